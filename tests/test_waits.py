"""Every wait for a paused rank ends at its limit, although its kernel still accepts packets."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hydra_ckpt import CheckpointCallback, CheckpointError
from hydra_ckpt.distributed.channel import Channel, RankTimeoutError
from hydra_ckpt.distributed.courier import Courier, bounded
from hydra_ckpt.distributed.group import Group
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.testing import run_distributed
from hydra_ckpt.testing.processes import PATIENCE
from tests.pausing import (
    LIMIT_S,
    PHASES,
    Meddling,
    attempt,
    build,
    config_of,
    make_state,
    outcome_of,
    pid_of_rank_0,
    stop_this_process,
    wait_until_stopped,
)

# -- calls ---------------------------------------------------------------------------------------------------------


def test_a_call_that_blocks_is_left_behind_and_the_connection_is_used_again_when_it_returns() -> None:
    courier, released = Courier("test"), threading.Event()
    with pytest.raises(TimeoutError):
        courier.call(lambda: released.wait(60 * PATIENCE), 0.05)
    with pytest.raises(TimeoutError):
        courier.call(lambda: pytest.fail("a call that nobody waits for any more is not made"), 0.05)
    released.set()
    assert courier.call(lambda: 7, 30) == 7
    with pytest.raises(ZeroDivisionError):
        courier.call(lambda: 1 // 0, 30)
    courier.close()
    with pytest.raises(TimeoutError):
        bounded(lambda: threading.Event().wait(60 * PATIENCE), 0.05)


def test_a_courier_beats_only_while_it_is_told_to() -> None:
    beaten = threading.Event()
    courier = Courier("test", beaten.set, 0.01)
    time.sleep(0.05)
    assert not beaten.is_set()
    with courier.beating():
        assert beaten.wait(30 * PATIENCE)
    courier.close()


# -- messages ------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Channel], Any]] = {
    "agree": lambda channel: channel.agree("a message", 1, sum),
    "receive": lambda channel: channel.receive("a message", (lambda: 1) if channel.is_coordinator else None),
    "scatter": lambda channel: channel.scatter("a message", [1, 1] if channel.is_coordinator else None),
    "a long message": lambda channel: channel.agree("a message", "x" * (1 << 26), len),  # more than sockets hold
    "farewell": lambda channel: channel.drain(),
}


def _pausing(call: str) -> str:
    pid = pid_of_rank_0()
    group = Group.create(None, LIMIT_S)
    channel = group.channel("test")
    assert channel.agree("all is well", 1, sum) == 2
    dist.barrier()
    if channel.is_coordinator:
        stop_this_process()
        return ""
    wait_until_stopped(pid)
    try:
        told = attempt(lambda: CALLS[call](channel))
        with pytest.raises(CheckpointError):
            group.channel("another")  # a connection that is made now
    finally:
        os.kill(pid, signal.SIGCONT)
    channel.close()
    group.close()
    return told


@pytest.mark.parametrize("call", list(CALLS))
def test_a_message_to_a_paused_rank_0(call: str) -> None:
    told = run_distributed(_pausing, 2, call, timeout_s=60)[1]
    assert told == "done" if call == "farewell" else "no answer from rank 0 within" in told


def _late(root: Path) -> list[str]:
    """Three ranks, of which the last comes too late."""
    group = Group.create(None, LIMIT_S)
    channel = group.channel("test")
    told = []
    if channel.rank == 2:
        while not (root / "1").exists():
            time.sleep(0.02)
    told.append(attempt(lambda: channel.agree("the first", 1, sum)))
    (root / str(channel.rank)).touch()
    if channel.rank == 0:
        while not (root / "2").exists():
            time.sleep(0.02)
    dist.barrier()
    channel.open()
    told.append(str(channel.agree("the second", 1, sum)))
    channel.drain()
    return told


def test_all_ranks_hear_which_one_was_late_and_are_in_step_again_afterwards(tmp_path: Path) -> None:
    for told in run_distributed(_late, 3, tmp_path, timeout_s=60):
        assert "the first: no answer from rank 2" in told[0]
        assert told[1] == "3"


def _at_work() -> list[Any]:
    group = Group.create(None, LIMIT_S)
    channel = group.channel("test")

    def work() -> str:
        time.sleep(3 * LIMIT_S)
        return "done"

    found = channel.coordinator_step("something long", work)
    channel.drain()
    return [found, channel.agree("the store does not grow", 1, sum)]


def test_a_rank_0_that_is_at_work_is_waited_for() -> None:
    assert run_distributed(_at_work, 2, timeout_s=60) == [["done", 2]] * 2


def _dead() -> str:
    group = Group.create(None, 60.0)
    channel = group.channel("test")
    assert channel.agree("all is well", 1, sum) == 2
    dist.barrier()
    if channel.is_coordinator:
        os._exit(0)
    return attempt(lambda: channel.agree("a message", 1, sum))


def test_a_rank_0_that_has_died_is_noticed_at_once() -> None:
    with pytest.raises(AssertionError, match="died with exit code 0") as caught:
        run_distributed(_dead, 2, timeout_s=30)
    assert list(caught.value.failures) == [0]  # type: ignore[attr-defined]


# -- saves ---------------------------------------------------------------------------------------------------------


def _pausing_in(root: Path, phase: str, is_async: bool) -> list[str]:
    files, state, pid = Meddling(stop_this_process), make_state(), pid_of_rank_0()
    config = config_of(root, is_async=is_async, max_recent_checkpoints=1)
    engine = build(config, files)
    engine.save(state, step=1).result()
    dist.barrier()
    files.phase = phase if dist.get_rank() == 0 else None
    pending = None
    if dist.get_rank() == 1:
        attempt(lambda: engine.save(state, step=2))
        pending = engine.pending
        assert pending is not None
        pending.wait()
        first = outcome_of(pending)
        wait_until_stopped(pid)  # it still is: nothing has waited for it to continue
        os.kill(pid, signal.SIGCONT)
    else:
        attempt(lambda: engine.save(state, step=2))
        pending = engine.pending
        assert pending is not None
        pending.wait()
        first = outcome_of(pending)
    then = attempt(lambda: engine.save(state, step=3).result())
    engine.close()
    return [first, then, outcome_of(pending)]


SHORT = ("making the draft", "writing its part", "writing the manifest", "having published", "retiring")


@pytest.mark.parametrize(
    "phase", [pytest.param(phase, marks=[] if phase in SHORT else [pytest.mark.slow]) for phase in PHASES]
)
def test_rank_0_is_paused_in_each_phase_of_a_save(tmp_path: Path, phase: str) -> None:
    is_async = phase in list(PHASES)[::2]  # both ways, in turn
    (first, then, last), (other, other_then, other_last) = run_distributed(
        _pausing_in, 2, tmp_path, phase, is_async, timeout_s=90
    )
    assert {first, other} != {"published", "failed"}
    assert (then, last) == ("done", last) == (other_then, other_last)
    assert scan(tmp_path).checkpoints[-1].step == 3


# -- a run ---------------------------------------------------------------------------------------------------------


def _pausing_a_run(root: Path, where: str) -> str:
    """Rank 1 comes to an end while rank 0 is paused."""
    pid, rank = pid_of_rank_0(), dist.get_rank()
    callback = CheckpointCallback(config_of(root, is_async=True), every_n_steps=3)
    told = ""

    def pause(here: str) -> None:
        if where != here:
            return
        if rank == 0:
            stop_this_process()
        else:
            wait_until_stopped(pid)

    def train() -> None:
        callback.on_train_begin(make_state())
        for step in range(1, 6):
            if step == 2:
                pause("between steps")
            callback.on_step_end(step)
        pause("before the end")
        callback.on_train_end()

    try:
        told = attempt(train)
        pause("before close")
        told = f"{told} {attempt(callback.close)}"
    finally:
        if rank == 1:
            os.kill(pid, signal.SIGCONT)
    return told


@pytest.mark.parametrize("where", ["between steps", "before the end", "before close"])
def test_a_run_does_not_wait_for_a_paused_rank_0(tmp_path: Path, where: str) -> None:
    told = run_distributed(_pausing_a_run, 2, tmp_path, where, timeout_s=90)[1]
    if where == "before close":
        assert told == "done done"
    else:
        assert told.startswith(("CheckpointError: ", "RankTimeoutError: "))


def _pausing_a_start(root: Path, delay_s: float) -> str:
    """Rank 0 is paused somewhere between build() and the first steps."""
    pid, rank = pid_of_rank_0(), dist.get_rank()
    with CheckpointCallback(config_of(root), every_n_steps=1, checkpointer=build(config_of(root))) as callback:
        if rank == 0:
            threading.Timer(delay_s, stop_this_process).start()
        try:
            told = attempt(lambda: [callback.on_train_begin(make_state()), *map(callback.on_step_end, range(1, 9999))])
        finally:
            if rank == 1:
                wait_until_stopped(pid)
                os.kill(pid, signal.SIGCONT)
    return told


@pytest.mark.slow
@pytest.mark.parametrize("attempt_number", range(12))
def test_rank_0_is_paused_anywhere(tmp_path: Path, attempt_number: int) -> None:
    told = run_distributed(_pausing_a_start, 2, tmp_path, 0.02 * 1.7**attempt_number, timeout_s=90)[1]
    assert told.startswith(("CheckpointError: ", "RankTimeoutError: ", "SaveFailedError: ", "SaveOutcomeUnknown: "))


def test_the_limit_is_named(tmp_path: Path) -> None:
    error = RankTimeoutError("waiting", [3], 7.0)
    assert error.ranks == [3]
    assert "checkpoint.consolidation_timeout_minutes" in str(error)
