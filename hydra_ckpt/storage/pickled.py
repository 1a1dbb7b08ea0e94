"""What other tools have pickled: values of plain DCP directories, accelerate's small files, `.bin` files.

Reading a pickle runs code from it. This is the one module that does, and its callers only with the user's permission
(`allow_legacy_pickle_restore`); tensors are read elsewhere, with `weights_only=True`, and indices by `dcp_index`.
"""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.plan import StoredChunk, StoredTensor
from hydra_ckpt.storage.dcp_index import INDEX, KeyPath, read_index
from hydra_ckpt.storage.header import read_piece, refuse_overlap
from hydra_ckpt.store import names
from hydra_ckpt.store.small_files import read_small_file

_MAX_BYTES = 4 << 30
ACCELERATE_MODEL = "pytorch_model_fsdp_{}"


@dataclass(frozen=True)
class DcpDirectory:
    """A directory that `dcp.save` has written.

    Attributes:
        tensors: Where each tensor is stored.
        values: Everything else, if loading it was requested.
        lengths: File and first byte of a chunk to its length in bytes.
    """

    tensors: dict[KeyPath, StoredTensor]
    values: dict[KeyPath, Any]
    lengths: dict[tuple[str, int], int]


def is_foreign(path: Path) -> bool:
    """Whether a directory is a checkpoint of DCP or accelerate, and not one of ours."""
    return index_of(path) is not None


def index_of(path: Path) -> Path | None:
    """The index of a checkpoint of DCP, or of the first model of one of accelerate; None for all other directories."""
    # os.path, because pathlib raises where the disk fails or a name is too long
    if os.path.lexists(path / names.MANIFEST):
        return None
    indices = (path / INDEX, path / ACCELERATE_MODEL.format(0) / INDEX)
    return next((index for index in indices if os.path.isfile(index)), None)  # noqa: PTH113


def read_dcp(root: Path, relative: str, *, values: bool) -> DcpDirectory:
    """Where the tensors of a DCP directory are stored, according to its index.

    Args:
        root: The directory that file names are given from.
        relative: The path of the DCP directory in it; empty for the directory itself.
        values: Whether its values are loaded too, which runs the pickles that they are. Without them nothing is run.

    Raises:
        CorruptCheckpointError: The index cannot be read, or lacks something it names.
    """
    found = DcpDirectory({}, {}, {})
    for entry in read_index(root / relative):
        files = [_below(relative, piece.file) for piece in entry.pieces]
        if entry.spec is None:
            if values:
                [piece] = entry.pieces
                found.values[entry.path] = _load(root, files[0], piece.first, piece.length)
            continue
        chunks = []
        for file, piece in zip(files, entry.pieces, strict=True):
            assert piece.box is not None  # those of tensors have one
            chunks.append(StoredChunk(piece.box, file, piece.first))
            found.lengths[file, piece.first] = piece.length
        refuse_overlap(root, entry.spec.name, chunks)
        found.tensors[entry.path] = StoredTensor(entry.spec, tuple(chunks))
    return found


def _below(relative: str, file: str) -> str:
    return f"{relative}/{file}" if relative else file


def _load(root: Path, file: str, first: int, length: int) -> Any:
    return _unpickled(root / file, io.BytesIO(read_piece(root, file, first, length)))


def read_pickle(path: Path) -> Any:
    """A file that `torch.save` has written; runs the pickle in it.

    Raises:
        CorruptCheckpointError: It cannot be read.
    """
    return _unpickled(path, io.BytesIO(read_small_file(path, _MAX_BYTES, follow=True)))


def _unpickled(path: Path, data: io.BytesIO) -> Any:
    try:
        return torch.load(data, map_location="cpu", weights_only=False)
    except Exception as error:  # noqa: BLE001 - pickles may raise anything
        raise CorruptCheckpointError(path, f"cannot be read: {error!r}") from None


def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, mapped into memory rather than read.

    Raises:
        CorruptCheckpointError: It is not a state dict of tensors.
    """
    # Older files are not archives, and only archives can be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # noqa: BLE001 - torch.load raises whatever the file leads to
        what = str(error).partition("\n")[0]  # what follows advises to run the pickle
        raise CorruptCheckpointError(path, f"cannot be read as tensors alone: {what}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CorruptCheckpointError(path, "is not a state dict of tensors")
    return {str(name): tensor for name, tensor in loaded.items()}
