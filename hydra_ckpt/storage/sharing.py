"""Finds what a value holds more than once: the same object in two places, or two tensors over the same memory.

An optimizer may count all steps in one tensor, and a list may be in a state under two names. Stored separately, the two
would diverge after a resume. Example: for `a = torch.zeros(6)` the value `[a, a[2:4], a]` has `a` twice, and its second
item is a view of `a` that begins at element 2.
"""

from __future__ import annotations

import io
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.storage.configs import is_config
from hydra_ckpt.storage.subclasses import is_wrapper, local_part

_LEAVES = {bool, bytes, complex, float, int, str, type(None)}
# Besides these, only dicts and their subclasses change in place.
_MUTABLE = (list, torch.Tensor, deque, set, bytearray, np.ndarray, io.BytesIO, torch.Generator)
_PLAIN = {torch.Tensor, torch.nn.Parameter}
_TENSORS = {torch.Tensor, DTensor}
_SIMPLE = {*_TENSORS, bool, float, int, str, type(None)}
# Methods that are called here and where tensors are written.
_NEEDED = {
    *("as_strided", "clone", "contiguous", "copy_", "cpu", "data_ptr", "detach", "dim", "element_size", "is_conj"),
    *("is_contiguous", "is_neg", "narrow", "numel", "size", "storage_offset", "stride", "to", "view"),
}
# Elements of a cluster that are examined one by one.
_MOST_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class View:
    """A tensor that shares memory with others.

    Attributes:
        base: The tensor whose elements all of them are made of.
        offset: Where it begins, in elements from the first one of the base.
        is_whole: Whether it is all of the base, as it is.
    """

    base: torch.Tensor
    offset: int
    is_whole: bool


@dataclass(frozen=True)
class Sharing:
    """What a value holds more than once. It is valid only as long as the value does not change.

    Attributes:
        repeated: Identities of tensors, and of containers that can change, that are in more than one place.
        views: Identity of a tensor to its position in memory that it shares with others.
        clashes: Identity of a tensor that shares memory in a way that cannot be stored, to why.
    """

    repeated: frozenset[int] = frozenset()
    views: Mapping[int, View] = field(default_factory=dict)
    clashes: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, known: Sequence[torch.Tensor] = (), passed: Collection[int] = ()) -> Sharing:
        """Examine a value.

        Args:
            value: Plain data, tensors, and containers of both.
            known: Tensors that are stored elsewhere already. One of them is the base of those that are the same.
            passed: Identities of tensors of which none is a view: a copy of a parameter must not follow it.
        """
        seen: dict[int, Any] = {id(tensor): tensor for tensor in known}
        before, repeated = set(seen), set[int]()
        _look_through(value, seen, repeated)
        repeated -= before
        tensors = [item for key, item in seen.items() if isinstance(item, torch.Tensor) and key not in passed]
        clusters = list(_clusters(tensors))
        if not clusters:
            return cls(frozenset(repeated)) if repeated else NOTHING_SHARED
        views: dict[int, View] = {}
        clashes: dict[int, str] = {}
        for cluster in clusters:
            base = _base(cluster, before)
            if base is None or any(id(item) in before and item is not base for item in cluster):
                clashes.update({id(item): _why(item, cluster) for item in cluster if id(item) not in before})
                continue
            start, stored = local_part(base).data_ptr(), base
            if id(base) not in before and not _counts_together(base, cluster):
                stored = base.detach().clone()  # PyTorch does not count in the base what is written to the others
            for item in cluster:
                if item is not stored:
                    offset = (local_part(item).data_ptr() - start) // base.element_size()
                    views[id(item)] = View(stored, offset, is_whole=geometry(item) == geometry(base))
        return cls(frozenset(repeated), views, clashes)

    @cached_property
    def bases(self) -> frozenset[int]:
        """Identities of the tensors that views are made of."""
        return frozenset(id(view.base) for view in self.views.values())


NOTHING_SHARED = Sharing()


@dataclass(frozen=True)
class Encoded:
    """What became of an optimizer's state that is ordinary tensors alone.

    Attributes:
        parameters: Names of the parameters, in the order of the state.
        state: Parameter name to its state as JSON data.
        tensors: The tensors by name.
    """

    parameters: Sequence[str | None]
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class Apart:
    """Knows an optimizer's tensors that share nothing; from save to save they are the same, and need no second look.

    Attributes:
        encoded: Path of an optimizer (or one inside it) to what became of its state; empty once anything has changed.
    """

    def __init__(self) -> None:
        self.encoded: dict[str, Encoded] = {}
        self._seen: tuple[Any, ...] | None = None

    @property
    def seen(self) -> Any:
        """The same object as long as the tensors are the same, over the same memory; None if that is unknown."""
        return self._seen

    def sharing(self, states: Collection[Mapping[Any, Any]], options: Collection[Mapping[str, Any]]) -> Sharing:
        """What an optimizer holds more than once.

        Args:
            states: Of its parameters.
            options: Of its groups.
        """
        items = [item for held in states for item in held.values()]
        kinds = set(map(type, items))
        among_options: dict[int, Any] = {}
        repeated = set[int]()
        _look_through(list(options), among_options, repeated)
        if repeated or not kinds <= _SIMPLE:
            self.encoded = {}
            return Sharing.of([*options, *states])
        tensors = items if kinds <= _TENSORS else [item for item in items if isinstance(item, torch.Tensor)]
        tensors += [item for item in among_options.values() if isinstance(item, torch.Tensor)]
        if any(tensor.__dict__ for tensor in tensors):
            self.encoded = {}
            return Sharing.of([*options, *states])
        facts = _facts(tensors)
        seen = (list(map(id, tensors)), facts, [key for held in states for key in held], list(map(len, states)))
        if facts is not None and seen == self._seen:
            return NOTHING_SHARED
        self.encoded, self._seen = {}, None
        found = Sharing.of([*options, *states])
        if found is NOTHING_SHARED:
            self._seen = seen
        return found


def _facts(tensors: Sequence[torch.Tensor]) -> list[tuple[Any, ...]] | None:
    """Where the memory of each is and how it is read; None if one has no memory."""
    parts = [tensor._local_tensor if type(tensor) is DTensor else tensor for tensor in tensors]  # noqa: SLF001
    if not set(map(type, parts)) <= _PLAIN:
        return None
    try:
        return [(part.data_ptr(), part.shape, part.stride(), part.dtype, part.requires_grad) for part in parts]
    except RuntimeError:  # a sparse one
        return None


def shared_memory(values: Collection[Any]) -> Callable[[torch.Tensor], bool]:
    """Tells of a tensor whether writing to it would change more than one place in these values.

    Args:
        values: Live objects' tensors and containers of tensors, each once for every place it has.
    """
    seen: dict[int, Any] = {}
    repeated: set[int] = set()
    for value in values:
        _look_through(value, seen, repeated)
    tensors = [item for item in seen.values() if isinstance(item, torch.Tensor)]
    several = {id(item) for cluster in _clusters(tensors) for item in cluster} | repeated
    parts = [local_part(item) for item in tensors if id(item) in several]
    addresses = {part.data_ptr() for part in parts if has_memory(part)}

    def is_shared(tensor: torch.Tensor) -> bool:
        part = local_part(tensor)
        return id(tensor) in several or (has_memory(part) and part.data_ptr() in addresses)

    return is_shared


def memory_pattern(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """For each tensor the number of the first one that shares memory with it, and the bytes from there to it.

    Example: (0, 0), (1, 0), (0, 8) for `[a, b, a[2:]]` of floats; of a tensor alone it is its own number.
    """
    different = list({id(item): item for item in tensors}.values())
    clusters = {id(item): number for number, items in enumerate(_clusters(different)) for item in items}
    firsts: dict[Any, int] = {}
    found = []
    for number, item in enumerate(tensors):
        first = firsts.setdefault(clusters.get(id(item), (id(item),)), number)
        offset = 0 if tensors[first] is item else local_part(item).data_ptr() - local_part(tensors[first]).data_ptr()
        found.append((first, offset))
    return found


def objects_in(value: Any) -> dict[int, Any]:
    """The tensors, and the containers that can change, in a value, by identity."""
    seen: dict[int, Any] = {}
    _look_through(value, seen, set())
    return seen


def _look_through(value: Any, seen: dict[int, Any], repeated: set[int]) -> None:
    kind = type(value)
    if kind in _LEAVES:
        return
    is_whole = is_config(value)  # nothing in it is stored by itself
    is_dict = kind is dict or (isinstance(value, Mapping) and not is_whole)
    if is_dict or is_whole or isinstance(value, _MUTABLE):
        if id(value) in seen:
            repeated.add(id(value))
            return
        seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        for item in _around(value):
            _look_through(item, seen, repeated)
    elif is_dict:
        for key, item in value.items():
            _look_through(key, seen, repeated)
            _look_through(item, seen, repeated)
        _look_through_attributes(value, seen, repeated)
    elif isinstance(value, list | tuple | deque | set | frozenset) and not set(map(type, value)) <= _LEAVES:
        for item in value:
            _look_through(item, seen, repeated)


def _look_through_attributes(value: Any, seen: dict[int, Any], repeated: set[int]) -> None:
    for item in getattr(value, "__dict__", {}).values():
        _look_through(item, seen, repeated)


def _around(tensor: torch.Tensor) -> Iterator[Any]:
    """A tensor's attributes, and the tensors inside a subclass."""
    beside = tensor.__dict__
    if type(tensor) in _PLAIN or isinstance(tensor, DTensor):
        if hidden := _NEEDED & beside.keys():
            raise CheckpointError(
                f"a tensor of {tensor.dtype} has the attribute {min(hidden)!r}, which hides PyTorch's method; rename it"
            )
        yield from beside.values()
    elif is_wrapper(tensor):
        yield from (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])  # type: ignore[attr-defined]


def _clusters(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors that share elements, together. Those that share with no other are in none."""
    yield from _empty_clusters(tensors)
    found = [(item, part) for item in tensors if has_memory(part := local_part(item))]
    if len(found) < 2:
        return
    starts = np.array([part.data_ptr() for _, part in found], np.uint64)
    ends = starts + np.array([stretch(part) for _, part in found], np.uint64)
    order = np.argsort(starts, kind="stable")
    reached = np.maximum.accumulate(ends[order])
    overlaps = starts[order][1:] < reached[:-1]
    if not overlaps.any():
        return
    # A cluster begins at each stretch of memory that does not begin inside another one.
    for cluster in np.split(order, np.flatnonzero(~overlaps) + 1):
        if len(cluster) > 1 and meet([found[place][1] for place in cluster]):
            yield [found[place][0] for place in sorted(cluster)]


def _empty_clusters(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """DTensors that are the same, of which this rank holds nothing: other ranks will find that they share memory."""
    found: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for item in tensors:
        if isinstance(item, DTensor) and type(local := local_part(item)) in _PLAIN and not local.numel():
            # Even an empty tensor has a storage, which its aliases share.
            found[local.untyped_storage()._cdata, item.shape, item.placements].append(item)  # noqa: SLF001
    yield from (cluster for cluster in found.values() if len(cluster) > 1)


def has_memory(part: torch.Tensor) -> bool:
    """Whether a plain tensor has elements in memory."""
    is_strided = type(part) in _PLAIN and part.layout is torch.strided and not part.is_nested
    return is_strided and not part.is_meta and part.numel() > 0


def stretch(part: torch.Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last one. Example: (2, 3) of floats, 24."""
    if part.is_contiguous():
        return part.nbytes
    last = sum(step * (size - 1) for step, size in zip(part.stride(), part.shape, strict=True))
    return (last + 1) * part.element_size()


def meet(parts: list[torch.Tensor]) -> bool:
    """Whether any element is in two of them. Example: two columns of one matrix overlap, but do not meet."""
    if all(part.is_contiguous() for part in parts):
        return True
    sizes = {part.element_size() for part in parts}
    start = min(part.data_ptr() for part in parts)
    length = (max(part.data_ptr() + stretch(part) for part in parts) - start) // min(sizes)
    if len(sizes) > 1 or length > _MOST_ELEMENTS:
        return True
    size, taken = sizes.pop(), np.zeros(length, np.bool_)
    for part in parts:
        if (part.data_ptr() - start) % size:
            return True
        here = taken[(part.data_ptr() - start) // size :]
        # Along a stride of 0 an expanded tensor has one element, however long it is.
        pairs = zip(part.shape, part.stride(), strict=True)
        shape = tuple(extent if step else min(extent, 1) for extent, step in pairs)
        mine = np.lib.stride_tricks.as_strided(here, shape, part.stride())
        if mine.any():
            return True
        mine[...] = True
    return False


def _base(cluster: list[torch.Tensor], known: Collection[int]) -> torch.Tensor | None:
    """What all tensors of a cluster are made of: one of them that holds all, or a row of all elements; or None."""
    first = min(cluster, key=lambda item: local_part(item).data_ptr())
    if all(geometry(item) == geometry(first) for item in cluster):
        return next((item for item in cluster if id(item) in known), cluster[0])
    size, start = first.element_size(), local_part(first).data_ptr()
    for item in cluster:
        is_plain = not isinstance(item, DTensor) and not item.is_conj() and not item.is_neg()
        if not is_plain or item.dtype != first.dtype or (item.data_ptr() - start) % size:
            return None
    length = max(item.data_ptr() - start + stretch(item) for item in cluster) // size
    for item in sorted(cluster, key=lambda item: id(item) not in known):
        if item.numel() == length and item.data_ptr() == start and item.is_contiguous():
            return item
    if (first.storage_offset() + length) * size > first.untyped_storage().nbytes():
        return None  # they came to the same memory in different ways
    whole = first.detach() if first.requires_grad else first  # what is detached is no longer known as a view
    return whole.as_strided((length,), (1,), first.storage_offset())


def _counts_together(base: torch.Tensor, cluster: list[torch.Tensor]) -> bool:
    """Whether PyTorch certainly counts writes to any of the tensors as changes of the base."""
    family = base._base if base._is_view() else base  # noqa: SLF001 - there is no public way to ask
    return all((item._base if item._is_view() else item) is family for item in cluster)  # noqa: SLF001


def geometry(item: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same but for their identity, on all ranks."""
    part = local_part(item)
    placed = (item.device_mesh, item.placements, item.shape) if isinstance(item, DTensor) else None
    return (part.data_ptr(), part.dtype, part.shape, part.stride(), part.is_conj(), part.is_neg(), placed)


def _why(item: torch.Tensor, cluster: list[torch.Tensor]) -> str:
    other = next(found for found in cluster if found is not item)
    return (
        f"it shares memory with another tensor, {list(other.shape)} of {other.dtype}, in a way that would be lost; "
        "clone() one of them"
    )
