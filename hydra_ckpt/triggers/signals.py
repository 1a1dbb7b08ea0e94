"""Signals that ask a run to save and stop, chained to whatever handles them already."""

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

log = logging.getLogger(__name__)


def _requeues(handler: Any) -> bool:
    """Whether a handler is submitit's that puts the job back into the queue, and ends the process on the spot."""
    module = str(getattr(handler, "__module__", ""))
    return module.startswith("submitit.") and getattr(handler, "__name__", "") == "checkpoint_and_try_requeue"


class _Link:
    """One handler of ours in the chain of a signal; in front as soon as it is made, which only the main thread can.

    Whoever comes later may hold on to it, so it can be called when it is over, and in forked processes, which know
    nothing of the run. There it does what would have happened without it.

    Args:
        number: The signal; kept.
        note: Called with the signal, and whether a handler that is not ours hears of it as well.
    """

    def __init__(self, number: signal.Signals, note: Callable[[signal.Signals, bool], None]) -> None:
        self.number = number
        self._note = note
        self._process: int | None = os.getpid()
        # None: not set from Python, and so never to be called or put back.
        self._before: Any = signal.getsignal(number)
        signal.signal(number, self)

    @property
    def watches(self) -> bool:
        """Whether it is not over, and this is the process that made it."""
        return self._process == os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        front, earlier = signal.getsignal(number), self.earlier()
        if self.watches:
            # One that ends the process must not come before the save: see `SignalWatch.requeue`.
            passes_on = callable(earlier) and earlier is not signal.default_int_handler and not _requeues(earlier)
            self._note(self.number, passes_on or not isinstance(front, _Link))
            if passes_on:
                earlier(number, frame)
            return
        if front is self:
            signal.signal(number, earlier)
        if callable(earlier):
            earlier(number, frame)
        elif front is self:  # what stands in front has been called, and would be so without us
            signal.raise_signal(number)

    @property
    def requeue(self) -> Callable[[], object] | None:
        """Calls the handler that puts the job back into the queue; None where this signal has none."""
        earlier = self.earlier()
        return partial(earlier, int(self.number), None) if _requeues(earlier) else None

    def end(self) -> None:
        """Watch no longer; what was there before is put back if nobody else has come in front since."""
        self._process, self._before = None, self.earlier()  # those that are over are not held on to
        in_front = signal.getsignal(self.number) is self
        if in_front and threading.current_thread() is threading.main_thread():
            signal.signal(self.number, self._before)

    def earlier(self) -> Any:
        """What would handle the signal without this one, and without links that are over."""
        if isinstance(self._before, _Link) and not self._before.watches:
            return self._before.earlier()
        return signal.SIG_DFL if self._before is None else self._before


class SignalWatch:
    """Notes that a signal came; earlier handlers are called as well, and put back at the end.

    The signal by which submitit puts a job back into its queue is watched in any case. Its handler ends the process, so
    it is not called when the signal comes, but by whoever ends the stopped job; see `requeue`.

    Args:
        signals: Names or numbers.

    Attributes:
        received: The last one that came, or None.
    """

    def __init__(self, signals: Iterable[str | int] | str | int | None) -> None:
        self._signals = parse_signals(signals)
        self._links: list[_Link] = []
        self.received: signal.Signals | None = None
        self._unheard: signal.Signals | None = None

    def install(self) -> None:
        """Start watching; only the main thread can."""
        queued = [item for item in signal.Signals if _requeues(signal.getsignal(item))]
        signals = list(dict.fromkeys([*self._signals, *queued]))
        if not signals or self._links:
            return
        if threading.current_thread() is not threading.main_thread():
            names = ", ".join(item.name for item in signals)
            log.warning("signals (%s) are not watched: training does not run in the main thread", names)
            return
        self._links = [_Link(item, self._hear) for item in signals]

    def requeue(self, *, stopped: bool) -> Callable[[], object] | None:
        """What puts the job back into its launcher's queue, and ends the process; None where nothing does, or should.

        It should where the launcher's own signal came; on Slurm also where the run has stopped without one, because its
        time was up. A local launcher has no queue to wait in: the job would start again at once.

        Args:
            stopped: Whether the run has stopped to be continued.
        """
        without = stopped and self.received is None and os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        for link in self._links:
            if (self.received == link.number or without) and link.requeue is not None:
                return link.requeue
        return None

    def remove(self, *, obeyed: bool) -> None:
        """Put the earlier handlers back, where nobody else has come in front since. Idempotent.

        Args:
            obeyed: Whether the run has stopped for what came. If not, it is sent again, to do what it would have done;
                another handler of the program's own has been called already.
        """
        # A forked process has not got what came to the run.
        again = self._unheard if not obeyed and any(link.watches for link in self._links) else None
        for link in self._links:
            link.end()
        self._links, self.received, self._unheard = [], None, None
        if again is not None:
            log.info("%s came when there was no step left to stop at; it is sent again", again.name)
            signal.raise_signal(again)

    def _hear(self, came: signal.Signals, heard: bool) -> None:
        self.received = came
        if not heard:
            self._unheard = came
