"""The arguments of `save`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra_ckpt import metrics as metric
from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.store import names

# Larger numbers are mistakes, and would make names too long.
_MOST = 10**15


def non_negative_int(name: str, value: Any) -> int:
    """A step or an epoch as a plain int.

    Args:
        name: The argument's name, for the message.
        value: An int, or anything usable as one (a NumPy int, a tensor with one element).

    Raises:
        CheckpointConfigError: It is not a whole number from 0 up.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < _MOST:
        raise CheckpointConfigError(f"{name}={value!r}: pass an int from 0 up (convert a float epoch with int(epoch))")
    return number


@dataclass
class SaveRequest:
    """What a caller of `save` requested.

    Attributes:
        step: Number of completed optimizer steps.
        epoch: The current epoch.
        metrics: Known so far; floats once `check_metrics` has run.
        consolidated: Whether models are written as Hugging Face directories.
        is_final: Whether training has ended.
        adds_export: Whether the step is already published and only lacks these directories.
        compares_fully: Whether to compare every byte that several ranks hold.
    """

    step: int
    epoch: int
    metrics: Mapping[str, Any]
    consolidated: bool
    is_final: bool = False
    adds_export: bool = False
    compares_fully: bool = False

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return names.checkpoint_name(self.epoch, self.step)

    def check_metrics(self, key: str) -> None:
        """Make the metrics floats, and check that one of them decides which checkpoint is best."""
        self.metrics = metric.as_floats(self.metrics)
        metric.deciding_key(self.metrics, key)
