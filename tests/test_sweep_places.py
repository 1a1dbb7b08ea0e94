"""Jobs of a sweep that are not below its directory, and jobs that have not begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hydra_ckpt.launchers.claims import Start
from hydra_ckpt.launchers.places import directory_of
from hydra_ckpt.sweeps.directories import job_directories, mark
from hydra_ckpt.sweeps.planned import PlannedJob, not_begun, write_plan
from hydra_ckpt.sweeps.record import RECORD, JobRecord
from hydra_ckpt.sweeps.summary import write_summary
from tests.sweep_app import App


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(tmp_path / "app")


def listed(sweep: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "hydra_ckpt.cli", "list", str(sweep), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("place", ["../jobs", "ABSOLUTE"])
def test_jobs_outside_the_sweeps_directory_are_in_its_summary(app: App, tmp_path: Path, place: str) -> None:
    place = str(tmp_path / "elsewhere") if place == "ABSOLUTE" else place
    command = [f"hydra.sweep.subdir={place}/${{hydra.job.num}}", "lr=0.3,0.1"]
    stopped = app.sweep_over(*command, kill="1 3", how="SIGTERM")
    assert (stopped.returncode, app.states) == (0, ["finished", "stopped"]), stopped.stderr
    assert app.sweep_over(*command).returncode == 0
    assert app.runs == ["0 0", "1 0", "1 3"]
    summary = app.summary
    assert [job["state"] for job in summary["jobs"]] == ["finished"] * 2
    assert [(app.sweep / job["job"]).resolve().name for job in summary["jobs"]] == ["0", "1"]
    best = (app.sweep / "BEST").resolve()
    assert best == (app.sweep / summary["best"]["checkpoint"]).resolve()
    assert best.is_dir()
    assert listed(app.sweep) == summary
    assert not list(tmp_path.rglob(".hydra_ckpt_jobs_below"))


def test_jobs_outside_are_found_through_links_and_a_damaged_list_leaves_the_others(tmp_path: Path) -> None:
    real, jobs = tmp_path / "disk" / "sweep", tmp_path / "disk" / "jobs"
    for path in (real / "0", jobs / "1", jobs / "2"):
        path.mkdir(parents=True)
        JobRecord.begin((), {}).end("finished").write(path)
    (tmp_path / "sweep").symlink_to(real)
    for path in (tmp_path / "sweep" / "0", tmp_path / "sweep" / ".." / "jobs" / "1", jobs / "2"):
        write_summary(tmp_path / "sweep", path)
    assert [path.name for path in job_directories(tmp_path / "sweep")] == ["0", "1", "2"]
    (jobs / "1" / RECORD).unlink()
    assert [path.name for path in job_directories(real)] == ["0", "2"]
    for text in ("[", "{}", '["a\\u0000b", 3, ["x"], "../nothing"]'):
        (real / ".hydra_ckpt_jobs_outside.json").write_text(text)
        assert [path.name for path in job_directories(real)] == ["0"]
    mark(real, jobs / "2")
    assert [path.name for path in job_directories(real)] == ["0", "2"]


@pytest.mark.parametrize("damage", ["[", "{}", "a link", "a pipe"])
def test_a_list_of_jobs_outside_that_cannot_be_read_is_not_overwritten(tmp_path: Path, damage: str) -> None:
    sweep, jobs = tmp_path / "sweep", [tmp_path / "jobs" / str(number) for number in range(3)]
    sweep.mkdir()
    for path in jobs:
        path.mkdir(parents=True)
        JobRecord.begin((), {}).end("finished").write(path)
    for path in jobs[:2]:
        mark(sweep, path)
    listed, saved = sweep / ".hydra_ckpt_jobs_outside.json", tmp_path / "saved.json"
    whole = listed.read_text()
    listed.rename(saved)
    if damage == "a link":
        listed.symlink_to(saved)
    elif damage == "a pipe":
        os.mkfifo(listed)
    else:
        listed.write_text(damage)
    mark(sweep, jobs[2])
    mark(sweep, jobs[2])
    assert [path.name for path in job_directories(sweep)] == ["2"]
    [kept] = sweep.glob(".hydra_ckpt_jobs_outside.*.json")
    kept.unlink()
    kept.write_text(whole)  # it can be read again
    assert sorted(path.name for path in job_directories(sweep)) == ["0", "1", "2"]


@pytest.mark.parametrize("how", ["SIGTERM", "STOP ..", "SIGKILL"])
def test_jobs_that_have_not_begun_wait_in_the_summary(app: App, how: str) -> None:
    app.sweep_over("lr=0.3,0.1", "seed=0,1", kill="1 3", how=how)
    state = "running" if how == "SIGKILL" else "stopped"
    assert app.states == ["finished", state, "waiting", "waiting"]
    jobs = app.summary["jobs"]
    assert [job["job"] for job in jobs] == ["0", "1", "2", "3"]
    assert [job["overrides"] for job in jobs[2:]] == [["lr=0.1", "seed=0"], ["lr=0.1", "seed=1"]]
    assert listed(app.sweep)["jobs"][2:] == jobs[2:]
    (app.sweep / "STOP").unlink(missing_ok=True)
    assert app.sweep_over("lr=0.3,0.1", "seed=0,1").returncode == 0
    assert app.states == ["finished"] * 4
    assert len(app.runs) == 5


def test_jobs_named_by_their_values_wait_without_a_directory(app: App) -> None:
    command = ["hydra.sweep.subdir=${hydra.job.override_dirname}", "lr=0.3,0.1,0.2"]
    app.sweep_over(*command, kill="lr=0.3 3", how="SIGTERM")
    assert [(job["job"], job["overrides"], job["state"]) for job in app.summary["jobs"]] == [
        ("lr=0.3", ["lr=0.3"], "stopped"),
        ("", ["lr=0.1"], "waiting"),
        ("", ["lr=0.2"], "waiting"),
    ]


def test_a_plan_is_of_the_last_start_and_equal_jobs_count_once_each(tmp_path: Path) -> None:
    same = [PlannedJob(str(number), ("lr=0.1",)) for number in range(3)]
    write_plan(tmp_path / "sweep", same)
    assert not_begun(tmp_path / "sweep", [("1", ["lr=0.1"])]) == [same[0], same[2]]
    assert not_begun(tmp_path / "sweep", [("0", ["lr=0.2"])]) == [PlannedJob("", ("lr=0.1",)), *same[1:]]
    for text in ("[", "3", "[[]]", '[["0", 3]]', '[[{"a": 1}]]'):
        (tmp_path / "sweep" / ".hydra_ckpt_plan.json").write_text(text)
        assert not_begun(tmp_path / "sweep", []) == []
    write_plan(tmp_path / "sweep", same)
    write_plan(tmp_path / "sweep", [])
    assert not_begun(tmp_path / "sweep", []) == []


def test_the_directory_of_a_job_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hydra.job.chdir=true, code in a job may resolve Hydra's configuration again."""
    job = tmp_path / "sweep" / "0"
    job.mkdir(parents=True)
    JobRecord.begin(("lr=0.1",), {}).end("stopped").write(job)
    hydra = {"job": {"num": 3}, "runtime": {"cwd": str(tmp_path)}, "sweep": {"dir": "sweep"}}
    config = OmegaConf.create({"hydra": {**hydra, "overrides": {"task": ["lr=0.1"]}}})
    monkeypatch.chdir(job)
    assert directory_of(Start("start", 1), config) == "0"
    config.hydra.job.num, config.hydra.overrides.task = 4, ["lr=0.2"]
    assert [directory_of(Start("start", 1), config) for _ in range(2)] == ["1", "1"]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()) == ["0", "1"]
