"""Signals that ask a run to save and stop, chained to their existing handlers."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable
from functools import partial
from types import FrameType
from typing import Any

from hydra_ckpt.jobs.signal_names import parse_signals
from hydra_ckpt.jobs.worker_signals import watched_signals

log = logging.getLogger(__name__)


def _requeues(handler: Any) -> bool:
    """Whether this is submitit's handler that puts the job back into the queue and immediately ends the process."""
    module = str(getattr(handler, "__module__", ""))
    return module.startswith("submitit.") and getattr(handler, "__name__", "") == "checkpoint_and_try_requeue"


class _Link:
    """One of our handlers in a signal's chain; creating it puts it in front. Main thread only.

    Later handlers may keep a reference to it, so it can be called after it has ended, and in forked processes, which
    know nothing about the run. Then it does what would have happened without it.

    Args:
        number: The signal.
        note: Called with the signal, and whether a handler that is not ours is also called.
    """

    def __init__(self, number: signal.Signals, note: Callable[[signal.Signals, bool], None]) -> None:
        self.number = number
        self._note = note
        self._creator = os.getpid()
        self._ended = False
        # None: not set from Python, so it is never called or restored.
        self._before: Any = signal.getsignal(number)
        signal.signal(number, self)

    @property
    def watches(self) -> bool:
        """Whether it has not ended, and this is the process that created it."""
        return not self._ended and self._creator == os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        front, earlier = signal.getsignal(number), self.earlier()
        if self.watches:
            # A handler that ends the process must not run before the save: see `SignalWatch.requeue`.
            passes_on = callable(earlier) and earlier is not signal.default_int_handler and not _requeues(earlier)
            self._note(self.number, passes_on or not isinstance(front, _Link))
            if passes_on:
                earlier(number, frame)
            return
        if _requeues(earlier) and self._creator != os.getpid():
            return  # only the process of the job may requeue it, and it received the signal as well
        if front is self:
            signal.signal(number, earlier)
        if callable(earlier):
            earlier(number, frame)
        elif front is self:  # otherwise the handler in front has been called, as it would be without us
            signal.raise_signal(number)

    @property
    def requeue(self) -> Callable[[], object] | None:
        """Calls the handler that puts the job back into the queue; None if this signal has none."""
        earlier = self.earlier()
        return partial(earlier, int(self.number), None) if _requeues(earlier) else None

    def end(self) -> None:
        """Stop watching; the earlier handler is restored unless another one has been put in front since."""
        self._ended, self._before = True, self.earlier()  # keep no reference to links that have ended
        in_front = signal.getsignal(self.number) is self
        if in_front and threading.current_thread() is threading.main_thread():
            signal.signal(self.number, self._before)

    def earlier(self) -> Any:
        """What would handle the signal without this link, and without links that have ended."""
        if isinstance(self._before, _Link) and not self._before.watches:
            return self._before.earlier()
        return signal.SIG_DFL if self._before is None else self._before


class SignalWatch:
    """Records signals; earlier handlers are also called, and restored at the end.

    The signal with which submitit requeues a job is always watched. Its handler ends the process, so it is not called
    when the signal arrives, but when the stopped job ends; see `requeue`.

    Args:
        signals: Names or numbers.

    Attributes:
        received: The last signal received, or None.
    """

    def __init__(self, signals: Iterable[str | int] | str | int | None) -> None:
        self._signals = parse_signals(signals)
        self._links: list[_Link] = []
        self.received: signal.Signals | None = None
        self._unheard: signal.Signals | None = None

    def install(self) -> None:
        """Start watching. Main thread only; other threads log a warning."""
        queued = [item for item in signal.Signals if _requeues(signal.getsignal(item))]
        signals = list(dict.fromkeys([*self._signals, *queued]))
        if not signals or self._links:
            return
        if threading.current_thread() is not threading.main_thread():
            names = ", ".join(item.name for item in signals)
            log.warning("signals (%s) are not watched: training is not running in the main thread", names)
            return
        self._links = [_Link(item, self._hear) for item in signals]
        watched_signals.set(signals)

    def requeue(self, *, stopped: bool) -> Callable[[], object] | None:
        """What puts the job back into its launcher's queue and ends the process; None if nothing does, or should.

        It should if the launcher's own signal came; on Slurm also if the run stopped without one, because its time was
        up. A local launcher has no queue: the job would restart immediately.

        Args:
            stopped: Whether the run has stopped to be continued.
        """
        without = stopped and self.received is None and os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        for link in self._links:
            if (self.received == link.number or without) and link.requeue is not None:
                return link.requeue
        return None

    def remove(self, *, obeyed: bool) -> None:
        """Restore the earlier handlers, unless others have been put in front since. Idempotent.

        Args:
            obeyed: Whether the run has stopped for the signal. If not, it is raised again for its usual effect, unless
                a handler of the program has already been called.
        """
        # A forked process did not receive the run's signal.
        again = self._unheard if not obeyed and any(link.watches for link in self._links) else None
        for link in self._links:
            link.end()
        watched_signals.set(())
        self._links, self.received, self._unheard = [], None, None
        if again is not None:
            log.info("%s came when there was no step left to stop at; raising it again", again.name)
            signal.raise_signal(again)

    def _hear(self, came: signal.Signals, heard: bool) -> None:
        self.received = came
        if not heard:
            self._unheard = came
