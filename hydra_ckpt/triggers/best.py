"""The best metric so far, and which metric that is. Pure: it is told metrics, and judges."""

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
        enabled: Whether anything is decided by it. If not, nothing is objected to.

    Attributes:
        key: The metric that decides, as far as that is known.
        value: Its best value so far, or None.
        refused: What a step's metrics were refused for, until `known` has raised it.
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
        """Take in the metrics of a step. What is wrong with them is kept for `known`.

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
        """Take in the metrics of a validation.

        Returns:
            Plain data: `values` as floats, whether one is an `improved` one, the `key` that decides, the `best` value.

        Raises:
            CheckpointConfigError: Under the default key it cannot be told which of them decides.
        """
        values = metric.as_floats(metrics)
        self._seen.update(values)
        # What validation gives for one step is no clearer in two parts than at once.
        self._validated.update(values)
        improved = self._consider(self._validated, decisive=self._enabled)
        return {"values": values, "improved": improved, "key": self.key, "best": self.value}

    def warn_if_absent(self) -> None:
        """Warn, once, if other metrics have come and never the configured one. Called when a save can get no more."""
        expected = self._enabled and self._configured != metric.DEFAULT_KEY
        if expected and not self._told and self._seen and self._configured not in self._seen:
            self._told = True
            log.warning("%s", metric.absence(self._configured, self._seen))

    def _consider(self, values: Mapping[str, float], *, decisive: bool) -> bool:
        """Whether these metrics improve on the best.

        Args:
            values: What was measured.
            decisive: Whether, where none is configured, the one among them decides from then on, whatever a step's own
                metrics were. Beside a configured one nothing else decides.
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
