"""The metric that decides which checkpoint is best, and metrics that arrive after a save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra_ckpt import metrics as metric
from hydra_ckpt.resolved import KeepOptions
from hydra_ckpt.saving.saver import Saver
from hydra_ckpt.store import names
from hydra_ckpt.store.best_so_far import BestSoFar
from hydra_ckpt.store.directory import Directory
from hydra_ckpt.sweeps.active import active_job


class RunMetrics:
    """The metrics of one run.

    Args:
        options: The configured metric.
        directory: Where checkpoints are stored; used by the coordinator only.
        saver: Knows which saves this run has made.
        is_coordinator: Whether this is rank 0, whose metrics count.

    Attributes:
        deciding: The metric that decides: configured, set by `decide_by`, or from an earlier run.
        best_value: Its best value when the run began: from the published checkpoints, up to the one it resumed from.
    """

    def __init__(self, options: KeepOptions, directory: Directory, saver: Saver, *, is_coordinator: bool) -> None:
        self._mode, self._directory, self._saver = options.best_metric_mode, directory, saver
        self._is_coordinator = is_coordinator
        self.deciding = options.best_metric_key
        self.best_value: float | None = None

    def begin(self, found: Mapping[str, Any]) -> None:
        """Continue with what `Directory.settle` has found."""
        self.best_value, self.deciding = found["best"], str(found["deciding"])

    def decide_by(self, key: str) -> None:
        """Let this metric decide from now on."""
        self.deciding = key
        if self._is_coordinator:
            self._directory.decide_by(key)

    def note_best(self, value: float | None) -> None:
        """Set the deciding metric's best value so far."""
        if self._is_coordinator:
            best = None if value is None else BestSoFar(self.deciding, self._mode, value)
            self._directory.best_so_far = best
            job = active_job()
            if job is not None:
                job.best = best

    def add(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Add metrics to a step this run has saved, once it is published."""
        name = names.checkpoint_name(epoch, step)
        if self._is_coordinator and self._saver.known.has(name):
            best = self._directory.best_so_far  # the value now, not when the background runs
            self._saver.background.afterwards(lambda: self._directory.add_metrics(name, values, best))

    def checked(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Metrics as numbers.

        Raises:
            CheckpointConfigError: A value is not a number, or it is not clear which metric decides.
        """
        values = metric.as_floats(metrics)
        metric.deciding_key(values, self.deciding)
        return values
