"""One launch is one run: its ranks, restarts and jobs share directories, under any launcher."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hydra_ckpt.errors import TopologyError
from hydra_ckpt.jobs import launch
from hydra_ckpt.testing.processes import PATIENCE
from tests.programs import Program

REPOSITORY = Path(__file__).resolve().parents[1]

# A stranger's application. In its first attempt rank 1 dies at a step that is not saved.
APP = """
import logging
import os
import signal

import hydra
import torch
import torch.distributed as dist
from hydra.utils import instantiate

from hydra_ckpt import AppState, init_process_group

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(cfg):
    init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    with instantiate(cfg.callbacks.checkpoint) as ckpt:
        start = ckpt.on_train_begin(AppState(model, optimizer))
        begun = start.step if start else 0
        log.info("begins at step %d", begun)
        for step in range(begun + 1, 7):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            ckpt.on_step_end(step)
            doomed = cfg.dies and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1
            if doomed and step == 5:
                ckpt.checkpointer.wait()
                log.warning("dies now")
                os.kill(os.getpid(), signal.SIGKILL)
        ckpt.on_train_end()


main()
"""
CONFIG = """
defaults:
  - checkpoint: default
  - callbacks: hydra_ckpt
  - _self_
lr: 0.1
dies: false
callbacks:
  checkpoint:
    every_n_steps: 2
"""
ONE_RUN = ("hydra/output=hydra_ckpt", "hydra/job_logging=hydra_ckpt")


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "app.py").write_text(APP)
    return tmp_path / "app.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher(kind: str) -> list[str]:
    """The beginning of a command that starts two ranks and restarts them once."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    restarts = ["--monitor-interval=0.1"]
    return {
        "standalone": [*torchrun, *restarts, "--standalone"],
        "static": [*torchrun, *restarts, "--master-addr=127.0.0.1", f"--master-port={free_port()}"],
        "c10d": [*torchrun, *restarts, "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"],
        "accelerate": [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"),
            *("--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
            *("--max_restarts=1", "--monitor_interval=0.1", f"--main_process_port={free_port()}"),
        ],
    }[kind]


def start(command: list[str], cwd: Path) -> Program:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    return Program(command, cwd=cwd, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finished(process: Program) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


def below(directory: Path) -> set[str]:
    """The content of a directory, without checkpoints' own content."""
    return {path.name for path in directory.iterdir()}


def slow(kind: str) -> Any:
    return pytest.param(kind, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["standalone", slow("static"), slow("c10d"), slow("accelerate")])
def test_a_restart_continues_in_the_one_run_directory(app: Path, kind: str) -> None:
    output = finished(start([*launcher(kind), str(app), *ONE_RUN, "dies=true"], app.parent))
    [run] = app.parent.glob("outputs/*/*")
    assert below(run) == {".hydra", "app.log", "app.rank1.log", "checkpoints"}
    assert below(run / ".hydra") == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    log = (run / "app.log").read_text()
    assert [line[-1] for line in log.splitlines() if "begins at step" in line] == ["0", "4"]
    assert "dies now" in (run / "app.rank1.log").read_text()
    assert "begins at step" not in (run / "app.rank1.log").read_text()
    assert output.count("begins at step") == 2, "one line for each attempt, not for each rank"
    assert (run / "checkpoints" / "LATEST").resolve().name == "epoch_0_step_6"


@pytest.mark.parametrize("kind", [slow("static"), slow("standalone"), slow("c10d"), slow("accelerate")])
def test_a_restart_of_a_sweep_continues_in_the_one_sweep_directory(app: Path, kind: str) -> None:
    finished(start([*launcher(kind), str(app), "-m", *ONE_RUN, "lr=0.1,0.2", "dies=true"], app.parent))
    [sweep] = app.parent.glob("multirun/*/*")
    assert below(sweep) == {"0", "1", "multirun.yaml"}
    logs = [(sweep / job / "app.log").read_text().splitlines() for job in "01"]
    # The first job's ranks died, so the second had not begun when all were restarted.
    assert [[line[-1] for line in log if "begins" in line] for log in logs] == [["0", "4"], ["0"]]
    for job in "01":
        assert below(sweep / job / ".hydra") == {"config.yaml", "hydra.yaml", "overrides.yaml"}
        assert (sweep / job / "checkpoints" / "LATEST").resolve().name == "epoch_0_step_6"


def test_without_a_launcher_the_options_change_nothing_one_sees(app: Path) -> None:
    (app.parent / "plain.py").write_text(
        "import hydra, logging\n"
        "@hydra.main(version_base='1.3', config_path='.', config_name='config')\n"
        "def main(cfg): logging.getLogger('plain').info('hello')\n"
        "main()\n"
    )
    output = finished(start([sys.executable, "plain.py", *ONE_RUN], app.parent))
    [run] = app.parent.glob("outputs/*/*")
    assert below(run) == {".hydra", "plain.log"}
    assert "][plain][INFO] - hello" in output


# --- our own application


def ranks_of(agent: Program) -> Iterator[tuple[int, psutil.Process]]:
    """Rank and process of what an agent has started."""
    for child in psutil.Process(agent.pid).children(recursive=True):
        try:
            rank = child.environ().get("RANK")
        except psutil.Error:
            continue
        if rank is not None:
            yield int(rank), child


def test_our_application_survives_the_loss_of_a_rank_without_help(tmp_path: Path) -> None:
    small = ["model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2", "data.seq_len=32"]
    short = ["data.max_bytes=20000", "trainer.max_steps=100", "trainer.validate_every=0", "model.num_attention_heads=4"]
    saves = ["callbacks.checkpoint.every_n_steps=10", "checkpoint.retention={newest:3}"]
    agent = start([*launcher("standalone"), "-m", "hydra_ckpt.recipe", *small, *short, *saves], tmp_path)
    deadline = time.monotonic() + 100 * PATIENCE
    while not list(tmp_path.glob("outputs/hydra_ckpt/*/*/checkpoints/LATEST")):
        assert agent.poll() is None, agent.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)
    next(child for rank, child in ranks_of(agent) if rank == 1).send_signal(signal.SIGKILL)
    output = finished(agent)
    [run] = tmp_path.glob("outputs/hydra_ckpt/*/*")
    assert {".hydra", "checkpoints", "hydra_ckpt_train.log"} <= below(run)
    assert (run / "checkpoints" / "LATEST").resolve().name.endswith("_step_100")
    [loaded] = re.findall(r"loaded \S+ \(step (\d+)\)", output)
    assert int(loaded) >= 5


# --- what the ranks agree on


def test_the_launch_time_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_CKPT_LAUNCH_TIME", "2024-05-06T07:08:09")
    launch._launched_at.cache_clear()
    assert launch._run_directory(None) == "2024-05-06/07-08-09"
    assert launch._run_directory("mine") == "mine"
    launch._launched_at.cache_clear()


def test_ranks_that_cannot_agree_on_a_time_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("HYDRA_CKPT_LAUNCH_TIME", raising=False)
    launch._launched_at.cache_clear()
    with pytest.raises(TopologyError, match="run_name"):
        launch._run_directory(None)


RANK = """
import sys
import torch
import torch.distributed as dist
from hydra_ckpt.jobs.launch import attempt, first_rank_says
from hydra_ckpt.jobs.process_group import init_process_group

said = first_rank_says("word", lambda: sys.argv[1])
init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print(attempt(), said, int(total))
"""


def test_ranks_whose_agents_count_restarts_differently_meet_after_each_restart() -> None:
    """As agents do that lose a host: one has seen its rank fail, the other only that a host is missing."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    seen = []
    for word, counts in (("one", "00"), ("two", "01"), ("three", "12")):
        each = [{"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": counts[rank]} for rank in range(2)]
        ranks = [
            Program(
                [sys.executable, "-c", RANK, word],
                env={**os.environ, **common, **own, "TORCHELASTIC_USE_AGENT_STORE": "True"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for own in each
        ]
        said = [rank.communicate(timeout=200)[0].split() for rank in ranks]
        assert said[0] == said[1]
        assert said[0][1:] == [word, "2"]
        seen.append(said[0][0])
    assert len(set(seen)) == 3
