"""Finds what objects have in common with models and with optimizers' groups, and joins it again after a load.

An object's state may hold a parameter of the model, a view of its memory, or a group of an optimizer: what training
writes to one is then in the other. Stored are copies, and beside them a link for each place. Example: the link
`(["", "state", "w", "flat"], "model.w", [0, [6], [1]])` of an optimizer says that `state[w]["flat"]` is `w` as one row.
After a load the copy is replaced by the live object, if it has the same value; the report names what stays a copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.state.holders import Holder
from hydra_ckpt.state.optimizer_oracle import differing
from hydra_ckpt.state.slots import TensorSlot
from hydra_ckpt.storage.sharing import geometry, has_memory, meet, objects_in, stretch
from hydra_ckpt.storage.subclasses import local_part

SAME, PART = "same", "part"
"""The whole of what is linked to; a part of it, or more than it, which is not joined again."""

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Link:
    """A place in an object's state that holds what belongs to a model or to an optimizer's group.

    Attributes:
        path: Keys and indexes that lead to it.
        target: The name of what is there: `model.fc.weight`, `optimizer.param_groups.0`.
        how: SAME, PART, or for a view its offset (in elements), shape and strides.
    """

    path: Path
    target: str
    how: Any

    @classmethod
    def read(cls, data: Sequence[Any]) -> Link:
        """A link from its JSON data.

        Raises:
            CorruptCheckpointError: It is none.
        """
        path, target, how = data if type(data) is list and len(data) == 3 else ((), None, None)
        is_path = type(path) is list and all(type(key) in (str, int) for key in path)
        if not is_path or type(target) is not str or not (how in (SAME, PART) or _is_view(how)):
            raise CorruptCheckpointError("progress", f"has a link that is none: {str(data)[:80]}")
        return cls(tuple(path), target, how)

    def data(self) -> list[Any]:
        """The link as JSON data."""
        return [list(self.path), self.target, self.how]


@dataclass(frozen=True)
class Targets:
    """The live objects that state may have in common with others.

    Attributes:
        places: Where the models' parameters and buffers are, by what messages call the model.
        groups: The optimizers' lists of groups, the groups, and their lists of parameters, by dotted name.
        options: Tensors and containers among the groups' options, by dotted name.
    """

    places: Mapping[str, Sequence[TensorSlot]]
    groups: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, places: Mapping[str, Sequence[TensorSlot]], inside: Sequence[Holder]) -> Targets:
        """Those of models' tensors and of optimizers.

        Args:
            places: Where the models' tensors are, by what messages call the model.
            inside: The optimizers, and those that they wrap.
        """
        groups: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for holder in inside:
            place = ".".join(filter(None, (holder.called, holder.path, "param_groups")))
            if holder.groups:
                groups[place] = holder.groups
            for index, group in enumerate(holder.groups):
                groups[f"{place}.{index}"], groups[f"{place}.{index}.params"] = group, group["params"]
                held = {key: value for key, value in group.items() if key != "params"}
                options.update({f"{place}.{index}.{key}": item for key, item in held.items() if _is_object(item)})
        return cls(places, groups, options)

    def links(self, owner: str, value: Any) -> list[Link]:
        """What a value has in common with them.

        Args:
            owner: The object whose state it is. What an optimizer has in common with its own options is stored as such.
            value: Plain data and tensors.
        """
        if not self._touches(objects_in(value)):
            return []
        return [
            Link(path, *told)
            for path, item in _places(value, (), self._names)
            if (told := self._told(owner, item)) is not None
        ]

    def __getitem__(self, name: str) -> Any:
        for items in (self.tensors, self.groups, self.options):
            if name in items:
                return items[name]
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        return any(name in items for items in (self.tensors, self.groups, self.options))

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The models' parameters and buffers by dotted name."""
        return {f"{dotted}.{slot.name}": slot.tensor for dotted, slots in self.places.items() for slot in slots}

    @cached_property
    def _names(self) -> dict[int, str]:
        everything = [*self.options.items(), *self.groups.items(), *reversed(list(self.tensors.items()))]
        return {id(item): name for name, item in everything}

    @cached_property
    def _memory(self) -> _Memory:
        tensors = {name: item for name, item in self.options.items() if isinstance(item, torch.Tensor)}
        return _Memory.of({**self.tensors, **tensors})

    def hold_any(self, objects: Mapping[int, Any]) -> bool:
        """Whether a group, or anything among the options, is one of these objects."""
        return any(id(item) in objects for items in (self.groups, self.options) for item in items.values())

    def _touches(self, objects: Mapping[int, Any]) -> bool:
        tensors = [item for item in objects.values() if isinstance(item, torch.Tensor)]
        if self.hold_any(objects):
            return True
        return bool(tensors) and (
            any(id(item) in objects for item in self.tensors.values()) or self._memory.touches(tensors)
        )

    def _told(self, owner: str, item: Any) -> tuple[str, Any] | None:
        name = self._names.get(id(item))
        if name is not None:
            found: tuple[str, Any] | None = (name, SAME)
        else:
            found = self._memory.told(item) if isinstance(item, torch.Tensor) else None
        is_own = found is not None and found[0] in self.options and found[0].startswith(f"{owner}.")
        return None if is_own else found


@dataclass(frozen=True)
class _Memory:
    """Where the memory of tensors is.

    Attributes:
        names: Of the tensors, in the model's order.
        tensors: The tensors.
        starts: Addresses of the first bytes.
        ends: Addresses after the last ones.
    """

    names: Sequence[str]
    tensors: Sequence[torch.Tensor]
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> _Memory:
        known = {name: item for name, item in tensors.items() if has_memory(local_part(item))}
        return cls(list(known), list(known.values()), *_stretches([local_part(item) for item in known.values()]))

    def touches(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether any of these tensors may share memory with those."""
        parts = [part for item in tensors if has_memory(part := local_part(item))]
        if not parts or not self.names:
            return False
        starts, ends = _stretches(parts)
        order = np.argsort(self.starts, kind="stable")
        reached = np.maximum.accumulate(self.ends[order])
        before = np.searchsorted(self.starts[order], ends, "left")  # how many begin before the end
        return bool(((before > 0) & (reached[before - 1] > starts)).any())

    def told(self, item: torch.Tensor) -> tuple[str, Any] | None:
        """With which tensor this one shares memory, and how; None if with none."""
        part = local_part(item)
        if not has_memory(part):
            return None
        start, end = part.data_ptr(), part.data_ptr() + stretch(part)
        here = [int(number) for number in np.flatnonzero((self.starts < end) & (self.ends > start))]
        here = [number for number in here if meet([part, local_part(self.tensors[number])])]
        found = [(self.names[number], _how(item, self.tensors[number])) for number in here]
        ranked = sorted(found, key=lambda pair: (pair[1] != SAME, pair[1] == PART))  # stable: the model's order
        return next(iter(ranked), None)


def _stretches(parts: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.array([part.data_ptr() for part in parts], np.uint64)
    return starts, starts + np.array([stretch(part) for part in parts], np.uint64)


def _how(item: torch.Tensor, target: torch.Tensor) -> Any:
    """How a tensor shares the memory of another one."""
    if geometry(item) == geometry(target):
        return SAME
    plain = {torch.Tensor, torch.nn.Parameter}
    if not {type(item), type(target)} <= plain or item.dtype != target.dtype or item.is_conj() or item.is_neg():
        return PART
    offset = item.data_ptr() - target.data_ptr()
    if offset < 0 or offset % item.element_size() or offset + stretch(item) > stretch(target):
        return PART
    return [offset // item.element_size(), list(item.shape), list(item.stride())]


def _is_object(value: Any) -> bool:
    return isinstance(value, torch.Tensor | dict | list)


def _is_view(how: Any) -> bool:
    """Whether data is an offset, a shape and strides."""
    if type(how) is not list or len(how) != 3 or not (type(how[1]) is type(how[2]) is list):
        return False
    offset, shape, strides = how
    return len(shape) == len(strides) and all(
        type(number) is int and 0 <= number < 1 << 48 for number in (offset, *shape, *strides)
    )


def _places(value: Any, path: Path, stops: Collection[int]) -> Iterator[tuple[Path, Any]]:
    """All objects in a value and where they are; what belongs to others is not looked into."""
    if _is_object(value):
        yield path, value
        if id(value) in stops:
            return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _places(item, (*path, key if type(key) in (str, int) else str(type(key))), stops)
            yield from _places(key, (*path, "<key>"), stops)
    elif isinstance(value, list | tuple | deque | set | frozenset):
        for index, item in enumerate(value):
            yield from _places(item, (*path, index), stops)
    if isinstance(value, torch.Tensor | Mapping):
        for name, item in getattr(value, "__dict__", {}).items():
            yield from _places(item, (*path, "<attributes>", name), stops)


def states_of(inside: Sequence[Holder], names: Mapping[int, str]) -> dict[str, Any]:
    """The state that an optimizer and those inside it hold, by path and parameter.

    Args:
        inside: The optimizer, and those that it wraps.
        names: Identity of a parameter to its name.
    """
    return {
        holder.path: {names.get(id(key), "another"): held for key, held in holder.state.items()} for holder in inside
    }


def options_of(inside: Sequence[Holder]) -> dict[str, Any]:
    """The options of the groups that an optimizer and those inside it hold, by path and number."""
    return {
        holder.path: [{key: item for key, item in group.items() if key != "params"} for group in holder.groups]
        for holder in inside
    }


class Joining:
    """Replaces copies by what they were copies of, where both have the same value.

    Args:
        links: The links of one object.
        targets: The live objects.
    """

    def __init__(self, links: Sequence[Link], targets: Targets) -> None:
        self._links, self._targets = links, targets
        self._equal: dict[tuple[int, str], tuple[Any, bool]] = {}

    def joined(self, value: Any) -> Any:
        """A value with live objects in place of copies."""
        for link in self._links:
            if link.how != PART:
                value = self._put(value, link.path, link)
        return value

    def _put(self, value: Any, path: Path, link: Link) -> Any:
        if not path:
            return self._live(value, link)
        key, *rest = path
        try:
            item = value[key]
        except (KeyError, IndexError, TypeError):
            return value  # a key that has no form in JSON, or another structure
        found = self._put(item, tuple(rest), link)
        if found is item:
            return value
        if isinstance(value, tuple):
            return tuple.__new__(type(value), [found if index == key else one for index, one in enumerate(value)])
        value[key] = found
        return value

    def _live(self, value: Any, link: Link) -> Any:
        """The live object, if it has the value of the copy."""
        try:
            live = _viewed(self._targets[link.target], link.how, value)
        except (KeyError, RuntimeError):
            return value
        known = (id(value), f"{link.target} {link.how}")
        if known not in self._equal:  # the copy is kept, so that no other object gets its identity
            self._equal[known] = (value, not list(differing(value, live)))
        return live if self._equal[known][1] else value


def _viewed(target: Any, how: Any, copy: Any) -> Any:
    """What a link says of a live object."""
    if not isinstance(target, torch.Tensor):
        return target
    is_parameter = isinstance(copy, torch.nn.Parameter)
    if how == SAME:
        return target if is_parameter == isinstance(target, torch.nn.Parameter) else target.detach()
    offset, shape, strides = how
    last = offset + sum(step * (size - 1) for step, size in zip(strides, shape, strict=True))
    if isinstance(target, DTensor) or not 0 <= last * target.element_size() < stretch(target):
        raise RuntimeError("the live tensor has another memory")
    return target.detach().as_strided(shape, strides, target.storage_offset() + offset)


def parted(saved: Sequence[Link], live: Sequence[Link], targets: Targets) -> list[Link]:
    """The saved links that a live object no longer has.

    Args:
        saved: Its links when it was saved.
        live: Its links now.
        targets: The live objects. Of a shard without elements no rank can tell what it shares.
    """
    now = {(link.path, link.target, str(link.how)) for link in live}
    return [
        link
        for link in saved
        if (link.path, link.target, str(link.how)) not in now and not _is_empty(targets.tensors.get(link.target))
    ]


def _is_empty(target: torch.Tensor | None) -> bool:
    return target is not None and not local_part(target).numel()
