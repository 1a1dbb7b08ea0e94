"""What other tools have pickled: indices and values of plain DCP directories, accelerate's small files.

Reading a pickle runs code from it. This is the one module that does, and its callers only with the user's permission
(`allow_legacy_pickle_restore`); tensors are read elsewhere, with `weights_only=True`.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.plan import StoredChunk, StoredTensor
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.dtypes import safetensors_dtype
from hydra_ckpt.storage.header import open_inside

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
        metadata = FileSystemReader(directory).read_metadata()
    except Exception as error:  # noqa: BLE001 - pickles raise whatever they like
        raise CorruptCheckpointError(directory / ".metadata", f"cannot be read: {error!r}") from None
    found = DcpDirectory({}, {}, {})
    stored: dict[str, list[_Stored]] = {}
    for index, place in metadata.storage_data.items():
        stored.setdefault(index.fqn, []).append(_stored(directory, relative, index, place))
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    for name, entry in metadata.state_dict_metadata.items():
        path = tuple(paths.get(name, (name,)))
        if name not in stored:
            raise CorruptCheckpointError(directory / ".metadata", f"does not say where {name} lies")
        if not isinstance(entry, TensorStorageMetadata):
            _, file, first, length = stored[name][0]
            found.values[path] = _load(root, file, first, length)
            continue
        spec = TensorSpec(name, safetensors_dtype(name, entry.properties.dtype), tuple(entry.size))
        sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
        chunks = []
        for offset, file, first, length in stored[name]:
            corner = offset if offset is not None else (0,) * len(spec.shape)
            chunks.append(StoredChunk(Box(corner, sizes[corner]), file, first))
            found.lengths[file, first] = length
        found.tensors[path] = StoredTensor(spec, tuple(chunks))
    return found


def _stored(directory: Path, relative: str, index: Any, place: Any) -> _Stored:
    if getattr(place, "transform_descriptors", None):
        raise CorruptCheckpointError(
            directory / place.relative_path, f"{index.fqn} is stored compressed or encrypted, which is not supported"
        )
    file = f"{relative}/{place.relative_path}" if relative else place.relative_path
    return None if index.offset is None else tuple(index.offset), file, place.offset, place.length


def _load(root: Path, file: str, first: int, length: int) -> Any:
    descriptor = open_inside(root, file)
    try:
        data = os.pread(descriptor, length, first)
    finally:
        os.close(descriptor)
    return _unpickled(root / file, io.BytesIO(data))


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
