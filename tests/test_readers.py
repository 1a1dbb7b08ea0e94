"""Readers' leases: what is being read, and what cannot be known, is kept."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.store import names, readers
from hydra_ckpt.store.readers import is_read, reading


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "epoch_0_step_1"
    path.mkdir()
    (path / names.MANIFEST).write_text("{}")
    return path


def test_a_checkpoint_is_read_while_any_reader_has_it(checkpoint: Path) -> None:
    assert not is_read(checkpoint)
    with reading(checkpoint):
        with reading(checkpoint):
            assert is_read(checkpoint)
        assert is_read(checkpoint)
    assert not is_read(checkpoint)


@pytest.mark.parametrize("what", ["nothing", "a link", "a directory"])
def test_what_cannot_be_opened_counts_as_read(checkpoint: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    manifest = checkpoint / names.MANIFEST
    manifest.unlink()
    if what == "a link":
        manifest.symlink_to(checkpoint.with_name("elsewhere"))
    elif what == "a directory":
        manifest.mkdir()
    assert is_read(checkpoint)
    assert "unknown whether it is being read" in caplog.text


def test_a_checkpoint_that_is_gone_is_not_read(checkpoint: Path) -> None:
    (checkpoint / names.MANIFEST).unlink()
    with pytest.raises(FileNotFoundError), reading(checkpoint):
        raise AssertionError("it was not there")


def test_a_checkpoint_that_is_retired_while_it_is_opened_is_not_read(checkpoint: Path) -> None:
    """The reader waits for the lock of a run that prunes; when it gets it, the directory has another name."""
    descriptor = os.open(checkpoint / names.MANIFEST, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    def retire() -> None:
        checkpoint.rename(checkpoint.with_name(".retired"))
        os.close(descriptor)

    timer = threading.Timer(0.2, retire)
    timer.start()
    with pytest.raises(FileNotFoundError), reading(checkpoint):
        raise AssertionError("it has been retired")
    timer.join()


def test_a_reader_does_not_wait_for_ever_for_a_stopped_process(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_PATIENCE_S", 0.2)
    with (checkpoint / names.MANIFEST).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="has been locked by another process"), reading(checkpoint):
            raise AssertionError("another process holds it")


def test_a_file_system_without_locks_has_no_leases(checkpoint: Path) -> None:
    descriptor = os.open(checkpoint / names.MANIFEST, os.O_RDONLY)
    os.close(descriptor)
    assert readers._lock(descriptor, fcntl.LOCK_SH)  # EBADF is among the errors of file systems without locks
    with pytest.raises(ValueError, match="descriptor"):
        readers._lock(-1, fcntl.LOCK_SH)
