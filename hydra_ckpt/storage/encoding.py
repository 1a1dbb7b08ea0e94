"""Nested Python values as JSON plus named tensors; nothing is pickled.

A value that JSON cannot express is an object with the key "~": `{"~": "tuple", "v": [...]}`. Tensors are referred to by
name; one that is not row-major includes its strides: `{"~": "tensor", "v": "m", "s": [1, 3]}` for a transposed (3, n).

An object that is in two places is one object again after a load: a tensor because both places name it, a list because
both have its label: `{"~": "same", "v": ["ema:seen#0", [1, 2]]}`, and in the other place `{"~": "same", "v":
["ema:seen#0"]}`.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hydra_ckpt.errors import CheckpointError, leave_out
from hydra_ckpt.storage.dtypes import SAFETENSORS_DTYPE
from hydra_ckpt.storage.facts import attributes, is_apart, narrowed, row_major
from hydra_ckpt.storage.kinds import NotExactError, tagged
from hydra_ckpt.storage.sharing import Sharing
from hydra_ckpt.storage.subclasses import check_wrapper, is_wrapper, local_part, take_apart

TAG, STRIDES, PLACEMENTS, MESH, SPLITS, DEVICE = "~", "s", "p", "m", "f", "d"
# Values that are not in the tree: left out, or in the file of each rank.
UNSAVED, OWN = "unsaved", "own"
# One object in several places; another object over the same memory; a part of that memory.
SAME, ALIAS, VIEW = "same", "alias", "view"
# Attributes that Python code has put on a value: `tensor.scale = 3`, or the `_metadata` of a state dict.
ATTRIBUTES = "attributes"
_AS_THEY_ARE = {int, float, str, bool, type(None)}
# What `tagged` makes of a value, and what Python code can put attributes on.
_MADE = {list, dict, torch.Tensor}
_WITH_ATTRIBUTES = {OrderedDict, Counter}
# The kinds that `fill` looks into.
_FILLED = {"tuple", "size", "ordered", "counter", "namedtuple", "defaultdict"}
# Those whose content has plain data before what they hold.
_WITH_HEADS = {"namedtuple", "defaultdict", "deque"}
# Python converts no longer ones to text: 4300 digits.
_MOST_BITS = 14284
_TENSORS = (torch.Tensor, torch.nn.Parameter)


class Sink(dict[str, torch.Tensor]):
    """Collects the tensors of one object's state by name, and records what is stored elsewhere and what is left out.

    Args:
        inside: What the names of its tensors begin with.
        called: What messages and `allow_unsaved` call the object instead: `extras.ema`.
        known: Identity of a tensor that is stored elsewhere, to the JSON data that refers to it there.
        unsaved: Patterns of dotted names that are left out.

    Attributes:
        sharing: What is in several places of the object; None to find out.
        made: Identity of a tensor in several places to the JSON data it became; bases of views have it negated.
        labels: Identity of what is in several places to what it is called.
        omitted: Dotted names of the values that were left out.
        joint: Identity of the tensors of all objects that are encoded together, to each and what it became; else None.
        own: DTensors whose shards are tensor subclasses, by name: each rank has to store its own.
        tells_placements: Whether DTensors say in the data how they are placed.
        describe_mesh: Describes the mesh of a DTensor, for those that need it; None if no DTensor says it.
    """

    tells_placements = False
    describe_mesh: Callable[[DTensor], Any] | None = None

    def __init__(
        self, inside: str, called: str, known: Mapping[int, Any] | None = None, unsaved: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.inside, self.called = inside, called
        self.known = known or {}
        self.unsaved = unsaved
        self.sharing: Sharing | None = None
        self.made: dict[int, Any] = {}
        self.labels: dict[int, str] = {}
        self.omitted: list[str] = []
        self.joint: dict[int, tuple[torch.Tensor, Any]] | None = None
        self.own: dict[str, torch.Tensor] = {}

    def another(self, known: Mapping[int, Any] | None = None) -> Sink:
        """An empty one for another part of the same object."""
        found = Sink(self.inside, self.called, known, self.unsaved)
        found.sharing, found.made, found.labels = self.sharing, self.made, self.labels
        return found

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


def refuse_shared_names(called: str, found: Mapping[str, torch.Tensor], known: Mapping[str, torch.Tensor]) -> None:
    """Raise if a tensor would get the name of another one in the files.

    Example: the tensor `lr` of an optimizer's options and one that a parameter's state has under `options.lr`.

    Args:
        called: What messages call the object that was encoded last.
        found: Its tensors by name.
        known: The tensors by name that were encoded before it.

    Raises:
        CheckpointError: A name is in both, for different tensors.
    """
    clashing = next((name for name in found.keys() & known.keys() if found[name] is not known[name]), None)
    if clashing is not None:
        raise CheckpointError(
            f"{called}: two tensors would have the name {clashing!r} in the files; rename this object, or the "
            "key of its state"
        )


def encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON data; its tensors are added to `tensors` under names that begin with `name`.

    Args:
        value: Plain data, tensors, and containers of both.
        name: What the names of its tensors begin with, and what messages call it.
        tensors: Takes the tensors; a `Sink` can do more.

    Raises:
        CheckpointError: A value fits neither JSON nor a tensor; the message names its place.
    """
    return _Encoder(tensors, value).value(value, name)


class _Encoder:
    """Encodes one value.

    Args:
        tensors: Takes the tensors.
        value: The value.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], value: Any) -> None:
        self._tensors = tensors
        self._sink = sink = tensors if isinstance(tensors, Sink) else None
        self._known: Mapping[int, Any] = sink.known if sink is not None else {}
        self._has_patterns = sink is not None and bool(sink.unsaved)
        given = sink.sharing if sink is not None else None
        self._sharing = given if given is not None else Sharing.of(value)
        self._made: dict[int, Any] = sink.made if sink is not None else {}
        self._labels: dict[int, str] = sink.labels if sink is not None else {}
        self._here: set[int] = set()  # what was written out in this value, so that a label is enough
        self._open: set[int] = set()
        self._sealed = ""  # the name of what can be left out only as a whole

    def value(self, value: Any, name: str) -> Any:
        """Any value, whose place has this name."""
        kind = type(value)
        if self._has_patterns and self._sink is not None and self._sink.omits(name):
            return _tagged(UNSAVED, None)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return self._number(value, name)
        if kind is float:
            return value if math.isfinite(value) else _tagged("float", repr(value))
        if id(value) in self._sharing.repeated:
            return self._repeated(value, name)
        return self._once(value, name)

    def _repeated(self, value: Any, name: str) -> Any:
        """What is in several places: the first says what it is, and all which one it is."""
        key = id(value)
        sink = self._sink if self._has_patterns else None
        if sink is not None and _Trial(sink, self._sharing, self._open).omits(value, name):
            return self._tensor(value, name) if isinstance(value, torch.Tensor) else self._once(value, name)
        if key in self._known:
            return dict(self._known[key])
        if key in self._open:
            raise self._refused(name, "its state holds itself; let state_dict() return something that does not")
        if key in self._made:
            return self._made[key]
        if key in self._here:
            return _tagged(SAME, [self._labels[key]])
        self._open.add(key)
        label = self._labels.setdefault(key, f"{name}#{len(self._labels)}")
        found = self._once(value, name)
        self._open.discard(key)
        if not isinstance(value, torch.Tensor):
            self._here.add(key)
            return _tagged(SAME, [label, found])
        # A name is always the same tensor. What is more than a name may be met again in another value of this object.
        is_named = found.get(TAG) == "tensor"
        self._made[key] = found if is_named else _tagged(SAME, [label, found])
        return self._made[key]

    def _once(self, value: Any, name: str) -> Any:
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return self._tensor_once(value, name)
        if kind is dict:
            return self._dict(value, name)
        if kind is list:
            return self._list(value, name)
        try:
            found = tagged(value)
        except NotExactError as error:
            raise self._unknown(value, name, f": {error}") from None
        if found is None:
            raise self._unknown(value, name, "")
        encoded = _tagged(found[0], self._content(*found, name))
        return self._with_attributes(value, encoded, name) if kind in _WITH_ATTRIBUTES else encoded

    def _list(self, value: list[Any], name: str) -> Any:
        kinds = set(map(type, value))
        is_finite = float not in kinds or all(type(item) is not float or math.isfinite(item) for item in value)
        # The state of Python's generator has 625 numbers.
        if kinds <= _AS_THEY_ARE and is_finite and not self._has_patterns:
            for index, number in enumerate(value):
                if type(number) is int and number.bit_length() > _MOST_BITS:
                    self._number(number, _join(name, str(index)))
            return list(value)
        return [self.value(item, _join(name, str(index))) for index, item in enumerate(value)]

    def _number(self, value: int, name: str) -> int:
        if value.bit_length() > _MOST_BITS:
            raise self._refused(name, "an int of more than 4300 digits cannot be stored; store it as bytes")
        return value

    def _content(self, tag: str, content: Any, name: str) -> Any:
        """What `tagged` has made of a value: JSON data, a tensor, or a container made just now, so in one place."""
        if type(content) not in _MADE:
            return content
        # A part may be left out where `fill` looks.
        with nullcontext() if tag in _FILLED else self._sealing(name):
            if tag in _WITH_HEADS:
                return [*content[:-1], self._once(content[-1], name)]
            return self._once(content, name)

    def _with_attributes(self, value: Any, encoded: Any, name: str) -> Any:
        """A value with what Python code has put beside it."""
        beside = attributes(value)
        if not beside:
            return encoded
        here, self._here = self._here, set()  # written out in full: the value may be met again elsewhere
        found = {}
        for key, item in beside.items():
            place = f"{name}.<attributes>.{key}"
            is_left = self._has_patterns and self._sink is not None and self._sink.omits(place)
            if not is_left:
                with self._sealing(place):
                    found[key] = self.value(item, place)
        self._here = here
        return _tagged(ATTRIBUTES, [encoded, found]) if found else encoded

    @contextmanager
    def _sealing(self, name: str) -> Iterator[None]:
        """Leave out no part of a value of this name, because `fill` does not look into it."""
        before = self._has_patterns, self._sealed
        self._has_patterns, self._sealed = False, self._sealed or name
        try:
            yield
        finally:
            self._has_patterns, self._sealed = before

    def _dict(self, value: Mapping[Any, Any], name: str) -> Any:
        if all(type(key) is str for key in value) and TAG not in value:
            return {key: self.value(item, _join(name, key)) for key, item in value.items()}
        pairs = [[self._key(key, name), self.value(item, _join(name, str(key)))] for key, item in value.items()]
        return _tagged("map", pairs)

    def _key(self, key: Any, name: str) -> Any:
        with self._sealing(name):
            return self.value(key, _join(name, "<key>"))

    def _tensor_once(self, value: torch.Tensor, name: str) -> Any:
        """A tensor, which another of several objects may have in the same container."""
        joint = None if self._sink is None else self._sink.joint
        if joint is None:
            return self._tensor(value, name)
        if id(value) not in joint:
            joint[id(value)] = (value, self._tensor(value, name))  # kept, so that no other has its identity
        return joint[id(value)][1]

    def _tensor(self, value: torch.Tensor, name: str) -> Any:
        if (known := self._known.get(id(value))) is not None:
            return dict(known)
        if name in self._tensors:
            raise CheckpointError(
                f"{name}: two tensors would have this name; let no key contain a dot, or be a string of digits"
            )
        local = local_part(value)
        if is_wrapper(local):
            return self._wrapped(value, local, name)
        if type(value) not in _TENSORS and not isinstance(value, DTensor):
            raise self._refused(name, f"a {type(value).__qualname__} is a tensor of a class that cannot be stored")
        if value.is_meta:
            raise self._refused(name, "a tensor on the meta device has no values; move it to a device")
        if value.dtype not in SAFETENSORS_DTYPE or value.layout != torch.strided or value.is_nested:
            raise self._refused(name, f"a tensor of {value.dtype}, {value.layout} cannot be stored; convert it")
        found = self._conjugated(value, name) or self._in_memory(value, name)
        if isinstance(value, torch.nn.Parameter):
            found = _tagged("parameter", [found, value.requires_grad])
        elif value.requires_grad:  # what it was computed from is not stored
            found = _tagged("leaf", found)
        return self._with_attributes(value, found, name)

    def _conjugated(self, value: torch.Tensor, name: str) -> Any:
        """A lazily conjugated tensor that shares its memory with no other one; None for all others."""
        shared = self._sharing.views.get(id(value)) is not None or id(value) in self._sharing.bases
        if isinstance(value, DTensor) or not value.is_conj() or shared:
            return None
        return _tagged("conj", self._strided(_plain(value).conj(), name))

    def _in_memory(self, value: torch.Tensor, name: str) -> Any:
        """A tensor by its name, or by that of the one whose memory it shares."""
        if (why := self._sharing.clashes.get(id(value))) is not None:
            raise self._refused(name, why)
        view = self._sharing.views.get(id(value))
        if view is None:
            return self._base(value, name) if id(value) in self._sharing.bases else self._strided(_plain(value), name)
        base = self._base(view.base, name)
        if view.is_whole:
            return _tagged(ALIAS, base)
        return _tagged(VIEW, [base, view.offset, list(value.shape), list(value.stride())])

    def _base(self, base: torch.Tensor, name: str) -> Any:
        """The base of views, stored where it is encountered first, under the name it has there."""
        known = self._known.get(id(base)) or self._made.get(-id(base))
        if known is None:
            known = self._made[-id(base)] = self._strided(_plain(base), name)
        return known

    def _strided(self, value: torch.Tensor, name: str) -> dict[str, Any]:
        """A tensor with its own memory: its name, and its strides and placements if needed."""
        found = _tagged("tensor", name)
        if (lies := value.stride()) != row_major(value.shape):
            if any(step == 0 and size > 1 for step, size in zip(lies, value.shape, strict=True)):
                return self._expanded(value, name)
            if not is_apart(value.shape, lies):
                raise self._refused(name, "its elements share memory with each other; store a .contiguous() one")
            found[STRIDES] = list(lies)
        if isinstance(value, DTensor) and self._sink is not None and self._sink.tells_placements:
            found[PLACEMENTS] = [getattr(placement, "dim", None) for placement in value.placements]
            strided = [getattr(placement, "split_factor", None) for placement in value.placements]
            found.update({SPLITS: strided} if any(strided) else {})
            if self._sink.describe_mesh is not None and (told := self._sink.describe_mesh(value)) is not None:
                found[MESH] = told
        elif self._sink is not None and self._sink.tells_placements and value.device.type != "cpu":
            found[DEVICE] = value.device.type  # untested on GPU
        self._tensors[name] = value
        return found

    def _expanded(self, value: torch.Tensor, name: str) -> dict[str, Any]:
        """An expanded view by what it was expanded from: a (3, 4) tensor with strides (1, 0) by its first column."""
        if isinstance(value, DTensor):
            raise self._refused(
                name, "it is an expanded DTensor, whose elements share memory; store a .contiguous() one"
            )
        return _tagged("expanded", [self._strided(narrowed(value), name), list(value.shape)])

    def _wrapped(self, value: torch.Tensor, local: torch.Tensor, name: str) -> dict[str, Any]:
        """A tensor subclass by its inner tensors. Those of a shard stay with this rank: they cannot be cut."""
        try:
            check_wrapper(local)
        except CheckpointError as error:
            raise self._refused(name, str(error)) from None
        if local is not value:
            if self._sink is None:
                raise CheckpointError(f"{name}: shards of a {type(local).__qualname__} cannot be stored here")
            self._sink.own[name] = value
            return _tagged(OWN, name)
        return _tagged("wrapped", self._once(take_apart(local), name))

    def _unknown(self, value: Any, name: str, why: str) -> CheckpointError:
        kind = type(value)
        return self._refused(
            name,
            f"a {kind.__module__}.{kind.__qualname__} can be stored neither as JSON nor as a tensor{why}. Let "
            "state_dict() return numbers, strings, lists, dicts and tensors only",
        )

    def _refused(self, name: str, why: str) -> CheckpointError:
        """The error for a value that cannot be stored, with both ways out."""
        if self._sink is None:
            return CheckpointError(f"{name}: {why}")
        whole = self._sink.dotted(self._sealed or name)
        return CheckpointError(f"{self._sink.dotted(name)}: {why}, {leave_out(whole)}")


class _Trial(_Encoder):
    """Finds out whether a part of a value is left out under the name of one of its places.

    There it is an object of its own, which is not what the other places hold.

    Args:
        sink: Knows what is left out; nothing is added to it.
        sharing: What is in several places.
        opened: Identities of what the value is in.
    """

    def __init__(self, sink: Sink, sharing: Sharing, opened: set[int]) -> None:
        self._trial = Sink(sink.inside, sink.called, sink.known, sink.unsaved)
        self._trial.sharing = sharing
        super().__init__(self._trial, None)
        self._open = set(opened)

    def omits(self, value: Any, name: str) -> bool:
        """Whether a part of this value is left out."""
        self._repeated(value, name)
        return bool(self._trial.omitted)

    def _repeated(self, value: Any, name: str) -> Any:
        """Look into every place of what is in several: the names differ."""
        if id(value) in self._open:
            raise self._refused(name, "its state holds itself; let state_dict() return something that does not")
        self._open.add(id(value))
        found = self._once(value, name)
        self._open.discard(id(value))
        return found


def _plain(value: torch.Tensor) -> torch.Tensor:
    """A tensor detached from autograd; the tensor itself if it is not attached, so that its identity is kept."""
    return value.detach() if isinstance(value, torch.nn.Parameter) or value.requires_grad else value


def _join(name: str, key: str) -> str:
    return f"{name}{key}" if not name or name.endswith(":") else f"{name}.{key}"


def _tagged(tag: str, content: Any) -> dict[str, Any]:
    return {TAG: tag, "v": content}
