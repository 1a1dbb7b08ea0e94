"""The callback: when it saves, what it does with metrics, how it ends, and what it leaves behind."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from hydra_ckpt import AppState, CheckpointCallback, CheckpointConfigError, Checkpointer, CheckpointingConfig
from hydra_ckpt.errors import CheckpointError, SaveFailedError
from hydra_ckpt.files import Files
from hydra_ckpt.store.catalog import Checkpoint, scan
from hydra_ckpt.testing import FaultyFiles, run_distributed
from hydra_ckpt.testing.processes import PATIENCE
from hydra_ckpt.triggers.schedule import Schedule


def make_state() -> AppState:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return AppState(model, optimizer)


def train_step(state: AppState) -> None:
    optimizer = state.optimizers[0]
    state.model(torch.ones(3, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def make(directory: Path, files: Files | None = None, **options: Any) -> CheckpointCallback:
    """A callback; options of the callback begin with an underscore, the others are the config's."""
    mine = {key[1:]: options.pop(key) for key in list(options) if key.startswith("_")}
    config = CheckpointingConfig(checkpoint_dir=str(directory), **options)
    rank = dist.get_rank() if dist.is_initialized() else 0
    engine = files and Checkpointer(config.resolve(), dp_rank=rank, tp_rank=0, pp_rank=0, files=files)
    return CheckpointCallback(config, checkpointer=engine, **mine)


def published(directory: Path) -> list[str]:
    return [item.name for item in scan(directory).checkpoints]


def steps(directory: Path) -> list[int]:
    return [item.step for item in scan(directory).checkpoints]


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("hydra_ckpt")}


class Slow(Files):
    """A disk on which it takes a while until a save is durable."""

    def sync_dir(self, path: Path) -> None:
        time.sleep(0.1)
        super().sync_dir(path)


# -- cadences ------------------------------------------------------------------------------------------------------


def test_every_n_steps_and_at_steps(tmp_path: Path) -> None:
    state = make_state()
    with make(tmp_path, _every_n_steps=4, _at_steps=[1, 6, 8]) as callback:
        assert callback.on_train_begin(state) is None
        pending = {}
        for step in range(1, 11):
            train_step(state)
            pending[step] = callback.on_step_end(step)
        assert [step for step, save in pending.items() if save is not None] == [1, 4, 6, 8]
        assert pending[4].result() == Checkpoint.open(tmp_path / "epoch_0_step_4")
        callback.on_train_end()
    assert steps(tmp_path) == [1, 4, 6, 8, 10]


def test_every_n_epochs_and_where_a_run_resumes_from_them(tmp_path: Path) -> None:
    state = make_state()
    with make(tmp_path, _every_n_epochs=2) as callback:
        callback.on_train_begin(state)
        for epoch in range(4):
            for step in (2 * epoch + 1, 2 * epoch + 2):
                assert callback.on_step_end(step, epoch) is None
            saved = callback.on_epoch_end(epoch, metrics={"default": epoch})
            assert (saved is not None) == (epoch in (1, 3))
        callback.on_train_end()
        callback.on_train_end()
    assert published(tmp_path) == ["epoch_2_step_4", "epoch_4_step_8"]
    assert [item.metrics for item in scan(tmp_path).checkpoints] == [{"default": 1.0}, {"default": 3.0}]
    with make(tmp_path) as callback:
        report = callback.on_train_begin(state)
        assert report is not None
        assert (report.step, report.epoch) == (8, 4)  # the next epoch, not the one that is done


def test_an_epochs_end_is_not_saved_again_under_another_name(tmp_path: Path) -> None:
    state = make_state()
    with make(tmp_path, _every_n_epochs=1, _every_n_steps=2) as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1)
        callback.on_step_end(2)
        assert callback.on_epoch_end(0) is None
        callback.on_train_end()
    assert published(tmp_path) == ["epoch_0_step_2"]


def test_every_n_seconds_saves_once_an_interval(tmp_path: Path) -> None:
    state = make_state()
    with make(tmp_path, _every_n_seconds=0.3) as callback:
        callback.on_train_begin(state)
        saved_at = []
        for step in range(1, 23):
            time.sleep(0.05)
            if callback.on_step_end(step) is not None:
                saved_at.append(step)
    assert 2 <= len(saved_at) <= 4
    assert min(b - a for a, b in itertools.pairwise(saved_at)) >= 4


def test_without_any_cadence_every_30_minutes_and_at_the_end(tmp_path: Path) -> None:
    nothing = dict.fromkeys(["every_n_steps", "every_n_seconds", "every_n_epochs", "at_steps", "max_run_time_s"], None)
    schedule = Schedule.of(**nothing, on_improvement=False)
    schedule.begin(1000.0)
    assert not schedule.is_due_by_time(2799.0)
    assert schedule.is_due_by_time(2800.0)
    schedule.saved(2800.0)
    assert not schedule.is_due_by_time(4599.0)
    other = Schedule.of(**{**nothing, "every_n_epochs": 3}, on_improvement=False)
    assert not other.is_due_by_time(1e9)
    state = make_state()
    with make(tmp_path) as callback:
        callback.on_train_begin(state)
        assert [callback.on_step_end(step) for step in range(1, 6)] == [None] * 5
        callback.on_train_end()
    assert steps(tmp_path) == [5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"every_n_steps": 1.5}, "whole number"),
        ({"every_n_seconds": -1}, "every_n_seconds=-1"),
        ({"at_steps": [3, 0]}, r"callbacks\.checkpoint\.at_steps=\[3, 0\]: expected a list of whole numbers from 1"),
        ({"at_steps": 5}, r"callbacks\.checkpoint\.at_steps=5: expected a list of whole numbers from 1"),
        ({"at_steps": [1.5]}, "expected a list of whole numbers from 1"),
        ({"at_steps": "12"}, "expected a list of whole numbers from 1"),
        ({"signals": 1.5}, r"callbacks\.checkpoint\.signals=1\.5: expected the name or number of a signal"),
        ({"max_run_time_s": True}, "max_run_time_s=True"),
        ({"signals": ["SIGNONE"]}, "no signal 'SIGNONE'"),
    ],
)
def test_cadences_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointConfigError, match=message):
        CheckpointCallback(CheckpointingConfig(), **options)


def test_a_repeated_step_is_ignored_and_a_smaller_one_raises(tmp_path: Path) -> None:
    state = make_state()
    with make(tmp_path, _every_n_steps=2) as callback:
        callback.on_train_begin(state)
        assert callback.on_step_end(0) is None
        assert callback.on_step_end(2) is not None
        assert callback.on_step_end(2) is None
        with pytest.raises(CheckpointConfigError, match=r"on_step_end\(step=1\) after step 2"):
            callback.on_step_end(1)
    assert steps(tmp_path) == [2]


def test_max_run_time_saves_and_stops_before_the_limit(tmp_path: Path) -> None:
    state = make_state()
    with make(tmp_path, _max_run_time_s=5.5) as callback:
        callback.on_train_begin(state)
        began, step = time.monotonic(), 0
        while not callback.should_stop and step < 200:
            time.sleep(0.05)
            step += 1
            callback.on_step_end(step)
        assert 0.4 < time.monotonic() - began < 3
        callback.on_train_end()
    assert steps(tmp_path) == [step]
    assert not Checkpoint.open(tmp_path / "LATEST").manifest.exports  # it is not the end of training


# -- metrics -------------------------------------------------------------------------------------------------------


def inodes(checkpoint: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(checkpoint)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in checkpoint.rglob("*")
        if path.is_file()
    }


def test_metrics_that_arrive_after_the_save_are_added_to_it_and_best_moves(tmp_path: Path) -> None:
    state = make_state()
    with make(tmp_path, _every_n_steps=1, is_async=True) as callback:
        callback.on_train_begin(state)
        values = [2.0, 1.5, math.nan, -math.inf, 1.75, torch.tensor(1.25), np.float32(1.25)]
        for step, value in enumerate(values, start=1):
            train_step(state)
            pending = callback.on_step_end(step)
            assert pending is not None
            before = inodes(pending.result().path)
            assert callback.on_validation_end({"val_loss": value}) is None
            callback.checkpointer.drain()
            after = inodes(tmp_path / f"epoch_0_step_{step}")
            assert {name: after[name] for name in before} == before  # beside the manifest, nothing written twice
            assert set(after) - set(before) == {"metrics.json"}
            assert callback.best is not None
            assert callback.best.step == [1, 2, 2, 2, 2, 6, 6][step - 1]
            assert callback.latest.step == step
        assert callback.best_metric == 1.25
    found = [item.metrics["val_loss"] for item in scan(tmp_path).checkpoints]
    assert [value for value in found if not math.isnan(value)] == [2.0, 1.5, -math.inf, 1.75, 1.25, 1.25]
    with make(tmp_path) as callback:  # a resumed run knows the best so far
        callback.on_train_begin(state)
        assert callback.best_metric == 1.25
        callback.on_step_end(8, metrics={"val_loss": 3.0})
        callback.on_train_end()
        assert callback.best.step == 6


def test_metrics_known_at_the_save_stand_in_the_manifest_and_more_are_added(tmp_path: Path) -> None:
    state = make_state()
    options = {"best_metric_key": "accuracy", "best_metric_mode": "max"}
    with make(tmp_path, _every_n_steps=1, **options) as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1, metrics={"loss": 3, "accuracy": 0.5})
        callback.on_step_end(2, metrics={"loss": 2})
        callback.on_validation_end({"accuracy": 0.75})
        callback.on_validation_end({"accuracy": 0.8, "f1": 0.1})
        callback.on_step_end(3, metrics={"loss": 1})
        callback.on_validation_end({"accuracy": 0.6})
        callback.checkpointer.drain()
        assert (callback.best_metric, callback.best.step) == (0.8, 2)
    found = scan(tmp_path).checkpoints
    assert found[0].manifest.metrics == {"loss": 3.0, "accuracy": 0.5}
    assert found[1].metrics == {"loss": 2.0, "accuracy": 0.8, "f1": 0.1}


def test_it_must_be_clear_which_metric_decides(tmp_path: Path) -> None:
    state = make_state()
    with make(tmp_path, _every_n_steps=1) as callback:
        callback.on_train_begin(state)
        with pytest.raises(CheckpointConfigError, match="the metrics given are accuracy, loss; set best_metric_key"):
            callback.on_step_end(1, metrics={"loss": 1, "accuracy": 2})
        callback.on_step_end(2, metrics={"loss": 1, "default": 2})
        callback.on_step_end(3, metrics={"loss": 1})
        callback.on_validation_end({"default": 1})
        # What validation gives for one step is no clearer in two parts than at once.
        callback.on_step_end(4)
        with pytest.raises(CheckpointConfigError, match="the metrics given are"):
            callback.on_validation_end({"val_loss": 1, "loss": 2})
        with pytest.raises(CheckpointConfigError, match="'loss': 'high' is not a number"):
            callback.on_validation_end({"loss": "high"})
    with make(tmp_path / "named", _every_n_steps=1, best_metric_key="val_loss") as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1, metrics={"loss": 1, "accuracy": 2})  # none of them decides, and that is fine
        callback.on_validation_end({"loss": 1})
        assert callback.best_metric is None


@pytest.mark.parametrize("metrics", [5, "loss", [("loss", 1.0)], 0, {"lo\ud800ss": 1.0}])
def test_metrics_that_are_no_mapping_or_have_a_name_that_cannot_be_written_are_refused(
    tmp_path: Path, metrics: Any
) -> None:
    state = make_state()
    named = r"metrics=.*takes a mapping" if not isinstance(metrics, dict) else r"metric 'lo\\ud800ss'"
    with make(tmp_path, _every_n_steps=1) as callback:
        callback.on_train_begin(state)
        with pytest.raises(CheckpointConfigError, match=named):
            callback.on_step_end(1, metrics=metrics)
        with pytest.raises(CheckpointConfigError, match=named):
            callback.on_validation_end(metrics)
        with pytest.raises(CheckpointConfigError, match=named):
            callback.checkpointer.save(state, step=2, metrics=metrics)
        assert callback.checkpointer.save(state, step=3, metrics={"loss": 1.0}).result() is not None


def test_on_improvement_saves_only_what_is_better(tmp_path: Path) -> None:
    state = make_state()
    with make(tmp_path, _on_improvement=True) as callback:
        callback.on_train_begin(state)
        saved = []
        for step, value in enumerate([3.0, 4.0, 2.0, math.nan, 2.0, 1.0], start=1):
            callback.on_step_end(step)
            if callback.on_validation_end({"loss": value}) is not None:
                saved.append(step)
        assert saved == [1, 3, 6]
        assert callback.best.step == 6
    assert [item.metrics["loss"] for item in scan(tmp_path).checkpoints] == [3.0, 2.0, 1.0]


# -- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_the_end_adds_the_export_without_writing_training_state_again(tmp_path: Path, is_async: bool) -> None:
    state = make_state()
    with make(tmp_path, _every_n_steps=2, is_async=is_async) as callback:
        callback.on_train_begin(state)
        for step in (1, 2):
            train_step(state)
            pending = callback.on_step_end(step, epoch=1)
        checkpoint = pending.result()
        callback.on_validation_end({"loss": 0.5})
        callback.checkpointer.drain()
        before, parts = inodes(checkpoint.path), checkpoint.manifest.parts
        assert not checkpoint.manifest.exports
        assert not (checkpoint.path / "model" / "consolidated").exists()
        callback.on_train_end()
        after = inodes(checkpoint.path)
        ended = Checkpoint.open(checkpoint.path)
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == {"manifest.json"}
    added = set(after) - set(before)
    assert "model/consolidated/model.safetensors" in added
    assert all(name.startswith(("model/consolidated/", "digests/export-")) for name in added)
    assert ended.manifest.exports == {"model": "model/consolidated"}
    assert ended.manifest.parts == parts
    assert ended.metrics == {"loss": 0.5}
    ended.check_files()
    fresh = make_state()
    with make(tmp_path) as callback:
        report = callback.on_train_begin(fresh)
        assert (report.step, report.epoch) == (2, 1)
        assert torch.equal(fresh.model.weight, state.model.weight)
        callback.on_train_end()  # it has its export already
    assert inodes(checkpoint.path) == after


def test_the_end_of_a_resumed_run_that_was_complete_adds_what_is_missing(tmp_path: Path) -> None:
    state = make_state()
    with make(tmp_path, _every_n_steps=1, save_consolidated="never") as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1, epoch=3)
        callback.on_train_end()
    assert not Checkpoint.open(tmp_path / "LATEST").manifest.exports
    with make(tmp_path) as callback:
        callback.on_train_begin(state)
        callback.on_train_end()
    assert published(tmp_path) == ["epoch_3_step_1"]
    assert Checkpoint.open(tmp_path / "LATEST").manifest.exports


# -- signals -------------------------------------------------------------------------------------------------------


def test_a_signal_saves_at_once_and_stops_and_earlier_handlers_live_on(tmp_path: Path) -> None:
    seen = []

    def earlier(number: int, frame: object) -> None:
        seen.append(number)

    original = signal.signal(signal.SIGUSR1, earlier)
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        state = make_state()
        with make(tmp_path, _signals=["SIGUSR1", "15"]) as callback:
            callback.on_train_begin(state)
            callback.on_step_end(1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert seen == [signal.SIGUSR1]
            assert callback.on_step_end(2) is not None
            assert callback.should_stop
            assert signal.getsignal(signal.SIGTERM) is not terminate
            callback.on_train_end()
        assert steps(tmp_path) == [2]
        assert not Checkpoint.open(tmp_path / "LATEST").manifest.exports
        assert signal.getsignal(signal.SIGUSR1) is earlier
        assert signal.getsignal(signal.SIGTERM) == terminate
    finally:
        signal.signal(signal.SIGUSR1, original)


def test_outside_the_main_thread_signals_are_not_watched_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train() -> None:
        state = make_state()
        with make(tmp_path, _every_n_steps=1) as callback:
            callback.on_train_begin(state)
            callback.on_step_end(1)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train)
    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join()
    assert "signals (SIGTERM) are not watched: training is not running in the main thread" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == before
    assert steps(tmp_path) == [1]


# -- exceptions and closing ----------------------------------------------------------------------------------------


def test_an_exception_drains_what_is_under_way_and_saves_nothing_new(tmp_path: Path) -> None:
    state = make_state()
    with (
        pytest.raises(ZeroDivisionError),
        make(tmp_path, Slow(), _every_n_steps=2, is_async=True) as callback,
    ):
        callback.on_train_begin(state)
        callback.on_step_end(1)
        pending = callback.on_step_end(2)
        callback.on_step_end(3)
        assert not pending.done()
        raise ZeroDivisionError
    assert pending.done()
    assert steps(tmp_path) == [2]
    assert not threads()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_save_on_exception_saves_the_last_step(tmp_path: Path, error: type[BaseException]) -> None:
    state = make_state()
    with pytest.raises(error), make(tmp_path, _every_n_steps=10, _save_on_exception=True) as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1)
        callback.on_step_end(2)
        raise error
    assert steps(tmp_path) == ([2] if error is ZeroDivisionError else [])  # who interrupts does not want to wait


def test_a_failed_background_save_is_raised_at_the_next_step_and_only_once(tmp_path: Path) -> None:
    failing = [True]
    files = FaultyFiles(lambda operation: 28 if failing[0] and operation.kind == "rename" else None)
    state = make_state()
    with make(tmp_path, files, _every_n_steps=2, is_async=True) as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1)
        pending = callback.on_step_end(2)
        pending.wait()
        with pytest.raises(SaveFailedError, match="saving step 2 failed: rank 0: OSError"):
            callback.on_step_end(3)
        failing[0] = False
        callback.on_step_end(4)
        callback.on_step_end(5)
        callback.on_step_end(6)
        callback.on_train_end()
    assert steps(tmp_path) == [4, 6]


def test_a_failed_last_save_is_raised_by_close_unless_an_error_is_on_its_way(tmp_path: Path) -> None:
    files = FaultyFiles(lambda operation: 28 if operation.kind == "rename" else None)
    state = make_state()
    with pytest.raises(SaveFailedError), make(tmp_path, files, _every_n_steps=1, is_async=True) as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1)
    with pytest.raises(KeyError), make(tmp_path, files, _every_n_steps=1, is_async=True) as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1)
        raise KeyError
    assert not threads()


def test_closing_leaves_no_thread_and_can_be_done_twice(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    state = make_state()
    callback = make(tmp_path, _every_n_steps=1, is_async=True, max_recent_checkpoints=1)
    callback.on_train_begin(state)
    callback.on_step_end(1)
    callback.on_step_end(2)
    assert threads()
    callback.close()
    callback.close()
    assert set(threading.enumerate()) <= before
    assert steps(tmp_path) == [2]
    with pytest.raises(CheckpointError, match="closed"):
        callback.checkpointer.save(state, step=3)
    train_step(state)  # the optimizer's hook is gone too


def test_a_callback_that_never_began_closes_quietly(tmp_path: Path) -> None:
    with make(tmp_path / "never"):
        pass
    callback = make(tmp_path / "never")
    callback.on_exception(ValueError())
    callback.on_train_end()
    assert (callback.best, callback.latest, callback.should_stop) == (None, None, False)
    callback.close()
    assert not (tmp_path / "never").exists()


def test_disabled_leaves_no_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, before = make_state(), set(threading.enumerate())
    handler = signal.getsignal(signal.SIGTERM)
    with make(tmp_path / "no", enabled=False, _every_n_steps=1, _save_on_exception=True) as callback:
        assert callback.on_train_begin(state) is None
        assert callback.on_step_end(1, metrics={"loss": 1}) is None
        assert callback.on_validation_end({"loss": 0.5}) is None
        assert callback.on_epoch_end(0) is None
        assert callback.on_step_end(0) is None
        callback.on_train_end()
        assert (callback.best, callback.latest, callback.should_stop, callback.best_metric) == (None, None, False, 0.5)
        assert signal.getsignal(signal.SIGTERM) == handler
        assert set(threading.enumerate()) <= before
    assert not (tmp_path / "no").exists()
    with make(tmp_path / "no", enabled=False, restore_from="epoch_0_step_3") as callback:
        assert callback.on_train_begin(state) is None
    assert "restore_from=epoch_0_step_3 is ignored" in caplog.text
    engine = CheckpointingConfig(enabled=False, checkpoint_dir=str(tmp_path / "no")).build(0, 0, 0)
    assert engine.save(state, step=1).result() is None
    assert engine.load(state) is None
    engine.add_metrics(1, 0, {"loss": 1})
    engine.drain()
    engine.close()
    assert not (tmp_path / "no").exists()


PROGRAM = """
import sys, torch
from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig
from tests.test_callback import Slow, make, make_state, train_step

state = make_state()
callback = make(sys.argv[1], Slow(), _every_n_steps=1, is_async=True)
callback.on_train_begin(state)
train_step(state)
pending = callback.on_step_end(1)
assert not pending.done()
if sys.argv[2] == "raise":
    raise RuntimeError("the loop is broken")
"""


@pytest.mark.parametrize("ending", ["return", "raise"])
def test_a_program_that_ends_without_close_still_publishes(tmp_path: Path, ending: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), ending]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60 * PATIENCE, check=False
    )
    assert done.returncode == (1 if ending == "raise" else 0), done.stderr
    assert ("the loop is broken" in done.stderr) == (ending == "raise")
    assert steps(tmp_path / "run") == [1]
    assert not list((tmp_path / "run").glob(".epoch*"))


# -- two ranks -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nothing_left() -> Iterator[list[CheckpointCallback]]:
    """Whatever the callbacks put into the list opened is gone afterwards: threads, process groups, ports."""
    threads_before = set(threading.enumerate())
    groups_before = len(dist.distributed_c10d._world.pg_map)
    callbacks: list[CheckpointCallback] = []
    yield callbacks
    dist.barrier()
    assert set(threading.enumerate()) <= threads_before
    assert len(dist.distributed_c10d._world.pg_map) == groups_before
    for callback in callbacks:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", callback.port), timeout=5)


def _begin(
    callbacks: list[CheckpointCallback], directory: Path, state: AppState, files: Files | None = None, **options: Any
) -> CheckpointCallback:
    callback = make(directory, files, **options)
    callback.on_train_begin(state)
    callback.port = callback.checkpointer.group._store.port
    callbacks.append(callback)
    return callback


def _two_ranks(root: Path) -> dict[str, Any]:
    rank, state = dist.get_rank(), make_state()
    found: dict[str, Any] = {}
    with nothing_left() as callbacks:
        # Rank 0's clock decides: the other's would never call for a save.
        with _begin(callbacks, root / "clock", state, _every_n_seconds=(0.3, 1e6)[rank]) as callback:
            saved = []
            for step in range(1, 18):
                time.sleep(0.05)
                if callback.on_step_end(step) is not None:
                    saved.append(step)
            found["clock"] = saved

        # A signal on rank 1 alone.
        with _begin(callbacks, root / "signal", state, is_async=True) as callback:
            log = []
            for step in range(1, 8):
                train_step(state)
                if step == 3 and rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                log.append((step, callback.on_step_end(step) is not None, callback.should_stop))
                if callback.should_stop:
                    break
            callback.on_train_end()
            found["signal"] = log

        # Metrics differ between ranks: rank 0's count.
        with _begin(callbacks, root / "metrics", state, _on_improvement=True) as callback:
            saved = []
            for step, mine in enumerate([(3.0, 9.0), (2.0, 99.0), (5.0, 0.0)], start=1):
                callback.on_step_end(step)
                saved.append(callback.on_validation_end({"loss": mine[rank]}) is not None)
            found["metrics"] = saved

        # A save that fails on rank 1 in the background is raised on both at the same step.
        files = FaultyFiles(lambda operation: 5 if rank == 1 and operation.kind == "sync" else None)
        with _begin(callbacks, root / "failed", state, files, _every_n_steps=2, is_async=True) as callback:
            callback.on_step_end(1)
            callback.on_step_end(2).wait()
            callback.on_step_end(3)
            with pytest.raises(SaveFailedError, match="rank 1: OSError"):
                callback.on_step_end(4)

        # All ranks raise, and the last step is saved.
        with (
            pytest.raises(ZeroDivisionError),
            _begin(callbacks, root / "raised", state, _every_n_steps=9, _save_on_exception=True) as callback,
        ):
            callback.on_step_end(1)
            raise ZeroDivisionError

        # Only one raises: it waits for the other no longer than the limit, and nothing half-done is left.
        began = time.monotonic()
        options = {"_save_on_exception": True, "consolidation_timeout_minutes": 0.12, "_every_n_steps": 9}
        with (
            pytest.raises(ZeroDivisionError) if rank == 1 else contextlib.nullcontext(),
            _begin(callbacks, root / "alone", state, **options) as callback,
        ):
            callback.on_step_end(1)
            if rank == 1:
                raise ZeroDivisionError
        found["waited"] = time.monotonic() - began
    return found


def test_two_ranks_decide_together_and_leave_nothing_behind(tmp_path: Path) -> None:
    one, other = run_distributed(_two_ranks, 2, tmp_path)
    assert one["clock"] == other["clock"]
    assert one["clock"]  # on a slow machine, every step may be due
    assert steps(tmp_path / "clock") == one["clock"]
    assert one["signal"] == other["signal"]
    assert one["signal"][2:] == [(3, False, False), (4, True, True)]
    assert steps(tmp_path / "signal") == [4]
    assert not Checkpoint.open(tmp_path / "signal" / "LATEST").manifest.exports
    assert one["metrics"] == other["metrics"] == [True, True, False]
    assert [item.metrics["loss"] for item in scan(tmp_path / "metrics").checkpoints] == [3.0, 2.0]
    assert not steps(tmp_path / "failed")
    assert steps(tmp_path / "raised") == [1]
    assert not steps(tmp_path / "alone")
    assert not list((tmp_path / "alone").glob(".epoch*"))
    assert max(one["waited"], other["waited"]) < 40


def _without_close(root: Path) -> None:
    state = make_state()
    callback = make(root, Slow(), _every_n_steps=1, is_async=True)
    callback.on_train_begin(state)
    callback.on_step_end(1)


def test_two_ranks_that_end_without_close_still_publish(tmp_path: Path) -> None:
    run_distributed(_without_close, 2, tmp_path)
    assert steps(tmp_path) == [1]


# -- seen by users -------------------------------------------------------------------------------------------------


def test_an_added_export_holds_what_was_saved_even_if_the_weights_have_changed_since(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_state()
    with make(tmp_path, _at_steps=[1]) as callback:
        callback.on_train_begin(state)
        train_step(state)
        saved = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
        callback.on_step_end(1)
        for parameter in state.model.parameters():
            parameter.data.zero_()  # an average is swapped in
        callback.on_train_end()
    [export] = (tmp_path / "epoch_0_step_1" / "model" / "consolidated").glob("*.safetensors")
    exported = load_file(export)
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    assert "the weights have changed since step 1 was saved" in caplog.text
    # Unchanged ones are written from memory, without a word.
    caplog.clear()
    with make(tmp_path / "other", _at_steps=[1]) as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1)
        callback.on_train_end()
    assert scan(tmp_path / "other").checkpoints[0].manifest.exports
    assert "changed" not in caplog.text


def test_validation_names_the_metric_that_decides_whatever_steps_report(tmp_path: Path) -> None:
    state = make_state()
    with make(tmp_path, _every_n_steps=1) as callback:
        callback.on_train_begin(state)
        for step, val_loss in enumerate([3.0, 1.0, 2.0], start=1):
            train_step(state)
            callback.on_step_end(step, metrics={"loss": 9 - step})
            callback.on_validation_end({"val_loss": val_loss})
        assert callback.best_metric == 1.0
        callback.on_train_end()
        assert callback.best is not None
        assert callback.best.step == 2
        assert callback.best.metrics == {"loss": 7.0, "val_loss": 1.0}
    with make(tmp_path, _every_n_steps=1) as callback:
        callback.on_train_begin(state)
        assert callback.best_metric == 1.0
        callback.on_step_end(4, metrics={"loss": 1})
        callback.on_validation_end({"val_loss": 1.5})
        callback.on_train_end()
        assert callback.best is not None
        assert (callback.best.step, callback.best_metric) == (2, 1.0)
    with make(tmp_path / "two", _every_n_steps=1) as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1)
        with pytest.raises(CheckpointConfigError, match="the metrics given are a, b"):
            callback.on_validation_end({"a": 1, "b": 2})


def test_switched_off_no_hook_objects_to_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with make(tmp_path / "off", enabled=False, restore_from="best") as callback:
        callback.on_train_begin(make_state())
        callback.on_step_end(3)
        callback.on_step_end(1)
        callback.on_validation_end({"a": 1, "b": 2})
        callback.on_train_end()
    assert caplog.text.count("restore_from=best") == 1
    assert not (tmp_path / "off").exists()


def test_a_save_that_is_due_while_another_is_written_can_be_left_out(tmp_path: Path) -> None:
    state, files = make_state(), Slow()
    with make(tmp_path, files, _every_n_steps=1, is_async=True, when_busy="skip") as callback:
        callback.on_train_begin(state)
        pendings = []
        for step in range(1, 6):
            train_step(state)
            pendings.append(callback.on_step_end(step))
        assert callback.checkpointer is not None
        assert callback.checkpointer.stats.skipped >= 1
        assert [pending.skipped for pending in pendings if pending].count(True) == callback.checkpointer.stats.skipped
        callback.on_train_end()
    found = steps(tmp_path)
    assert found[0] == 1
    assert found[-1] == 5  # the last one waits
    assert len(found) < 5


@pytest.mark.parametrize("model", [None, [], {}, "model", [None]])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(CheckpointConfigError, match=r"expected a torch\.nn\.Module"):
        AppState(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extras": {1: nn.Linear(1, 1)}}, r"extras\[1\]: the name must be a string"),
        ({"extras": {"a/b": nn.Linear(1, 1)}}, r"extras\['a/b'\]: the name must be a string without '/'"),
        ({"extras": {"x": 1}}, r"extras\['x'\] \(int\) has no state_dict\(\)"),
        ({"extras": [nn.Linear(1, 1)]}, "extras: expected a dict of objects by name, got list"),
        ({"extras": nn.Linear(1, 1)}, "extras: expected a dict of objects by name, got Linear"),
        ({"lr_scheduler": object()}, r"lr_scheduler: expected an object with state_dict\(\).* got object"),
        ({"lr_scheduler": [None]}, r"lr_scheduler: expected .* got NoneType"),
    ],
)
def test_what_has_no_state_or_no_name_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointConfigError, match=message):
        AppState(nn.Linear(1, 1), **arguments)
    assert AppState(nn.Linear(1, 1), extras=None).extras == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_a_tensor_that_nothing_could_be_loaded_into_is_refused_at_the_save(tmp_path: Path, kind: str) -> None:
    model = nn.Linear(2, 2)
    if kind == "buffer":
        model.register_buffer("e", torch.ones(1).expand(5))
    else:
        model.register_parameter("e", nn.Parameter(torch.ones(3, 1).expand(3, 4)))
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as engine:
        with pytest.raises(CheckpointError, match=rf"the {kind} e is an expanded view.*\.contiguous\(\)"):
            engine.save(AppState(model), step=1)
        with pytest.raises(CheckpointConfigError, match="an int from 0 up"):
            engine.save(AppState(nn.Linear(2, 2)), step=-1)
        engine.save(AppState(nn.Linear(2, 2)), step=1).result()
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("__metadata__", torch.ones(2), "under the name '__metadata__'"),
        ("~", torch.ones(2), "under the name '~'"),
        ("a\ud800", torch.ones(2), r"the name 'a\\ud800' of a tensor is not valid Unicode text"),
        ("dense", torch.eye(2).to_sparse(), r"dense: tensors of the layout sparse_coo.*\.to_dense\(\)"),
        ("later", nn.UninitializedParameter(), "later is not initialized yet"),
        ("deep", torch.ones((1,) * 65), "deep has 65 dimensions.* at most 64, each"),
        ("long", nn.Parameter(torch.empty(0, 2**62)), r"long has .*each shorter than 2\*\*62"),
    ],
    ids=["metadata", "tag", "surrogate", "sparse", "lazy", "deep", "long"],
)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_what_files_cannot_hold_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str, is_async: bool
) -> None:
    model = nn.Linear(2, 2)
    if isinstance(tensor, nn.Parameter):
        model.register_parameter(name, tensor)
    else:
        model.register_buffer(name, tensor)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path), is_async=is_async).build(0, 0, 0) as engine:
        with pytest.raises(CheckpointConfigError, match=message):
            engine.save(AppState(model), step=1)
        assert [path.name for path in tmp_path.iterdir()] == ["owner.json"]
        engine.save(AppState(nn.Linear(2, 2)), step=1).result()


def test_checkpoints_that_vanished_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = make_state()
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as engine:
        engine.save(state, step=1).result()
    shutil.rmtree(tmp_path / "epoch_0_step_1")
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as engine:
        assert engine.start(state) is None
    assert "LATEST leads to it, but it is gone" in caplog.text


def test_a_launcher_without_a_process_group_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0):
        assert "init_process_group()" in caplog.text


def test_signals_that_cannot_be_caught_are_refused() -> None:
    with pytest.raises(CheckpointConfigError, match="SIGKILL cannot be caught"):
        CheckpointCallback(CheckpointingConfig(), signals=["SIGTERM", "SIGKILL"])


@pytest.mark.parametrize("wait", [False, True])
def test_weights_changed_before_they_are_copied_fail_the_save_and_are_never_published(
    tmp_path: Path, wait: bool
) -> None:
    model = nn.Linear(128, 128)  # small tensors are copied in save()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gate = threading.Event()
    with CheckpointingConfig(checkpoint_dir=str(tmp_path), is_async=True, wait_for_staging=wait).build(
        0, 0, 0
    ) as engine:
        state = AppState(model, optimizer)
        engine.save(state, step=1).result()
        # The background is kept busy, as by a save that takes long.
        engine._saver.background.afterwards(lambda: gate.wait(30 * PATIENCE) and None)
        pending = engine.save(state, step=2)
        before = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.zero_()
        gate.set()
        if wait:
            checkpoint = pending.result()
            [shard] = (checkpoint.path / "model").glob("*.safetensors")
            assert torch.equal(load_file(shard)["weight"], before)
        else:
            with pytest.raises(SaveFailedError, match=r"changed while being copied.*wait_for_staging=true"):
                pending.result()
            engine.save(state, step=3).result()
    assert steps(tmp_path) == ([1, 2] if wait else [1, 3])


def test_a_learning_rate_that_is_a_tensor_is_saved_as_it_was(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1.0), foreach=False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    gate = threading.Event()
    state = AppState(model, optimizer, scheduler)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path), is_async=True).build(0, 0, 0) as engine:
        engine.save(state, step=1).result()
        engine._saver.background.afterwards(lambda: gate.wait(30 * PATIENCE) and None)
        pending = engine.save(state, step=2)
        scheduler.step()
        gate.set()
        pending.result()
        engine.load(state, restore_from="epoch_0_step_2")
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert scheduler.last_epoch == 0


def test_validation_may_change_what_it_measures(tmp_path: Path) -> None:
    with make(tmp_path, _every_n_steps=1) as callback:
        callback.on_train_begin(make_state())
        for step, metrics in enumerate([{"val_a": 2.0}, {"val_a": 1.0, "val_b": 2.0}, {"val_b": 0.0}], start=1):
            callback.on_step_end(step, metrics={"loss": 1.0})
            callback.on_validation_end(metrics)
        assert callback.best_metric == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"staging_dir": "file"}, r"checkpoint\.staging_dir=.*file cannot be written to"),
        ({"model_repo_id": "no/where"}, r"checkpoint\.model_repo_id=no/where"),
        ({"original_model_root_dir": "nowhere"}, r"checkpoint\.original_model_root_dir=.*nowhere is not a directory"),
    ],
)
def test_what_exports_need_is_looked_for_at_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), **options)
    with CheckpointCallback(config, every_n_steps=1000) as callback:
        callback.on_train_begin(AppState(nn.Linear(2, 2)))
        with pytest.raises(CheckpointError, match=message):
            callback.on_step_end(1)
