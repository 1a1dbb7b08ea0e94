"""What makes a run save and stop: files, signals, exit codes; and the agreement of the ranks on it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hydra_ckpt import Checkpoint, CheckpointCallback, CheckpointConfigError, CheckpointError, CheckpointingConfig
from hydra_ckpt.store.owner import read_owner
from hydra_ckpt.testing import run_distributed
from hydra_ckpt.triggers.requests import INTERVAL_S, RequestFiles
from hydra_ckpt.triggers.signals import SignalWatch, parse_signals
from tests.programs import run
from tests.test_callback import make, make_state, steps


def run_until_stopped(callback: CheckpointCallback, most: int = 400) -> int:
    step = 0
    while not callback.should_stop and step < most:
        time.sleep(0.01)
        step += 1
        callback.on_step_end(step)
    return step


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_save_saves_once_and_a_file_stop_saves_and_stops(tmp_path: Path) -> None:
    with make(tmp_path, _requeue_exit_code=85) as callback:
        callback.on_train_begin(make_state())
        (tmp_path / "SAVE").touch()
        saved = [step for step in range(1, 6) if callback.on_step_end(step) is not None]
        assert saved == [1]
        assert not (tmp_path / "SAVE").exists()
        (tmp_path / "STOP").touch()
        step = 5
        while not callback.should_stop and step < 400:
            step += 1
            time.sleep(0.02)
            callback.on_step_end(step)
        callback.on_train_end()
        assert callback.exit_code == 0  # whoever stops a run by a file does not want it to come back
    assert steps(tmp_path) == [1, step]
    assert not (tmp_path / "STOP").exists()
    with make(tmp_path, _every_n_steps=1) as callback:  # obeyed once
        callback.on_train_begin(make_state())
        callback.on_step_end(step + 1)
        assert not callback.should_stop


def test_files_are_looked_for_at_most_once_a_second_and_a_sweep_s_stop_stays(tmp_path: Path) -> None:
    job, sweep = tmp_path / "0", tmp_path
    job.mkdir()
    files = RequestFiles([job, job], shared=sweep)
    assert files.look(10.0) == set()
    (job / "SAVE").touch()
    (sweep / "STOP").touch()
    (sweep / "SAVE").touch()
    assert files.look(10.0 + INTERVAL_S / 2) == set()
    assert files.look(10.0 + INTERVAL_S) == {"SAVE", "STOP"}
    assert files.look(10.0 + 2 * INTERVAL_S) == {"STOP"}
    assert (sweep / "STOP").exists()
    (job / "STOP").mkdir()  # no request, but a directory that happens to be called so
    (sweep / "STOP").unlink()
    assert files.look(20.0) == set()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove everything")
def test_a_file_that_cannot_be_removed_is_obeyed_once(tmp_path: Path) -> None:
    (tmp_path / "SAVE").touch()
    tmp_path.chmod(0o500)
    files = RequestFiles([tmp_path])
    assert [files.look(now) for now in (1.0, 3.0, 5.0)] == [{"SAVE"}, set(), set()]


# -- signals and exit codes ----------------------------------------------------------------------------------------


LATE_SIGNAL = """
import os, signal, sys
from pathlib import Path
from tests.test_triggers import make
from tests.test_callback import make_state

with make(Path(sys.argv[1])) as callback:
    callback.on_train_begin(make_state())
    callback.on_step_end(1)
    if sys.argv[2] in ("before", "error"):
        os.kill(os.getpid(), signal.SIGTERM)
    if sys.argv[2] == "error":
        raise ValueError("the reason")
    callback.on_train_end()
    if sys.argv[2] == "after":
        os.kill(os.getpid(), signal.SIGTERM)
    print("held back", flush=True)
print("not reached")
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_behind_the_last_step_ends_the_process_once_all_is_saved(tmp_path: Path, when: str) -> None:
    command = [sys.executable, "-c", LATE_SIGNAL, str(tmp_path), when]
    ended = run(command, cwd=Path(__file__).parents[1])
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "held back\n"), ended.stderr
    assert Checkpoint.open(tmp_path / "LATEST").step == 1
    assert read_owner(tmp_path)[0].released  # type: ignore[index]


def test_an_error_is_not_hidden_by_a_signal_that_came_as_well(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LATE_SIGNAL, str(tmp_path), "error"]
    ended = run(command, cwd=Path(__file__).parents[1])
    assert ended.returncode == 1
    assert "ValueError: the reason" in ended.stderr


FORKED = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from tests.test_triggers import make
from tests.test_callback import make_state

def earlier(number, frame):
    print("earlier", flush=True)
    os._exit(3)

def child(ready):
    ready.set()
    time.sleep(60)

if sys.argv[2] == "handler":
    signal.signal(signal.SIGTERM, earlier)
with make(Path(sys.argv[1]), _signals=["SIGTERM", "term", 15]) as callback:
    callback.on_train_begin(make_state())
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    forked = context.Process(target=child, args=(ready,))
    forked.start()
    ready.wait(30)
    forked.terminate()
    forked.join(30)
    print(forked.exitcode, flush=True)
    forked.kill()
    callback.on_step_end(1)
    print(callback.should_stop)
"""


@pytest.mark.parametrize(("before", "said"), [("default", "-15\nFalse\n"), ("handler", "earlier\n3\nFalse\n")])
def test_a_forked_process_hears_signals_as_if_no_run_watched(tmp_path: Path, before: str, said: str) -> None:
    command = [sys.executable, "-c", FORKED, str(tmp_path), before]
    ended = run(command, cwd=Path(__file__).parents[1])
    assert (ended.returncode, ended.stdout) == (0, said), ended.stderr


@pytest.fixture
def usr1() -> Iterator[list[str]]:
    """Names of what has handled SIGUSR1; the program's own handler, "own", is in place."""
    seen: list[str] = []
    original = signal.signal(signal.SIGUSR1, lambda *_: seen.append("own"))
    yield seen
    signal.signal(signal.SIGUSR1, original)


@pytest.mark.parametrize("first", [0, 1])
def test_watches_end_in_any_order(first: int, usr1: list[str]) -> None:
    own = signal.getsignal(signal.SIGUSR1)
    watches = [SignalWatch("usr1"), SignalWatch("usr1")]
    for watch in watches:
        watch.install()
    signal.raise_signal(signal.SIGUSR1)
    assert [watch.received for watch in watches] == [signal.SIGUSR1] * 2
    assert usr1 == ["own"]
    watches.pop(first).remove(obeyed=True)
    [left] = watches
    left.received = None
    signal.raise_signal(signal.SIGUSR1)
    assert left.received == signal.SIGUSR1
    assert usr1 == ["own"] * 2
    left.remove(obeyed=True)
    assert signal.getsignal(signal.SIGUSR1) is own


def test_a_handler_that_came_later_stays_and_passes_through_a_watch_that_is_over(usr1: list[str]) -> None:
    own = signal.getsignal(signal.SIGUSR1)
    watch = SignalWatch("usr1")
    watch.install()
    ours: Any = signal.getsignal(signal.SIGUSR1)

    def later(number: int, frame: Any) -> None:
        usr1.append("later")
        ours(number, frame)

    signal.signal(signal.SIGUSR1, later)
    watch.remove(obeyed=True)
    assert signal.getsignal(signal.SIGUSR1) is later
    signal.raise_signal(signal.SIGUSR1)
    assert usr1 == ["later", "own"]
    assert watch.received is None
    signal.signal(signal.SIGUSR1, ours)  # as `later` would put back what it had found
    signal.raise_signal(signal.SIGUSR1)
    assert usr1 == ["later", "own", "own"]
    assert signal.getsignal(signal.SIGUSR1) is own


TWO_RUNS = """
import os, signal, sys
from pathlib import Path
from tests.test_triggers import make
from tests.test_callback import make_state

one, two = (make(Path(sys.argv[1]) / name) for name in ("one", "two"))
for callback in (one, two):
    callback.on_train_begin(make_state())
    callback.on_step_end(1)
if sys.argv[2] == "before":
    os.kill(os.getpid(), signal.SIGTERM)
for callback in (one, two):
    callback.on_train_end()
    callback.close()
    print("closed", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("not reached")
"""


@pytest.mark.parametrize(("when", "closed"), [("before", 1), ("after", 2)])
def test_a_signal_ends_a_process_whose_runs_have_ended_in_the_order_they_began(
    tmp_path: Path, when: str, closed: int
) -> None:
    command = [sys.executable, "-c", TWO_RUNS, str(tmp_path), when]
    ended = run(command, cwd=Path(__file__).parents[1])
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "closed\n" * closed), ended.stderr
    for name in ("one", "two"):
        assert Checkpoint.open(tmp_path / name / "LATEST").step == 1
        assert read_owner(tmp_path / name)[0].released  # type: ignore[index]


@pytest.mark.parametrize("given", ["SIGUSR1", "usr1", 10, "10", ["SIGUSR1"], [10], ("usr1",), ["SIGUSR1", "usr1", 10]])
def test_signals_are_named_in_any_of_the_usual_ways(given: Any) -> None:
    assert parse_signals(given) == [signal.SIGUSR1]


@pytest.mark.parametrize("given", ["SIGFOO", True, [None], 12345, -1, [1.5]])
def test_what_is_no_signal_is_refused(given: Any) -> None:
    with pytest.raises(CheckpointConfigError, match="there is no signal"):
        parse_signals(given)


def test_a_run_that_stops_to_be_continued_says_so_by_its_exit_code(tmp_path: Path) -> None:
    with make(tmp_path / "signal", _requeue_exit_code=85) as callback:
        callback.on_train_begin(make_state())
        assert callback.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        callback.on_step_end(1)
        assert (callback.should_stop, callback.exit_code) == (True, 85)
    with make(tmp_path / "time", _requeue_exit_code=85, _max_run_time_s=5.2) as callback:
        callback.on_train_begin(make_state())
        assert run_until_stopped(callback) < 400
        assert callback.exit_code == 85
    with make(tmp_path / "unset") as callback:
        callback.on_train_begin(make_state())
        os.kill(os.getpid(), signal.SIGTERM)
        callback.on_step_end(1)
        assert (callback.should_stop, callback.exit_code) == (True, 0)
    for code in (0, 256, True, "85"):
        with pytest.raises(CheckpointConfigError, match="requeue_exit_code="):
            CheckpointCallback(CheckpointingConfig(), requeue_exit_code=code)


def test_the_time_limit_counts_what_saves_and_steps_have_taken() -> None:
    from hydra_ckpt.triggers.schedule import Schedule

    nothing = dict.fromkeys(["every_n_steps", "every_n_seconds", "every_n_epochs", "at_steps"], None)
    schedule = Schedule.of(**nothing, on_improvement=False, max_run_time_s=100.0)
    schedule.begin(1000.0)
    assert not schedule.is_time_up(1084.0, 10.0)
    assert schedule.is_time_up(1085.0, 10.0)
    assert schedule.time_up(1085.0, 8.0, 2.0) == (
        "max_run_time_s=100 is nearly reached: 85.0 s have passed since training began, and 15.0 s are reserved "
        "(longest save 8.0 s, two steps 2.0 s, margin 5 s)"
    )
    assert Schedule.of(**schedule.as_data()) == schedule.__class__.of(**schedule.as_data())


# -- two ranks -----------------------------------------------------------------------------------------------------


def _two_ranks(root: Path) -> dict[str, Any]:
    rank, state = dist.get_rank(), make_state()
    found: dict[str, Any] = {}

    # Cadences differ: rank 0's count.
    with make(root / "cadence", _every_n_steps=(2, 3)[rank], _at_steps=([5], None)[rank]) as callback:
        callback.on_train_begin(state)
        found["cadence"] = [step for step in range(1, 7) if callback.on_step_end(step) is not None]

    # Rank 0's metrics count; nonsense elsewhere harms nobody.
    with make(root / "metrics", _every_n_steps=1) as callback:
        callback.on_train_begin(state)
        best = []
        for step, loss in enumerate([3.0, 2.0, -0.0, 1.0], start=1):
            callback.on_step_end(step, metrics={"loss": loss} if rank == 0 else {"a": "nonsense", "b": 1})
            best.append(callback.best_metric)
            if step == 2:
                callback.on_validation_end({"loss": 1.5} if rank == 0 else {"x": 1, "y": 2})
                best.append(callback.best_metric)
        callback.on_train_end()
        found["best"] = [*best, callback.best_metric]

    # What rank 0 cannot make sense of is raised on all ranks at the same step.
    with make(root / "refused", _every_n_steps=9) as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1, metrics={"a": 1, "b": 2} if rank == 0 else None)
        with pytest.raises(CheckpointConfigError, match="the metrics given are a, b"):
            callback.on_step_end(2)
        with pytest.raises(CheckpointConfigError, match="the metrics given are a, b"):
            callback.on_validation_end({"a": 1, "b": 2} if rank == 0 else {"c": 1})
        callback.on_step_end(3)

    # A file.
    if rank == 0:
        (root / "file").mkdir()
        (root / "file" / "SAVE").touch()
    with make(root / "file") as callback:
        callback.on_train_begin(state)
        found["file"] = [step for step in range(1, 5) if callback.on_step_end(step) is not None]
        found["step"] = _signalled(callback, rank)

    # Ranks at different steps.
    with make(root / "steps", _every_n_steps=99, consolidation_timeout_minutes=0.2) as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1)
        callback.on_step_end(2 + rank)
        with pytest.raises(CheckpointError, match=r"for step 2, another for step 3\. Every rank must call it"):
            callback.on_step_end(4)

    # One rank saves where the other takes a step.
    with make(root / "ahead", _every_n_steps=99, consolidation_timeout_minutes=0.2) as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1)
        with pytest.raises(CheckpointError, match="every rank must make the same calls"):
            if rank == 0:
                callback.checkpointer.save(state, step=2)
            callback.on_step_end(2)
            callback.on_step_end(3)
    return found


def _signalled(callback: CheckpointCallback, rank: int) -> tuple[int, int]:
    """The step at which rank 1 gets a signal, and the one at which both stop."""
    for step in range(5, 12):
        if step == 7 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        callback.on_step_end(step)
        if callback.should_stop:
            return 7, step
    return 7, 0


def test_two_ranks_agree_at_every_step(tmp_path: Path) -> None:
    one, other = run_distributed(_two_ranks, 2, tmp_path)
    assert one == other
    assert one["cadence"] == [2, 4, 5, 6]
    # What comes with a step counts from the next one on, what validation gives at once.
    assert one["best"] == [None, 3.0, 1.5, 1.5, 0.0, 0.0]
    assert one["file"] == [1]
    assert one["step"] == (7, 8)
    assert steps(tmp_path / "file") == [1, 8]
