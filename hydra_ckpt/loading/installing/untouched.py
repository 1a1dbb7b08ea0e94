"""Finds what objects change while they load their state: tensors they were given, and what belongs to others.

A saved value is compared with the live one after a load. An object may have taken over the very tensors that it was
given, so these are compared by digest with what they were before.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hydra_ckpt.state.optimizer_oracle import differing
from hydra_ckpt.storage.folding import digest_each
from hydra_ckpt.storage.subclasses import is_wrapper, local_part

_CHANGEABLE = (set, bytearray, np.ndarray)


@dataclass(frozen=True)
class Before:
    """Tensors as they were read.

    Attributes:
        names: The name of each piece of memory.
        memory: These pieces.
        digests: What they held.
    """

    names: Sequence[str]
    memory: Sequence[torch.Tensor]
    digests: Sequence[int]

    @classmethod
    @torch.no_grad()
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Before:
        """Look at tensors; nothing is copied."""
        pairs = [(name, memory) for name, tensor in tensors.items() for memory in _memory(tensor)]
        names, memory = [name for name, _ in pairs], [memory for _, memory in pairs]
        return cls(names, memory, digest_each(memory))

    @torch.no_grad()
    def changed(self) -> list[str]:
        """Names of the tensors that hold other values now."""
        now = digest_each(self.memory)
        pairs = zip(self.names, self.digests, now, strict=True)
        return list(dict.fromkeys(name for name, one, other in pairs if one != other))


def _memory(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The memory of this rank's part of a tensor."""
    local = local_part(tensor)
    if not is_wrapper(local):
        yield local
        return
    attributes, _ = local.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in attributes:
        yield from _memory(getattr(local, name))


@dataclass(frozen=True)
class Options:
    """The options of all optimizers' groups at one moment, by dotted name of the optimizer."""

    values: Mapping[str, Sequence[Mapping[str, Any]]]

    @classmethod
    @torch.no_grad()
    def of(cls, optimizers: Mapping[str, Any]) -> Options:
        """Copy them."""
        return cls({name: [_copied(group) for group in _groups(item)] for name, item in optimizers.items()})

    def changed(self, optimizers: Mapping[str, Any]) -> dict[str, list[str]]:
        """For each optimizer the dotted names of the options that differ now."""
        found = {
            name: sorted(differing(self.values[name], [_copied(group) for group in _groups(item)], name))
            for name, item in optimizers.items()
        }
        return {name: options for name, options in found.items() if options}


def _groups(optimizer: Any) -> Sequence[Mapping[str, Any]]:
    return getattr(optimizer, "param_groups", None) or ()


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: snapshot(value, clone=True) for key, value in group.items() if key != "params"}


def snapshot(value: Any, *, clone: bool = False) -> Any:
    """A value as it is now: its containers copied, at every depth; other objects are the same ones.

    Args:
        value: Plain data and tensors.
        clone: Whether tensors are copied too.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if clone else value
    if isinstance(value, dict):
        new = copy.copy(value)  # of the same kind, with the same attributes
        new.update((key, snapshot(item, clone=clone)) for key, item in value.items())
        return new
    if isinstance(value, list | deque):
        items: Any = copy.copy(value)
        for index, item in enumerate(value):
            items[index] = snapshot(item, clone=clone)
        return items
    if isinstance(value, tuple):
        parts = [snapshot(item, clone=clone) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return copy.copy(value) if isinstance(value, _CHANGEABLE) else value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in plain data, at every depth."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | deque):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
