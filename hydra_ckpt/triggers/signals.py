"""Signals that ask a run to save and stop, chained to whatever handles them already."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from hydra_ckpt.errors import CheckpointConfigError

log = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], Any]


def parse_signals(signals: Iterable[str | int] | str | int | None) -> list[signal.Signals]:
    """Signals from names or numbers.

    Raises:
        CheckpointConfigError: There is no such signal.
    """
    if signals is None:
        return []
    given = [signals] if isinstance(signals, str | int) else signals
    if not isinstance(given, Iterable):
        raise CheckpointConfigError(
            f"callbacks.checkpoint.signals={given!r}: expected the name or number of a signal, such as SIGTERM or 15, "
            "a list of these, or null"
        )
    found = []
    for item in given:
        try:
            found.append(_signal(item))
        except (KeyError, TypeError, ValueError):
            raise CheckpointConfigError(
                f"callbacks.checkpoint.signals: there is no signal {item!r}; give names such as SIGTERM, or numbers"
            ) from None
    for item in {signal.SIGKILL, signal.SIGSTOP}.intersection(found):
        raise CheckpointConfigError(f"callbacks.checkpoint.signals: {item.name} cannot be caught by any program")
    return found


def _signal(item: str | int) -> signal.Signals:
    """A signal from SIGTERM, term, "15" or 15."""
    text = str(item).strip().upper()
    if text.isdigit() and not isinstance(item, bool):
        return signal.Signals(int(text))
    return signal.Signals[text if text.startswith("SIG") else f"SIG{text}"]


class SignalWatch:
    """Notes that a signal came; earlier handlers are called as well, and put back at the end.

    Args:
        signals: Names or numbers.

    Attributes:
        received: The last one that came, or None.
    """

    def __init__(self, signals: Iterable[str | int] | str | int | None) -> None:
        self._signals = parse_signals(signals)
        self._previous: dict[signal.Signals, Any] = {}
        self.received: signal.Signals | None = None
        self._unheard: signal.Signals | None = None

    def install(self) -> None:
        """Start watching; only the main thread can."""
        if not self._signals or self._previous:
            return
        if threading.current_thread() is not threading.main_thread():
            names = ", ".join(item.name for item in self._signals)
            log.warning("signals (%s) are not watched: training does not run in the main thread", names)
            return
        for item in self._signals:
            self._previous[item] = signal.signal(item, self._note)

    def remove(self, *, obeyed: bool) -> None:
        """Put the earlier handlers back. Idempotent.

        Args:
            obeyed: Whether the run has stopped for what came. If not, it is sent again, to do what it would have done;
                an earlier handler of the program's own has been called already.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for item, previous in self._previous.items():
            # None: the earlier handler was not set from Python and cannot be put back.
            signal.signal(item, signal.SIG_DFL if previous is None else previous)
        again = None if obeyed else self._unheard
        self._previous, self.received, self._unheard = {}, None, None
        if again is not None:
            log.info("%s came when there was no step left to stop at; it is sent again", again.name)
            signal.raise_signal(again)

    def _note(self, number: int, frame: FrameType | None) -> None:
        came = self.received = signal.Signals(number)
        previous = self._previous.get(came)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)
        else:
            self._unheard = came
