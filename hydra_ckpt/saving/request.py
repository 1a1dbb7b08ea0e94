"""What a caller of `save` asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra_ckpt import metrics as metric
from hydra_ckpt.store import names


@dataclass
class SaveRequest:
    """What a caller of `save` asked for.

    Attributes:
        step: Number of completed optimizer steps.
        epoch: The epoch they were done in.
        metrics: Known so far; floats once `check_metrics` has run.
        consolidated: Whether models are written as Hugging Face directories.
        adds_export: Whether the step is published and only lacks these.
    """

    step: int
    epoch: int
    metrics: dict[str, Any]
    consolidated: bool
    adds_export: bool

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return names.checkpoint_name(self.epoch, self.step)

    def check_metrics(self, key: str) -> None:
        """Make the metrics floats, and see that it can be told which of them decides."""
        self.metrics = metric.as_floats(self.metrics)
        metric.deciding_key(self.metrics, key, required=False)
