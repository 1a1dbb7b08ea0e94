"""The best metric so far, and which metric that is. Pure: it is told metrics, and judges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra_ckpt import metrics as metric
from hydra_ckpt.errors import CheckpointConfigError


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

    def note(self, metrics: Mapping[str, Any] | None) -> dict[str, float]:
        """Take in the metrics of a step. What is wrong with them is kept for `known`.

        Returns:
            The metrics as floats.
        """
        self._validated = {}
        try:
            values = metric.as_floats(metrics)
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
            CheckpointConfigError: It cannot be told which of them decides.
        """
        values = metric.as_floats(metrics)
        # What validation gives for one step is no clearer in two parts than at once.
        self._validated.update(values)
        improved = self._consider(self._validated, decisive=self._enabled)
        return {"values": values, "improved": improved, "key": self.key, "best": self.value}

    def _consider(self, values: Mapping[str, float], *, decisive: bool) -> bool:
        """Whether these metrics improve on the best.

        Args:
            values: What was measured.
            decisive: Whether one of them must be the metric that decides. Where none is configured, the one that
                validation gives decides from then on, whatever a step's own metrics were.
        """
        key = self.key
        if key not in values:
            settled = key != metric.DEFAULT_KEY or (not self._enabled and len(values) > 1)
            learned = settled and self._configured == metric.DEFAULT_KEY
            if settled and (learned or not decisive):
                return False
            found = metric.deciding_key(values, key, required=decisive)
            if found is None:
                return False
            key = found
        if decisive and key != self.key:
            self.key, self.value = key, None
        if not metric.is_better(values[key], self.value, self._mode):
            return False
        self.value = values[key]
        return True
