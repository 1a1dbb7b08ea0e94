"""Metrics: numbers from whatever training hands over, and which of them decides."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Collection, Mapping
from typing import Any

from hydra_ckpt.errors import CheckpointConfigError, some_of

DEFAULT_KEY = "default"


def as_floats(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Each metric as a float.

    Raises:
        CheckpointConfigError: They are not a mapping, a name cannot be written to a file, or `float()` does not take a
            value.
    """
    if metrics is not None and not isinstance(metrics, Mapping):
        raise CheckpointConfigError(f'metrics={metrics!r} is not valid; it takes a mapping such as {{"loss": 0.5}}')
    torch = sys.modules.get("torch")  # a caller with a tensor has imported it
    found = {}
    for name, value in (metrics or {}).items():
        _refuse_unwritable(name)
        try:
            found[str(name)] = float(value.detach() if torch is not None and isinstance(value, torch.Tensor) else value)
        except Exception as error:  # noqa: BLE001 - what float() calls is anybody's code
            raise CheckpointConfigError(f"metric {name!r}: {value!r} is not a number ({error})") from None
    return found


def _refuse_unwritable(name: object) -> None:
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise CheckpointConfigError(
            f"metric {name!r}: the name has a character that cannot be written as UTF-8; give it another name"
        ) from None


def deciding_key(metrics: Mapping[str, float], key: str) -> str | None:
    """The metric that decides: the configured one, or under the default key the only one given; None: none of them.

    Args:
        metrics: What was given.
        key: `checkpoint.best_metric_key`.

    Raises:
        CheckpointConfigError: Under the default key it cannot be told; lists the keys.
    """
    if not metrics or key in metrics:
        return key if metrics else None
    if key == DEFAULT_KEY and len(metrics) == 1:
        return next(iter(metrics))
    if key == DEFAULT_KEY:
        raise CheckpointConfigError(
            f"checkpoint.best_metric_key={key}: the metrics given are {', '.join(sorted(metrics))}; "
            "set best_metric_key to the one that decides which checkpoint is best"
        )
    return None


def absence(key: str, seen: Collection[str]) -> str:
    """What to say where the configured metric has not come, and others have."""
    near = difflib.get_close_matches(key, seen, n=3, cutoff=0.68)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return (
        f"checkpoint.best_metric_key={key}: no metric with this name has been given so far, so no checkpoint is the "
        f"best; the metrics given are {some_of(sorted(seen), 10)}{meant}"
    )


def is_better(value: float, than: float | None, mode: str) -> bool:
    """Whether a metric improves on the best so far; NaN and infinities never do."""
    if not math.isfinite(value):
        return False
    return than is None or (value < than if mode == "min" else value > than)
