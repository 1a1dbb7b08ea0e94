"""The network between two hosts drops every packet in the middle of a save, and works again later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hydra_ckpt.store.catalog import scan
from tests.hosts.network import hosts, needs_hosts, run_ranks
from tests.pausing import PHASES

pytestmark = needs_hosts

LIMIT_S = 4.0
# Rank 0 cuts the last host off where the phase begins; when that has given up, packets pass again.
PROGRAM = """
import json, os, subprocess, sys, threading, time
from pathlib import Path
import torch.distributed as dist
os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=size)
from tests.pausing import Meddling, attempt, build, config_of, make_state, outcome_of

root, phase, sides, victim, is_async = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5] == "async"
RULES = {"in": ["INPUT", "-s"], "out": ["OUTPUT", "-d"]}

def change(action):
    for side in sides.split("+"):
        subprocess.run(["iptables", action, *RULES[side], victim, "-j", "DROP"], check=True)

def wait_for(name):
    while not (root / name).exists():
        time.sleep(0.05)

def heal():
    wait_for("given up")
    change("-D")
    (root / "healed").touch()

def cut_off():
    change("-A")
    threading.Thread(target=heal, daemon=True).start()

files, state = Meddling(cut_off), make_state()
config = config_of(root, limit_s=float(sys.argv[6]), is_async=is_async, max_recent_checkpoints=1)
engine = build(config, files)
engine.save(state, step=1).result()
dist.barrier()
files.phase = phase if rank == 0 else None
begun = time.monotonic()
attempt(lambda: engine.save(state, step=2))
engine.pending.wait()
found = {"first": outcome_of(engine.pending), "waited_s": time.monotonic() - begun, "step": 2}
second = engine.pending
if rank == size - 1:
    (root / "given up").touch()
wait_for("healed")
# TCP waits longer and longer before it sends again, so the first saves may still run into the limit.
found["then"] = [attempt(lambda: engine.save(state, step=step).result()) for step in (3, 4, 5)]
found["settled"] = outcome_of(second)
engine.close()
print(json.dumps(found), flush=True)
os._exit(0)
"""


def _partition(root: Path, phase: str, sides: str, kind: str, count: int = 2) -> list[dict[str, Any]]:
    root.mkdir(exist_ok=True)
    with hosts([f"host{number}" for number in range(count)]) as made:
        ended = run_ranks(made, PROGRAM, str(root), phase, sides, made[-1].address, kind, str(LIMIT_S))
    assert [rank.code for rank in ended] == [0] * count, "\n".join(rank.err for rank in ended)
    return [json.loads(rank.out) for rank in ended]


def _check(found: list[dict[str, Any]], root: Path) -> None:
    outcomes = {rank["first"] for rank in found}
    assert outcomes < {"published", "failed", "unknown"}
    assert not {"published", "failed"} <= outcomes
    # Each of the two waits of a save has its limit; what remains is work.
    assert all(rank["waited_s"] < 2 * LIMIT_S + 5 for rank in found)
    assert {rank["settled"] for rank in found} == {found[0]["first"]}
    assert {rank["then"][-1] for rank in found} == {"done"}
    assert scan(root).checkpoints[-1].step == 5


SHORT = ("writing the manifest",)


@pytest.mark.parametrize(
    "phase", [pytest.param(phase, marks=[] if phase in SHORT else [pytest.mark.slow]) for phase in PHASES]
)
def test_packets_are_dropped_in_each_phase_of_a_save(tmp_path: Path, phase: str) -> None:
    found = _partition(tmp_path / "run", phase, "in+out", "async")
    _check(found, tmp_path / "run")
    if phase == "making the draft":  # the last host has handed in nothing
        assert found[1]["first"] == "failed"
    if phase == "writing the manifest":  # rank 0 continues, and the last host sees what it has published
        assert [rank["first"] for rank in found] == ["published", "published"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("sides", ["in", "out"])
@pytest.mark.parametrize("phase", ["making the draft", "writing its part", "writing the manifest", "having published"])
def test_packets_are_dropped_in_one_direction(tmp_path: Path, phase: str, sides: str, kind: str) -> None:
    _check(_partition(tmp_path / "run", phase, sides, kind), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["writing its part", "writing the manifest"])
def test_one_of_three_hosts_is_cut_off(tmp_path: Path, phase: str) -> None:
    found = _partition(tmp_path / "run", phase, "in+out", "async", count=3)
    _check(found, tmp_path / "run")
    assert found[0]["first"] == found[1]["first"] != "unknown"
