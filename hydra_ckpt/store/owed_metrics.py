"""Metrics that arrived after a checkpoint was published: written to it at once, or with the next attempt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.store.best_so_far import BestSoFar

log = logging.getLogger(__name__)


@dataclass
class Owed:
    """Metrics of a checkpoint that are not on disk yet.

    Attributes:
        metrics: The metrics.
        best: The run's best value when they arrived.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    best: BestSoFar | None = None


class OwedMetrics:
    """What is still to be written, by checkpoint. Coordinator only.

    Args:
        write: Writes to the checkpoint of a name.
    """

    def __init__(self, write: Callable[[str, Owed], None]) -> None:
        self._write = write
        self._owed: dict[str, Owed] = {}

    def __bool__(self) -> bool:
        return bool(self._owed)

    def __str__(self) -> str:
        return str({name: owed.metrics for name, owed in self._owed.items()})

    def add(self, name: str, metrics: Mapping[str, float], best: BestSoFar | None) -> None:
        """Add metrics of a checkpoint, and the run's best value."""
        owed = self._owed.setdefault(name, Owed())
        owed.metrics.update(metrics)
        owed.best = best or owed.best

    def keep_only(self, kept: Collection[str]) -> None:
        """Forget those of checkpoints of other names."""
        self._owed = {name: owed for name, owed in self._owed.items() if name in kept}

    def write(self) -> None:
        """Write everything; what cannot be written now is kept, with a warning."""
        for name, owed in list(self._owed.items()):
            try:
                self._write(name, owed)
            except CheckpointError as error:  # the checkpoint is gone or damaged, or another run has the directory
                log.warning("metrics of %s could not be added: %s", name, error)
            except OSError as error:
                log.warning(
                    "metrics of %s cannot be written now (%s); they are kept, and the write will be tried again",
                    name,
                    error,
                )
                continue
            del self._owed[name]
