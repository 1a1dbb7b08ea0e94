"""Signals as people write them."""

from __future__ import annotations

import signal
from collections.abc import Iterable

from hydra_ckpt.errors import CheckpointConfigError

__all__ = ["parse_signals"]


def parse_signals(signals: Iterable[str | int] | str | int | None) -> list[signal.Signals]:
    """Signals from names or numbers, each once.

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
    return list(dict.fromkeys(found))  # one may be named twice: SIGTERM, term, 15


def _signal(item: str | int) -> signal.Signals:
    """A signal from SIGTERM, term, "15" or 15."""
    text = str(item).strip().upper()
    if text.isdigit() and not isinstance(item, bool):
        return signal.Signals(int(text))
    return signal.Signals[text if text.startswith("SIG") else f"SIG{text}"]
