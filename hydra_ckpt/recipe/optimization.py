"""AdamW and its learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from hydra_ckpt.recipe.settings import OptimizerSettings

__all__ = ["build_optimizer", "build_schedule"]

_LOWEST = 0.1
"""The share of the learning rate that a falling schedule ends at."""


def build_optimizer(parts: Sequence[nn.Module], settings: OptimizerSettings) -> AdamW:
    """AdamW over all parameters that are trained, of a model or of the parts of it that this rank holds."""
    first, second = settings.betas
    # One parameter at a time: under tensor parallelism the parameters are on different meshes, and a fused step over
    # such a list is refused.
    return AdamW(
        [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=(first, second),
        weight_decay=settings.weight_decay,
        foreach=False,
    )


def build_schedule(optimizer: AdamW, settings: OptimizerSettings, max_steps: int) -> LambdaLR:
    """Linear warm-up, then constant, or falling to a tenth along a line or half a cosine."""
    fall = _FALLS[settings.schedule]
    warmup = settings.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
        return _LOWEST + (1 - _LOWEST) * fall(progress)

    return LambdaLR(optimizer, factor)


_FALLS: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
