"""A model cut into the stages of a pipeline. Each keeps the names that its tensors have in the whole model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["cut"]


class _Elsewhere(nn.Module):
    """Replaces a layer that another stage has."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns its input."""
        return hidden_states


def cut(model: Any, stages: int, wanted: list[int]) -> list[Any]:
    """Stages of a language model, each with a run of its layers; the first embeds, the last has norm and head.

    Args:
        model: The whole model; it is not changed.
        stages: The number of stages.
        wanted: The numbers of those that are returned.
    """
    return [_stage(copy.deepcopy(model), stages, number) for number in wanted]


def _stage(part: Any, stages: int, number: int) -> Any:
    count = len(part.model.layers)
    mine = range(count * number // stages, count * (number + 1) // stages)
    for index in range(count):
        if index not in mine:
            part.model.layers[index] = _Elsewhere()
    if number > 0:
        part.model.embed_tokens = _Elsewhere()
    if number < stages - 1:
        part.model.norm, part.lm_head = _Elsewhere(), _Elsewhere()
    return part
