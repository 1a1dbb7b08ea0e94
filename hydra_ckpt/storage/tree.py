"""Nested Python values as JSON plus named tensors; nothing is pickled.

What JSON does not know is an object with the key "~": `{"~": "tuple", "v": [...]}`. Tensors are referred to by name;
one that does not lie row by row says its strides: `{"~": "tensor", "v": "m", "s": [1, 3]}` for a transposed (3, n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from hydra_ckpt.errors import CheckpointError, CorruptCheckpointError
from hydra_ckpt.storage.dtypes import SAFETENSORS_DTYPE
from hydra_ckpt.storage.kinds import DECODERS as PLAIN_DECODERS
from hydra_ckpt.storage.kinds import NotExactError, tagged
from hydra_ckpt.storage.subclasses import check_wrapper, is_wrapper, local_part, put_together, take_apart

_TAG, _STRIDES, _PLACEMENTS = "~", "s", "p"
# What is not in the tree but beside it: left out, or in the file of each rank.
UNSAVED, OWN = "unsaved", "own"
_AS_THEY_ARE = {int, str, bool, type(None)}
_STRIDED = torch.strided
_TENSORS = (torch.Tensor, torch.nn.Parameter)


class Sink(dict[str, torch.Tensor]):
    """Takes the tensors of one object's state by name, and knows what is stored elsewhere and what is left out.

    Args:
        inside: What the names of its tensors begin with.
        called: What messages and `allow_unsaved` call the object instead: `extras.ema`.
        known: Identity of a tensor that is stored elsewhere, to the JSON data that refers to it there.
        unsaved: Patterns of dotted names that are left out.

    Attributes:
        omitted: Dotted names of the values that were left out.
        own: DTensors whose shards are tensor subclasses, by name: each rank has to store its own.
        tells_placements: Whether DTensors say in the data how they are placed.
    """

    tells_placements = False

    def __init__(
        self, inside: str, called: str, known: Mapping[int, Any] | None = None, unsaved: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.inside, self.called = inside, called
        self.known = known or {}
        self.unsaved = unsaved
        self.omitted: list[str] = []
        self.own: dict[str, torch.Tensor] = {}

    def another(self, known: Mapping[int, Any] | None = None) -> Sink:
        """An empty one for another part of the same object."""
        return Sink(self.inside, self.called, known, self.unsaved)

    def dotted(self, name: str) -> str:
        """The name of a value as users write it."""
        inner = name.removeprefix(self.inside).replace(":", ".").strip(".")
        return f"{self.called}.{inner}" if inner else self.called

    def omits(self, name: str) -> bool:
        """Whether a value is to be left out; takes note of it if it is."""
        found = any(fnmatchcase(self.dotted(name), pattern) for pattern in self.unsaved)
        if found:
            self.omitted.append(self.dotted(name))
        return found


def encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON data; its tensors are added to `tensors` under names that begin with `name`.

    Args:
        value: Plain data, tensors, and containers of both.
        name: What the names of its tensors begin with, and what messages call it.
        tensors: Takes the tensors; a `Sink` can do more.

    Raises:
        CheckpointError: A value fits neither JSON nor a tensor; the message names its place.
    """
    kind = type(value)
    if _omits(tensors, name):
        return _tagged(UNSAVED, None)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else _tagged("float", repr(value))
    if isinstance(value, torch.Tensor):
        return _tensor(value, name, tensors)
    if kind is dict:
        return _dict(value, name, tensors)
    if kind is list:
        if set(map(type, value)) <= _AS_THEY_ARE:  # the state of Python's generator has 625 numbers
            return list(value)
        return [encode(item, _join(name, str(index)), tensors) for index, item in enumerate(value)]
    try:
        found = tagged(value)
    except NotExactError as error:
        raise _unknown(value, name, tensors, f": {error}") from None
    if found is None:
        raise _unknown(value, name, tensors, "")
    return _tagged(found[0], encode(found[1], name, tensors))


def _unknown(value: Any, name: str, tensors: dict[str, torch.Tensor], why: str) -> CheckpointError:
    kind = type(value)
    return _refused(
        name,
        tensors,
        f"a {kind.__module__}.{kind.__qualname__} can be stored neither as JSON nor as a tensor{why}. "
        "Let state_dict() return numbers, texts, lists, dicts and tensors only",
    )


def _omits(tensors: dict[str, torch.Tensor], name: str) -> bool:
    return isinstance(tensors, Sink) and bool(tensors.unsaved) and tensors.omits(name)


def _refused(name: str, tensors: dict[str, torch.Tensor], why: str) -> CheckpointError:
    """The error for a value that cannot be stored, with both ways out."""
    if not isinstance(tensors, Sink):
        return CheckpointError(f"{name}: {why}")
    dotted = tensors.dotted(name)
    return CheckpointError(f"{dotted}: {why}, {leave_out(dotted)}")


def leave_out(dotted: str) -> str:
    """The last remedy of every refusal: how to train on without a value in the checkpoint."""
    return f'or, if it may be lost, leave it out: checkpoint.allow_unsaved=["{dotted}"]'


def _join(name: str, key: str) -> str:
    return f"{name}{key}" if not name or name.endswith(":") else f"{name}.{key}"


def _tagged(tag: str, content: Any) -> dict[str, Any]:
    return {_TAG: tag, "v": content}


def _tensor(value: torch.Tensor, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if isinstance(tensors, Sink) and (known := tensors.known.get(id(value))) is not None:
        return dict(known)
    if name in tensors:
        raise CheckpointError(
            f"{name}: two tensors would have this name; let no key contain a dot, or be a text of digits"
        )
    local = local_part(value)
    if is_wrapper(local):
        return _wrapped(value, local, name, tensors)
    if type(value) not in _TENSORS and not isinstance(value, DTensor):
        raise _refused(name, tensors, f"a {type(value).__qualname__} is a tensor of a class that cannot be stored")
    if value.is_meta:
        raise _refused(name, tensors, "a tensor on the meta device has no values; move it to a device")
    if value.dtype not in SAFETENSORS_DTYPE or value.layout != torch.strided or value.is_nested:
        raise _refused(name, tensors, f"a tensor of {value.dtype}, {value.layout} cannot be stored; convert it")
    if isinstance(value, torch.nn.Parameter):
        return _tagged("parameter", [_tensor(value.detach(), name, tensors), value.requires_grad])
    if value.requires_grad and value.is_leaf:
        return _tagged("leaf", _tensor(value.detach(), name, tensors))
    return _strided(value, name, tensors)


def _strided(value: torch.Tensor, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A tensor with memory of its own, by its name, and how it lies and is placed."""
    found = _tagged("tensor", name)
    if (lies := value.stride()) != row_major(value.shape):
        if any(step == 0 and size > 1 for step, size in zip(lies, value.shape, strict=True)):
            return _expanded(value, name, tensors)
        if not _is_apart(value.shape, lies):
            raise _refused(name, tensors, "its elements share memory with each other; store a .contiguous() one")
        found[_STRIDES] = list(lies)
    if isinstance(value, DTensor) and isinstance(tensors, Sink) and tensors.tells_placements:
        found[_PLACEMENTS] = [placement.dim if isinstance(placement, Shard) else None for placement in value.placements]
    tensors[name] = value
    return found


def is_ordinary(value: Any) -> bool:
    """Whether a value is a plain tensor that lies row by row, as nearly all are: its name says everything."""
    return (
        type(value) is torch.Tensor
        and value.dtype in SAFETENSORS_DTYPE
        and value.layout is _STRIDED
        and value.stride() == row_major(value.shape)
    )


@lru_cache(maxsize=4096)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor that lies row by row. Example: (12, 4, 1) for the shape (2, 3, 4)."""
    found, step = [], 1
    for size in reversed(shape):
        found.append(step)
        step *= max(size, 1)
    return tuple(reversed(found))


def _expanded(value: torch.Tensor, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """An expanded view by what it was expanded from: a (3, 4) tensor with strides (1, 0) by its first column."""
    if isinstance(value, DTensor):
        raise _refused(
            name, tensors, "it is an expanded DTensor, whose elements share memory; store a .contiguous() one"
        )
    narrow = value
    for dim, stride in enumerate(value.stride()):
        narrow = narrow.narrow(dim, 0, 1) if stride == 0 and value.shape[dim] > 1 else narrow
    return _tagged("expanded", [_tensor(narrow, name, tensors), list(value.shape)])


def _is_apart(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether no two elements are one in memory. Example: (3, 4) with strides (1, 3) is; with (2, 1) it is not."""
    end = 0
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
        if step <= end:
            return False
        end += step * (size - 1)
    return True


def _wrapped(value: torch.Tensor, local: torch.Tensor, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A tensor subclass by its inner tensors. Those of a shard are this rank's alone: nobody can cut them otherwise."""
    try:
        check_wrapper(local)
    except CheckpointError as error:
        raise _refused(name, tensors, str(error)) from None
    if local is not value:
        if not isinstance(tensors, Sink):
            raise CheckpointError(f"{name}: shards of a {type(local).__qualname__} cannot be stored here")
        tensors.own[name] = value
        return _tagged(OWN, name)
    return _tagged("wrapped", encode(take_apart(local), name, tensors))


def _dict(value: Mapping[Any, Any], name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if all(type(key) is str for key in value) and _TAG not in value:
        return {key: encode(item, _join(name, key), tensors) for key, item in value.items()}
    pairs = [
        [encode(key, _join(name, "<key>"), tensors), encode(item, _join(name, str(key)), tensors)]
        for key, item in value.items()
    ]
    return _tagged("map", pairs)


_NO_OTHERS: Mapping[str, Callable[[Any], Any]] = {}
OMITTED = object()
"""What takes the place of a value that was left out, until `fill` knows better."""


def fill(value: Any, live: Any) -> Any:
    """A decoded value with what was left out taken from the live object's own state; dropped where that has none.

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
    data: Any, tensors: Mapping[str, torch.Tensor], others: Mapping[str, Callable[[Any], Any]] = _NO_OTHERS
) -> Any:
    """The value that `encode` was given.

    Args:
        data: What `encode` returned.
        tensors: The tensors that it refers to, by name.
        others: What to make of references to what is stored elsewhere, by their tag.

    Raises:
        CorruptCheckpointError: The data was not made by `encode`, or a tensor is missing.
        CheckpointError: It holds an enum or a named tuple whose class this program has not, or has otherwise.
    """
    if isinstance(data, list):
        return [decode(item, tensors, others) for item in data]
    if not isinstance(data, dict):
        return data
    if _TAG not in data:
        return {key: decode(item, tensors, others) for key, item in data.items()}
    try:
        tag, content = data[_TAG], data["v"]
        if tag == "tensor":
            return tensors[content]
        if tag in others:
            return others[tag](content)
        return DECODERS[tag](decode(content, tensors, others))
    except CheckpointError:
        raise  # some of ours are ValueErrors too
    except (KeyError, ValueError, TypeError, AttributeError, StopIteration, RuntimeError) as error:
        raise CorruptCheckpointError("progress", f"cannot be decoded: {error!r}") from None


DECODERS: Mapping[str, Callable[[Any], Any]] = {
    **PLAIN_DECODERS,
    "wrapped": put_together,
    "expanded": lambda pair: pair[0].expand(pair[1]),
    "parameter": lambda pair: torch.nn.Parameter(pair[0], requires_grad=pair[1]),
    "leaf": lambda tensor: tensor.detach().requires_grad_(),
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
    """The strides of the tensors that encoded data refers to, by name, of those that do not lie row by row.

    Raises:
        CorruptCheckpointError: They are no strides.
    """
    found: dict[str, tuple[int, ...]] = {}
    for item in _nodes(data, "tensor"):
        if _STRIDES in item:
            given = item[_STRIDES]
            if type(given) is not list or not all(type(step) is int and 0 <= step < 1 << 48 for step in given):
                raise CorruptCheckpointError("progress", f"{item['v']!r} has strides that are none")
            found[item["v"]] = tuple(given)
    return found


def placements(data: Any) -> dict[str, list[int | None]]:
    """For DTensors the sharded dimension of each mesh dimension, by name.

    Raises:
        CorruptCheckpointError: They are no dimensions.
    """
    found = {item["v"]: item[_PLACEMENTS] for item in _nodes(data, "tensor") if _PLACEMENTS in item}
    for name, dims in found.items():
        if type(dims) is not list or not all(dim is None or (type(dim) is int and 0 <= dim < 64) for dim in dims):
            raise CorruptCheckpointError("progress", f"{name!r} has placements that are none")
    return found


def _nodes(data: Any, tag: str) -> Iterator[dict[str, Any]]:
    """The nodes of encoded data with a tag whose content is a name."""
    if isinstance(data, list | dict):
        if isinstance(data, dict) and data.get(_TAG) == tag:
            yield data
            return
        for item in data if isinstance(data, list) else data.values():
            yield from _nodes(item, tag)


def missing_from(data: Any) -> bool:
    """Whether encoded data lacks a value that was left out."""
    return next(_nodes(data, UNSAVED), None) is not None
