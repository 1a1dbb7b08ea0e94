"""Sweeps in a third-party application: jobs do not mix, an interrupted sweep continues, and its summary is right."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_ckpt.sweeps.record import RECORD, JobRecord, read_record
from hydra_ckpt.sweeps.summary import SUMMARY, write_summary
from hydra_ckpt.testing.processes import PATIENCE
from tests.programs import Program, run
from tests.sweep_app import App

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(tmp_path)


def test_a_sweep_killed_in_the_middle_continues_where_it_was(app: App) -> None:
    died = app.sweep_over("lr=0.3,0.1,0.2", kill="1 5")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert app.runs == ["0 0", "1 0"]
    assert app.states == ["finished", "running", "waiting"]  # as it was written; who asks now is told better
    listed = _tool("list", app.sweep, "--json")
    assert [job["state"] for job in listed["jobs"]] == ["finished", "interrupted", "waiting"]

    done = app.sweep_over("lr=0.3,0.1,0.2", "hydra/callbacks=hydra_ckpt_summary")
    assert done.returncode == 0, done.stderr
    assert app.runs == ["1 4", "2 0"]  # the first is not run, the second resumes, the third begins
    assert "the job has already finished" in (app.sweep / "0" / "app.log").read_text()
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


def test_the_best_value_of_a_step_that_was_not_saved_is_in_the_record_also_after_a_resume(app: App) -> None:
    options = ("lr=0.3", "checkpoint.best_metric_mode=max", "callbacks.checkpoint.every_n_steps=4")
    assert app.sweep_over(*options, kill="0 5").returncode == -signal.SIGKILL
    assert app.sweep_over(*options).returncode == 0
    (job,) = app.summary["jobs"]
    assert job["best_so_far"] == {"metric": "loss", "mode": "max", "value": pytest.approx(0.3 + 1 / 2)}
    assert job["metric"]["value"] <= 0.3 + 1 / 4  # the best of the steps that were saved


def test_jobs_in_directories_below_each_other_are_all_in_the_summary(app: App) -> None:
    values = ["sets", "sets/small", "/mnt/data/corpora/en/web/2024", "sets/.hidden/epoch_1_step_2"]
    command = ["hydra.sweep.subdir=${hydra.job.override_dirname}", f"+data={','.join(values)}"]
    done = app.sweep_over(*command)
    assert done.returncode == 0, done.stderr
    assert len(app.runs) == len(values)
    jobs = {f"+data={value}" for value in values}
    assert {job["job"] for job in app.summary["jobs"]} == jobs
    assert app.states == ["finished"] * len(values)
    (app.sweep / SUMMARY).unlink()
    (app.sweep / "+data=sets/notes/deep/er").mkdir(parents=True)
    assert {job["job"] for job in _tool("list", app.sweep, "--json")["jobs"]} == jobs
    assert app.sweep_over(*command).returncode == 0
    assert app.runs == []


def ends_by(app: App, statement: str, *, before_the_end: bool = False) -> None:
    """Change the application: how its function ends."""
    program, end = app.root / "app.py", "        ckpt.on_train_end()\n"
    told = f"        {statement}\n"
    program.write_text(program.read_text().replace(end, told + end if before_the_end else end + told))


@pytest.mark.parametrize("statement", ["sys.exit(0)", pytest.param("return torch.ones(2)", marks=pytest.mark.slow)])
def test_a_job_that_ends_well_without_a_result_is_done(app: App, statement: str) -> None:
    ends_by(app, statement)
    done = app.sweep_over("lr=0.3,0.1")
    assert (done.returncode, app.runs, app.states) == (0, ["0 0", "1 0"], ["finished"] * 2), done.stderr
    assert [job["objective"] for job in app.summary["jobs"]] == [None, None]
    again = app.sweep_over("lr=0.3,0.1")
    assert (again.returncode, app.runs, app.states) == (0, [], ["finished"] * 2), again.stderr
    log = (app.sweep / "0" / "app.log").read_text()
    assert "the job has already finished without a result that could be recorded" in log


@pytest.mark.parametrize(
    ("code", "state"), [(0, "interrupted"), pytest.param(3, "failed", marks=pytest.mark.slow)], ids=["0", "3"]
)
def test_a_job_that_exits_in_the_middle_of_training_runs_again(app: App, code: int, state: str) -> None:
    ends_by(app, f"sys.exit({code})", before_the_end=True)
    ended = app.sweep_over("lr=0.3,0.1")
    assert (ended.returncode, app.runs, app.states) == (code, ["0 0"], [state, "waiting"]), ended.stderr
    assert app.sweep_over("lr=0.3,0.1").returncode == code
    assert app.runs == ["0 6"]


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 3])
def test_an_exit_under_a_parallel_launcher_ends_no_other_job(app: App, code: int) -> None:
    ends_by(app, f"sys.exit({code}) if cfg.lr == 0.3 else None", before_the_end=code == 3)
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "lr=0.3,0.1"]
    ended = app.sweep_over(*joblib)
    assert ended.returncode == (1 if code else 0), ended.stderr
    assert app.states == ["failed" if code else "finished", "finished"]
    assert ("job 0 ended by sys.exit(3) before it was done" in ended.stderr) is bool(code)


@pytest.mark.slow
def test_a_sweep_killed_again_and_again_ends_as_if_it_had_not_been(app: App) -> None:
    for kill in ("0 1", "0 6", "1 1", "1 2", "2 6"):
        assert app.sweep_over("lr=0.3,0.1,0.2", kill=kill).returncode == -signal.SIGKILL
    assert app.sweep_over("lr=0.3,0.1,0.2").returncode == 0
    assert app.runs == ["0 0", "0 0", "0 4", "1 0", "1 0", "1 0", "2 0", "2 4"]
    assert [job["objective"] for job in app.summary["jobs"]] == pytest.approx([0.3 + 1 / 6, 0.1 + 1 / 6, 0.2 + 1 / 6])


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


def test_sigterm_ends_the_sweep_and_the_same_command_continues(app: App) -> None:
    stopped = app.sweep_over("lr=0.3,0.1", "callbacks.checkpoint.requeue_exit_code=85", kill="0 3", how="SIGTERM")
    assert (stopped.returncode, app.runs) == (85, ["0 0"])
    assert app.states == ["stopped", "waiting"]
    assert app.summary["jobs"][0]["last"]["step"] == 3
    done = app.sweep_over("lr=0.3,0.1", "callbacks.checkpoint.requeue_exit_code=85")
    assert (done.returncode, app.runs) == (0, ["0 3", "1 0"])
    (app.sweep / "STOP").touch()
    held = app.sweep_over("lr=0.3,0.1,0.2", "callbacks.checkpoint.requeue_exit_code=85")
    assert (held.returncode, app.runs) == (0, [])
    assert "no more jobs start" in (app.sweep / "0" / "app.log").read_text()


@pytest.mark.slow
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
    log = (app.root / "one/app.log").read_text()
    assert log.count("steps: 2 -> 4") == 1, log


@pytest.mark.parametrize("place", [pytest.param("relative", marks=pytest.mark.slow), "absolute"])
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


@pytest.mark.slow
def test_all_ranks_of_torchrun_go_by_the_first_one(app: App) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "app.py"]
    environment = {**os.environ, "RUNS": str(app.root / "runs"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for expected in (["run 0", "run 0"], []):
        command = [*torchrun, "hydra.run.dir=run", "steps=2"]
        done = subprocess.run(
            command, cwd=app.root, env=environment, capture_output=True, text=True, timeout=200 * PATIENCE, check=False
        )
        assert done.returncode == 0, done.stderr
        assert app.runs == expected


def _tool(*arguments: Any) -> Any:
    command = [sys.executable, "-m", "hydra_ckpt.cli", *map(str, arguments)]
    done = run(command, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# -- started where it runs -----------------------------------------------------------------------------------------

# A start waits 30 s for the process that holds the directory; here it waits one.
IMPATIENT = """
from hydra_ckpt.store.lease import Times
defaults = list(Times.__init__.__defaults__)
defaults[2] = 1.0
Times.__init__.__defaults__ = tuple(defaults)
"""


@contextmanager
def running(app: App, *arguments: str) -> Iterator[Program]:
    """The application as a program of its own, in the middle of training."""
    environment = {**os.environ, "RUNS": str(app.root / "runs"), "PYTHONPATH": str(REPOSITORY), "STEP_S": "1"}
    command = [sys.executable, "app.py", *arguments]
    null = subprocess.DEVNULL
    with Program(command, cwd=app.root, env=environment, stdout=null, stderr=null) as process:
        try:
            while not (app.root / "runs").exists():
                assert process.poll() is None
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


def _record_of(directory: Path) -> tuple[str, bool, str | None]:
    found = read_record(directory)
    assert found is not None
    return found.state_now(directory), found.ended is not None, found.error


def test_a_start_that_is_refused_leaves_the_record_of_the_live_job_alone(app: App) -> None:
    program = app.root / "app.py"
    program.write_text(program.read_text().replace("import hydra_ckpt\n", f"import hydra_ckpt\n{IMPATIENT}", 1))
    command, run = ["hydra.run.dir=run", "steps=90"], app.root / "run"
    with running(app, *command):
        refused = app.run(*command)
        assert refused.returncode == 1
        assert "is being written by another run" in refused.stderr
        assert _record_of(run) == ("running", False, None)
        shutil.copytree(run, app.root / "copy", symlinks=True)
        assert _record_of(app.root / "copy")[0] == "interrupted"
        assert _record_of(run)[0] == "running"
    assert _record_of(run) == ("interrupted", False, None)
    for name in ("run", "copy"):
        assert app.run(f"hydra.run.dir={name}", "steps=90").returncode == 0
        assert _record_of(app.root / name) == ("finished", True, None)


@pytest.mark.slow
def test_a_start_that_is_refused_leaves_no_record_without_resumable_job_either(tmp_path: Path) -> None:
    app = App(tmp_path / "app", resumable=False)
    program = app.root / "app.py"
    program.write_text(program.read_text().replace("import hydra_ckpt\n", f"import hydra_ckpt\n{IMPATIENT}", 1))
    command = ["-m", "hydra.sweep.dir=sweep", "hydra/callbacks=hydra_ckpt_summary", "lr=0.3", "steps=90"]
    with running(app, *command):
        refused = app.run(*command)
        assert refused.returncode == 1
        assert "is being written by another run" in refused.stderr
        assert app.states == ["running"]


# -- many jobs in one process, and other people's sweepers ---------------------------------------------------------

PROBE = """
import gc, json, os, threading

import psutil
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from hydra.experimental.callback import Callback


class Probe(Callback):
    def on_job_end(self, config, **_):
        gc.collect()
        process = psutil.Process()
        with open(os.environ["PROBE"], "a") as file:
            file.write(json.dumps({
                "threads": sorted(thread.name for thread in threading.enumerate()),
                "files": process.num_fds(),
                "connections": len(process.net_connections()),
                "memory": process.memory_info().rss,
                "groups": len(dist.distributed_c10d._world.pg_map),
                "singletons": bool(AcceleratorState._shared_state or PartialState._shared_state),
                "children": len(process.children()),
            }) + "\\n")
"""
TINY = [
    f"data.path={REPOSITORY / 'hydra_ckpt'}",
    "data.max_bytes=60000",
    "data.seq_len=16",
    "trainer.batch_size=2",
    "trainer.max_steps=3",
    "trainer.validate_every=3",
    "trainer.validate_batches=1",
    "callbacks.checkpoint.every_n_steps=2",
    "checkpoint=async",
]


@pytest.mark.slow
@pytest.mark.timeout(900 * PATIENCE)
def test_32_jobs_in_one_process_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "PROBE": str(tmp_path / "probe")}
    seeds = f"seed={','.join(map(str, range(32)))}"
    command = [
        sys.executable,
        "-m",
        "hydra_ckpt.recipe",
        "-m",
        "run_name=many",
        "+hydra.callbacks.probe._target_=probe.Probe",
    ]
    done = subprocess.run(
        [*command, *TINY, seeds],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=880 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "probe").read_text().splitlines()]
    assert len(found) == 32
    print(*(f"{item['memory'] >> 20} MiB, {item['files']} files" for item in found), sep="\n")
    for key in ("threads", "files", "connections", "groups", "singletons", "children"):
        assert all(item[key] == found[1][key] for item in found[1:]), [item[key] for item in found]
    assert not found[-1]["singletons"]
    # The first jobs fill allocators and caches.
    assert found[-1]["memory"] - found[7]["memory"] < 24 << 20
    summary = json.loads((tmp_path / "multirun/hydra_ckpt/many/checkpoints_summary.json").read_text())
    assert [job["state"] for job in summary["jobs"]] == ["finished"] * 32


# -- the command that continues --------------------------------------------------------------------------------------


def test_show_prints_the_command_that_continues_it_and_it_does(app: App) -> None:
    place = "kept/it's = odd, $HOME"
    hydra = place.replace("'", "\\'")
    died = app.run(f"hydra.run.dir='{hydra}'", "+note='a b, \"c\"'", "lr=0.25", kill=f"{Path(place).name} 5")
    assert died.returncode == -signal.SIGKILL, died.stderr
    job = app.root / place
    tool = [sys.executable, "-m", "hydra_ckpt.cli", "show"]
    shown = run([*tool, job, "--command"], cwd=REPOSITORY)
    assert shown.returncode == 0, shown.stderr
    environment = {**os.environ, "RUNS": str(app.root / "runs_again"), "PYTHONPATH": str(REPOSITORY)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    again = subprocess.run(
        ["bash", "-c", shown.stdout],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=100 * PATIENCE,
        check=False,
    )
    assert again.returncode == 0, shown.stdout + again.stderr
    assert (app.root / "runs_again").read_text() == f"{Path(place).name} 4\n"
    assert json.loads((job / "hydra_ckpt_job.json").read_text())["state"] == "finished"
    data = _tool("show", job, "--json")
    assert data["overrides"] == ["+note='a b, \"c\"'", "lr=0.25"]
    assert (data["step"], data["pointers"], data["problem"]) == (6, ["BEST", "LATEST"], None)
    assert data["details"]["optimizers"] == ["SGD"]
    assert data["changed"] == []
    assert data["parts"].keys() == {"model"}
    assert sum(data["files"].values()) == data["bytes"]


def _job_ended(sweep: Path, name: str, **known: Any) -> None:
    (sweep / name).mkdir(parents=True)
    replace(JobRecord.begin((), {}).end("failed"), **known).write(sweep / name)


def test_an_error_that_cannot_be_encoded_does_not_keep_a_summary_from_being_written(tmp_path: Path) -> None:
    _job_ended(tmp_path, "0", error="RuntimeError: cannot read /data/\udcff.bin")
    summary = write_summary(tmp_path)
    assert json.loads((tmp_path / SUMMARY).read_text()) == summary
    assert summary["jobs"][0]["error"].endswith("\udcff.bin")


@pytest.mark.parametrize("place", ["x" * 300, "a/" * 3000, "a\0b", "a\ud800b"])
def test_a_job_whose_checkpoints_cannot_be_looked_for_is_shown_without_any(tmp_path: Path, place: str) -> None:
    _job_ended(tmp_path, "0", checkpoint_dir=place)
    _job_ended(tmp_path, "1")
    (tmp_path / "elsewhere").symlink_to("x" * 300)
    jobs = write_summary(tmp_path)["jobs"]
    assert [(job["job"], job["checkpoints"], job["last"]) for job in jobs] == [("0", 0, None), ("1", 0, None)]
    assert [job["job"] for job in _tool("list", tmp_path, "--json")["jobs"]] == ["0", "1"]


def test_a_job_runs_also_if_its_record_cannot_be_written(app: App) -> None:
    (app.sweep / "0" / RECORD).mkdir(parents=True)
    done = app.sweep_over("lr=0.3", "steps=2")
    assert (done.returncode, app.runs) == (0, ["0 0"]), done.stderr
    assert "the job's state could not be recorded" in (app.sweep / "0" / "app.log").read_text()
