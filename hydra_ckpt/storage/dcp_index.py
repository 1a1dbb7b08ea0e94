"""The index of a DCP directory (`.metadata`), which is a pickle, read without making any object that it asks for.

A pickle is a program for a small machine. This one knows the instructions that DCP's indices consist of, builds
nothing but plain data, and writes down what is to be called instead of calling it; so there is nothing to be trusted.
Source: `pickletools`, and `torch/distributed/checkpoint/metadata.py`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, CorruptCheckpointError
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.dtypes import SAFETENSORS_DTYPE, check_name
from hydra_ckpt.storage.header import LIMIT, MAX_DIMENSIONS

INDEX = ".metadata"
_MAX_BYTES = 1 << 30
_DTYPES = {str(dtype).removeprefix("torch."): name for dtype, name in SAFETENSORS_DTYPE.items()}
_MARK = object()
# What copies of a model are called that are not what is trained.
_AVERAGES = ("ema", "averag", "shadow", "teacher", "swa")

# The keys that lead to a value in nested dictionaries and lists.
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Piece:
    """A part of an entry in a file.

    Attributes:
        box: Which part of the tensor; None for a value.
        file: Name of the file.
        first: Its first byte.
        length: Its bytes.
    """

    box: Box | None
    file: str
    first: int
    length: int


@dataclass(frozen=True)
class Entry:
    """A tensor or value in a DCP directory.

    Attributes:
        path: The keys that lead to it.
        spec: What tensor it is; None for a value.
        pieces: Where it lies.
    """

    path: KeyPath
    spec: TensorSpec | None
    pieces: tuple[Piece, ...]


def read_index(directory: Path) -> list[Entry]:
    """The entries of a DCP directory.

    Raises:
        CorruptCheckpointError: The index is damaged, or lacks something it names.
        CheckpointConfigError: It has a tensor of a kind that cannot be stored.
    """
    path = directory / INDEX
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CorruptCheckpointError(path, f"is larger than {_MAX_BYTES} bytes")
        found = _run(path.read_bytes())
        if not isinstance(found, _Noted) or found.what != "Metadata":
            raise ValueError("it is no index of torch.distributed.checkpoint")
        return list(_entries(directory, found.state))
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - what a damaged program leads to
        raise CorruptCheckpointError(path, f"cannot be read: {type(error).__name__}: {error}") from None


def dotted(path: KeyPath) -> str:
    """Keys as one name."""
    return ".".join(map(str, path))


def model_prefix(directory: Path, votes: Mapping[KeyPath, int], remedy: str) -> KeyPath:
    """The keys that lead to a model's tensors.

    Args:
        directory: Where they lie, for the message.
        votes: By prefix the number of tensors below it that have a name of the model's; not empty.
        remedy: What to do where it cannot be told.

    Raises:
        CheckpointConfigError: Several have as many, and none of them is called a model.
    """

    def rank(prefix: KeyPath) -> tuple[int, bool, int]:
        keys = [str(key).lower() for key in prefix]
        is_average = any(word in key for key in keys for word in _AVERAGES)
        return -votes[prefix], is_average, -keys.count("model")

    best = min(map(rank, votes))
    found = {prefix for prefix in votes if rank(prefix) == best}
    if len(found) > 1:
        raise ambiguous(directory, found, remedy)
    return found.pop()


def ambiguous(directory: Path, prefixes: Collection[KeyPath], remedy: str) -> CheckpointConfigError:
    """The error where several parts may be the model."""
    found = ", ".join(sorted(map(dotted, prefixes)))
    return CheckpointConfigError(
        f"{directory} holds a model's tensors under each of {found}, and nothing tells which is meant. {remedy}"
    )


# -- the machine -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Noted:
    """What a pickle refers to by name, or an object that it wants made of that.

    Attributes:
        what: The name, without the module's.
        arguments: What it is to be called with; None where it is not called.
        state: What it is to be given then.
    """

    what: str
    arguments: tuple[Any, ...] | None = None
    state: Any = field(default=None)


class _Machine:
    """A stack, a memory, and the instructions of indices."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memory: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in _PUSHED:
            self.stack.append(_PUSHED[name]())
        elif name in _CONSTANTS:
            self.stack.append(argument)
        elif name in _COLLECTED:
            self._collect(name)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self._memory[len(self._memory) if argument is None else argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memory[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"):
            self._note(name, argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"it has the instruction {name}, which no index needs")

    def _collect(self, name: str) -> None:
        """Make a tuple, or fill a list or dictionary."""
        count = _COLLECTED[name]
        items = self._since_mark() if count is None else self._popped(count)
        if name.startswith("TUPLE"):
            self.stack.append(tuple(items))
        elif name.startswith("APPEND"):
            self._top(list).extend(items)
        else:
            self._top(dict).update(_pairs(items))

    def _note(self, name: str, argument: Any) -> None:
        """Write down a name, or what is to be done with it."""
        if name == "GLOBAL":
            self.stack.append(_Noted(argument.split(" ")[-1]))
        elif name == "STACK_GLOBAL":
            _, what = self._popped(2)
            self.stack.append(_Noted(str(what)))
        elif name == "BUILD":
            [state] = self._popped(1)
            self._top(_Noted).state = state
        else:
            called, arguments = self._popped(2)
            if not isinstance(called, _Noted) or called.arguments is not None or not isinstance(arguments, tuple):
                raise ValueError("it calls what is no class")
            self.stack.append(arguments[0] if called.what == "Size" else _Noted(called.what, arguments))

    def _popped(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count:
            raise ValueError("it takes more than there is")
        del self.stack[-count:]
        return items

    def _top(self, kind: type[Any]) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise TypeError(f"it takes something else for a {kind.__name__}")
        return self.stack[-1]

    def _since_mark(self) -> list[Any]:
        position = max(place for place, item in enumerate(self.stack) if item is _MARK)
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items


_PUSHED: dict[str, Any] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
# How many items these take; None for all since the mark.
_COLLECTED: dict[str, int | None] = {
    "TUPLE": None,
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "APPEND": 1,
    "APPENDS": None,
    "SETITEM": 2,
    "SETITEMS": None,
}
_CONSTANTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"} | {
    f"{size}BINUNICODE{bits}" for size, bits in (("SHORT_", ""), ("", ""), ("", "8"))
}


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int, _Noted):  # a nest of tuples would take for ever to be hashed
            raise TypeError(f"it has a {type(key).__name__} for a key")
        yield key, value


def _run(data: bytes) -> Any:
    machine = _Machine()
    for instruction, argument, _ in pickletools.genops(data):
        machine.step(instruction.name, argument)
    if len(machine.stack) != 1:
        raise ValueError("it ends in the middle")
    return machine.stack[0]


# -- what it says ----------------------------------------------------------------------------------------------------


def _entries(directory: Path, index: dict[str, Any]) -> Iterator[Entry]:
    places: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
    for key, place in index["storage_data"].items():
        places.setdefault(key.state["fqn"], []).append((key.state.get("offset"), place.state))
    paths = index.get("planner_data") or {}
    seen: set[KeyPath] = set()
    for name, entry in index["state_dict_metadata"].items():
        if type(name) is not str:
            raise TypeError("the name of an entry is no text")
        if name not in places:
            raise CorruptCheckpointError(directory / INDEX, f"does not say where {name} lies")
        path = _path(paths.get(name, (name,)))
        if path in seen:
            raise ValueError(f"two entries lie under {path}")
        seen.add(path)
        if entry.what == "TensorStorageMetadata":
            yield _tensor(directory, name, path, entry.state, places[name])
        else:
            yield Entry(path, None, (_piece(directory, name, None, places[name][0][1]),))


def _path(value: Any) -> KeyPath:
    if not isinstance(value, tuple | list) or not value or not all(type(key) in (str, int) for key in value):
        raise ValueError("the keys that lead to an entry are no texts or numbers")
    return tuple(value)


def _tensor(
    directory: Path, name: str, path: KeyPath, state: dict[str, Any], places: list[tuple[Any, dict[str, Any]]]
) -> Entry:
    dtype = state["properties"].state[0].what
    if dtype not in _DTYPES:
        raise CheckpointConfigError(f"{name} is {dtype}, which safetensors files cannot hold")
    check_name(name)
    shape = _ints(state["size"])
    sizes = {
        _ints(chunk.state["offsets"], len(shape)): _ints(chunk.state["sizes"], len(shape)) for chunk in state["chunks"]
    }
    spec = TensorSpec(name, _DTYPES[dtype], shape)
    pieces = []
    for offset, place in places:
        corner = (0,) * len(shape) if offset is None else _ints(offset, len(shape))
        if corner not in sizes or any(a + n > m for a, n, m in zip(corner, sizes[corner], shape, strict=True)):
            raise ValueError(f"it does not say rightly which part of {name} begins at {list(corner)}")
        piece = _piece(directory, name, Box(corner, sizes[corner]), place)
        if Box(corner, sizes[corner]).numel * spec.itemsize > piece.length:
            raise ValueError(f"it names too few bytes for a piece of {name}")
        pieces.append(piece)
    return Entry(path, spec, tuple(pieces))


def _piece(directory: Path, name: str, box: Box | None, state: dict[str, Any]) -> Piece:
    file, first, length = state["relative_path"], state["offset"], state["length"]
    if type(file) is not str:
        raise TypeError(f"the file of {name} is no name")
    if state.get("transform_descriptors"):
        raise CorruptCheckpointError(
            directory / file, f"{name} is stored compressed or encrypted, which is not supported"
        )
    [first, length] = _ints((first, length))
    return Piece(box, file, first, length)


def _ints(values: Any, count: int | None = None) -> tuple[int, ...]:
    """Sizes or positions, as they can be."""
    found = tuple(values)
    # Not shown in the messages: a nest of tuples would take for ever to be written out.
    if not all(type(value) is int and 0 <= value < LIMIT for value in found) or len(found) > MAX_DIMENSIONS:
        raise ValueError("a size or position is no number that it can be")
    if count is not None and len(found) != count:
        raise ValueError(f"a size or position has not {count} dimensions")
    return found
