"""`SafetensorsReader`: our checkpoints, and any directory of safetensors files, for `dcp.load`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
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

from hydra_ckpt.errors import CheckpointError, CorruptCheckpointError
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.storage.dcp_contents import Contents, read_contents
from hydra_ckpt.storage.dcp_values import VALUES, load_item, tensor_names
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.ledger import Ledger
from hydra_ckpt.storage.read import Fetch, fetch
from hydra_ckpt.storage.verification import checks, findings, share_out
from hydra_ckpt.store import names
from hydra_ckpt.values import refuse_url


@dataclass(frozen=True)
class _Turn:
    """The part of the checks that a rank makes, sent by the coordinator, which alone knows the number of ranks."""

    rank: int
    world_size: int


class SafetensorsReader(StorageReader):
    """Reads byte ranges of safetensors files into the state dict of `dcp.load`; no file is unpickled.

        dcp.load(state_dict, storage_reader=SafetensorsReader("checkpoints/step_10"))

    Args:
        path: What `SafetensorsWriter` wrote, or any directory of `*.safetensors` files: whole tensors, or the shards
            of torch's `HuggingFaceStorageWriter(save_distributed=True)`.
        verify: Check every byte against its digest. The ranks share this work, and the load fails on all of them if one
            finds damage. A single rank checks everything before it loads anything. Files without digests are not
            checked.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        super().__init__()
        refuse_url("SafetensorsReader(path)", path)
        self._path = Path(path).absolute()
        self._verify = verify
        self.reset()

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The directory."""
        return self._path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Prepare for another load, perhaps from another directory."""
        if checkpoint_id:
            refuse_url("checkpoint_id", checkpoint_id)
            self._path = Path(checkpoint_id).absolute()
        self._load_id = names.nonce()
        self._found: Contents | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Called by DCP: what there is to load.

        Raises:
            CheckpointNotFoundError: The directory holds no safetensors files.
            CorruptCheckpointError: A header or the manifest is damaged.
        """
        try:
            self._found = found = read_contents(self._path)
        except CheckpointError:
            if "rank" not in kwargs:
                raise
            # DCP has asked a second time, for this rank's own metadata, and would now hide the error behind another
            # one; it is raised again by `set_up_storage_reader`, which comes next.
            self.reset()
            return Metadata({})
        known: dict[str, Any] = {name: _metadata_of(stored) for name, stored in found.tensors.items()}
        known.update(dict.fromkeys(found.values, BytesStorageMetadata()))
        planner_data = found.planner_data
        if planner_data is None:  # DCP looks keys up in it, and would fail without it
            planner_data = {name: (name,) for name in known}
        meta = StorageMeta(checkpoint_id=self._path, load_id=self._load_id)
        return Metadata(known, planner_data=planner_data, storage_meta=meta)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called by DCP on every rank."""
        self._contents()

    def _contents(self) -> Contents:
        if self._found is None:
            self._found = read_contents(self._path)
        return self._found

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Called by DCP on every rank."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Coordinator only, called by DCP: divide the checks among the ranks."""
        return [replace(plan, storage_data=_Turn(rank, len(plans))) for rank, plan in enumerate(plans)]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Called by DCP on every rank: check this rank's share of the bytes, then fill what the plan asks for.

        Raises:
            CorruptCheckpointError: Bytes are not those that were written.
        """
        found = self._contents()
        ledger = self._check(found, plan.storage_data)
        tensors = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                self._load_value(found, item, planner, ledger)
            else:
                tensors.append((item, planner.resolve_tensor(item).detach()))
        fetch(self._path, [_fetch(found, item, target) for item, target in tensors], ledger)
        for item, target in tensors:
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _check(self, found: Contents, turn: Any) -> Ledger | None:
        if not self._verify or found.manifest is None:
            return None
        if not isinstance(turn, _Turn):  # a planner has made a plan of its own
            turn = _Turn(0, 1)
        everything = checks(self._path, found.manifest.files, found.manifest.digests)
        for error in findings(self._path, share_out(everything, turn.rank, turn.world_size)):
            raise error
        # Other ranks compare the rest at the same time; what is about to be used is also compared here.
        return Ledger(everything) if turn.world_size > 1 else None

    def _load_value(self, found: Contents, item: ReadItem, planner: LoadPlanner, ledger: Ledger | None) -> None:
        data = found.values[item.storage_index.fqn]
        try:
            inner = {name: found.inner[name] for name in tensor_names(data)}
        except (KeyError, TypeError) as error:
            raise CorruptCheckpointError(
                self._path / VALUES, f"refers to a tensor that does not exist: {error}"
            ) from None
        tensors = {
            name: torch.empty(stored.spec.shape, dtype=TORCH_DTYPE[stored.spec.dtype], device="cpu")
            for name, stored in inner.items()
        }
        whole = [Fetch(inner[name], Box.whole(tuple(into.shape)), into) for name, into in tensors.items()]
        fetch(self._path, whole, ledger)
        load_item(planner, item, self._path / VALUES, data, tensors)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this reader can read there: a local directory."""
        return "://" not in str(checkpoint_id) and Path(checkpoint_id).is_dir()


def _fetch(found: Contents, item: ReadItem, target: torch.Tensor) -> Fetch:
    stored = found.tensors[item.storage_index.fqn]
    corner = item.storage_index.offset or (0,) * len(item.lengths)
    offsets = tuple(a + b for a, b in zip(corner, item.storage_offsets, strict=True))
    return Fetch(stored, Box(offsets, tuple(item.lengths)), target)


def _metadata_of(stored: StoredTensor) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(torch.Size(chunk.box.offsets), torch.Size(chunk.box.sizes)) for chunk in stored.chunks
    ]
    properties = TensorProperties(dtype=TORCH_DTYPE[stored.spec.dtype])
    return TensorStorageMetadata(properties, torch.Size(stored.spec.shape), chunks)
