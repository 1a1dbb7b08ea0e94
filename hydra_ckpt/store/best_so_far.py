"""The best metric so far, as checkpoints record it: it may have been measured at a step that was not saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_ckpt import metrics as metric
from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.store.catalog import Checkpoint

KEY = "best_so_far"
"""In a manifest's `details`, and in `metrics.json`, which is written later."""
COUNTS_FROM = "best_counts_from"
"""In a manifest's `details`: the step up to which a directory's results come from other values than the run's."""


@dataclass(frozen=True, slots=True)
class BestSoFar:
    """The best value of a run.

    Attributes:
        metric: The metric that decided.
        mode: "min" or "max".
        value: Its best value.
    """

    metric: str
    mode: str
    value: float

    def as_data(self) -> dict[str, Any]:
        """As plain data."""
        return {"metric": self.metric, "mode": self.mode, "value": self.value}


def opened(path: Path | None) -> Checkpoint | None:
    """The checkpoint a run continues from; None for a fresh start, or if another tool wrote it."""
    try:
        return None if path is None else Checkpoint.open(path)
    except (CheckpointError, OSError):
        return None


def best_until(checkpoint: Checkpoint | None, key: str, mode: str) -> float | None:
    """The best value known when a checkpoint got its last metrics.

    Args:
        checkpoint: The checkpoint a run continues from, if any.
        key: The metric that decides now; a value of another metric is ignored.
        mode: "min" or "max".
    """
    if checkpoint is None:
        return None
    best: float | None = None
    for record in (checkpoint.manifest.details.get(KEY), checkpoint.added.get(KEY)):
        value = _value(record, key, mode)
        if value is not None and metric.is_better(value, best, mode):
            best = value
    return best


def counts_from(checkpoint: Checkpoint | None) -> int:
    """The step after which results belong to the run that continues from a checkpoint."""
    step = None if checkpoint is None else checkpoint.manifest.details.get(COUNTS_FROM)
    return step if type(step) is int and step > 0 else 0


def _value(record: object, key: str, mode: str) -> float | None:
    if not isinstance(record, dict) or (record.get("metric"), record.get("mode")) != (key, mode):
        return None
    value = record.get("value")
    try:
        return float(value) if type(value) in (int, float) else None  # type: ignore[arg-type]
    except OverflowError:
        return None
