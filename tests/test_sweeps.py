"""Sweeps in a stranger's application: jobs keep apart, an interrupted sweep goes on, and what is told of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]

APP = """
import os, signal, sys, time
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

import hydra_ckpt


@hydra.main(version_base="1.3", config_path="conf", config_name="app")
@hydra_ckpt.resumable_job
def main(cfg):
    out = Path(HydraConfig.get().runtime.output_dir)
    torch.manual_seed(cfg.seed)
    if "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr)
    with instantiate(cfg.callbacks.checkpoint) as ckpt:
        start = ckpt.on_train_begin(hydra_ckpt.AppState(model, optimizer))
        begin = start.step if start else 0
        with open(os.environ["RUNS"], "a") as runs:
            runs.write(f"{out.name} {begin}\\n")
        if cfg.fail:
            raise RuntimeError("no such luck")
        for step in range(begin + 1, cfg.steps + 1):
            loss = (model(torch.ones(8, 4)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if os.environ.get("KILL") == f"{out.name} {step}":
                os.kill(os.getpid(), getattr(signal, os.environ["HOW"]))
            ckpt.on_step_end(step)
            if step % 2 == 0:
                ckpt.on_validation_end({"loss": cfg.lr + 1 / step})
            if ckpt.should_stop:
                return ckpt.best_metric
        ckpt.on_train_end()
        return ckpt.best_metric


main()
"""
CONF = {
    "defaults": [{"checkpoint": "default"}, {"callbacks": "hydra_ckpt"}, "_self_"],
    "lr": 0.1,
    "seed": 0,
    "steps": 6,
    "fail": False,
    "callbacks": {"checkpoint": {"every_n_steps": 2}},
}


class App:
    """The application in a directory of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.sweep = root, root / "sweep"
        (root / "conf").mkdir()
        (root / "app.py").write_text(APP)
        (root / "conf" / "app.yaml").write_text(yaml.safe_dump(CONF))

    def run(self, *arguments: str, kill: str = "", how: str = "SIGKILL") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "RUNS": str(self.root / "runs"), "KILL": kill, "HOW": how}
        environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "app.py", *arguments]
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=200, check=False
        )

    def sweep_over(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "hydra.sweep.dir=sweep", *arguments, **options)

    @property
    def runs(self) -> list[str]:
        """Job and first step of every time the function was called, since this was asked last."""
        path = self.root / "runs"
        found = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.sweep / "checkpoints_summary.json").read_text())

    @property
    def states(self) -> list[str]:
        return [job["state"] for job in self.summary["jobs"]]


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(tmp_path)


def test_a_sweep_killed_in_the_middle_goes_on_where_it_was(app: App) -> None:
    died = app.sweep_over("lr=0.3,0.1,0.2", kill="1 5")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert app.runs == ["0 0", "1 0"]
    assert app.states == ["finished", "running"]  # as it was written; who asks now is told better
    listed = _tool("list", app.sweep, "--json")
    assert [job["state"] for job in listed["jobs"]] == ["finished", "interrupted"]

    done = app.sweep_over("lr=0.3,0.1,0.2", "hydra/callbacks=hydra_ckpt_summary")
    assert done.returncode == 0, done.stderr
    assert app.runs == ["1 4", "2 0"]  # the first is not run, the second resumes, the third begins
    assert "the job is finished already" in (app.sweep / "0" / "app.log").read_text()
    summary = app.summary
    assert app.states == ["finished"] * 3
    assert [job["overrides"] for job in summary["jobs"]] == [["lr=0.3"], ["lr=0.1"], ["lr=0.2"]]
    assert [job["objective"] for job in summary["jobs"]] == pytest.approx([0.3 + 1 / 6, 0.1 + 1 / 6, 0.2 + 1 / 6])
    assert [job["last"]["step"] for job in summary["jobs"]] == [6, 6, 6]
    assert summary["jobs"][1]["metric"] == {"name": "loss", "mode": "min", "value": pytest.approx(0.1 + 1 / 6)}
    assert summary["best"]["job"] == "1"
    assert summary["jobs"][1]["last"]["exports"]["model"] == "1/checkpoints/epoch_0_step_6/model/consolidated"
    assert (app.sweep / "BEST").resolve() == app.sweep / "1" / "checkpoints" / "epoch_0_step_6"
    assert not (app.sweep / "BEST").readlink().is_absolute()
    for shown in ("lr=0.1", "finished", "loss 0.266667", "BEST"):
        assert shown in done.stdout
    assert _tool("list", app.sweep, "--json") == summary

    again = app.sweep_over("lr=0.3,0.1,0.2")
    assert (again.returncode, app.runs) == (0, [])


def test_ctrl_c_and_failures_are_recorded_and_run_again(app: App) -> None:
    stopped = app.sweep_over("fail=true,false", "lr=0.1,0.2", kill="3 3", how="SIGINT")
    assert stopped.returncode != 0
    assert app.runs == ["0 0", "1 0", "2 0", "3 0"]
    assert app.states == ["failed", "failed", "finished", "interrupted"]
    assert app.summary["jobs"][0]["error"] == "RuntimeError: no such luck"
    assert app.summary["jobs"][0]["last"] is None
    again = app.sweep_over("fail=true,false", "lr=0.1,0.2", "hydra/callbacks=hydra_ckpt_summary")
    assert again.returncode == 1
    assert app.runs == ["0 0", "1 0", "3 2"]
    assert app.states == ["failed", "failed", "finished", "finished"]
    assert "failed" in again.stdout  # although Hydra tells nobody of the end of such a sweep


def test_sigterm_ends_the_sweep_and_the_same_command_goes_on(app: App) -> None:
    stopped = app.sweep_over("lr=0.3,0.1", "callbacks.checkpoint.requeue_exit_code=85", kill="0 3", how="SIGTERM")
    assert (stopped.returncode, app.runs) == (85, ["0 0"])
    assert app.states == ["stopped"]
    assert app.summary["jobs"][0]["last"]["step"] == 3
    done = app.sweep_over("lr=0.3,0.1", "callbacks.checkpoint.requeue_exit_code=85")
    assert (done.returncode, app.runs) == (0, ["0 3", "1 0"])
    (app.sweep / "STOP").touch()
    held = app.sweep_over("lr=0.3,0.1,0.2", "callbacks.checkpoint.requeue_exit_code=85")
    assert (held.returncode, app.runs) == (0, [])
    assert "no further job begins" in (app.sweep / "0" / "app.log").read_text()


def test_a_job_of_another_configuration_is_refused_in_a_sweep_and_run_alone(app: App) -> None:
    assert app.sweep_over("lr=0.3,0.1", "steps=2").returncode == 0
    assert app.runs == ["0 0", "1 0"]
    shifted = app.sweep_over("lr=0.2,0.1", "steps=2")
    assert shifted.returncode == 1
    assert "0 belongs to a job with another configuration (lr: 0.3 -> 0.2)" in shifted.stderr
    assert app.runs == []
    # How a run is saved is no part of what it computes; a finished one is then looked at again.
    assert app.sweep_over("lr=0.3,0.1", "steps=2", "checkpoint=async").returncode == 0
    assert app.runs == ["0 2", "1 2"]
    one = ["hydra.run.dir=one", "steps=2"]
    assert app.run(*one).returncode == 0
    assert app.run(*one).returncode == 0
    assert app.run("hydra.run.dir=one", "steps=4").returncode == 0
    assert app.runs == ["one 0", "one 2"]
    assert "the configuration has changed since the last start: steps: 2 -> 4" in (app.root / "one/app.log").read_text()


@pytest.mark.parametrize("place", ["relative", "absolute"])
def test_jobs_never_share_a_directory(app: App, place: str) -> None:
    if place == "relative":
        assert app.sweep_over("lr=0.3,0.1", "checkpoint.checkpoint_dir=ckpt/mine").returncode == 0
        assert [(app.sweep / job / "ckpt/mine/LATEST").exists() for job in "01"] == [True, True]
        assert [job["last"]["path"] for job in app.summary["jobs"]] == [
            f"{job}/ckpt/mine/epoch_0_step_6" for job in "01"
        ]
        return
    done = app.sweep_over("lr=0.3,0.1", f"checkpoint.checkpoint_dir={app.root / 'shared'}")
    assert done.returncode == 1
    assert "belongs to the sweep job" in done.stderr
    assert app.runs == ["0 0"]
    assert app.states == ["finished", "failed"]


def test_all_ranks_of_torchrun_go_by_the_first_one(app: App) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "app.py"]
    environment = {**os.environ, "RUNS": str(app.root / "runs"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for expected in (["run 0", "run 0"], []):
        command = [*torchrun, "hydra.run.dir=run", "steps=2"]
        done = subprocess.run(
            command, cwd=app.root, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
        assert app.runs == expected


def _tool(*arguments: Any) -> Any:
    command = [sys.executable, "-m", "hydra_ckpt.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
