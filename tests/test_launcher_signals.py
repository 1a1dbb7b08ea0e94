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
from textwrap import indent

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


@pytest.mark.parametrize("held", ["preparing", "between"])
def test_a_launcher_that_runs_one_job_at_a_time_obeys_a_signal_before_training(tmp_path: Path, held: str) -> None:
    """joblib runs the jobs in the launcher's own process if `n_jobs` is 1."""
    app = App(tmp_path / "app")
    hold = '    (Path.cwd() / "held").touch()\n    while not (Path.cwd() / "go").exists():\n        time.sleep(0.05)\n'
    text = (app.root / "app.py").read_text()
    if held == "preparing":
        text = text.replace("    torch.manual_seed(cfg.seed)\n", hold + "    torch.manual_seed(cfg.seed)\n")
    else:
        text = text.replace("        ckpt.on_train_end()\n", "        ckpt.on_train_end()\n" + indent(hold, "    "))
    (app.root / "app.py").write_text(text)
    command = [sys.executable, "app.py", "-m", "hydra.sweep.dir=sweep", "hydra/launcher=joblib"]
    command += ["hydra.launcher.n_jobs=1", "lr=0.1,0.2", "+callbacks.checkpoint.requeue_exit_code=85"]
    environment = {**os.environ, "RUNS": str(app.root / "runs"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=app.root, env=environment, start_new_session=True, **output)
    try:
        while not (app.root / "held").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        while not list(app.sweep.glob(".hydra_ckpt_halt_all.json")):  # the handler has run
            assert process.poll() is None
            time.sleep(0.05)
        (app.root / "go").touch()
        told, _ = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 85, told
    assert app.runs == ["0 0"]
    assert app.states == ["stopped" if held == "preparing" else "finished", "waiting"]
