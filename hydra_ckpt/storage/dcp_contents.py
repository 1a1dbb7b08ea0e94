"""What a directory holds for `dcp.load`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import CheckpointConfigError, CheckpointNotFoundError, CorruptCheckpointError
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.storage.dcp_shards import read_directory, refuse_gaps
from hydra_ckpt.storage.dcp_values import PLANNER_DATA, TENSORS, VALUES
from hydra_ckpt.storage.decoding import decode
from hydra_ckpt.storage.header import read_tensors
from hydra_ckpt.storage.verification import read_small
from hydra_ckpt.store import names
from hydra_ckpt.store.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Contents:
    """The entries of a directory.

    Attributes:
        tensors: By name.
        values: Encoded values by name.
        inner: Tensors that these refer to.
        planner_data: The data that the save planner stored for its load planner; None if nothing is stored.
        manifest: None for a directory of safetensors files alone.
    """

    tensors: Mapping[str, StoredTensor]
    values: Mapping[str, Any] = field(default_factory=dict)
    inner: Mapping[str, StoredTensor] = field(default_factory=dict)
    planner_data: Any = None
    manifest: Manifest | None = None


def read_contents(path: Path) -> Contents:
    """What there is to load; headers and small files are read and checked.

    Raises:
        CheckpointNotFoundError: The directory holds no safetensors files.
        CheckpointConfigError: It holds files of another format.
        CorruptCheckpointError: A header or small file is damaged, or a part of a tensor is missing.
    """
    if not (path / names.MANIFEST).exists():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        if not files:
            raise CheckpointNotFoundError(f"{path} holds neither {names.MANIFEST} nor *.safetensors files")
        return Contents(read_directory(path, files))
    manifest = read_manifest(path)
    for name, part in manifest.parts.items():
        if part.format != "safetensors":
            raise CheckpointConfigError(
                f"{path / name} holds PyTorch's own files: load it with dcp.load(state_dict, checkpoint_id=...)"
            )
    listed = [file for name, part in manifest.parts.items() if name != TENSORS for file in part.files]
    inner = manifest.parts[TENSORS].files if TENSORS in manifest.parts else ()
    contents = Contents(
        read_tensors(path, listed),
        _small_json(path, VALUES, manifest) or {},
        read_tensors(path, list(inner)),
        decode(_small_json(path, PLANNER_DATA, manifest), {}),
        manifest,
    )
    for tensor in contents.tensors.values():
        refuse_gaps(path, tensor)
    return contents


def _small_json(path: Path, file: str, manifest: Manifest) -> dict[str, Any] | None:
    if file not in manifest.files:
        return None
    try:
        return dict(json.loads(read_small(path, file, manifest.files[file])))
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(path / file, f"is not JSON that hydra_ckpt wrote: {error}") from None
