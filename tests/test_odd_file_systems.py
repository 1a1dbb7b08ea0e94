"""File systems and clocks that answer as few do, and directories in which others delete."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig
from hydra_ckpt.store.catalog import scan

Hook = Callable[[int], object]


def train(
    root: Path,
    last: int,
    *,
    metrics: Mapping[int, float] | None = None,
    hook: Hook = lambda _: None,
    **options: Any,
) -> int:
    """Train up to a step and save each one; returns the step that the run began at."""
    model = torch.nn.Linear(2, 1)
    config = CheckpointingConfig(checkpoint_dir=str(root), save_consolidated="false", **options)
    with CheckpointCallback(config, every_n_steps=1) as callback:
        report = callback.on_train_begin(AppState(model, torch.optim.SGD(model.parameters(), lr=0.1)))
        begun = report.step if report is not None else 0
        for step in range(begun + 1, last + 1):
            found = (metrics or {}).get(step)
            callback.on_step_end(step, metrics=None if found is None else {"loss": found})
            hook(step)
        callback.on_train_end()
    return begun


def saved(root: Path) -> list[int]:
    return [item.step for item in scan(root).checkpoints]


def test_a_directory_that_cannot_be_flushed_is_used_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fsync = os.fsync

    def odd(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", odd)
    root = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        train(root, 2)
        assert train(root, 3) == 2
    told = [record.message for record in caplog.records if "cannot flush directories" in record.message]
    assert sum(message.startswith(f"the file system of {root} ") for message in told) == 1


def test_a_disk_that_fails_to_flush_a_directory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(Exception, match="Input/output error"):
        train(tmp_path / "run", 1)


@pytest.mark.parametrize("number", [524, errno.ENOTTY, errno.EPERM, errno.EIO])
def test_locks_that_answer_oddly_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, "odd")

    monkeypatch.setattr(fcntl, "flock", flock)
    train(tmp_path, 3, max_recent_checkpoints=2)
    assert saved(tmp_path) == [2, 3]
    assert train(tmp_path, 4, max_recent_checkpoints=2) == 3


def test_what_could_not_be_deleted_is_not_published_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, 2)
    unlink = os.unlink

    def busy(path: Any, *arguments: Any, dir_fd: int | None = None) -> None:
        place = "" if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
        if ".deleting" in f"{place}/{os.fspath(path)}":
            raise OSError(errno.EBUSY, "Device or resource busy")
        unlink(path, *arguments, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        train(tmp_path, 4, max_recent_checkpoints=2)
        train(tmp_path, 5, max_recent_checkpoints=2)
    assert saved(tmp_path) == [4, 5]
    train(tmp_path, 6)
    assert saved(tmp_path) == [4, 5, 6]
    assert not list(tmp_path.glob(".*deleting*"))


def test_best_moves_on_if_somebody_deletes_its_checkpoint(tmp_path: Path) -> None:
    def delete(step: int) -> None:
        if step == 5:
            shutil.rmtree(tmp_path / "epoch_0_step_2")

    train(tmp_path, 9, metrics={2: 0.1, 4: 0.5, 6: 0.3, 8: 0.7}, hook=delete)
    best = scan(tmp_path).pointed("BEST")
    assert best is not None
    assert best.step == 6


def test_a_clock_before_its_beginning_makes_readable_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: -5.0)
    train(tmp_path, 2)
    assert train(tmp_path, 3) == 2
