"""The job this process is running, and signals that arrive while it is not training."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_ckpt.jobs.signal_names import parse_signals
from hydra_ckpt.store.best_so_far import BestSoFar

__all__ = ["RESUMABLE", "ActiveJob", "activated", "active_job", "let_through", "shield"]

RESUMABLE = "_hydra_ckpt_resumable"
"""An attribute of functions that `resumable_job` has wrapped."""


@dataclass
class ActiveJob:
    """The job running in this process; its callback reports what happens to it.

    Attributes:
        checkpoint_dir: Where its checkpoints are.
        on_hold: Called by the rank that takes the lease of the checkpoints, once it has it.
        best: The best value so far of the metric that decides; only rank 0 knows it.
        trains: Whether training has begun and not come to its end, as far as a callback knows.
        stopped: Whether it was asked to stop before its end.
        exit_code: The program's exit code if the job stopped to be continued later; otherwise None.
        reason: Why it was asked to stop, for people.
        requeue: Called at the end of a stopped job: puts it back into its launcher's queue, and ends the process. None
            if the launcher has no queue, or did not stop the job itself.
        series: Random text, kept when the job is started again and begins alike.
        continues: Whether an earlier start of the job has that text too.
        signal: The signal received since the job began; recorded only in processes where `shield` was called.
    """

    checkpoint_dir: Path | None = None
    on_hold: Callable[[], None] | None = None
    best: BestSoFar | None = None
    trains: bool = False
    stopped: bool = False
    exit_code: int | None = None
    reason: str = ""
    requeue: Callable[[], object] | None = None
    series: str = ""
    continues: bool = False
    signal: signal.Signals | None = None


# A process runs one job at a time; None between jobs.
_active: ActiveJob | None = None


def active_job() -> ActiveJob | None:
    """The job this process runs under `resumable_job`, or None."""
    return _active


@contextmanager
def activated() -> Iterator[ActiveJob]:
    """Make a new job this process's active job, until the block ends."""
    global _active  # noqa: PLW0603 - the process has one job, and code far below must find it
    before, _active = _active, ActiveJob()
    try:
        yield _active
    finally:
        _active = before


def shield(signals: Any) -> None:
    """Keep signals from ending this process while nothing watches for them, now and in later jobs.

    For workers of a launcher that runs jobs side by side: when one dies, idle or not, the launcher kills the others,
    unsaved. A signal before training begins stops the job at its first step; between two jobs it does nothing.

    Args:
        signals: The signals that stop a run, as in `callbacks.checkpoint.signals`.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    process = os.getpid()

    def note(number: int, _: object) -> None:
        if os.getpid() != process:  # a child process handles its own signals
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif _active is not None:
            _active.signal = signal.Signals(number)

    numbers = parse_signals(signals)
    for number in numbers:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, note)
    let_through(numbers)


def let_through(signals: Iterable[signal.Signals]) -> None:
    """Unblock signals that the launcher has blocked in its workers (`launchers.spawning`); main thread only."""
    if threading.current_thread() is threading.main_thread():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
