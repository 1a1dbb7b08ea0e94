"""What other tools have pickled: indices and values of plain DCP directories, accelerate's small files.

Reading a pickle runs code from it. This is the one module that does, and its callers only with the user's permission
(`allow_legacy_pickle_restore`); tensors are read elsewhere, with `weights_only=True`. Where tensors alone are wanted,
the index is read without permission: nothing but the classes that DCP's indices consist of is made from it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.plan import StoredChunk, StoredTensor
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.dtypes import safetensors_dtype
from hydra_ckpt.storage.header import read_piece
from hydra_ckpt.store import names

INDEX = ".metadata"
ACCELERATE_MODEL = "pytorch_model_fsdp_{}"
_MAX_INDEX_BYTES = 1 << 30
# What an index consists of, beside element types.
_INDEX_CLASSES = {
    *((metadata.__name__, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata")),
    *((metadata.__name__, name) for name in ("MetadataIndex", "StorageMeta", "TensorProperties")),
    *((metadata.__name__, name) for name in ("TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    (filesystem.__name__, "_StorageInfo"),
    (filesystem.__name__, "SerializationFormat"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}

# The keys that lead to a value in nested dictionaries and lists.
KeyPath = tuple[Any, ...]
# A piece of an entry: its offsets in the whole tensor, its file, first byte and length in bytes.
_Stored = tuple[tuple[int, ...] | None, str, int, int]


@dataclass(frozen=True)
class DcpDirectory:
    """A directory that `dcp.save` has written.

    Attributes:
        tensors: Where each tensor lies.
        values: All else, loaded.
        lengths: File and first byte of a chunk to its length in bytes.
    """

    tensors: dict[KeyPath, StoredTensor]
    values: dict[KeyPath, Any]
    lengths: dict[tuple[str, int], int]


def is_foreign(path: Path) -> bool:
    """Whether a directory is a checkpoint of DCP's or accelerate's, and none of ours."""
    if (path / names.MANIFEST).exists():
        return False
    return (path / INDEX).is_file() or (path / ACCELERATE_MODEL.format(0) / INDEX).is_file()


def read_dcp(root: Path, relative: str) -> DcpDirectory:
    """Read the index of a DCP directory, and its values; runs the pickles in it.

    Args:
        root: The directory that file names are given from.
        relative: Where in it the DCP directory lies; empty for itself.

    Raises:
        CorruptCheckpointError: The index cannot be read, or lacks something it names.
    """
    directory = root / relative
    try:
        index = FileSystemReader(directory).read_metadata()
    except Exception as error:  # noqa: BLE001 - pickles raise whatever they like
        raise CorruptCheckpointError(directory / INDEX, f"cannot be read: {error!r}") from None
    stored = _places(index, directory, relative)
    found = _tensors(index, stored, directory)
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            _, file, first, length = stored[name][0]
            found.values[_path(index, name)] = _load(root, file, first, length)
    return found


def read_dcp_tensors(root: Path, relative: str) -> DcpDirectory:
    """Read where the tensors of a DCP directory lie, and no values; runs nothing.

    Args:
        root: The directory that file names are given from.
        relative: Where in it the DCP directory lies; empty for itself.

    Raises:
        CorruptCheckpointError: The index cannot be read, has other things in it, or lacks something it names.
    """
    directory = root / relative
    path = directory / INDEX
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise CorruptCheckpointError(path, f"is larger than {_MAX_INDEX_BYTES} bytes")
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError("it is no index of torch.distributed.checkpoint")
        return _tensors(index, _places(index, directory, relative), directory)
    except CorruptCheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - damaged pickles raise whatever they like
        raise CorruptCheckpointError(path, f"cannot be read: {error!r}") from None


class _IndexUnpickler(pickle.Unpickler):
    """Makes what indices consist of and nothing else, whatever a file asks for."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Called for everything that a pickle refers to by name."""
        if module_name == "torch" and isinstance(found := getattr(torch, global_name, None), torch.dtype):
            return found
        if (module_name, global_name) not in _INDEX_CLASSES:
            raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}, which no index needs")
        return super().find_class(module_name, global_name)


def _path(index: Metadata, name: str) -> KeyPath:
    paths = index.planner_data if isinstance(index.planner_data, dict) else {}
    return tuple(paths.get(name, (name,)))


def _places(index: Metadata, directory: Path, relative: str) -> dict[str, list[_Stored]]:
    """Where the pieces of each entry lie."""
    found: dict[str, list[_Stored]] = {}
    for key, place in index.storage_data.items():
        found.setdefault(key.fqn, []).append(_stored(directory, relative, key, place))
    for name in index.state_dict_metadata:
        if name not in found:
            raise CorruptCheckpointError(directory / INDEX, f"does not say where {name} lies")
    return found


def _tensors(index: Metadata, stored: Mapping[str, list[_Stored]], directory: Path) -> DcpDirectory:
    """The tensors of an index; none of its values."""
    found = DcpDirectory({}, {}, {})
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        spec = TensorSpec(name, safetensors_dtype(name, entry.properties.dtype), tuple(entry.size))
        sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
        chunks = []
        for offset, file, first, length in stored[name]:
            corner = offset if offset is not None else (0,) * len(spec.shape)
            if corner not in sizes:
                raise CorruptCheckpointError(directory / INDEX, f"does not say how large the piece of {name} is")
            box = Box(corner, sizes[corner])
            if box.numel * spec.itemsize > length:
                raise CorruptCheckpointError(directory / INDEX, f"names too few bytes for a piece of {name}")
            chunks.append(StoredChunk(box, file, first))
            found.lengths[file, first] = length
        found.tensors[_path(index, name)] = StoredTensor(spec, tuple(chunks))
    return found


def _stored(directory: Path, relative: str, index: Any, place: Any) -> _Stored:
    if getattr(place, "transform_descriptors", None):
        raise CorruptCheckpointError(
            directory / place.relative_path, f"{index.fqn} is stored compressed or encrypted, which is not supported"
        )
    file = f"{relative}/{place.relative_path}" if relative else place.relative_path
    return None if index.offset is None else tuple(index.offset), file, place.offset, place.length


def _load(root: Path, file: str, first: int, length: int) -> Any:
    return _unpickled(root / file, io.BytesIO(read_piece(root, file, first, length)))


def read_pickle(path: Path) -> Any:
    """A file that `torch.save` has written; runs the pickle in it.

    Raises:
        CorruptCheckpointError: It cannot be read.
    """
    return _unpickled(path, io.BytesIO(path.read_bytes()))


def _unpickled(path: Path, data: io.BytesIO) -> Any:
    try:
        return torch.load(data, map_location="cpu", weights_only=False)
    except Exception as error:  # noqa: BLE001 - pickles raise whatever they like
        raise CorruptCheckpointError(path, f"cannot be read: {error!r}") from None


def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, mapped into memory rather than read.

    Raises:
        CorruptCheckpointError: It is no state dict of tensors.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 - torch.load raises whatever the file leads to
        raise CorruptCheckpointError(path, f"cannot be read as tensors alone: {error}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CorruptCheckpointError(path, "is no state dict of tensors")
    return {str(name): tensor for name, tensor in loaded.items()}
