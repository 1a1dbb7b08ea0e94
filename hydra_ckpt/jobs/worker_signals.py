"""Keeps stop signals away from the workers of data loaders, so that the training process can save first.

Slurm signals every process of a job step; torchrun, `timeout` and a terminal signal every process of a session. The
workers of PyTorch's loaders die of SIGTERM, and the loader then raises an error in the training process, often before
the step at which the run would have saved. So workers ignore the signals that their run watches. When the training
process has ended, they end within seconds, as always: PyTorch's workers watch for it.

A worker is in danger from its first moment on, and PyTorch sets a handler of its own a little later. So it begins with
the signals blocked, and lets them through when a handler that does nothing is in place. A blocked or an ignored signal
would be inherited by programs that the worker starts; a handler is not.
"""

from __future__ import annotations

import atexit
import inspect
import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import register_after_fork
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

__all__ = ["WatchedSignals", "blocked_in_workers", "leave_to_parent", "watched_signals"]

# Whose code a DataLoader of torch, or of torchdata, runs in its workers; and what PyTorch calls these processes.
_MODULES = ("torch.utils.data.", "torchdata.")
_PROCESS = "pt_data_worker"
_STARTS_WORKERS = "multiprocessing.popen_fork"
_SET_HANDLERS = "_set_worker_signal_handlers"
_PATIENCE_S = 5.0


class WatchedSignals:
    """The signals that the run in this process watches.

    Attributes:
        numbers: These signals.
        ends: One byte that forked workers share: whether the training process is ending.
    """

    def __init__(self) -> None:
        self.numbers: frozenset[signal.Signals] = frozenset()
        self.ends = mmap.mmap(-1, 1)
        self._is_prepared = False
        self._mask = threading.local()  # of the thread that forks, as it was before

    def set(self, numbers: Collection[signal.Signals]) -> None:
        """Replace them; an empty collection when the run has ended."""
        self.numbers = frozenset(numbers)
        if numbers and not self._is_prepared:
            self._is_prepared = True
            os.register_at_fork(before=self._block, after_in_parent=self._unblock, after_in_child=self._in_child)
            register_after_fork(self, WatchedSignals._in_process)
            atexit.register(_end_workers, os.getpid())

    def _block(self) -> None:
        self._mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, self.numbers)

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask.before)

    def _in_child(self) -> None:
        """In a forked process; those of `multiprocessing` first find out what they are."""
        if not _is_called_by(_STARTS_WORKERS):
            self._unblock()

    def _in_process(self) -> None:
        """In a process of `multiprocessing` that was forked."""
        target = getattr(multiprocessing.current_process(), "_target", None)
        if self.numbers and str(getattr(target, "__module__", "")).startswith(_MODULES):
            _after_torch(lambda: leave_to_parent(self.numbers))
        else:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.numbers)


watched_signals = WatchedSignals()


def leave_to_parent(numbers: Collection[int]) -> None:
    """Ignore these signals in a worker, and let them through. Main thread only.

    Args:
        numbers: The signals that the training process watches.
    """
    for number in numbers:
        signal.signal(number, _ignore)
        signal.siginterrupt(number, False)  # code that reads files may not expect to be interrupted
    with suppress(OSError):
        Path("/proc/self/comm").write_text(_PROCESS)  # as PyTorch does: `_end_workers` knows workers by it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


@contextmanager
def blocked_in_workers() -> Iterator[None]:
    """Let workers that are spawned meanwhile begin with the watched signals blocked; see `leave_to_parent`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched_signals.numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    if watched_signals.ends[0]:
        os._exit(0)  # as PyTorch's own handler does when the training process ends a worker


def _after_torch(step: Callable[[], Any]) -> None:
    """In a worker: do something once PyTorch has set its handlers."""
    from torch.utils.data._utils import signal_handling as torch_signals  # imported already

    set_handlers = getattr(torch_signals, _SET_HANDLERS)

    def then(*arguments: Any) -> None:
        set_handlers(*arguments)
        step()

    setattr(torch_signals, _SET_HANDLERS, then)  # there is no public place between this and the first batch


def _is_called_by(module: str) -> bool:
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None


def _end_workers(process: int) -> None:
    """When the training process ends: end the workers that are left. `multiprocessing` would wait for them for ever."""
    if os.getpid() != process:
        return
    watched_signals.ends[0] = 1
    deadline = time.monotonic() + _PATIENCE_S
    with suppress(Exception):  # PyTorch raises in this thread if a worker fails
        left = [child for child in multiprocessing.active_children() if child.daemon and _is_worker(child.pid)]
        for child in left:
            child.terminate()
        for child in left:
            child.join(max(0.0, deadline - time.monotonic()))
    with suppress(Exception):
        for child in multiprocessing.active_children():
            if child.daemon and _is_worker(child.pid):
                child.kill()


def _is_worker(process: int | None) -> bool:
    try:
        return bool(psutil.Process(process).name() == _PROCESS)
    except psutil.Error:
        return False
