"""Sweeps under real launchers that run jobs in parallel, and under sweepers that use the jobs' results."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from hydra_ckpt.launchers.claims import Claim, Start
from hydra_ckpt.launchers.places import directory_of
from hydra_ckpt.sweeps.record import JobRecord, read_record
from tests.programs import Program
from tests.sweep_app import REPOSITORY, App

JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
SUBMITIT = ["hydra/launcher=submitit_local"]
CODE = "callbacks.checkpoint.requeue_exit_code=85"
LONG = {"STEP_S": "0.1"}


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(tmp_path / "app")


def steps(app: App) -> dict[str, int]:
    """The last saved step of each job that has one."""
    return {job["job"]: job["last"]["step"] for job in app.summary["jobs"] if job["last"]}


# -- joblib ----------------------------------------------------------------------------------------------------------


def test_a_signal_to_one_job_lets_its_sibling_finish_and_no_further_job_begins(app: App) -> None:
    stopped = app.sweep_over(*JOBLIB, CODE, "lr=0.3,0.1,0.2", kill="0 3", how="SIGTERM", AFTER="2", HOLD="1 3")
    assert stopped.returncode == 85, stopped.stderr
    assert sorted(app.runs) == ["0 0", "1 0"]
    assert app.states == ["stopped", "finished", "waiting"]
    assert steps(app) == {"0": 3, "1": 6}
    assert '"requeue": true' in (app.sweep / "0/hydra_ckpt_job.json").read_text()
    assert "job 0 was stopped (SIGTERM came). Run the same command again to continue it" in stdout(stopped)
    assert "job 2 waits; no more jobs start: job 0 was stopped" in stdout(stopped)
    done = app.sweep_over(*JOBLIB, CODE, "lr=0.3,0.1,0.25")  # what has not begun may still be another one
    assert done.returncode == 0, done.stderr
    assert sorted(app.runs) == ["0 3", "2 0"]
    assert app.states == ["finished"] * 3


def test_a_job_that_joblib_runs_in_the_launchers_process_stops_as_under_the_basic_launcher(app: App) -> None:
    alone = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]
    stopped = app.sweep_over(*alone, f"+{CODE}", "lr=0.3,0.1", kill="0 3", how="SIGTERM")
    assert stopped.returncode == 85, stopped.stderr
    assert app.states == ["stopped", "waiting"]


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_all_jobs_saved(app: App) -> None:
    stopped = app.sweep_over(
        *JOBLIB, CODE, "lr=0.3,0.1,0.2", "steps=400", kill="0 3", how="SIGTERM launcher", AFTER="2", **LONG
    )
    assert stopped.returncode == 85, stopped.stderr
    assert app.states == ["stopped", "stopped", "waiting"]
    assert all(3 <= step < 400 for step in steps(app).values())
    assert len(steps(app)) == 2
    assert "the launcher received SIGTERM: running jobs save and stop" in stdout(stopped)


@pytest.mark.slow
def test_a_signal_to_all_processes_stops_jobs_saved_though_a_worker_is_idle(app: App) -> None:
    stopped = app.sweep_over(*JOBLIB, CODE, "lr=0.3,0.1", kill="1 5", how="SIGTERM group", AFTER="2", WAIT_FOR="0")
    assert stopped.returncode == 85, stopped.stderr
    assert app.states == ["finished", "stopped"]
    assert steps(app) == {"0": 6, "1": 5}


@pytest.mark.slow
def test_a_file_stop_for_the_sweep_stops_running_jobs_and_holds_the_others_back(app: App) -> None:
    stopped = app.sweep_over(*JOBLIB, CODE, "lr=0.3,0.1,0.2", "steps=400", kill="0 3", how="STOP ..", AFTER="2", **LONG)
    assert stopped.returncode == 0, stopped.stderr
    assert app.states == ["stopped", "stopped", "waiting"]
    assert len(steps(app)) == 2
    (app.sweep / "STOP").unlink()
    assert app.sweep_over(*JOBLIB, CODE, "lr=0.3,0.1,0.2", "steps=400").returncode == 0
    assert app.states == ["finished"] * 3


@pytest.mark.slow
def test_a_file_stop_for_one_job_stops_it_alone(app: App) -> None:
    stopped = app.sweep_over(*JOBLIB, CODE, "lr=0.3,0.1,0.2", kill="0 3", how="STOP .", AFTER="2", HOLD="1 3")
    assert stopped.returncode == 0, stopped.stderr
    assert app.states == ["stopped", "finished", "finished"]
    assert not (app.sweep / "0/STOP").exists()
    assert '"requeue": false' in (app.sweep / "0/hydra_ckpt_job.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fail", ["true,false", "false,true"], ids=["first", "second"])
def test_a_job_that_fails_beside_a_stopped_one_is_told_by_the_exit_code(app: App, fail: str) -> None:
    kill = "1 3" if fail.startswith("true") else "0 3"
    ended = app.sweep_over(*JOBLIB, CODE, f"fail={fail}", kill=kill, how="SIGTERM", AFTER="2")
    assert ended.returncode == 1, ended.stderr
    assert sorted(app.states) == ["failed", "stopped"]
    assert "no such luck" in ended.stdout + ended.stderr
    again = app.sweep_over(*JOBLIB, CODE, f"fail={fail}")
    assert again.returncode == 1
    assert sorted(app.states) == ["failed", "finished"]


@pytest.mark.slow
def test_signals_in_nested_sweep_directories_stop_their_own_sweep_alone(app: App) -> None:
    outer, inner = "hydra.sweep.dir=sweep", "hydra.sweep.dir=sweep/0/inner/deep"
    assert app.run("-m", inner, *JOBLIB, CODE, "lr=0.3,0.1", kill="0 3", how="SIGTERM", HOLD="1 3").returncode == 85
    done = app.run("-m", outer, *JOBLIB, CODE, "lr=0.3,0.1", "hydra.sweep.subdir=x/y${hydra.job.num}")
    assert done.returncode == 0, done.stderr
    assert app.run("-m", inner, *JOBLIB, CODE, "lr=0.3,0.1").returncode == 0
    summary = json.loads((app.sweep / "0/inner/deep/checkpoints_summary.json").read_text())
    assert [job["state"] for job in summary["jobs"]] == ["finished"] * 2


@pytest.mark.slow
def test_jobs_of_a_parallel_launcher_keep_apart_and_are_all_in_the_summary(app: App) -> None:
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=4", "lr=0.1,0.2,0.3,0.4"]
    done = app.sweep_over(*joblib)
    assert done.returncode == 0, done.stderr
    assert sorted(app.runs) == ["0 0", "1 0", "2 0", "3 0"]
    assert app.states == ["finished"] * 4
    assert app.summary["best"]["job"] == "0"
    assert all((app.sweep / job / "checkpoints/LATEST").exists() for job in "0123")
    assert app.sweep_over(*joblib).returncode == 0
    assert app.runs == []


# -- submitit --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_under_submitit_a_stopped_job_stops_alone_and_the_sweep_ends_with_the_code(app: App) -> None:
    stopped = app.sweep_over(*SUBMITIT, CODE, "lr=0.3,0.1", kill="0 3", how="SIGTERM", AFTER="2", HOLD="1 3")
    assert stopped.returncode == 85, stopped.stderr
    assert app.states == ["stopped", "finished"]
    assert "UncompletedJobError" not in stopped.stderr
    assert "job 0 was stopped (SIGTERM came)" in stdout(stopped)
    assert app.sweep_over(*SUBMITIT, CODE, "lr=0.3,0.1").returncode == 0
    assert app.states == ["finished"] * 2
    assert "0 3" in app.runs


@pytest.mark.parametrize("timeouts", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_submitits_own_signal_saves_first_and_then_puts_the_job_back(app: App, timeouts: str) -> None:
    submitit = [*SUBMITIT, "hydra.launcher.timeout_min=5", f"+hydra.launcher.max_num_timeout={timeouts}"]
    ended = app.sweep_over(*submitit, CODE, "lr=0.3", kill="0 3", how="SIGUSR2")
    logs = "".join(path.read_text() for path in app.sweep.glob(".submitit/*/*_log.*"))
    assert "SIGUSR2 came: saving and stopping" in logs
    if timeouts == "1":
        assert ended.returncode == 0, ended.stderr
        assert app.runs == ["0 0", "0 3"]
        assert app.states == ["finished"]
    else:
        assert ended.returncode == 85, ended.stderr
        assert "will not restart the job: Job not requeued because: timed-out too many times" in logs
        assert app.states == ["stopped"]
        assert steps(app) == {"0": 3}


# -- Optuna ----------------------------------------------------------------------------------------------------------


def optuna_over(*arguments: str, trials: int = 2, jobs: int = 1) -> list[str]:
    return ["hydra/sweeper=optuna", f"hydra.sweeper.n_trials={trials}", f"hydra.sweeper.n_jobs={jobs}", *arguments]


def stored(app: App, **options: int) -> list[str]:
    return optuna_over(
        f"hydra.sweeper.storage=sqlite:///{app.root}/study.db", "hydra.sweeper.study_name=s", VALUES, **options
    )


@contextmanager
def begun(app: App, *arguments: str, begin: bool = True, **environment: str) -> Iterator[Program]:
    """The sweep as a program of its own, once a job has begun to train."""
    environment = {**os.environ, "RUNS": str(app.root / "runs"), "PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, "app.py", "-m", "hydra.sweep.dir=sweep", *arguments]
    pipe = subprocess.PIPE
    with Program(command, cwd=app.root, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            while begin and not (app.root / "runs").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_a_second_launcher_in_the_directory_of_a_sweep_is_refused_and_may_use_another(app: App) -> None:
    with begun(app, *stored(app, trials=2), "steps=60", STEP_S="1") as first:
        second = app.sweep_over(*stored(app))
        assert second.returncode == 1
        assert f"another program launches jobs in {app.sweep} (host " in second.stderr
        assert f"process {first.pid})" in second.stderr
        assert "set another hydra.sweep.dir" in second.stderr
        assert app.runs == ["0 0"]
        assert app.run("-m", "hydra.sweep.dir=other", *stored(app, trials=1)).returncode == 0  # the same study
        assert app.runs == ["0 0"]
    assert [state for state, *_ in trials_of(app)] == ["RUNNING", "COMPLETE"]
    assert app.sweep_over(*stored(app, trials=1), "steps=60").returncode == 0  # the first one was killed
    assert [state for state, *_ in trials_of(app)] == ["COMPLETE", "COMPLETE"]


VALUES = "lr=interval(0.01,0.5)"


def trials_of(app: App) -> list[tuple[str, float, float | None]]:
    """State, value of `lr` and objective of each trial."""
    return [(trial.state.name, trial.params["lr"], trial.value) for trial in study_of(app).trials]


def study_of(app: App) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=f"sqlite:///{app.root}/study.db")


def objective(value: float) -> float:
    """What a finished job returns."""
    return pytest.approx(value + 1 / 6, rel=1e-6)  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [[], pytest.param(JOBLIB, marks=pytest.mark.slow), pytest.param(SUBMITIT, marks=pytest.mark.slow)]
)
def test_a_stopped_trial_is_no_failed_one_and_runs_again_with_its_values(app: App, launcher: list[str]) -> None:
    stopped = app.sweep_over(*stored(app, trials=3), *launcher, CODE, kill="1 3", how="SIGTERM")
    assert stopped.returncode == 85, stopped.stderr
    before = trials_of(app)
    assert [state for state, _, _ in before] == ["COMPLETE", "RUNNING"]  # and no third one was asked for
    assert app.runs == ["0 0", "1 0"]
    done = app.sweep_over(*stored(app), *launcher, CODE)
    assert done.returncode == 0, done.stderr
    assert app.runs == ["1 3", "2 0"]  # without a gap
    after = trials_of(app)
    assert [value for _, value, _ in after[:2]] == [value for _, value, _ in before]
    assert all(found == ("COMPLETE", found[1], objective(found[1])) for found in after)
    assert app.states == ["finished"] * 3


@pytest.mark.slow
def test_trials_that_were_asked_for_with_a_stopped_one_wait_for_the_next_start(app: App) -> None:
    stopped = app.sweep_over(*stored(app, trials=4, jobs=3), CODE, kill="1 3", how="SIGTERM")
    assert stopped.returncode == 85, stopped.stderr
    before = trials_of(app)
    assert [state for state, _, _ in before] == ["COMPLETE", "RUNNING", "RUNNING"]
    assert app.states == ["finished", "stopped", "waiting"]
    assert app.runs == ["0 0", "1 0"]
    assert app.sweep_over(*stored(app, jobs=3), CODE).returncode == 0
    assert app.runs == ["1 3", "2 0"]
    assert [found[:2] for found in trials_of(app)] == [("COMPLETE", value) for _, value, _ in before]


@pytest.mark.slow
def test_trials_beside_a_stopped_one_are_told_by_the_next_start(app: App) -> None:
    options = {"trials": 2, "jobs": 2}
    stopped = app.sweep_over(*stored(app, **options), *JOBLIB, CODE, kill="0 3", how="SIGTERM", AFTER="2", HOLD="1 3")
    assert stopped.returncode == 85, stopped.stderr
    assert [state for state, _, _ in trials_of(app)] == ["RUNNING"] * 2
    assert app.states == ["stopped", "finished"]
    app.runs  # noqa: B018 - forgotten
    assert app.sweep_over(*stored(app, **options), *JOBLIB, CODE).returncode == 0
    assert app.runs == ["0 3"]
    assert all(found == ("COMPLETE", found[1], objective(found[1])) for found in trials_of(app))
    assert len(trials_of(app)) == 2


@pytest.mark.slow
def test_a_killed_trial_runs_again_too(app: App) -> None:
    killed = app.sweep_over(*stored(app), kill="1 5", how="SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    [_, (state, value, _)] = trials_of(app)
    assert state == "RUNNING"
    assert app.sweep_over(*stored(app, trials=1)).returncode == 0
    assert app.runs == ["0 0", "1 0", "1 4"]
    assert trials_of(app)[1] == ("COMPLETE", value, objective(value))


def study_over(app: App, *values: float) -> list[str]:
    """A stored study whose first trials have these values; more would be other ones."""
    study = optuna.create_study(study_name="s", storage=f"sqlite:///{app.root}/study.db")
    for value in values:
        study.enqueue_trial({"lr": value})
    return [argument for argument in stored(app, trials=len(values)) if argument != VALUES] + ["lr=choice(0.3,0.4,0.5)"]


def test_a_trial_with_the_values_of_a_finished_one_keeps_its_own_directory(app: App) -> None:
    command = study_over(app, 0.4, 0.5, 0.5)
    assert app.sweep_over(*command, kill="2 5").returncode == -signal.SIGKILL
    assert app.runs == ["0 0", "1 0", "2 0"]
    done = app.sweep_over(*command, "hydra.sweeper.n_trials=1")
    assert (done.returncode, app.runs) == (0, ["2 4"]), done.stderr
    assert app.states == ["finished"] * 3
    assert trials_of(app)[2] == ("COMPLETE", 0.5, objective(0.5))


@pytest.mark.slow
def test_trials_with_equal_values_come_back_side_by_side_each_in_its_own_directory(app: App) -> None:
    command = [*study_over(app, 0.4, 0.3, 0.5, 0.5), "hydra.sweeper.n_jobs=2", *JOBLIB]
    app.sweep_over(*command, kill="3 3", how="SIGKILL group", AFTER="4", HOLD="2 3")
    assert sorted(app.runs) == ["0 0", "1 0", "2 0", "3 0"]
    done = app.sweep_over(*command, "hydra.sweeper.n_trials=2")
    assert done.returncode == 0, done.stderr
    assert sorted(run.split()[0] for run in app.runs) == ["2", "3"]
    assert app.states == ["finished"] * 4
    assert [state for state, *_ in trials_of(app)] == ["COMPLETE"] * 4


@pytest.mark.slow
def test_a_trial_is_left_to_its_own_sweep_also_if_that_cannot_be_seen_or_was_moved(app: App) -> None:
    command = [*study_over(app, 0.5, 0.5), "hydra.sweeper.n_trials=1"]
    assert app.sweep_over(*command).returncode == 0  # has an ended job with the other trial's values
    app.run("-m", "hydra.sweep.dir=other/sweep", *command, kill="0 5")
    shutil.copytree(app.root / "other/sweep", app.root / "copy")
    assert app.run("-m", "hydra.sweep.dir=copy", *command).returncode == 0
    (app.root / "other").rename(app.root / "elsewhere")
    assert app.sweep_over(*command).returncode == 0
    assert trials_of(app)[1][0] == "RUNNING"
    app.runs  # noqa: B018 - forgotten
    moved = app.run("-m", "hydra.sweep.dir=elsewhere/sweep", *command)
    assert (moved.returncode, app.runs) == (0, ["0 4"]), moved.stderr
    assert trials_of(app)[1] == ("COMPLETE", 0.5, objective(0.5))


def job_config(sweep: Path, number: int) -> DictConfig:
    """What the directory of a job with `lr=0.5` is chosen by."""
    hydra = {
        "job": {"num": number},
        "runtime": {"cwd": str(sweep.parent)},
        "sweep": {"dir": sweep.name},
        "overrides": {"task": ["lr=0.5"]},
    }
    return OmegaConf.create({"hydra": hydra})


def test_a_start_gives_each_directory_to_one_job(tmp_path: Path) -> None:
    for name, override in (("0", "lr=0.5"), ("1", "lr=0.1"), ("2", "lr=0.5"), ("3", "lr=0.5")):
        (tmp_path / name).mkdir()
        JobRecord.begin((override,), {}).end("failed").write(tmp_path / name)
    one, other = Start.new(4), Start.new(4)
    Claim(one.name).write(tmp_path / "3")  # reserved for a trial
    given = [directory_of(one, job_config(tmp_path, number)) for number in (2, 0, 1, 5, 2, 0, 1)]
    assert given == ["2", "0", "4", "5", "2", "0", "4"]
    Claim(one.name, 7).write(tmp_path / "3")
    assert directory_of(one, job_config(tmp_path, 7)) == "3"
    assert [directory_of(other, job_config(tmp_path, number)) for number in (3, 0, 2, 1)] == ["3", "0", "2", "6"]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_every_point_of_a_grid_is_evaluated_once_though_the_sweep_was_killed(app: App, jobs: int) -> None:
    storage = [f"hydra.sweeper.storage=sqlite:///{app.root}/study.db", "hydra.sweeper.study_name=s"]
    grid = ["hydra/sweeper/sampler=grid", "lr=choice(0.1,0.2,0.3)", "seed=choice(0,1)", *storage]
    for kill in ("1 3", "3 3", "") if jobs == 1 else ("0 3", "4 3", ""):
        ended = app.sweep_over(*optuna_over(*grid, trials=6, jobs=jobs), kill=kill)
        assert ended.returncode == (-signal.SIGKILL if kill else 0), ended.stderr
    points = {(lr, seed) for lr in (0.1, 0.2, 0.3) for seed in (0, 1)}
    complete = [trial for trial in study_of(app).trials if trial.state.name == "COMPLETE"]
    assert {(trial.params["lr"], trial.params["seed"]) for trial in complete} == points
    first = [run for run in app.runs if run.endswith(" 0")]
    assert len(first) == len(set(first)) == len(points)  # and no job began twice
    assert len(app.summary["jobs"]) == len(points)


@pytest.mark.slow
def test_trials_that_never_began_because_the_sweep_was_killed_run_in_the_next_start(app: App) -> None:
    killed = app.sweep_over(*stored(app, trials=3, jobs=3), kill="0 3")
    assert killed.returncode == -signal.SIGKILL
    before = trials_of(app)
    assert [state for state, *_ in before] == ["RUNNING"] * 3
    assert app.sweep_over(*stored(app, trials=3, jobs=3)).returncode == 0
    assert trials_of(app) == [("COMPLETE", value, objective(value)) for _, value, _ in before]
    assert len(app.summary["jobs"]) == 3


@pytest.mark.parametrize("resumable", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["resumable", "plain"])
@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["stored", "in_memory"])
def test_a_job_number_that_comes_back_with_other_values_gets_a_directory_of_its_own(
    tmp_path: Path, resumable: bool, kept: bool
) -> None:
    app = App(tmp_path / "app", resumable=resumable)
    command = stored(app) if kept else optuna_over(VALUES)
    for first in (0, 2):
        done = app.sweep_over(*command)
        assert done.returncode == 0, done.stderr
        assert app.runs == [f"{first} 0", f"{first + 1} 0"]
        results = yaml.safe_load((app.sweep / "optimization_results.yaml").read_text())
        assert results["best_value"] == objective(results["best_params"]["lr"])
    if kept:
        assert len(trials_of(app)) == 4
        assert all(found == ("COMPLETE", found[1], objective(found[1])) for found in trials_of(app))


@pytest.mark.slow
def test_without_the_decorator_the_result_of_other_values_does_not_count(tmp_path: Path) -> None:
    app = App(tmp_path / "app", resumable=False)
    assert app.sweep_over("lr=0.01,0.02", "steps=4", "hydra/callbacks=hydra_ckpt_summary").returncode == 0
    assert [job["objective"] for job in app.summary["jobs"]] == pytest.approx([0.26, 0.27])
    better = pytest.approx([0.3 + 1 / 6, 0.4 + 1 / 6])
    for goal, expected in ((4, [None, None]), (6, better), (6, better)):
        for record in app.sweep.glob("*/hydra_ckpt_job.json"):
            record.unlink()
        again = app.sweep_over("lr=0.3,0.4", f"steps={goal}", "hydra/callbacks=hydra_ckpt_summary")
        assert again.returncode == 0, again.stderr
        assert [job["objective"] for job in app.summary["jobs"]] == expected


@pytest.mark.slow
def test_a_file_stop_ends_a_sweep_that_goes_by_results_and_the_trial_is_no_result(app: App) -> None:
    stopped = app.sweep_over(*stored(app), CODE, kill="0 3", how="STOP .")
    assert stopped.returncode == 0, stopped.stderr
    [(state, value, _)] = trials_of(app)
    assert (state, app.states) == ("RUNNING", ["stopped"])
    assert app.sweep_over(*stored(app, trials=1), CODE).returncode == 0
    assert trials_of(app) == [("COMPLETE", value, objective(value))]


@pytest.mark.slow
def test_a_study_whose_sampler_is_seeded_continues_without_a_storage(app: App) -> None:
    seeded = [*optuna_over(VALUES, trials=3), "hydra.sweeper.sampler.seed=1"]
    stopped = app.sweep_over(*seeded, CODE, kill="1 3", how="SIGTERM")
    assert (stopped.returncode, app.runs) == (85, ["0 0", "1 0"])
    assert app.sweep_over(*seeded, CODE).returncode == 0
    assert app.runs == ["1 3", "2 0"]
    assert app.states == ["finished"] * 3


@pytest.mark.slow
def test_an_objective_that_is_no_number_is_kept_and_written_as_strict_json(app: App) -> None:
    ended = app.sweep_over(*stored(app), "nan=choice(true)", "hydra.sweeper.max_failure_rate=1")
    assert "returned nan: it has finished, but a sweeper cannot use NaN" in stdout(ended)
    texts = [path.read_text() for path in app.sweep.glob("*/hydra_ckpt_job.json")]
    found = [json.loads(text, parse_constant=pytest.fail)["objective"] for text in texts]
    assert found == [{"not finite": "nan"}] * 2
    assert [(job["state"], job["objective"]) for job in app.summary["jobs"]] == [("finished", None)] * 2
    assert [trial.state.name for trial in study_of(app).trials] == ["FAIL"] * 2
    single = ["hydra.run.dir=one", "nan=true"]
    assert app.run(*single).returncode == 0
    assert app.run(*single).returncode == 0
    kept = read_record(app.root / "one")
    assert kept is not None
    assert math.isnan(kept.objective)


@pytest.mark.slow
def test_a_failed_trial_is_recorded(app: App) -> None:
    fail = optuna_over("fail=choice(true)", "hydra.sweeper.max_failure_rate=1.0")
    failed = app.sweep_over(*fail)
    assert app.states == ["failed"] * 2, failed.stderr
    assert app.summary["jobs"][0]["error"] == "RuntimeError: no such luck"


def stdout(ended: object) -> str:
    """What a program has logged."""
    return str(getattr(ended, "stdout", "")) + str(getattr(ended, "stderr", ""))
