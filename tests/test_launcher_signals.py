"""Signals to a whole group of processes: idle workers survive, and a stopped trial does not fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest

from tests.sweep_app import REPOSITORY, App

JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]


@contextmanager
def group_of(app: App, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A sweep in a process group of its own, once a job trains."""
    environment = {**os.environ, "RUNS": str(app.root / "runs"), "PYTHONPATH": str(REPOSITORY), "STEP_S": "0.5"}
    command = [sys.executable, "app.py", "-m", "hydra.sweep.dir=sweep", "steps=99", *arguments]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=app.root, env=environment, start_new_session=True, **output)
    try:
        while not list(app.sweep.glob("*/checkpoints/epoch_*")):
            assert process.poll() is None
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("resumable", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_signal_to_the_group_reaches_idle_workers_and_the_running_jobs_save(tmp_path: Path, resumable: bool) -> None:
    app = App(tmp_path / "app", resumable=resumable)
    with group_of(app, *JOBLIB, "lr=0.1", "callbacks.checkpoint.every_n_steps=2") as process:
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert b"TerminatedWorkerError" not in output
    if resumable:
        assert app.states == ["stopped"]
    [log] = app.sweep.glob("0/app.log")
    assert "SIGTERM came: saving and stopping" in log.read_text()


@pytest.mark.parametrize("launcher", [[], pytest.param(JOBLIB, marks=pytest.mark.slow)], ids=["basic", "joblib"])
def test_a_stopped_trial_has_not_failed_though_nobody_reads_stderr(tmp_path: Path, launcher: list[str]) -> None:
    app = App(tmp_path / "app")
    storage = f"sqlite:///{app.root}/study.db"
    study = [f"hydra.sweeper.storage={storage}", "hydra.sweeper.study_name=s", "hydra.sweeper.n_trials=2"]
    arguments = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", *study, "lr=interval(0.1,0.2)", *launcher]
    with group_of(app, *arguments) as process:
        assert process.stdout is not None
        process.stdout.close()  # as if `tee` had got the signal, too
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=100)
    assert app.states == ["stopped"]
    assert [trial.state.name for trial in optuna.load_study(study_name="s", storage=storage).trials] == ["RUNNING"]
