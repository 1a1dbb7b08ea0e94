"""torchrun on several hosts: when one host is lost, the others continue from the newest checkpoint."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from hydra_ckpt.store.catalog import scan
from hydra_ckpt.store.names import LATEST
from hydra_ckpt.testing.processes import PATIENCE
from tests.hosts.network import INTERFACE, Host, collect, hosts, needs_hosts

pytestmark = [needs_hosts, pytest.mark.slow]

STEPS = 24


def _torchrun(host: Host, root: Path, nodes: str, endpoint: Host) -> subprocess.Popen[str]:
    rendezvous = "join_timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    launcher = ["-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", "1", "--max-restarts", "3"]
    launcher += ["--rdzv-id", "job", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{endpoint.address}:29500"]
    launcher += ["--rdzv-conf", f"{rendezvous},is_host={int(host is endpoint)}", "--local-addr", host.address]
    recipe = ["-m", "hydra_ckpt.recipe", f"hydra.run.dir={root}", "run_name=elastic", f"trainer.max_steps={STEPS}"]
    recipe += [
        "checkpoint=async",
        "checkpoint.consolidation_timeout_minutes=0.2",
        "callbacks.checkpoint.every_n_steps=5",
    ]
    return host.start(
        [*launcher, *recipe],
        {"GLOO_SOCKET_IFNAME": INTERFACE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        own_processes=True,
    )


def _newest(root: Path) -> int:
    found = list(root.rglob(LATEST))
    latest = scan(found[0].parent).pointed(LATEST) if found else None
    return 0 if latest is None else latest.step


@pytest.mark.parametrize(
    ("names", "victim"),
    [(["alpha", "beta"], 0), (["alpha", "beta", "gamma"], 0), (["alpha", "beta", "gamma"], 1)],
    ids=["one of two", "rank 0 of three", "another of three"],
)
def test_a_host_is_lost_and_the_rest_continues(tmp_path: Path, names: list[str], victim: int) -> None:
    root = tmp_path / "run"
    with hosts(names) as made:
        endpoint = made[-1]  # the launcher's own store is on the host that stays
        nodes = f"{len(names) - 1}:{len(names)}"
        started = [_torchrun(host, root, nodes, endpoint) for host in made]
        deadline = time.monotonic() + 120 * PATIENCE
        while _newest(root) < 6:
            assert time.monotonic() < deadline, [process.poll() for process in started]
            time.sleep(0.1)
        lost = started.pop(victim)
        lost.kill()  # and with it all processes of that host
        lost.communicate()
        before = _newest(root)
        ended = collect(started, 240.0)
    assert [process.code for process in ended] == [0] * len(ended), ended[-1].err[-3000:]
    assert _newest(root) == STEPS > before
    (directory,) = {path.parent for path in root.rglob(LATEST)}
    last = scan(directory).pointed(LATEST)
    assert last is not None
    assert last.manifest.world_size == len(names) - 1
