"""Keeps stop signals away from the workers of data loaders, so that the training process can save first.

Slurm signals every process of a job step; torchrun, `timeout` and a terminal signal every process of a session. The
workers of PyTorch's loaders die of SIGTERM, and the loader then raises an error in the training process, often before
the step at which the run would have saved. So workers ignore the signals that their run watches. When the training
process has ended, they end within seconds, as always: PyTorch's workers watch for it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Collection
from multiprocessing.util import register_after_fork

# What a DataLoader of torch, or of torchdata, runs in its workers.
_WORKERS = ("torch.utils.data.", "torchdata.")


class WatchedSignals:
    """The signals that the run in this process watches; what forked workers and pickled loaders look at."""

    def __init__(self) -> None:
        self.numbers: frozenset[signal.Signals] = frozenset()

    def set(self, numbers: Collection[signal.Signals]) -> None:
        """Replace them; an empty collection when the run has ended."""
        self.numbers = frozenset(numbers)


watched_signals = WatchedSignals()


def leave_to_parent(numbers: Collection[int]) -> None:
    """Ignore these signals in a worker, unless the process that started it sends them; then end. Main thread only.

    They are blocked and received in a thread, which can see who sent them; a handler cannot. Idempotent.

    Args:
        numbers: The signals that the training process watches.
    """
    parent = multiprocessing.parent_process()
    new = set(numbers) - set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    if parent is None or parent.pid is None or not new or not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, new)
    threading.Thread(target=_receive, args=(new, parent.pid), name="hydra_ckpt-signals", daemon=True).start()


def _receive(numbers: Collection[int], parent: int) -> None:
    while True:
        if signal.sigwaitinfo(numbers).si_pid == parent:
            os._exit(0)  # as PyTorch's own handler does when the loader ends a worker


def _after_fork(watched: WatchedSignals) -> None:
    target = getattr(multiprocessing.current_process(), "_target", None)
    if str(getattr(target, "__module__", "")).startswith(_WORKERS):
        leave_to_parent(watched.numbers)


register_after_fork(watched_signals, _after_fork)
