"""File layers for tests: one records every change, one fails on request."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra_ckpt.files import Files, OpenFile


@dataclass(frozen=True)
class Operation:
    """One change on disk.

    Attributes:
        kind: Name of the method of `Files` or `OpenFile`.
        path: What it changed.
        args: Its other arguments; data as bytes.
        at: When, in nanoseconds of this host's monotonic clock: puts the operations of several ranks in order.
    """

    kind: str
    path: Path
    args: tuple[Any, ...] = ()
    at: int = field(default_factory=time.monotonic_ns)


class _Tap(OpenFile):
    """An open file whose changes are reported before they happen."""

    def __init__(self, inner: OpenFile, report: Callable[[Operation], None]) -> None:
        self._inner = inner
        self._report = report
        self.path = inner.path

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        self._report(Operation("write_at", self.path, (offset, bytes(data))))
        self._inner.write_at(offset, data)

    def write_runs(self, offset: int, run: int, count: int, stride: int, data: memoryview) -> None:
        self._report(Operation("write_runs", self.path, (offset, run, count, stride, bytes(data))))
        self._inner.write_runs(offset, run, count, stride, data)

    def sync(self) -> None:
        self._report(Operation("sync", self.path))
        self._inner.sync()


class _Tapped(Files):
    """A file layer that reports every change before it happens."""

    def report(self, operation: Operation) -> None:
        """Called before the change; may raise."""
        raise AssertionError("a subclass says what to do")

    def make_dir(self, path: Path) -> None:
        self.report(Operation("make_dir", path))
        super().make_dir(path)

    def allocate(self, path: Path, nbytes: int) -> None:
        self.report(Operation("allocate", path, (nbytes,)))
        super().allocate(path, nbytes)

    @contextmanager
    def open(self, path: Path, *, direct: bool = False) -> Iterator[OpenFile]:
        with super().open(path, direct=direct) as file:
            yield _Tap(file, self.report)

    def sync_dir(self, path: Path) -> None:
        self.report(Operation("sync_dir", path))
        super().sync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self.report(Operation("rename", source, (target,)))
        super().rename(source, target)

    def replace(self, source: Path, target: Path) -> None:
        self.report(Operation("replace", source, (target,)))
        super().replace(source, target)

    def symlink(self, text: str, path: Path) -> None:
        self.report(Operation("symlink", path, (text,)))
        super().symlink(text, path)

    def unlink(self, path: Path) -> None:
        self.report(Operation("unlink", path))
        super().unlink(path)

    def remove_tree(self, path: Path) -> None:
        self.report(Operation("remove_tree", path))
        super().remove_tree(path)


class RecordingFiles(_Tapped):
    """Records every change; see `replay`.

    Attributes:
        operations: All changes in order, over all threads.
    """

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._lock = threading.Lock()

    def report(self, operation: Operation) -> None:
        """Remember it."""
        with self._lock:
            self.operations.append(operation)


class FaultyFiles(_Tapped):
    """Fails at a chosen operation.

    Args:
        fails: Gets each change before it happens; the number of an error (`errno.ENOSPC`) makes it fail, None not.
    """

    def __init__(self, fails: Callable[[Operation], int | None]) -> None:
        self._fails = fails

    def report(self, operation: Operation) -> None:
        """Fail, or not."""
        number = self._fails(operation)
        if number is not None:
            raise OSError(number, os.strerror(number), str(operation.path))


def replay(operations: Sequence[Operation], origin: Path, target: Path, *, torn: bool = False) -> None:
    """Do recorded changes again below another directory, as if the machine had stopped after the last of them.

    Args:
        operations: What was recorded below `origin`.
        origin: The directory it was recorded in.
        target: A directory in the state that `origin` had before.
        torn: Write only half of the last change, if it is a write.
    """
    files = Files()

    def moved(path: Path) -> Path:
        return target / path.relative_to(origin)

    for number, operation in enumerate(operations):
        half = torn and number == len(operations) - 1
        path, args = moved(operation.path), operation.args
        if operation.kind in ("write_at", "write_runs", "sync"):
            if operation.kind == "write_at" and half:
                args = (args[0], args[1][: len(args[1]) // 2])
            with files.open(path) as file:
                getattr(file, operation.kind)(*args)
        elif operation.kind in ("rename", "replace"):
            getattr(files, operation.kind)(path, moved(args[0]))
        elif operation.kind == "symlink":
            files.symlink(args[0], path)
        elif operation.kind == "remove_tree" and half:
            _remove_some(path)
        else:
            getattr(files, operation.kind)(path, *args)


def _remove_some(path: Path) -> None:
    """What an interrupted removal leaves: every other file gone."""
    everything = sorted(item for item in path.rglob("*") if item.is_file())
    for item in everything[::2]:
        item.unlink()
