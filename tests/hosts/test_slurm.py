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

from tests.sweep_app import App

REPOSITORY = Path(__file__).parents[2]
SUBMITIT = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=15", "hydra.launcher.max_num_timeout=2"]
WAIT_S = 240

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


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
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
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


def test_the_script_of_the_documentation_continues_after_signals_and_requeues(slurm: None, tmp_path: Path) -> None:
    script = re.findall(r"```bash job.sh\n(.*?)```", (REPOSITORY / "docs/clusters.md").read_text(), re.DOTALL)[0]
    script = script.replace("#SBATCH --gpus-per-node=8\n", "").replace("--nproc-per-node 8", "--nproc-per-node 1")
    # The names of these two nodes lead nowhere.
    script = script.replace('$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', "127.0.0.1")
    script = script.replace(
        "run_name=night", "run_name=night trainer.max_steps=100000 callbacks.checkpoint.every_n_steps=5"
    )
    (tmp_path / "job.sh").write_text(script)
    job = said("sbatch", "--parsable", "job.sh", cwd=tmp_path).strip()
    run, log = tmp_path / "outputs/hydra_ckpt/night", tmp_path / f"slurm-{job}.out"

    def resumed() -> int:
        return len(re.findall(r"loaded \S+/epoch_\d+_step_\d+ ", log.read_text())) if log.exists() else 0

    try:
        wait_for((run / "checkpoints/LATEST").exists, log)
        said("scancel", "--signal=TERM", job)  # what Slurm does before the time limit
        wait_for(lambda: restarts(job) == 1 and resumed() == 1, log)
        assert "SIGTERM came: saving and stopping" in log.read_text()
        said("scontrol", "requeue", job)  # ends all processes
        wait_for(lambda: restarts(job) == 2 and resumed() == 2, log)
    finally:
        said("scancel", job)


def test_jobs_of_an_array_have_runs_of_their_own(slurm: None, tmp_path: Path) -> None:
    train = "python -m hydra_ckpt.recipe run_name=array_$SLURM_ARRAY_TASK_ID trainer.max_steps=2"
    said("sbatch", "--wait", "--array=0-1", "--wrap", train, cwd=tmp_path)
    for task in "01":
        assert (tmp_path / f"outputs/hydra_ckpt/array_{task}/checkpoints/epoch_0_step_2/manifest.json").exists()
