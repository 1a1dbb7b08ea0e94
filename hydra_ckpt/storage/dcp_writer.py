"""`SafetensorsWriter`: whole tensors in final safetensors files, for `dcp.save` and `dcp.async_save`."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError
from hydra_ckpt.files import Files
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.file_layout import DEFAULT_FILE_BYTES, FileLayout, lay_out
from hydra_ckpt.layout.plan import WritePlan
from hydra_ckpt.layout.replicas import WriteShare
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.dcp_draft import (
    Assignment,
    Session,
    announce,
    await_assignment,
    begin_draft,
    check_target,
    draft_path,
    give_up,
    publish,
    session,
)
from hydra_ckpt.storage.dcp_finish import complete
from hydra_ckpt.storage.dcp_layout import (
    STATE,
    Sidecar,
    Written,
    check_complete,
    check_planned,
    lay_out_shares,
    plan_of,
    share_of,
    shares_in,
)
from hydra_ckpt.storage.dcp_values import TENSORS, encode_item
from hydra_ckpt.storage.digests import Digested, encode, hex_digest
from hydra_ckpt.storage.dtypes import safetensors_dtype
from hydra_ckpt.storage.memory import bytes_of
from hydra_ckpt.storage.write import create_files, create_own_files, write_plan
from hydra_ckpt.store import names
from hydra_ckpt.store.draft import Draft, discard
from hydra_ckpt.values import refuse_url


@dataclass
class _Saving:
    """Coordinator only: the save in progress.

    Attributes:
        draft: Where it is written.
        remove: Removes the draft; runs automatically when the writer is garbage collected.
        thread: The thread that saves.
        world_size: Ranks that save.
        assignment: What is sent to the ranks, once it is known.
        headers: Digests of the files' headers.
        sidecar: This rank's digests, once they are written.
        failure: Why there is none.
    """

    draft: Draft
    remove: weakref.finalize[..., Any]
    thread: threading.Thread
    world_size: int = 1
    assignment: Assignment | None = None
    headers: list[Digested] = field(default_factory=list)
    sidecar: Sidecar | None = None
    failure: Exception | None = None


# Saves of this process that have a draft, by its path.
_SAVING: weakref.WeakValueDictionary[Path, _Saving] = weakref.WeakValueDictionary()


class SafetensorsWriter(StorageWriter):
    """Writes a state dict once, in parallel, into final safetensors files of whole tensors.

    The directory appears when everything in it is durable, or not at all. Values that are not tensors go to JSON, with
    tensors inside them in separate files; nothing is pickled. One instance serves any number of saves, one at a time:

        dcp.save(state_dict, storage_writer=SafetensorsWriter("checkpoints/step_10"))

    Planners that cache plans (`DefaultSavePlanner(enable_plan_caching=True)`) work, also with new instances. A save
    that fails leaves nothing: its draft is removed by the next save to the same directory, by `abandon()`, or when the
    writer is deleted.

    Args:
        path: The directory to publish. It must not exist, or be empty.
        max_file_bytes: Size at which a new file begins.
        overwrite: Replace a checkpoint of this writer, after the new one is complete. Nothing else is replaced.
        files: The file layer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_file_bytes: int = DEFAULT_FILE_BYTES,
        overwrite: bool = False,
        files: Files | None = None,
    ) -> None:
        super().__init__()
        refuse_url("SafetensorsWriter(path)", path)
        self._target = Path(path).absolute()
        self._max_file_bytes = max_file_bytes
        self._overwrite = overwrite
        self._files = files or Files()
        self._save_id = names.nonce()
        self._rank = 0
        self._is_coordinator = False
        self._saving: _Saving | None = None

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The directory that is, or will be, published."""
        return self._target

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Prepare for another save, perhaps to another directory."""
        self.abandon()
        self._save_id = names.nonce()
        if checkpoint_id:
            refuse_url("checkpoint_id", checkpoint_id)
            self._target = Path(checkpoint_id).absolute()

    # DCP passes rank and use_collectives only to a signature with the word "kwargs".
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called by DCP on every rank.

        Raises:
            CheckpointConfigError: The ranks would not plan together.
        """
        if not kwargs.get("use_collectives", True):
            raise CheckpointConfigError(
                "SafetensorsWriter needs the ranks to plan together, since no rank alone can tell when the checkpoint "
                "is complete: save with use_collectives=True"
            )
        self.abandon()
        self._rank = kwargs.get("rank") or 0
        self._is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Called by DCP on every rank: check that everything can be stored; the coordinator creates the draft.

        What can fail early fails here: DCP keeps global plans in its cache whether or not the save succeeds.

        Raises:
            CheckpointExistsError: The directory exists and is not empty.
            CheckpointConfigError: A tensor cannot be stored.
        """
        for item in plan.items:
            share_of(item)
        if self._is_coordinator:
            self._begin()
        return plan

    def _begin(self) -> None:
        check_target(self._target, overwrite=self._overwrite)
        self._files.make_dir(self._target.parent)
        path, thread = draft_path(self._target, session()), threading.current_thread()
        other = _SAVING.get(path)
        if other is not None:
            if other.thread is not thread and other.thread.is_alive():
                raise CheckpointError(
                    f"another thread saves to {self._target}. Save to another directory; or if that save has failed, "
                    "call abandon() on its writer"
                )
            other.remove()
        draft = begin_draft(self._files, self._target)
        remove = weakref.finalize(self, _remove, self._files, draft.path, os.getpid())
        self._saving = _Saving(draft, remove, thread)
        _SAVING[path] = self._saving

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Coordinator only, called by DCP: lay out the files and create them.

        Never fails: `write_data` raises any error, so that DCP's plan cache stays the same on all ranks.
        """
        saving = self._current()
        saving.world_size = len(plans)
        # A plan that is not usable represents a cached one; then only the planner's metadata says what is saved.
        if all(plan.usable for plan in plans):
            shares = (share_of(item) for plan in plans for item in plan.items)
            self._assign(saving, (share for share in shares if share is not None))
        return [replace(plan, storage_data=session()) for plan in plans]

    def _assign(self, saving: _Saving, shares: Iterable[WriteShare]) -> None:
        try:
            layouts = lay_out_shares(shares, self._max_file_bytes)
            for directory in (STATE, names.DIGESTS):
                self._files.make_dir(saving.draft.path / directory)
            saving.headers = create_files(self._files, saving.draft.path, plan_of(layouts, (), {}))
            saving.assignment = Assignment(saving.draft.path, saving.draft.token, layouts)
            if saving.world_size > 1:
                announce(self._files, saving.draft, saving.assignment)
        except Exception as error:  # noqa: BLE001 - raised by write_data
            saving.failure = error
            give_up(self._files, saving.draft)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Called by DCP on every rank: write this rank's items, durably.

        Raises:
            CheckpointError: Data differs from the plan, or the plan was cached by another writer.
            OSError: The disk is full or fails.
        """
        future: Future[list[WriteResult]] = Future()
        try:
            assignment = self._told(plan, planner)
            if assignment is None or not (plan.items or self._is_coordinator):
                future.set_result([])
            else:
                future.set_result(self._write(assignment, plan, planner))
        except Exception:
            if self._saving is not None and self._saving.world_size == 1:
                self.abandon()
            raise
        return future

    def _told(self, plan: SavePlan, planner: SavePlanner) -> Assignment | None:
        """This save's assignment; None on a rank where the coordinator raises what went wrong."""
        if not self._is_coordinator:
            if not isinstance(plan.storage_data, Session):
                raise CheckpointError(
                    f"the plan that {type(planner).__name__} has cached was made by another storage writer, because "
                    "DCP keeps one plan for all planners with the same class name. Give SafetensorsWriter a planner "
                    "class of its own: class Planner(DefaultSavePlanner): pass"
                )
            return await_assignment(draft_path(self._target, plan.storage_data))
        saving = self._current()
        if saving.assignment is None and saving.failure is None:
            self._assign_cached(saving, planner)
        if saving.failure is not None:
            raise saving.failure
        return saving.assignment

    def _assign_cached(self, saving: _Saving, planner: SavePlanner) -> None:
        metadata = getattr(planner, "metadata", None)
        if isinstance(metadata, Metadata):
            self._assign(saving, shares_in(metadata))
        else:
            give_up(self._files, saving.draft)
            saving.failure = CheckpointError(
                f"{type(planner).__name__} caches plans, but does not say in .metadata what the cached plans save"
            )

    def _write(self, assignment: Assignment, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        inner: dict[str, torch.Tensor] = {}
        values = {
            key: encode_item(planner, item, inner) for key, item in enumerate(plan.items) if item.tensor_data is None
        }
        shares = {key: share for key, item in enumerate(plan.items) if (share := share_of(item)) is not None}
        own = {len(plan.items) + number: _whole(name, tensor) for number, (name, tensor) in enumerate(inner.items())}
        written = plan_of(assignment.files, self._own_files(own), shares, own)
        check_planned(written)
        # Tensors on an accelerator are copied to the host; those in host memory are written directly from there.
        held = {key: _host_tensor(planner, plan.items[key], share) for key, share in shares.items()}
        held.update(zip(own, map(_on_host, inner.values()), strict=True))
        sidecar = self._write_files(assignment, written, held)
        own_files = tuple((file.path, file.nbytes) for file in written.own_files)
        results = []
        for key, item in enumerate(plan.items):
            report = Written(assignment.token, sidecar, own_files=own_files)
            if key in shares:
                report = replace(report, box=shares[key].box)
            else:
                value, tensors = values[key]
                report = replace(report, value=value, tensors=tensors)
            results.append(WriteResult(item.index, shares[key].nbytes if key in shares else 0, report))
        return results

    def _own_files(self, shares: Mapping[int, WriteShare]) -> tuple[FileLayout, ...]:
        specs = [share.spec for share in shares.values()]
        return tuple(lay_out([specs], TENSORS, f"rank-{self._rank:05d}")) if specs else ()

    def _write_files(self, assignment: Assignment, plan: WritePlan, held: Mapping[int, torch.Tensor]) -> Sidecar:
        draft = assignment.root
        records = list(self._saving.headers) if self._saving is not None else []
        if plan.own_files:
            self._files.make_dir(draft / TENSORS)
        records += create_own_files(self._files, draft, plan)
        sources = {key: bytes_of(tensor) for key, tensor in held.items()}
        records += write_plan(self._files, draft, plan, sources, start_with=self._rank)
        path = f"{names.DIGESTS}/rank-{self._rank:05d}.bin"
        data = encode([file.path for file in plan.all_files], records)
        self._files.write_new(draft / path, data)
        sidecar = path, len(data), hex_digest(data)
        if self._saving is not None:
            self._saving.sidecar = sidecar
        return sidecar

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Coordinator only, called by DCP: publish what was written, if it is all that `metadata` lists.

        Raises:
            CheckpointError: Something is missing, or is not of this save. Nothing is published.
        """
        saving = self._current()
        try:
            if saving.assignment is None or saving.sidecar is None:
                raise CheckpointError("finish() was called for a save that has written nothing")
            flat = [result for rank in results for result in rank]
            check_complete(metadata, flat, saving.draft.token)
            complete(self._files, saving.draft, saving.assignment.files, metadata, results, saving.sidecar)
            publish(self._files, saving.draft, overwrite=self._overwrite)
        except BaseException:
            self.abandon()
            raise
        saving.remove.detach()
        self._saving = None

    def storage_meta(self) -> StorageMeta | None:
        """Called by DCP."""
        return StorageMeta(checkpoint_id=self._target, save_id=self._save_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this writer can write there: a local path."""
        return "://" not in str(checkpoint_id)

    def abandon(self) -> None:
        """Remove what a failed save left. DCP never calls this; the next save also does it."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.remove()

    def _current(self) -> _Saving:
        if self._saving is None:
            raise CheckpointError("SafetensorsWriter has no draft: prepare_local_plan() did not run on the coordinator")
        return self._saving


def _remove(files: Files, path: Path, process: int) -> None:
    """Remove a draft; not in a process that was forked while it was written."""
    if os.getpid() == process:
        discard(files, path)


def _whole(name: str, tensor: torch.Tensor) -> WriteShare:
    shape = tuple(tensor.shape)
    spec = TensorSpec(name, safetensors_dtype(name, tensor.dtype), shape)
    return WriteShare(spec, Box.whole(shape), 0, shape[0] if shape else 1)


def _host_tensor(planner: SavePlanner, item: WriteItem, share: WriteShare) -> torch.Tensor:
    """The item's data as it was planned.

    Raises:
        CheckpointConfigError: It is a tensor of a kind that files cannot hold.
        CheckpointError: It is something else: for example, DCP's plan cache does not notice a changed element type.
    """
    data, name = planner.resolve_data(item), item.index.fqn
    if not isinstance(data, torch.Tensor):
        raise CheckpointError(f"{name}: the planner gave {type(data).__name__} for a tensor")
    dtype, shape = safetensors_dtype(name, data.dtype), tuple(data.shape)
    if dtype != share.spec.dtype:
        raise CheckpointError(
            f"{name}: planned as {share.spec.dtype}, but the planner gave {dtype}. A planner that converts tensors "
            "must plan them with their new type; one that caches plans does not notice another element type: use one "
            "without plan caching, or of another class name"
        )
    if shape != share.box.sizes:
        raise CheckpointError(
            f"{name}: planned as a part of shape {list(share.box.sizes)}, but this rank holds one of shape "
            f"{list(shape)}. DCP computes wrong parts where two mesh dimensions shard one dimension of a tensor "
            "unevenly (tensor parallelism and FSDP2); make it divisible"
        )
    if data.device.type == "meta":
        raise CheckpointError(f"{name}: is on the meta device and has no values; initialize it before it is saved")
    held = _on_host(data)
    if type(held).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise CheckpointConfigError(
            f"{name}: a {type(held).__name__} is not one block of elements and cannot be stored; save the tensors that "
            "it consists of under keys of their own"
        )
    return held


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
