"""No two ranks ever disagree whether a save was published or failed, whatever happens in between."""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hydra_ckpt import CheckpointCallback, CheckpointError, SaveFailedError
from hydra_ckpt.errors import SaveOutcomeUnknown
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.testing import FaultyFiles, Operation, run_distributed
from hydra_ckpt.testing.processes import PATIENCE, forkserver
from tests.pausing import (
    LIMIT_S,
    Meddling,
    attempt,
    build,
    config_of,
    make_state,
    outcome_of,
    pid_of_rank_0,
    state_of,
    stop_this_process,
)

KINDS = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def steps(root: Path) -> list[int]:
    return [item.step for item in scan(root).checkpoints]


# -- rank 0 is slow ------------------------------------------------------------------------------------------------


def _slow(root: Path, phase: str, options: dict[str, Any]) -> list[str]:
    files = Meddling(lambda: time.sleep(2.5 * LIMIT_S))
    config = config_of(root, **options)
    told = []
    with CheckpointCallback(config, every_n_steps=1, checkpointer=build(config, files)) as callback:
        callback.on_train_begin(make_state())
        for step in (1, 2):
            files.phase = phase if dist.get_rank() == 0 and step == 2 else None
            pending = callback.on_step_end(step)
            assert pending is not None
            told.append(outcome_of(pending))
        callback.on_train_end()
    return told


@pytest.mark.parametrize(
    ("phase", "is_async"),
    [("making the draft", True), ("writing the manifest", False), ("writing the manifest", True)],
)
def test_a_rank_0_that_publishes_more_slowly_than_the_limit_is_no_time_out(
    tmp_path: Path, phase: str, is_async: bool
) -> None:
    found = run_distributed(_slow, 2, tmp_path, phase, {"is_async": is_async})
    assert found == [["published", "published"]] * 2
    assert steps(tmp_path) == [1, 2]


# -- rank 0 dies ---------------------------------------------------------------------------------------------------


def _widowed(rank: int, root: Path, store: Path, phase: str, is_async: bool) -> None:
    logging.disable()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    files = Meddling(lambda: os.kill(os.getpid(), signal.SIGKILL))
    engine, state = build(config_of(root, is_async=is_async), files), make_state()
    engine.save(state, step=1).result()
    files.phase = phase if rank == 0 else None
    try:
        told = outcome_of(engine.save(state, step=2))
    except SaveFailedError:
        told = "failed"
    (root / "told").write_text(told)
    assert attempt(lambda: engine.save(state, step=3)) != "done"
    engine.close()


@KINDS
@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("making the draft", "failed"),  # this rank has handed in nothing
        ("writing the manifest", "unknown"),  # nothing proves that it failed
        ("having published", "published"),  # it is there to be seen
    ],
)
def test_what_is_known_of_a_save_in_which_rank_0_dies(
    tmp_path: Path, phase: str, expected: str, is_async: bool
) -> None:
    root, store = tmp_path / "run", tmp_path / "store"
    jobs = [(rank, root, store, phase, is_async) for rank in range(2)]
    ranks = [forkserver().Process(target=_widowed, args=job) for job in jobs]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60 * PATIENCE)
        assert process.exitcode is not None, "a rank hangs"
    assert [process.exitcode for process in ranks] == [-signal.SIGKILL, 0]
    assert (root / "told").read_text() == expected
    assert steps(root) == ([1, 2] if expected == "published" else [1])


# -- a rank is cut off for a while ---------------------------------------------------------------------------------


def _cut_off(root: Path, fails: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Rank 0 is paused until rank 1 has given up."""
    rank, broken = dist.get_rank(), [False]

    def fail(operation: Operation) -> int | None:
        return errno.EIO if broken[0] and operation.kind == "rename" else None

    class Files(Meddling, FaultyFiles):
        def __init__(self) -> None:
            Meddling.__init__(self, stop_this_process)
            FaultyFiles.__init__(self, fail)

    files, state, pid = Files(), make_state(), pid_of_rank_0()
    engine = build(config_of(root, **options), files)
    engine.save(state, step=1).result()
    if rank == 0:
        files.phase, broken[0] = "writing the manifest", fails
    pending = engine.save(state, step=2) if rank == 1 else None
    if rank == 0:
        try:
            pending = engine.save(state, step=2)
        except SaveFailedError:
            pending = engine.pending
    assert pending is not None
    pending.wait()
    found = {"at first": "unknown" if pending.is_unknown else "failed" if pending.has_failed else "published"}
    if rank == 1:
        os.kill(pid, signal.SIGCONT)
    broken[0] = False
    found["then"] = attempt(lambda: engine.save(state, step=3).result())
    found["settled"] = outcome_of(pending)
    if found["then"] != "done":
        found["again"] = attempt(lambda: engine.save(state, step=4).result())
    engine.close()
    return found


@KINDS
def test_a_rank_that_was_cut_off_hears_at_the_next_save_that_the_last_one_is_published(
    tmp_path: Path, is_async: bool
) -> None:
    first, second = run_distributed(_cut_off, 2, tmp_path, False, {"is_async": is_async})
    assert first == {"at first": "published", "then": "done", "settled": "published"}
    assert second == {**first, "at first": "unknown"}
    assert steps(tmp_path) == [1, 2, 3]


@KINDS
@pytest.mark.parametrize("policy", ["raise", "warn"])
def test_a_rank_that_was_cut_off_hears_that_the_last_save_has_failed(
    tmp_path: Path, policy: str, is_async: bool
) -> None:
    options = {"is_async": is_async, "on_save_failure": policy}
    first, second = run_distributed(_cut_off, 2, tmp_path, True, options)
    assert first["at first"] == "failed"
    assert second["at first"] == "unknown"
    assert first["settled"] == second["settled"] == "failed"
    assert (first["then"] == "done") == (second["then"] == "done")
    if first["then"] != "done":  # an asynchronous save that has failed is raised once, on all ranks
        assert (policy, is_async) == ("raise", True)
        assert first["then"].startswith("SaveFailedError: saving step 2 failed")
        assert second["then"].startswith("SaveFailedError: saving step 2 failed")
        assert first["again"] == second["again"] == "done"


def _trains_on(root: Path, at_the_end: bool, options: dict[str, Any]) -> dict[str, Any]:
    """The whole loop, with rank 0 paused in a save until rank 1 has given up."""
    rank, files, pid = dist.get_rank(), Meddling(stop_this_process), pid_of_rank_0()
    config = config_of(root, **options)
    engine = build(config, files)
    found: dict[str, Any] = {"unknown": False}
    if rank == 1:

        def wake_rank_0() -> None:
            # On a slow machine this rank may give up, and be told, before rank 0 has stopped.
            while not (found["unknown"] and state_of(pid) == "T"):
                found["unknown"] |= engine.pending is not None and engine.pending.is_unknown
                time.sleep(0.01)
            os.kill(pid, signal.SIGCONT)

        waker = threading.Thread(target=wake_rank_0)
        waker.start()
    with CheckpointCallback(config, every_n_steps=2, checkpointer=engine) as callback:
        callback.on_train_begin(make_state())
        for step in (1, 2, 3):
            files.phase = "writing the manifest" if rank == 0 and step == 2 and not at_the_end else None
            callback.on_step_end(step)
        files.phase = "writing the manifest" if rank == 0 and at_the_end else None
        found["end"] = attempt(callback.on_train_end)
    if rank == 1:
        waker.join()
    return found


@pytest.mark.parametrize("policy", ["raise", "warn"])
@pytest.mark.parametrize("at_the_end", [False, True], ids=["in the middle", "in the final save"])
def test_a_run_continues_where_a_rank_was_cut_off_for_a_while(tmp_path: Path, at_the_end: bool, policy: str) -> None:
    first, second = run_distributed(_trains_on, 2, tmp_path, at_the_end, {"on_save_failure": policy})
    assert first == {"unknown": False, "end": "done"}
    assert second == {"unknown": True, "end": "done"}
    assert steps(tmp_path) == [2, 3]
    assert scan(tmp_path).checkpoints[-1].manifest.exports


def test_the_asynchronous_final_save_is_settled_too(tmp_path: Path) -> None:
    first, second = run_distributed(_trains_on, 2, tmp_path, True, {"is_async": True})
    assert (first["end"], second) == ("done", {"unknown": True, "end": "done"})


# -- the error itself ----------------------------------------------------------------------------------------------


def test_the_error_says_what_it_means() -> None:
    error = SaveOutcomeUnknown(7, "no answer from rank 0")
    assert isinstance(error, CheckpointError)
    assert not isinstance(error, SaveFailedError)
    assert error.step == 7
    assert "step 7" in str(error)
    assert "hydra-ckpt list" in str(error)
