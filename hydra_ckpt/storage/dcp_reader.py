"""`SafetensorsReader`: our checkpoints, and any directory of safetensors files, for `dcp.load`."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from hydra_ckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.storage.dcp_writer import OBJECTS
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.header import read_tensors
from hydra_ckpt.storage.read import Fetch, fetch
from hydra_ckpt.storage.tree import decode
from hydra_ckpt.storage.verify import checks, findings, read_small, share_out
from hydra_ckpt.store import names
from hydra_ckpt.store.manifest import Manifest, read_manifest


class SafetensorsReader(StorageReader):
    """Reads byte ranges of safetensors files into the state dict of `dcp.load`; nothing is unpickled.

        dcp.load(state_dict, storage_reader=SafetensorsReader("checkpoints/step_10"))

    Args:
        path: What `SafetensorsWriter` wrote, or any directory of `*.safetensors` files.
        verify: Check every byte against its digest, shared out over the ranks; files without digests are taken as
            they are.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        super().__init__()
        self._path = Path(path).absolute()
        self._verify = verify
        self._tensors: dict[str, StoredTensor] = {}
        self._objects: dict[str, Any] = {}
        self._manifest: Manifest | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Prepare for another load, perhaps from another directory."""
        if checkpoint_id:
            self._path = Path(checkpoint_id).absolute()
        self._tensors, self._objects, self._manifest = {}, {}, None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Called by DCP: what there is to load.

        Raises:
            CheckpointNotFoundError: The directory holds no safetensors files.
            CorruptCheckpointError: A header or the manifest is damaged.
        """
        try:
            self._open()
        except CheckpointError:
            if "rank" not in kwargs:
                raise
            # DCP has asked a second time, for metadata of this rank's own, and would now bury the error under one of
            # its own; it is raised again by `set_up_storage_reader`, which comes next.
            self.reset()
            return Metadata({})
        known: dict[str, Any] = {name: _metadata_of(stored) for name, stored in self._tensors.items()}
        known.update(dict.fromkeys(self._objects, BytesStorageMetadata()))
        return Metadata(known, storage_meta=StorageMeta(checkpoint_id=self._path))

    def _open(self) -> None:
        if not (self._path / names.MANIFEST).exists():
            files = sorted(path.name for path in self._path.glob("*.safetensors"))
            if not files:
                raise CheckpointNotFoundError(f"{self._path} holds neither {names.MANIFEST} nor *.safetensors files")
            self._tensors = read_tensors(self._path, files)
            return
        self._manifest = read_manifest(self._path)
        listed = [file for part in self._manifest.parts.values() for file in part.files]
        self._tensors = read_tensors(self._path, listed)
        if OBJECTS in self._manifest.files:
            try:
                self._objects = dict(json.loads(read_small(self._path, OBJECTS, self._manifest.files[OBJECTS])))
            except (ValueError, TypeError) as error:
                raise CorruptCheckpointError(self._path / OBJECTS, f"is not JSON of ours: {error}") from None

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called by DCP on every rank."""
        if not self._tensors and not self._objects:
            self._open()
        if self._verify and self._manifest is not None:
            rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            everything = checks(self._path, self._manifest.files, self._manifest.digests)
            for error in findings(self._path, share_out(everything, rank, world)):
                raise error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Called by DCP on every rank."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Coordinator only, called by DCP."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Called by DCP on every rank: fill what the plan asks for."""
        tensors = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                self._load_object(item, planner)
            else:
                tensors.append((item, planner.resolve_tensor(item).detach()))
        fetch(self._path, [self._fetch(item, target) for item, target in tensors])
        for item, target in tensors:
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _fetch(self, item: ReadItem, target: torch.Tensor) -> Fetch:
        stored = self._tensors[item.storage_index.fqn]
        corner = item.storage_index.offset or (0,) * len(item.lengths)
        offsets = tuple(a + b for a, b in zip(corner, item.storage_offsets, strict=True))
        return Fetch(stored, Box(offsets, tuple(item.lengths)), target)

    def _load_object(self, item: ReadItem, planner: LoadPlanner) -> None:
        # DCP's planners take pickled bytes; these are made here, of data that came from JSON.
        buffer = io.BytesIO()
        torch.save(decode(self._objects[item.storage_index.fqn], {}), buffer)
        buffer.seek(0)
        planner.load_bytes(item, buffer)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this reader can read there: a local directory."""
        return "://" not in str(checkpoint_id) and Path(checkpoint_id).is_dir()


def _metadata_of(stored: StoredTensor) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(torch.Size(chunk.box.offsets), torch.Size(chunk.box.sizes)) for chunk in stored.chunks
    ]
    properties = TensorProperties(dtype=TORCH_DTYPE[stored.spec.dtype])
    return TensorStorageMetadata(properties, torch.Size(stored.spec.shape), chunks)
