"""Finds tensors that share memory here and had different values when they were saved: not all of them can be loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from hydra_ckpt.loading.reading import read_boxes
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.state.optimizer_oracle import same_tensor
from hydra_ckpt.storage.read import Fetch
from hydra_ckpt.storage.sharing import memory_pattern

_ALIGNMENT = 64  # bytes; that of every element type divides it


def overwritten(source: Source, fetches: Sequence[Fetch]) -> dict[int, int]:
    """Which tensors would lose their values because others in the same memory are read after them.

    Equal values may be read into the same memory, as when it was shared by the saved tensors too. So the few tensors
    that share memory are read beforehand, into other memory. Example: `head` and `embedding` share their memory here
    and had different values: the number of `head` to that of `embedding`.

    Args:
        source: The checkpoint, read.
        fetches: What is going to be read into live tensors.

    Returns:
        Number of a tensor to that of one which overwrites it.
    """
    found = {}
    for cluster in _sharing(fetches):
        values = [replace(fetches[number], into=_apart(fetches[number].into)) for number in cluster]
        read_boxes(source, values)
        here, saved = [fetches[number].into for number in cluster], [item.into for item in values]
        found.update({cluster[lost]: cluster[by] for lost, by in _lost(here, saved).items()})
    return found


def _sharing(fetches: Sequence[Fetch]) -> Iterator[list[int]]:
    """Numbers of tensors that share memory, together."""
    clusters: dict[int, list[int]] = defaultdict(list)
    for number, (first, _) in enumerate(memory_pattern([item.into for item in fetches])):
        clusters[first].append(number)
    yield from (cluster for cluster in clusters.values() if len(cluster) > 1)


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


@torch.no_grad()
def _lost(here: Sequence[torch.Tensor], saved: Sequence[torch.Tensor]) -> dict[int, int]:
    """Write values one after the other to memory arranged as that of live tensors; which of them are lost, to what."""
    start = min(item.data_ptr() for item in here) // _ALIGNMENT * _ALIGNMENT
    end = max(item.data_ptr() + _stretch(item) for item in here)
    memory = torch.zeros(end - start, dtype=torch.uint8, device="cpu")
    views = [_view(memory, item, item.data_ptr() - start) for item in here]
    for view, value in zip(views, saved, strict=True):
        view.copy_(value)
    pairs = enumerate(zip(views, saved, strict=True))
    lost = [number for number, (view, value) in pairs if not same_tensor(view, value)]
    return {number: _met_by(number, here) for number in lost}


def _met_by(number: int, here: Sequence[torch.Tensor]) -> int:
    """The last tensor that shares memory with one of them."""
    others = (other for other in reversed(range(len(here))) if other != number)
    return next(other for other in others if here[other] is here[number] or _meet(here[number], here[other]))


def _meet(one: torch.Tensor, other: torch.Tensor) -> bool:
    return len({first for first, _ in memory_pattern([one, other])}) == 1


def _stretch(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    last = sum(step * (size - 1) for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    return (last + 1) * tensor.element_size()


def _view(memory: torch.Tensor, like: torch.Tensor, offset: int) -> torch.Tensor:
    """A tensor over bytes that begin at an offset, with the type, shape and strides of another one."""
    typed = memory[offset : offset + _stretch(like)].view(like.dtype)
    return typed.as_strided(like.shape, like.stride())
