"""The index of a DCP directory (`.metadata`), which is a pickle, read without creating any object that it names.

See `pickle_machine`. Source: `torch/distributed/checkpoint/metadata.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, CorruptCheckpointError
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.dtypes import SAFETENSORS_DTYPE, check_name
from hydra_ckpt.storage.header import LIMIT, MAX_DIMENSIONS
from hydra_ckpt.storage.pickle_machine import Noted, run
from hydra_ckpt.store.small_files import read_small_file

INDEX = ".metadata"
_MAX_BYTES = 1 << 30
_DTYPES = {str(dtype).removeprefix("torch."): name for dtype, name in SAFETENSORS_DTYPE.items()}
# Names of copies of a model that are not the trained one.
_AVERAGES = ("ema", "averag", "shadow", "teacher", "swa")

# The keys that lead to a value in nested dictionaries and lists.
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class IndexedChunk:
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
        spec: The tensor's name, type and shape; None for a value.
        pieces: Where it is stored.
    """

    path: KeyPath
    spec: TensorSpec | None
    pieces: tuple[IndexedChunk, ...]


def read_index(directory: Path) -> list[Entry]:
    """The entries of a DCP directory.

    Raises:
        CorruptCheckpointError: The index is damaged, or lacks something it names.
        CheckpointConfigError: It has a tensor of a kind that cannot be stored.
    """
    path = directory / INDEX
    try:
        found = run(read_small_file(path, _MAX_BYTES, follow=True))
        if not isinstance(found, Noted) or found.what != "Metadata":
            raise ValueError("it is not an index of torch.distributed.checkpoint")
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
        directory: Where they are stored, for the message.
        votes: By prefix the number of tensors below it that have a name of the model's; not empty.
        remedy: What to do if that is unclear, for the message.

    Raises:
        CheckpointConfigError: Several have the same number of tensors, and none of them is called a model.
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
    """The error if several parts may be the model."""
    found = ", ".join(sorted(map(dotted, prefixes)))
    return CheckpointConfigError(
        f"{directory} holds a model's tensors under each of {found}, and it is unclear which one is meant. {remedy}"
    )


# -- what it says ----------------------------------------------------------------------------------------------------


def _entries(directory: Path, index: dict[str, Any]) -> Iterator[Entry]:
    places: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
    for key, place in index["storage_data"].items():
        places.setdefault(key.state["fqn"], []).append((key.state.get("offset"), place.state))
    paths = index.get("planner_data") or {}
    seen: set[KeyPath] = set()
    for name, entry in index["state_dict_metadata"].items():
        if type(name) is not str:
            raise TypeError("the name of an entry is not a string")
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
        raise ValueError("the keys that lead to an entry are not strings or numbers")
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
            raise ValueError(f"it wrongly describes the part of {name} that begins at {list(corner)}")
        piece = _piece(directory, name, Box(corner, sizes[corner]), place)
        if Box(corner, sizes[corner]).numel * spec.itemsize > piece.length:
            raise ValueError(f"it names too few bytes for a piece of {name}")
        pieces.append(piece)
    return Entry(path, spec, tuple(pieces))


def _piece(directory: Path, name: str, box: Box | None, state: dict[str, Any]) -> IndexedChunk:
    file, first, length = state["relative_path"], state["offset"], state["length"]
    if type(file) is not str:
        raise TypeError(f"the file of {name} is no name")
    if state.get("transform_descriptors"):
        raise CorruptCheckpointError(
            directory / file, f"{name} is stored compressed or encrypted, which is not supported"
        )
    [first, length] = _ints((first, length))
    return IndexedChunk(box, file, first, length)


def _ints(values: Any, count: int | None = None) -> tuple[int, ...]:
    """Sizes or positions, if they are valid."""
    found = tuple(values)
    # Not shown in the messages: a nest of tuples would take for ever to be written out.
    if not all(type(value) is int and 0 <= value < LIMIT for value in found) or len(found) > MAX_DIMENSIONS:
        raise ValueError("a size or position is not a valid number")
    if count is not None and len(found) != count:
        raise ValueError(f"a size or position does not have {count} dimensions")
    return found
