"""The job that this process runs, and the signals that come while it does not train."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_ckpt.jobs.signal_names import parse_signals
from hydra_ckpt.store.best_so_far import BestSoFar

__all__ = ["ActiveJob", "activated", "active_job", "shield"]


@dataclass
class ActiveJob:
    """The job that runs in this process now; its callback tells what happens to it.

    Attributes:
        checkpoint_dir: Where its checkpoints are.
        best: The best value so far of the metric that decides; only rank 0 knows it.
        stopped: Whether it was asked to stop before its end.
        exit_code: What the program exits with where the job stopped to be continued later; None where it did not.
        reason: Why it was asked to stop, for people.
        requeue: Called at the end of a stopped job: puts it back into its launcher's queue, and ends the process. None
            where the launcher has no queue, or something else than that launcher stopped the job.
        signal: The signal that came since the job began; noted only in processes that `shield` is called in.
    """

    checkpoint_dir: Path | None = None
    best: BestSoFar | None = None
    stopped: bool = False
    exit_code: int | None = None
    reason: str = ""
    requeue: Callable[[], object] | None = None
    signal: signal.Signals | None = None


# A process runs one job at a time; it is None again behind each of them.
_active: ActiveJob | None = None


def active_job() -> ActiveJob | None:
    """The job this process runs under `resumable_job`, or None."""
    return _active


@contextmanager
def activated() -> Iterator[ActiveJob]:
    """Make a new job the one of this process, until the block ends."""
    global _active  # noqa: PLW0603 - the process has one job, and code far below it has to find it
    before, _active = _active, ActiveJob()
    try:
        yield _active
    finally:
        _active = before


def shield(signals: Any) -> None:
    """Keep signals from ending this process while nothing watches for them; from now on, and in later jobs as well.

    For workers of a launcher that runs jobs side by side: when one of them dies, idle or not, the launcher kills the
    others, unsaved. A signal before training begins stops the job at its first step; between two jobs it does nothing.

    Args:
        signals: What stops a run, as `callbacks.checkpoint.signals` has it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    process = os.getpid()

    def note(number: int, _: object) -> None:
        if os.getpid() != process:  # a child's signal is its own
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif _active is not None:
            _active.signal = signal.Signals(number)

    for number in parse_signals(signals):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, note)
