"""Decodes what `hydra_ckpt.storage.encoding` encoded. Nothing is imported or called for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hydra_ckpt.errors import CheckpointError, CorruptCheckpointError
from hydra_ckpt.storage.encoding import (
    ALIAS,
    ATTRIBUTES,
    DEVICE,
    MESH,
    OWN,
    PLACEMENTS,
    SAME,
    SPLITS,
    STRIDES,
    TAG,
    UNSAVED,
    VIEW,
)
from hydra_ckpt.storage.kinds import DECODERS as PLAIN_DECODERS
from hydra_ckpt.storage.subclasses import put_together

_NO_OTHERS: Mapping[str, Callable[[Any], Any]] = {}
_LEAVES = {bool, float, int, str, type(None)}
OMITTED = object()
"""Placeholder for a value that was left out, until `fill` replaces it."""


def fill(value: Any, live: Any) -> Any:
    """A decoded value in which omitted values come from the live object's own state, or are dropped if it has none.

    Args:
        value: Decoded with OMITTED where something is missing.
        live: What the object's state_dict() returns now.
    """
    if isinstance(value, dict):
        known = live if isinstance(live, Mapping) else {}
        kept = {key: item for key, item in value.items() if item is not OMITTED or key in known}
        for key in value.keys() - kept.keys():
            del value[key]
        for key, item in kept.items():
            value[key] = known[key] if item is OMITTED else fill(item, known.get(key))
    elif isinstance(value, list | tuple):
        there = live if isinstance(live, type(value)) and len(live) == len(value) else [None] * len(value)
        whole = [other if item is OMITTED else fill(item, other) for item, other in zip(value, there, strict=True)]
        if isinstance(value, tuple):
            return tuple.__new__(type(value), whole)
        value[:] = whole
    return value


def decode(
    data: Any,
    tensors: Mapping[str, torch.Tensor],
    others: Mapping[str, Callable[[Any], Any]] = _NO_OTHERS,
    made: dict[str, Any] | None = None,
) -> Any:
    """The value that `encode` was given.

    Args:
        data: What `encode` returned.
        tensors: The tensors that it refers to, by name.
        others: What to make of references to what is stored elsewhere, by their tag.
        made: Objects in several places, by what they are called: one dict for all values that may share them.

    Raises:
        CorruptCheckpointError: The data was not made by `encode`, or a tensor is missing.
        CheckpointError: It holds an enum or a named tuple whose class this program lacks, or has in another form.
    """
    try:
        return _Decoder(tensors, others, {} if made is None else made).value(data)
    except RecursionError:
        raise CorruptCheckpointError("progress", "cannot be decoded: it is nested too deeply") from None


class _Decoder:
    """Decodes values; an object that is in several of them is one object again.

    Args:
        tensors: The tensors that are referred to, by name.
        others: What to make of references to what is stored elsewhere, by their tag.
        made: Objects that are in several places, by what they are called.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        others: Mapping[str, Callable[[Any], Any]],
        made: dict[str, Any],
    ) -> None:
        self._tensors, self._others, self._made = tensors, others, made

    def value(self, data: Any) -> Any:
        """Any value."""
        if isinstance(data, list):
            return data.copy() if _is_flat(data) else [self.value(item) for item in data]
        if not isinstance(data, dict):
            return data
        if TAG not in data:
            return {key: self.value(item) for key, item in data.items()}
        try:
            return self._tagged(data[TAG], data["v"])
        except CheckpointError:
            raise  # some of ours are ValueErrors too
        except (KeyError, ValueError, TypeError, AttributeError, StopIteration, RuntimeError, OverflowError) as error:
            raise CorruptCheckpointError("progress", f"cannot be decoded: {error!r}") from None

    def _tagged(self, tag: str, content: Any) -> Any:
        if tag == "tensor":
            return self._tensors[content]
        if tag in self._others:
            return self._others[tag](content)
        if tag == SAME:
            label, *inner = content
            if inner and label not in self._made:
                self._made[label] = self.value(inner[0])
            return self._made[label]
        return DECODERS[tag](self.value(content))


def _view(content: list[Any]) -> torch.Tensor:
    """A part of a tensor's memory."""
    base, offset, shape, stride = content
    if not all(type(number) is int and number >= 0 for number in (offset, *shape, *stride)):
        raise ValueError("a view whose numbers are not sizes")
    end = offset + sum(step * (size - 1) for step, size in zip(stride, shape, strict=True))
    if isinstance(base, DTensor):
        base = base.full_tensor()  # it was plain; shards of it share memory with nothing
    if not base.is_contiguous() or end >= base.numel():
        raise ValueError("a view that reaches beyond its tensor")
    return torch.as_strided(base, shape, stride, base.storage_offset() + offset)


def _with_attributes(pair: list[Any]) -> Any:
    found, beside = pair
    if any(name.startswith("__") for name in beside):
        raise ValueError("an attribute with a name that Python keeps for itself")
    found.__dict__.update(beside)
    return found


def expanded(data: Any) -> Any:
    """Encoded data in which each place of an object that is in several says what it is."""
    return _expanded(data, {})


def _expanded(data: Any, known: dict[str, Any]) -> Any:
    if isinstance(data, list):
        return [_expanded(item, known) for item in data]
    if not isinstance(data, dict):
        return data
    if data.get(TAG) == SAME and isinstance(data.get("v"), list) and data["v"]:
        label, *inner = data["v"]
        if inner:
            known[label] = _expanded(inner[0], known)
        return {**data, "v": [label, known[label]]} if label in known else data
    return {key: _expanded(item, known) for key, item in data.items()}


DECODERS: Mapping[str, Callable[[Any], Any]] = {
    **PLAIN_DECODERS,
    "wrapped": put_together,
    "expanded": lambda pair: pair[0].expand(pair[1]),
    "parameter": lambda pair: torch.nn.Parameter(pair[0], requires_grad=pair[1]),
    "conj": lambda tensor: tensor.conj(),
    "leaf": lambda tensor: tensor.detach().requires_grad_(),
    ALIAS: lambda tensor: tensor.detach(),
    VIEW: _view,
    ATTRIBUTES: _with_attributes,
    UNSAVED: lambda _: OMITTED,
}
"""From a tag to what makes the value of its decoded content."""


def tensor_names(data: Any) -> list[str]:
    """Names of the tensors that encoded data refers to."""
    return [item["v"] for item in _nodes(data, "tensor")]


def own_names(data: Any) -> list[str]:
    """Names of what encoded data refers to in the files of single ranks."""
    return [item["v"] for item in _nodes(data, OWN)]


def strides(data: Any) -> dict[str, tuple[int, ...]]:
    """The strides of the tensors that encoded data refers to, by name, for those that are not row-major.

    Raises:
        CorruptCheckpointError: They are not valid strides.
    """
    found: dict[str, tuple[int, ...]] = {}
    for item in _nodes(data, "tensor"):
        if STRIDES in item:
            given = item[STRIDES]
            if type(given) is not list or not all(type(step) is int and 0 <= step < 1 << 48 for step in given):
                raise CorruptCheckpointError("progress", f"{item['v']!r} has invalid strides")
            found[item["v"]] = tuple(given)
    return found


def placements(data: Any) -> dict[str, list[int | None]]:
    """For DTensors the sharded dimension of each mesh dimension, by name.

    Raises:
        CorruptCheckpointError: They are not valid dimensions.
    """
    found = {item["v"]: item[PLACEMENTS] for item in _nodes(data, "tensor") if PLACEMENTS in item}
    for name, dims in found.items():
        if type(dims) is not list or not all(dim is None or (type(dim) is int and 0 <= dim < 64) for dim in dims):
            raise CorruptCheckpointError("progress", f"{name!r} has invalid placements")
    return found


def splits(data: Any) -> dict[str, list[int | None]]:
    """For DTensors that are sharded strided, the split factor for each mesh dimension, by name.

    Raises:
        CorruptCheckpointError: They are not valid factors.
    """
    found = {item["v"]: item[SPLITS] for item in _nodes(data, "tensor") if SPLITS in item}
    for name, factors in found.items():
        if type(factors) is not list or not all(one is None or (type(one) is int and one > 0) for one in factors):
            raise CorruptCheckpointError("progress", f"{name!r} has invalid placements")
    return found


def devices(data: Any) -> dict[str, str]:
    """The kind of device of plain tensors that were not in host memory, by name."""
    return {item["v"]: item[DEVICE] for item in _nodes(data, "tensor") if type(item.get(DEVICE)) is str}


def foreign_meshes(data: Any) -> dict[str, list[Any]]:
    """The shape and dimension names of the mesh of each DTensor that was on none of the model's, by name.

    Raises:
        CorruptCheckpointError: They are not valid.
    """
    found = {item["v"]: item[MESH] for item in _nodes(data, "tensor") if MESH in item}
    check_meshes(found)
    return found


def check_meshes(found: Mapping[str, Any]) -> None:
    """Check descriptions of meshes.

    Raises:
        CorruptCheckpointError: One is not a shape and names, or none.
    """
    for name, mesh in found.items():
        shape, names = mesh if type(mesh) is list and len(mesh) == 2 else (None, None)
        if type(shape) is not list or not all(type(size) is int for size in shape):
            raise CorruptCheckpointError("progress", f"{name!r} has an invalid mesh")
        if names is not None and (type(names) is not list or not all(type(item) is str for item in names)):
            raise CorruptCheckpointError("progress", f"{name!r} has an invalid mesh")


def _nodes(data: Any, tag: str) -> Iterator[dict[str, Any]]:
    """The nodes of encoded data with a tag whose content is a name."""
    waiting = [data]  # not by recursion, which takes much longer where there are many values
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict) and item.get(TAG) == tag:
            yield item
        elif isinstance(item, dict):
            waiting += reversed(item.values())
        elif isinstance(item, list) and not _is_flat(item):
            waiting += reversed(item)


def _is_flat(data: list[Any]) -> bool:
    """Whether a list holds nothing but plain values, each as JSON has it."""
    return set(map(type, data)) <= _LEAVES


def missing_from(data: Any) -> bool:
    """Whether encoded data lacks a value that was left out."""
    return next(_nodes(data, UNSAVED), None) is not None
