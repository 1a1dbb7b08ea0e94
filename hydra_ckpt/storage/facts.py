"""What is to be known of a single tensor: its strides, whether its elements are separate, and what Python put on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from hydra_ckpt.storage.dtypes import SAFETENSORS_DTYPE

# Notes of the compiler, for this process alone.
_COMPILER = "_dynamo_"
_STRIDED = torch.strided


def attributes(value: Any) -> dict[str, Any]:
    """What Python code has put on a value, but for the notes of torch.compile, which are for one process alone."""
    return {name: item for name, item in getattr(value, "__dict__", {}).items() if not name.startswith(_COMPILER)}


def narrowed(value: torch.Tensor) -> torch.Tensor:
    """An expanded view before it was expanded: the first column of a (3, 4) tensor with strides (1, 0)."""
    for dim, stride in enumerate(value.stride()):
        if stride == 0 and value.shape[dim] > 1:
            value = value.narrow(dim, 0, 1)
    return value


def is_ordinary(value: Any) -> bool:
    """Whether a value is a plain row-major tensor, as nearly all are: its name says everything."""
    return (
        type(value) is torch.Tensor
        and value.dtype in SAFETENSORS_DTYPE
        and value.layout is _STRIDED
        and value.stride() == row_major(value.shape)
        and not value.requires_grad
        and not value.__dict__
    )


@lru_cache(maxsize=4096)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a row-major tensor. Example: (12, 4, 1) for the shape (2, 3, 4)."""
    found, step = [], 1
    for size in reversed(shape):
        found.append(step)
        step *= max(size, 1)
    return tuple(reversed(found))


def is_apart(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether no two elements share memory. Example: (3, 4) with strides (1, 3) is; with (2, 1) it is not."""
    end = 0
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
        if step <= end:
            return False
        end += step * (size - 1)
    return True
