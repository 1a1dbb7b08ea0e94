"""Who may write to a directory: live runs keep it, dead ones lose it, and no clock has to be right."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hydra_ckpt import Checkpointer, CheckpointError, CheckpointExistsError, CheckpointingConfig
from hydra_ckpt.cli.holding import decision, held
from hydra_ckpt.files import Files
from hydra_ckpt.jobs.restarts import job_of_this_process, restarts_of_this_process
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.store.lease import Lease, Times, is_held
from hydra_ckpt.store.owner import Owner, look
from hydra_ckpt.testing import run_distributed
from hydra_ckpt.testing.processes import PATIENCE, forkserver
from tests.programs import Program
from tests.test_zombies import make_state

SHORT = Times(heartbeat_s=0.25, stale_s=1.5, grace_s=2.0, look_s=0.05)
ELSEWHERE = {"boot": "another boot", "incarnation": "0" * 12, "released": False}

HOLDER = """
import signal, sys
from pathlib import Path
from tests.test_lease import SHORT, build
from tests.test_zombies import make_state

engine = build(Path(sys.argv[1]))
engine.start(make_state())
print("holds", flush=True)
for line in sys.stdin:
    if line == "save\\n":
        print(engine.save(make_state(), step=int(sys.stdin.readline())).result().step, flush=True)
engine.close()
"""


def build(root: Path, times: Times = SHORT, **options: Any) -> Checkpointer:
    rank = dist.get_rank() if dist.is_initialized() else 0
    config = CheckpointingConfig(checkpoint_dir=str(root), **options)
    return Checkpointer(config.resolve(), dp_rank=rank, tp_rank=0, pp_rank=0, times=times)


def record_of(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "owner.json").read_text()))


def leave_record(root: Path, **changes: Any) -> None:
    """A directory with a checkpoint and the record of a run that is described by the changes."""
    with build(root) as engine:
        engine.save(make_state(), step=1).result()
    found = {**record_of(root), **changes}
    (root / "owner.json").write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


@contextmanager
def another_run(
    root: Path, kind: type[subprocess.Popen[str]] = Program, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    with kind(
        [sys.executable, "-c", HOLDER, str(root)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "holds\n"
            yield process
        finally:
            process.kill()


def saves(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"save\n{step}\n")
    process.stdin.flush()
    assert process.stdout.readline() == f"{step}\n"


# -- a live run keeps its directory --------------------------------------------------------------------------------


@contextmanager
def beating(root: Path, *, ahead_s: float) -> Iterator[None]:
    """A heart whose clock differs."""
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(0.2):
            now = time.time() + ahead_s
            os.utime(root / "owner.json", (now, now))

    now = time.time() + ahead_s
    os.utime(root / "owner.json", (now, now))
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@pytest.mark.parametrize("ahead_s", [-180.0, 0.0, 180.0, 1e6])
@pytest.mark.parametrize(
    "other",
    [
        {**ELSEWHERE, "launch": "another"},
        {"namespace": "pid:[1]", "pid": 1, "released": False, "launch": "another", "incarnation": "0" * 12},
        {**ELSEWHERE, "boot": None, "namespace": None, "ticks": None, "launch": None, "restarts": None},
        {**ELSEWHERE, "launch": "another", "written by": "a newer version"},
    ],
    ids=["another host", "another container of this host", "an older version", "a newer version"],
)
def test_a_heartbeat_that_moves_is_a_live_run_s_whatever_the_clocks_say(
    tmp_path: Path, ahead_s: float, other: dict[str, Any]
) -> None:
    leave_record(tmp_path, **other)
    with (
        beating(tmp_path, ahead_s=ahead_s),
        build(tmp_path) as engine,
        pytest.raises(CheckpointExistsError, match="is being written by another run"),
    ):
        engine.start(make_state())
    assert record_of(tmp_path)["incarnation"] == other["incarnation"]


@pytest.mark.parametrize("ahead_s", [-1e6, 180.0])
def test_a_heartbeat_that_does_not_move_is_a_dead_run_s_whatever_the_clocks_say(
    tmp_path: Path, ahead_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    leave_record(tmp_path, **ELSEWHERE)
    then = time.time() + ahead_s
    os.utime(tmp_path / "owner.json", (then, then))
    with build(tmp_path) as engine:
        assert engine.start(make_state()).step == 1
    assert "Watching its heartbeat" in caplog.text


def test_a_live_process_is_refused_at_once_though_its_clock_was_set(tmp_path: Path) -> None:
    with another_run(tmp_path, subprocess.Popen) as process:
        saves(process, 1)
        text = json.dumps({**record_of(tmp_path), "started": 1.0})
        (tmp_path / "owner.json").write_text(text)
        with build(tmp_path) as engine, pytest.raises(CheckpointExistsError, match=f"process {process.pid}"):
            engine.start(make_state())
        assert is_held(tmp_path)
        saves(process, 2)
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie of the kernel's kind
        assert not is_held(tmp_path)
        with build(tmp_path) as engine:
            assert engine.start(make_state()).step == 2


def test_a_number_that_belongs_to_a_later_process_is_a_dead_run_s(tmp_path: Path, caplog: Any) -> None:
    leave_record(tmp_path, incarnation="0" * 12, released=False, pid=os.getppid(), ticks=1)
    with build(tmp_path) as engine:
        assert engine.start(make_state()).step == 1
    assert "Watching" not in caplog.text


def test_a_forked_process_neither_releases_nor_saves(tmp_path: Path) -> None:
    state = make_state()
    with build(tmp_path) as engine:
        engine.save(state, step=1).result()
        told: Any = multiprocessing.get_context("fork").Queue()

        def child() -> None:
            try:
                engine.save(state, step=2).result()
            except CheckpointError as error:
                told.put(str(error))
            engine.close()

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        assert "fork" in told.get(timeout=30 * PATIENCE)
        process.join(30 * PATIENCE)
        assert process.exitcode == 0
        assert not record_of(tmp_path)["released"]
        assert engine.save(state, step=3).result().step == 3


def test_a_record_that_is_gone_is_made_again(tmp_path: Path) -> None:
    state = make_state()
    with build(tmp_path) as engine:
        engine.save(state, step=1).result()
        before = record_of(tmp_path)
        (tmp_path / "owner.json").unlink()
        assert engine.save(state, step=2).result().step == 2
        assert record_of(tmp_path) == before
        (tmp_path / "owner.json").unlink()
        deadline = time.monotonic() + 30 * PATIENCE
        while not (tmp_path / "owner.json").exists():  # the heart does it, too
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with build(tmp_path) as engine:
        engine.start(state)
        (tmp_path / "owner.json").unlink()
        leave_record(tmp_path / "other", **ELSEWHERE)
        (tmp_path / "other" / "owner.json").rename(tmp_path / "owner.json")
        with pytest.raises(CheckpointError, match="no longer held by this run"):
            engine.save(state, step=3).result()


def test_a_zombie_does_not_take_a_record_that_is_gone(tmp_path: Path) -> None:
    lease = Lease(Files(), tmp_path, Owner.here(), SHORT)
    lease.acquire()
    time.sleep(SHORT.stale_s)  # no sign of life: it may have been taken for dead
    (tmp_path / "owner.json").unlink()
    with pytest.raises(CheckpointError, match="is gone, or cannot be read"):
        lease.check()


# -- a job comes back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recorded", "now", "expected"),
    [
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, "requeued"),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}, "none"),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, "none"),
        (
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"},
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
            "none",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"},
            {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"},
            "restarted",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"},
            {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"},
            "none",
        ),
        (
            {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "a"},
            {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "b", "TORCHELASTIC_RESTART_COUNT": "3"},
            "none",
        ),
        (
            {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "3"},
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "b"},
            "requeued",
        ),
        ({"PBS_JOBID": "7"}, {"PBS_JOBID": "7"}, "none"),
    ],
)
def test_a_job_comes_back_with_a_larger_count_only(
    recorded: dict[str, str], now: dict[str, str], expected: str
) -> None:
    here = Owner.here()
    before, after = (
        replace(here, job=job_of_this_process(found), restarts=restarts_of_this_process(found))
        for found in (recorded, now)
    )
    assert after.is_requeued(before) is (expected == "requeued")
    assert after.is_restarted(before) is (expected == "restarted")


def test_a_requeued_job_takes_over_at_once_and_another_step_of_the_job_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with another_run(tmp_path, SLURM_JOB_ID="7") as process:
        saves(process, 1)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        with build(tmp_path) as engine, pytest.raises(CheckpointExistsError):
            engine.start(make_state())
        saves(process, 2)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with build(tmp_path) as engine:
            assert engine.start(make_state()).step == 2


def test_an_older_version_s_record_that_was_released_is_free_at_once(tmp_path: Path, caplog: Any) -> None:
    old = {"boot": None, "namespace": None, "ticks": None, "launch": None, "restarts": None}
    leave_record(tmp_path, **{**old, "incarnation": "0" * 12, "job": "SLURM_JOB_ID=7"})
    with build(tmp_path) as engine:
        assert engine.start(make_state()).step == 1
    assert "Watching" not in caplog.text


# -- two at one instant --------------------------------------------------------------------------------------------


def _race(root: Path, start: float) -> str:
    time.sleep(max(start - time.time(), 0.0))
    lease = Lease(Files(), root, replace(Owner.here(), launch=str(os.getpid())), SHORT)
    try:
        lease.acquire()
        for _ in range(20):
            lease.check()
            time.sleep(0.005)
    except CheckpointExistsError as error:
        return "refused" if "is being written by another run" in str(error) else str(error)
    except (OSError, CheckpointError) as error:
        return repr(error)
    return "admitted"


def test_of_runs_that_start_at_one_instant_one_is_admitted(tmp_path: Path) -> None:
    dead = {**ELSEWHERE, "boot": Owner.here().boot, "pid": 1, "ticks": 1 << 60}
    leave_record(tmp_path / "left", **dead)
    (tmp_path / "left" / "epoch_0_step_1").rename(tmp_path / "unused")
    with forkserver().Pool(3, maxtasksperchild=None) as pool:
        for number in range(40):
            root = tmp_path / str(number)
            root.mkdir()
            if number % 2:
                (root / "owner.json").write_bytes((tmp_path / "left" / "owner.json").read_bytes())
            found = pool.starmap(_race, [(root, time.time() + 0.05)] * 3, chunksize=1)
            assert sorted(found) == ["admitted", "refused", "refused"], (number, found)
            assert [path.name for path in root.iterdir()] == ["owner.json"]


@pytest.mark.parametrize("lives", [False, None])
def test_what_a_run_left_that_died_while_it_took_the_lease_is_removed(tmp_path: Path, lives: bool | None) -> None:
    leave_record(tmp_path)
    lease = Lease(Files(), tmp_path, Owner.here(), SHORT)
    left = lease._claim_path(look(tmp_path / "owner.json"))
    dead = replace(Owner.here(), pid=1, ticks=1 << 60, boot=Owner.here().boot if lives is False else "elsewhere")
    left.write_bytes(dead.to_bytes())
    with build(tmp_path) as engine:
        assert engine.start(make_state()).step == 1
    assert not left.exists()


# -- waiting -------------------------------------------------------------------------------------------------------


def test_the_same_run_started_again_waits_for_its_former_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with another_run(tmp_path) as process:
        saves(process, 1)
        launch = record_of(tmp_path)["launch"]
        before = Owner.here
        assert launch != before().launch
        monkeypatch.chdir(Path(__file__).parents[1])
        monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path)])
        assert before().launch == launch
        with build(tmp_path) as engine, pytest.raises(CheckpointExistsError, match="is being written"):
            engine.start(make_state())  # it does not end
        assert "still held by an earlier start of this run" in caplog.text
        killer = threading.Timer(0.5, process.kill)
        killer.start()
        with build(tmp_path) as engine:
            assert engine.start(make_state()).step == 1
        killer.join()


def test_the_same_run_waits_for_a_former_process_on_another_host(tmp_path: Path) -> None:
    leave_record(tmp_path, **ELSEWHERE)
    assert record_of(tmp_path)["launch"] == Owner.here().launch
    last = threading.Timer(0.7, os.utime, (tmp_path / "owner.json",))
    last.start()  # seen to move, and not any more
    with build(tmp_path) as engine:
        assert engine.start(make_state()).step == 1
    last.join()
    (tmp_path / "owner.json").write_text(json.dumps({**record_of(tmp_path), **ELSEWHERE}))
    with beating(tmp_path, ahead_s=0.0), build(tmp_path) as engine, pytest.raises(CheckpointExistsError):
        engine.start(make_state())


def test_prune_and_another_job_of_a_sweep_never_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave_record(tmp_path, **ELSEWHERE, run="sweep, job 1")
    with (
        pytest.raises(CheckpointExistsError, match=r"may still be written .* remove .*owner\.json"),
        held(tmp_path, decision(scan(tmp_path))),
    ):
        pass
    lease = Lease(Files(), tmp_path, Owner.here("sweep, job 2"), SHORT)
    with pytest.raises(CheckpointExistsError, match="belongs to the sweep job sweep, job 1"):
        lease.acquire()
    assert "Watching" not in caplog.text
    (tmp_path / "owner.json").unlink()
    with held(tmp_path, decision(scan(tmp_path))):
        pass


def _start_behind_a_dead_holder(root: Path) -> int:
    with build(root, replace(SHORT, stale_s=6.0), consolidation_timeout_minutes=0.05) as engine:
        return int(engine.start(make_state()).step)


def test_the_other_ranks_wait_as_long_as_rank_0(tmp_path: Path) -> None:
    leave_record(tmp_path, **ELSEWHERE)
    assert run_distributed(_start_behind_a_dead_holder, 2, tmp_path) == [1, 1]


def test_the_log_says_why_a_start_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave_record(tmp_path, **ELSEWHERE, host="node7")
    with caplog.at_level(logging.WARNING), build(tmp_path) as engine:
        engine.start(make_state())
    assert "is held by a run on host node7" in caplog.text


def test_a_run_that_this_process_has_not_closed_is_named_with_the_remedy(tmp_path: Path) -> None:
    state = make_state()
    first = build(tmp_path)
    first.start(state)
    with build(tmp_path) as second:
        with pytest.raises(CheckpointExistsError, match=r"in this same process .* \(callback\.close\(\)\)"):
            second.start(state)
        first.close()
        second.start(state)
