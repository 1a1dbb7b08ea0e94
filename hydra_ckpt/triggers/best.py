"""The best metric so far, and which metric decides. Pure: no I/O."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hydra_ckpt import metrics as metric
from hydra_ckpt.errors import CheckpointConfigError

log = logging.getLogger(__name__)


class BestMetric:
    """Follows the metric that decides which checkpoint is best.

    Args:
        key: `checkpoint.best_metric_key`.
        mode: "min" or "max".
        enabled: Whether the best metric is used. If not, no metrics are refused.

    Attributes:
        key: The deciding metric, as far as it is known.
        value: Its best value so far, or None.
        refused: The error with which a step's metrics were refused, until `known` raises it.
    """

    def __init__(self, key: str, mode: str, *, enabled: bool) -> None:
        self._configured = self.key = key
        self._mode = mode
        self._enabled = enabled
        self.value: float | None = None
        self.refused: CheckpointConfigError | None = None
        self._validated: dict[str, float] = {}
        self._seen: set[str] = set()
        self._told = False

    def note(self, metrics: Mapping[str, Any] | None) -> dict[str, float]:
        """Record the metrics of a step. An error in them is kept for `known`.

        Returns:
            The metrics as floats.
        """
        self._validated = {}
        try:
            values = metric.as_floats(metrics)
            self._seen.update(values)
            self._consider(values, decisive=False)
        except CheckpointConfigError as error:
            self.refused = error
            return {}
        return values

    def known(self) -> float | None:
        """The best value so far.

        Raises:
            CheckpointConfigError: A step's metrics have been refused.
        """
        if self.refused is not None:
            refused, self.refused = self.refused, None
            raise refused
        return self.value

    def validate(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Record the metrics of a validation.

        Returns:
            Plain data: `values` as floats, whether the best value `improved`, the deciding `key`, the `best` value.

        Raises:
            CheckpointConfigError: Under the default key it is not clear which of them decides.
        """
        values = metric.as_floats(metrics)
        self._seen.update(values)
        # Metrics of one step count together, even if validation reports them in two calls.
        self._validated.update(values)
        improved = self._consider(self._validated, decisive=self._enabled)
        return {"values": values, "improved": improved, "key": self.key, "best": self.value}

    def warn_if_absent(self) -> None:
        """Warn, once, if metrics came but never the configured one. Called when no more can come for a save."""
        expected = self._enabled and self._configured != metric.DEFAULT_KEY
        if expected and not self._told and self._seen and self._configured not in self._seen:
            self._told = True
            log.warning("%s", metric.absence(self._configured, self._seen))

    def _consider(self, values: Mapping[str, float], *, decisive: bool) -> bool:
        """Whether these metrics improve on the best.

        Args:
            values: The measured metrics.
            decisive: Whether the deciding one among them, if none is configured, stays the deciding metric from now on,
                whatever a step's own metrics were. If one is configured, no other metric decides.
        """
        key = self.key
        if key not in values:
            if key != metric.DEFAULT_KEY or (not self._enabled and len(values) > 1):
                return False
            found = metric.deciding_key(values, key)
            if found is None:
                return False
            key = found
        if decisive and key != self.key:
            self.key, self.value = key, None
        if not metric.is_better(values[key], self.value, self._mode):
            return False
        self.value = values[key]
        return True
