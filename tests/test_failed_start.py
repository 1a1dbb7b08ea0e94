"""A start or an end that fails or is interrupted does not keep the directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hydra_ckpt import Checkpointer, CheckpointError, CheckpointingConfig
from hydra_ckpt.files import Files
from hydra_ckpt.testing.processes import PATIENCE
from tests.test_zombies import make_state


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Where a shell has started the tests in the background, interrupts are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def build(root: Path, files: Files | None = None, **options: Any) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=str(root), **options)
    return Checkpointer(config.resolve(), dp_rank=0, tp_rank=0, pp_rank=0, files=files)


def is_released(root: Path) -> bool:
    return bool(json.loads((root / "owner.json").read_text())["released"])


class FailsOnce(Files):
    def __init__(self) -> None:
        self.has_failed = False

    def rename(self, source: Path, target: Path) -> None:
        if not self.has_failed:
            self.has_failed = True
            raise OSError(5, "Input/output error")
        super().rename(source, target)


class InterruptedOnce(Files):
    def __init__(self) -> None:
        self.has_failed = False

    def sync_dir(self, path: Path) -> None:
        if not self.has_failed:
            self.has_failed = True
            signal.raise_signal(signal.SIGINT)
        super().sync_dir(path)


@pytest.mark.parametrize(("files", "error"), [(FailsOnce(), CheckpointError), (InterruptedOnce(), KeyboardInterrupt)])
def test_a_start_that_fails_releases_the_directory(tmp_path: Path, files: Files, error: type[BaseException]) -> None:
    with build(tmp_path) as engine:
        engine.save(make_state(), step=1).result()
    shutil.copytree(tmp_path / "epoch_0_step_1", tmp_path / ".epoch_0_step_7.draft-ab12")
    engine = build(tmp_path, files)
    with pytest.raises(error):
        engine.start(make_state())
    assert is_released(tmp_path)
    assert engine.start(make_state()) is not None  # the same one may try again
    assert not is_released(tmp_path)
    engine.save(make_state(), step=9).result()
    engine.close()
    with build(tmp_path) as other:
        report = other.start(make_state())
        assert report is not None
        assert report.path.name == "epoch_0_step_9"


class SlowManifest(Files):
    """Takes long to publish, and is interrupted meanwhile."""

    def __init__(self) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def write_new(self, path: Path, data: bytes) -> None:
        if path.name == "manifest.json":
            self.begun.set()
            self.goes_on.wait(60 * PATIENCE)
        super().write_new(path, data)


def test_a_second_close_finishes_what_an_interrupted_one_did_not(tmp_path: Path) -> None:
    files = SlowManifest()
    engine = build(tmp_path, files, is_async=True)
    engine.start(make_state())
    pending = engine.save(make_state(), step=1)
    files.begun.wait()
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert not pending.done()
    with pytest.raises(CheckpointError, match="closed"):
        engine.save(make_state(), step=2)
    threading.Timer(0.2, files.goes_on.set).start()
    engine.close()
    assert pending.result() is not None
    assert is_released(tmp_path)
    engine.close()


def test_a_forked_process_does_not_wait_for_a_save_of_its_parent(tmp_path: Path) -> None:
    files = SlowManifest()
    with build(tmp_path, files, is_async=True) as engine:
        engine.start(make_state())
        pending = engine.save(make_state(), step=1)
        files.begun.wait()
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(20)  # ends a child that waits
                pending.wait()
                pending.wait_staged()
                with pytest.raises(CheckpointError, match="forked"):
                    pending.result()
                engine.wait()
                engine.close()
                os._exit(5)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        files.goes_on.set()
        assert os.waitstatus_to_exitcode(status) == 5
        assert pending.result() is not None
        assert not is_released(tmp_path)
