"""docs/clusters.md on a real Slurm with two nodes on this machine: the commands work, and what it says happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hydra_ckpt.testing.processes import PATIENCE
from tests.sweep_app import App

REPOSITORY = Path(__file__).parents[2]
SUBMITIT = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=15", "hydra.launcher.max_num_timeout=2"]
WAIT_S = 240
RESUMED = r"loaded \S+/epoch_\d+_step_(\d+) "

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 * PATIENCE)]


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    """A running Slurm; its commands and this environment's are found."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started as root")
    started = subprocess.run([REPOSITORY / "scripts/slurm", "start"], capture_output=True, text=True, check=False)
    if started.returncode != 0:
        pytest.skip(f"no Slurm here: {started.stderr.strip()}")
    [config, path] = re.findall(r"=(\S+?)(?::\$PATH)?(?=\s)", started.stdout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", config)
        patch.setenv("PATH", f"{path}:{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
    subprocess.run([REPOSITORY / "scripts/slurm", "stop"], check=True)


def said(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60 * PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(what: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "it has not begun"
        time.sleep(0.5)


def restarts(job: str) -> int:
    return int(re.findall(r"Restarts=(\d+)", said("scontrol", "show", "job", job))[0])


@pytest.mark.parametrize("how", ["its signal", "the time limit"])
def test_submitit_puts_a_stopped_job_back_and_the_sweep_ends_when_all_are_finished(
    slurm: None, tmp_path: Path, how: str
) -> None:
    app = App(tmp_path / "app")
    if how == "its signal":
        done = app.sweep_over(*SUBMITIT, "lr=0.1,0.2", kill="0 3", how="SIGUSR2")
    else:
        limit = ["callbacks.checkpoint.max_run_time_s=8", "steps=24"]
        done = app.sweep_over(*SUBMITIT, *limit, "lr=0.1", STEP_S="0.2")
    assert done.returncode == 0, done.stderr
    assert set(app.states) == {"finished"}
    again = [run for run in app.runs if not run.endswith(" 0")]
    assert again
    assert "0 3" in again or how != "its signal"


def documented() -> str:
    """The script of the documentation, for this machine."""
    script = re.findall(r"```bash job.sh\n(.*?)```", (REPOSITORY / "docs/clusters.md").read_text(), re.DOTALL)[0]
    script = script.replace("#SBATCH --gpus-per-node=8\n", "").replace("--nproc-per-node 8", "--nproc-per-node 1")
    # The names of these two nodes lead nowhere.
    script = script.replace('$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', "127.0.0.1")
    return script.replace(
        "run_name=night", "run_name=night trainer.max_steps=100000 callbacks.checkpoint.every_n_steps=5"
    )


def resumed(log: Path) -> int:
    """How often a job has resumed."""
    return len(re.findall(RESUMED, log.read_text())) if log.exists() else 0


def resumed_at(log: Path) -> int:
    """The step from which a job has resumed last."""
    return int(re.findall(RESUMED, log.read_text())[-1])


def test_the_script_of_the_documentation_goes_on_after_signals_and_requeues(slurm: None, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(documented())
    job = said("sbatch", "--parsable", "job.sh", cwd=tmp_path).strip()
    run, log = tmp_path / "outputs/hydra_ckpt/night", tmp_path / f"slurm-{job}.out"
    try:
        wait_for((run / "checkpoints/LATEST").exists, log)
        said("scancel", "--signal=TERM", job)  # what Slurm does before the time limit
        wait_for(lambda: restarts(job) == 1 and resumed(log) == 1, log)
        assert "SIGTERM came: saving and stopping" in log.read_text()
        said("scontrol", "requeue", job)  # ends all processes
        wait_for(lambda: restarts(job) == 2 and resumed(log) == 2, log)
    finally:
        said("scancel", job)


def test_jobs_of_an_array_have_runs_of_their_own(slurm: None, tmp_path: Path) -> None:
    train = "python -m hydra_ckpt.recipe run_name=array_$SLURM_ARRAY_TASK_ID trainer.max_steps=2"
    said("sbatch", "--wait", "--array=0-1", "--wrap", train, cwd=tmp_path)
    for task in "01":
        assert (tmp_path / f"outputs/hydra_ckpt/array_{task}/checkpoints/epoch_0_step_2/manifest.json").exists()


# -- real time limits: Slurm counts in minutes, and looks every half a minute -----------------------------------------


def test_a_job_requeues_itself_at_the_signal_before_its_real_time_limit(slurm: None, tmp_path: Path) -> None:
    script = documented().replace("--time=04:00:00", "--time=2").replace("TERM@300", "TERM@45")
    script = re.sub(r" callbacks\.checkpoint\.max_run_time_s=\d+", "", script)  # Slurm's signal alone stops it
    (tmp_path / "job.sh").write_text(script)
    job = said("sbatch", "--parsable", "job.sh", cwd=tmp_path).strip()
    log = tmp_path / f"slurm-{job}.out"
    try:
        wait_for(lambda: restarts(job) == 1 and resumed(log) == 1, log)
        told = log.read_text()
        assert "SIGTERM came: saving and stopping" in told
        assert "DUE TO TIME LIMIT" not in told
        assert resumed_at(log) > 0
    finally:
        said("scancel", job)


def test_a_job_that_its_time_limit_kills_goes_on_from_its_newest_checkpoint(slurm: None, tmp_path: Path) -> None:
    script = documented().replace("--time=04:00:00", "--time=1").replace("#SBATCH --signal=TERM@300\n", "")
    script = re.sub(r" callbacks\.checkpoint\.max_run_time_s=\d+", " callbacks.checkpoint.signals=null", script)
    (tmp_path / "job.sh").write_text(script)
    job = said("sbatch", "--parsable", "job.sh", cwd=tmp_path).strip()
    log = tmp_path / f"slurm-{job}.out"
    wait_for(lambda: "JobState=TIMEOUT" in said("scontrol", "show", "job", job), log)
    assert "SIGTERM came" not in log.read_text()
    again = said("sbatch", "--parsable", "job.sh", cwd=tmp_path).strip()
    log = tmp_path / f"slurm-{again}.out"
    try:
        wait_for(lambda: resumed(log) == 1, log)
        assert resumed_at(log) > 0
    finally:
        said("scancel", again)


@pytest.mark.parametrize("timeouts", [3, 0])
def test_submitit_obeys_its_own_time_limit_as_often_as_it_may(slurm: None, tmp_path: Path, timeouts: int) -> None:
    app = App(tmp_path / "app")
    limits = ["timeout_min=2", f"max_num_timeout={timeouts}", "signal_delay_s=60"]
    submitit = ["hydra/launcher=submitit_slurm", *(f"hydra.launcher.{limit}" for limit in limits)]
    done = app.sweep_over(*submitit, "lr=0.1", "steps=24", "callbacks.checkpoint.requeue_exit_code=85", STEP_S="2")
    logs = "".join(path.read_text() for path in app.sweep.glob(".submitit/*/*_log.*"))
    assert "SIGUSR2 came: saving and stopping" in logs
    if timeouts:
        assert done.returncode == 0, done.stderr + logs
        assert app.states == ["finished"]
        first, *others = (int(run.split()[1]) for run in app.runs)
        assert first == 0
        assert others
        assert min(others) > 0
    else:
        assert done.returncode == 85, done.stderr + logs
        assert app.states == ["stopped"]
        assert "Job not requeued because: timed-out too many times" in logs
