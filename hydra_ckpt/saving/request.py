"""What a caller of `save` asks for."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from hydra_ckpt import metrics as metric
from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.store import names

# Larger numbers are accidents, and their names would be too long.
_MOST = 10**15


def whole(name: str, value: Any) -> int:
    """A step or an epoch as a plain int.

    Args:
        name: What it is called, for the message.
        value: An int, or what stands for one (NumPy's, a tensor of one element).

    Raises:
        CheckpointConfigError: It is no whole number from 0.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < _MOST:
        raise CheckpointConfigError(
            f"{name}={value!r}: these are counted from 0; give an int (of an epoch that is a float: int(epoch))"
        )
    return number


@dataclass
class SaveRequest:
    """What a caller of `save` asked for.

    Attributes:
        step: Number of completed optimizer steps.
        epoch: The epoch they were done in.
        metrics: Known so far; floats once `check_metrics` has run.
        consolidated: Whether models are written as Hugging Face directories.
        is_final: Whether it is the end of training.
        adds_export: Whether the step is published and only lacks these.
        compares_fully: Whether every byte that several ranks hold is compared.
    """

    step: int
    epoch: int
    metrics: dict[str, Any]
    consolidated: bool
    is_final: bool = False
    adds_export: bool = False
    compares_fully: bool = False

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return names.checkpoint_name(self.epoch, self.step)

    def check_metrics(self, key: str) -> None:
        """Make the metrics floats, and see that it can be told which of them decides."""
        self.metrics = metric.as_floats(self.metrics)
        metric.deciding_key(self.metrics, key)
