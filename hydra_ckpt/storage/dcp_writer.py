"""`SafetensorsWriter`: whole tensors in final safetensors files through `torch.distributed.checkpoint`'s own door."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from hydra_ckpt import __version__
from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, CheckpointExistsError
from hydra_ckpt.files import Files
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.files import DEFAULT_FILE_BYTES, FileLayout, by_size, index_json, lay_out
from hydra_ckpt.layout.plan import WritePlan, fill_files, full_coverage
from hydra_ckpt.layout.replicas import Share
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.digests import Digested, encode, hex_digest
from hydra_ckpt.storage.dtypes import safetensors_dtype
from hydra_ckpt.storage.memory import bytes_of
from hydra_ckpt.storage.tree import encode as encode_value
from hydra_ckpt.storage.tree import format_of
from hydra_ckpt.storage.write import create_files, write_plan
from hydra_ckpt.store import names
from hydra_ckpt.store.draft import Draft, complete_draft, create_draft, discard, join_draft, publish_draft
from hydra_ckpt.store.manifest import WRITER, FileRecord, Manifest, PartRecord

STATE = "state"
OBJECTS = "objects.json"
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class _Assignment:
    """What the coordinator tells each rank."""

    path: str
    token: str
    files: tuple[FileLayout, ...]


class SafetensorsWriter(StorageWriter):
    """Writes a state dict once, in parallel, into final safetensors files of whole tensors.

    The directory appears when everything in it is durable, or not at all. Values that are no tensors go to JSON;
    nothing is pickled. Use one instance for one save at a time:

        dcp.save(state_dict, storage_writer=SafetensorsWriter("checkpoints/step_10"))

    Args:
        path: The directory to create; it must not exist.
        max_file_bytes: Size at which a new file begins.
        files: The file layer.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_file_bytes: int = DEFAULT_FILE_BYTES, files: Files | None = None
    ) -> None:
        super().__init__()
        self._path = Path(path).absolute()
        self._max_file_bytes = max_file_bytes
        self._files = files or Files()
        self._rank = 0
        self._headers: list[Digested] = []
        self._draft: Draft | None = None
        self._layouts: tuple[FileLayout, ...] = ()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Prepare for another save, perhaps to another directory."""
        self.abandon()
        if checkpoint_id:
            self._path = Path(checkpoint_id).absolute()
        self._headers, self._draft, self._layouts = [], None, ()

    # DCP passes rank and use_collectives only to a signature with the word "kwargs".
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called by DCP on every rank."""
        if not kwargs.get("use_collectives", True):
            raise CheckpointConfigError(
                "SafetensorsWriter needs the ranks to plan together: save with use_collectives=True"
            )
        self._rank = kwargs.get("rank") or 0

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Called by DCP on every rank."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Coordinator only, called by DCP: lay the files out and create them.

        Raises:
            CheckpointExistsError: The directory exists.
            CheckpointError: The ranks' shards do not cover every tensor exactly once.
        """
        self.abandon()
        if self._path.exists():
            raise CheckpointExistsError(f"{self._path} exists already; save into a new directory")
        specs = {spec.name: spec for plan in plans for item in plan.items if (spec := _spec(item)) is not None}
        groups = by_size(specs.values(), self._max_file_bytes)
        self._layouts = tuple(lay_out(groups, STATE, "model")) if groups else ()
        covered = sum(_plan(self._layouts, _shares(plan.items)).coverage for plan in plans) % (1 << 64)
        if covered != full_coverage(self._layouts):
            raise CheckpointError(
                "the shards of the state dict do not cover every tensor exactly once; nothing was written"
            )
        self._files.make_dir(self._path.parent)
        self._draft = create_draft(self._files, self._path.parent, self._path.name)
        for directory in (STATE, names.DIGESTS):
            self._files.make_dir(self._draft.path / directory)
        self._headers = create_files(self._files, self._draft.path, _plan(self._layouts, {}))
        assignment = _Assignment(str(self._draft.path), self._draft.token, self._layouts)
        return [replace(plan, storage_data=assignment) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Called by DCP on every rank: write this rank's items, durably."""
        told: _Assignment = plan.storage_data
        draft = join_draft(Path(told.path), self._path.name, told.token, patience_s=_PATIENCE_S)
        shares = _shares(plan.items)
        # Tensors on an accelerator are brought over; those in host memory are written from where they lie.
        held = {key: _host_tensor(planner, plan.items[key]) for key in shares}
        sources = {key: bytes_of(tensor) for key, tensor in held.items()}
        written = _plan(told.files, shares)
        records = self._headers + write_plan(self._files, draft.path, written, sources, start_with=self._rank)
        sidecar = f"{names.DIGESTS}/rank-{self._rank:05d}.bin"
        data = encode([file.path for file in told.files], records)
        self._files.write_new(draft.path / sidecar, data)
        note = {"sidecar": [sidecar, len(data), hex_digest(data)]}
        results = [
            WriteResult(item.index, shares[key].nbytes, note)
            if key in shares
            else WriteResult(item.index, 0, {**note, "object": _object(planner, item)})
            for key, item in enumerate(plan.items)
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Coordinator only, called by DCP: publish."""
        draft = self._draft
        assert draft is not None  # prepare_global_plan ran on this rank
        flat = [result for rank in results for result in rank]
        objects = {item.index.fqn: item.storage_data["object"] for item in flat if "object" in item.storage_data}
        data = json.dumps(objects, sort_keys=True).encode()
        self._files.write_new(draft.path / OBJECTS, data)
        files = {file.path: FileRecord(file.nbytes) for file in self._layouts}
        files[OBJECTS] = FileRecord(len(data), hex_digest(data))
        if len(self._layouts) > 1:
            index = index_json(self._layouts)
            self._files.write_new(draft.path / STATE / "model.safetensors.index.json", index)
            files[f"{STATE}/model.safetensors.index.json"] = FileRecord(len(index), hex_digest(index))
        files.update({path: FileRecord(size, digest) for path, size, digest in self._sidecars(draft, flat)})
        manifest = Manifest(
            step=0,
            epoch=0,
            created=time.time(),
            world_size=len(results),
            parts={STATE: PartRecord("safetensors", tuple(file.path for file in self._layouts))},
            files=files,
            digests=tuple(sorted(path for path in files if path.startswith(f"{names.DIGESTS}/"))),
            details={WRITER: __version__},
            format=format_of(data),
        )
        complete_draft(self._files, draft, manifest)
        self._files.unlink(draft.path / names.TOKEN)
        publish_draft(self._files, draft)

    def _sidecars(self, draft: Draft, results: Sequence[WriteResult]) -> list[tuple[str, int, str]]:
        found = {item.storage_data["sidecar"][0]: item.storage_data["sidecar"] for item in results}
        own = f"{names.DIGESTS}/rank-{self._rank:05d}.bin"
        if own not in found:  # this rank has written headers, even if no item was its own
            data = (draft.path / own).read_bytes()
            found[own] = [own, len(data), hex_digest(data)]
        return [(path, size, digest) for path, size, digest in found.values()]

    def storage_meta(self) -> StorageMeta | None:
        """Called by DCP."""
        return StorageMeta(checkpoint_id=self._path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this writer can write there: a local path."""
        return "://" not in str(checkpoint_id)

    def abandon(self) -> None:
        """Remove what a failed save left behind. DCP has no call for that; the next save does it."""
        if self._draft is not None:
            discard(self._files, self._draft.path)


def _spec(item: WriteItem) -> TensorSpec | None:
    if item.tensor_data is None:
        return None
    name = item.index.fqn
    return TensorSpec(name, safetensors_dtype(name, item.tensor_data.properties.dtype), tuple(item.tensor_data.size))


def _shares(items: Sequence[WriteItem]) -> dict[int, Share]:
    found = {}
    for key, item in enumerate(items):
        spec = _spec(item)
        if spec is None or item.tensor_data is None:
            continue
        box = Box(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))
        found[key] = Share(spec, box, 0, box.sizes[0] if box.sizes else 1)
    return found


def _plan(files: tuple[FileLayout, ...], shares: Mapping[int, Share]) -> WritePlan:
    return WritePlan(files, (), shares, tuple(fill_files(files, shares)), "")


def _host_tensor(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    data = planner.resolve_data(item)
    if not isinstance(data, torch.Tensor):
        raise CheckpointError(f"{item.index.fqn}: the planner gave {type(data).__name__} for a tensor")
    return data.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def _object(planner: SavePlanner, item: WriteItem) -> Any:
    if item.type != WriteItemType.BYTE_IO or not isinstance(planner, DefaultSavePlanner):
        raise CheckpointError(
            f"{item.index.fqn}: only DefaultSavePlanner and its subclasses can hand over values that are no tensors"
        )
    tensors: dict[str, torch.Tensor] = {}
    value = encode_value(planner.lookup_object(item.index), item.index.fqn, tensors)
    if tensors:
        raise CheckpointError(
            f"{item.index.fqn}: holds tensors inside another object; save them under keys of their own"
        )
    return value
