"""Directories of safetensors files without a manifest: whole tensors, or the shards that torch's own writer leaves.

`torch.distributed.checkpoint.HuggingFaceStorageWriter(save_distributed=True)` gives each rank a file, whose header says
in its metadata at which offsets of the whole tensor each part begins. It records neither the whole shape nor the number
of files: the shape is where the last part ends, and a missing last part cannot be detected.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.plan import StoredChunk, StoredTensor
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.header import LIMIT, read_header, refuse_overlap

_SHARDING = "DCP_SHARDING_INFO"
_OFFSETS = "saved_offsets"


def read_directory(root: Path, files: list[str]) -> dict[str, StoredTensor]:
    """All tensors of a set of files by name, shards of one tensor brought together.

    Raises:
        CorruptCheckpointError: A header is damaged, two files disagree about a tensor, or a part of one is missing.
    """
    parts: dict[str, list[StoredTensor]] = defaultdict(list)
    for file in files:
        stored, metadata = read_header(root, file)
        offsets = _offsets(root / file, metadata)
        for tensor in stored:
            parts[tensor.spec.name].append(tensor if offsets is None else _placed(root / file, tensor, offsets))
    found = {name: _joined(root, tensors) for name, tensors in parts.items()}
    for tensor in found.values():
        refuse_gaps(root, tensor)
    return found


def refuse_gaps(root: Path, tensor: StoredTensor) -> None:
    """Check that every element is stored. DCP would silently leave the others as they are.

    Raises:
        CorruptCheckpointError: Some are not.
    """
    held, whole = sum(chunk.box.numel for chunk in tensor.chunks), Box.whole(tensor.spec.shape).numel
    if held != whole:
        file = tensor.chunks[0].file
        raise CorruptCheckpointError(
            root / file, f"{tensor.spec.name}: the files hold {held} of its {whole} elements; a file is missing"
        )


def _offsets(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    if _SHARDING not in metadata:
        return None
    try:
        body = json.loads(metadata[_SHARDING])
        return {name: tuple(entry[_OFFSETS]) for name, entry in body.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"{_SHARDING} cannot be read: {error!r}") from None


def _placed(path: Path, tensor: StoredTensor, offsets: Mapping[str, Any]) -> StoredTensor:
    """A part at its position in its tensor; as far as this file shows, the tensor ends with it."""
    spec, (chunk,) = tensor.spec, tensor.chunks
    corner = offsets.get(spec.name, ())
    if len(corner) != len(spec.shape) or not all(type(start) is int and 0 <= start < LIMIT for start in corner):
        raise CorruptCheckpointError(path, f"{spec.name}: {_SHARDING} does not say which part of the tensor this is")
    shape = tuple(start + size for start, size in zip(corner, spec.shape, strict=True))
    return StoredTensor(replace(spec, shape=shape), (replace(chunk, box=Box(corner, spec.shape)),))


def _joined(root: Path, tensors: list[StoredTensor]) -> StoredTensor:
    first = tensors[0].spec
    chunks: tuple[StoredChunk, ...] = tuple(chunk for tensor in tensors for chunk in tensor.chunks)
    for tensor, chunk in zip(tensors, chunks, strict=True):
        if (tensor.spec.dtype, len(tensor.spec.shape)) != (first.dtype, len(first.shape)):
            raise CorruptCheckpointError(
                root / chunk.file, f"{first.name} is in {chunks[0].file} too, and the two do not match"
            )
    refuse_overlap(root, first.name, chunks)
    shape = tuple(max(sizes) for sizes in zip(*(tensor.spec.shape for tensor in tensors), strict=True))
    return StoredTensor(TensorSpec(first.name, first.dtype, shape), chunks)
