"""Staging: copies of tensors in buffers that are allocated once, so that training may go on.

Pages touched for the first time cost five to twenty times the copy itself; a pool that keeps its buffers pays
once. A buffer is lent to one snapshot at a time and comes back when that snapshot is released.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, counted
from hydra_ckpt.storage.memory import bytes_of, is_plain_memory, resident

# Starts of tensors in a buffer: a cache line, and a multiple of every element size.
_ALIGNMENT = 64
_NO_CASTS: Mapping[int, torch.dtype] = {}


class Buffer:
    """Host memory for the tensors of one snapshot, with the views into it that the last tensors needed.

    Args:
        nbytes: Its size.
        pinned: Whether it is page-locked.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self._memory = resident(nbytes) if not pinned else torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
        self._layout: list[tuple[torch.dtype, torch.Size]] | None = None
        self._slots: list[tuple[torch.Tensor, memoryview]] = []

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._memory.numel()

    def slots(self, tensors: Collection[torch.Tensor]) -> list[tuple[torch.Tensor, memoryview]]:
        """A place for each tensor, of its type and shape, and the same place as bytes.

        Kept for the next tensors of the same layout: making views takes a tenth of the time of copying.
        """
        layout = [(tensor.dtype, tensor.shape) for tensor in tensors]
        if layout != self._layout:
            offsets, _ = _positions(tensors)
            targets = [_slot(self._memory, offset, tensor) for offset, tensor in zip(offsets, tensors, strict=True)]
            self._slots = [(target, bytes_of(target)) for target in targets]
            self._layout = layout
        return self._slots


class BufferPool:
    """Buffers that outlive a save. Safe to use from several threads.

    Args:
        pinned: Allocate page-locked memory, for copies from an accelerator. Untested on GPU.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: list[Buffer] = []
        self._lock = threading.Lock()

    def prewarm(self, nbytes: int) -> None:
        """Allocate and touch a buffer of at least this size, unless one is free."""
        self.give_back(self.take(nbytes))

    def holds(self, nbytes: int) -> bool:
        """Whether `take` would find a buffer of this size, and allocate none."""
        with self._lock:
            return any(buffer.nbytes >= nbytes for buffer in self._free)

    def take(self, nbytes: int) -> Buffer:
        """A buffer of at least `nbytes`; its pages are resident."""
        with self._lock:
            fitting = [buffer for buffer in self._free if buffer.nbytes >= nbytes]
            # Only buffers that fit are worth keeping: what a larger state outgrew goes back to the system.
            self._free = fitting[1:]
        return fitting[0] if fitting else Buffer(nbytes, pinned=self._pinned)

    def give_back(self, buffer: Buffer) -> None:
        """Return a buffer nobody looks at any more."""
        with self._lock:
            self._free.append(buffer)

    def clear(self) -> None:
        """Free all buffers that are not lent."""
        with self._lock:
            self._free = []


@dataclass
class Snapshot:
    """Tensors' bytes at one moment, by key; `release` when they are written.

    Attributes:
        sources: Key to row-major bytes.
    """

    sources: dict[int, memoryview] = field(default_factory=dict)
    _pool: BufferPool | None = None
    _buffer: Buffer | None = None

    def release(self) -> None:
        """Let go of the memory. Idempotent."""
        self.sources = {}
        if self._pool is not None and self._buffer is not None:
            self._pool.give_back(self._buffer)
        self._buffer = None


@torch.no_grad()
def borrow(
    tensors: Mapping[int, torch.Tensor],
    casts: Mapping[int, torch.dtype] = _NO_CASTS,
    pool: BufferPool | None = None,
) -> Snapshot:
    """Look at tensors where they lie, copying only those not in plain host memory, or wanted in another element type.

    For synchronous saves: nothing may change the tensors until the snapshot is released.

    Args:
        tensors: Live tensors by key.
        casts: Element types, where they are not the tensors' own.
        pool: Lends the memory for what changes its type.
    """
    snapshot = Snapshot()
    if casts:
        changed = Staging({key: tensors[key] for key in casts}, pool or BufferPool(), casts)
        changed.copy()
        snapshot = changed.snapshot
    for key, tensor in tensors.items():
        if key not in casts:
            snapshot.sources[key] = bytes_of(tensor if is_plain_memory(tensor) else _to_host(tensor))
    return snapshot


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


class Staging:
    """Copies of tensors in one buffer of a pool, made in as many steps as the caller likes.

    Args:
        tensors: Live tensors by key.
        pool: Lends the buffer.
        casts: Element types of the copies, where they are not the tensors' own.
    """

    def __init__(
        self,
        tensors: Mapping[int, torch.Tensor],
        pool: BufferPool,
        casts: Mapping[int, torch.dtype] = _NO_CASTS,
    ) -> None:
        self._live = dict(tensors)
        self._versions = {key: _version(tensor) for key, tensor in tensors.items()}
        self._late: list[tuple[torch.Tensor, int]] = []
        copies = _copies(tensors, casts)
        buffer = pool.take(_positions(copies.values())[1])
        slots = dict(zip(copies, buffer.slots(copies.values()), strict=True))
        self._targets = {key: target for key, (target, _) in slots.items()}
        self.snapshot = Snapshot({key: view for key, (_, view) in slots.items()}, pool, buffer)

    @torch.no_grad()
    def copy(self, keys: Iterable[int] | None = None) -> None:
        """Copy these tensors, or all that are left; afterwards they may change.

        Raises:
            CheckpointError: One of those that were left has been changed before it was copied.
        """
        wanted = list(self._live) if keys is None else list(keys)
        pairs = [(self._targets[key], self._live.pop(key)) for key in wanted]
        _copy(pairs)
        if keys is None:
            self._late = [(source, self._versions[key]) for key, (_, source) in zip(wanted, pairs, strict=True)]
            self.check()

    def check(self) -> None:
        """See that what was copied last is as it was when the staging was made.

        A change counts only when it is complete, so one that is under way while a tensor is copied shows later.

        Raises:
            CheckpointError: A tensor has been changed.
        """
        changed = sum(_version(source) != version for source, version in self._late)
        if changed:
            raise CheckpointError(
                f"{counted(changed, 'tensor')} changed while being copied, between save() and the optimizer's next "
                "step (weights swapped for an average, or scaled). Set checkpoint.wait_for_staging=true, which copies "
                "everything before save() returns, or make the change before the save, or behind "
                "PendingSave.wait_staged()"
            )


def _version(tensor: torch.Tensor) -> int:
    """PyTorch's count of a tensor's changes in place, which its views share; those through `.data` escape it."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - documented for autograd, and in no other place


def staged_bytes(tensors: Mapping[int, torch.Tensor], casts: Mapping[int, torch.dtype] = _NO_CASTS) -> int:
    """The size of the buffer that a copy of these tensors takes."""
    return _positions(_copies(tensors, casts).values())[1]


def _copies(tensors: Mapping[int, torch.Tensor], casts: Mapping[int, torch.dtype]) -> dict[int, torch.Tensor]:
    """What the copies look like: a tensor itself, or one without data where its element type changes."""
    changed = {key: torch.empty(tensors[key].shape, dtype=dtype, device="meta") for key, dtype in casts.items()}
    return {**tensors, **changed}


def _positions(tensors: Iterable[torch.Tensor]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _slot(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    part = buffer[offset : offset + like.numel() * like.element_size()]
    return part.view(like.dtype).view(like.shape)


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy sources to host targets; accelerator copies run on their own stream, behind the work queued so far."""
    there = [(target, source) for target, source in pairs if source.is_cuda]  # untested on GPU
    here = [(target, source) for target, source in pairs if not source.is_cuda]
    streams = {}
    for device in {source.device for _, source in there}:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        streams[device].wait_event(torch.cuda.current_stream(device).record_event())
    for target, source in there:
        with torch.cuda.stream(streams[source.device]):
            target.copy_(source, non_blocking=True)
            source.record_stream(streams[source.device])
    if here:
        # All in one call: beside a busy training thread, each return to the interpreter may wait for its lock.
        torch._foreach_copy_([target for target, _ in here], [source for _, source in here])
    for stream in streams.values():
        stream.synchronize()


class _StagedDict(dict[str, Any]):
    """A dict that can be watched for its end."""


class PooledStager(AsyncStager):
    """Stages state dicts for `dcp.async_save` into buffers that are kept from save to save.

    A buffer is used again only after the staged state dict that looked into it is gone, so a later save never
    touches what an earlier one is still writing.
    """

    def __init__(self) -> None:
        self._pool = BufferPool(pinned=torch.cuda.is_available())

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of the state dict on the host; DTensors keep their mesh and placements."""
        # pytree would take a torch.Size apart, and put it together as a tuple.
        leaves, structure = tree_flatten(dict(state_dict), is_leaf=lambda value: isinstance(value, torch.Size))
        if any(isinstance(leaf, ShardedTensor) for leaf in leaves):
            raise _refusal(state_dict)
        local = {
            position: leaf.to_local() if isinstance(leaf, DTensor) else leaf
            for position, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor)
        }
        buffer = self._pool.take(staged_bytes(local))
        targets = {key: target for key, (target, _) in zip(local, buffer.slots(local.values()), strict=True)}
        _copy([(targets[key], tensor) for key, tensor in local.items()])
        leaves = [
            _like(leaf, targets[position]) if position in targets else copy.deepcopy(leaf)
            for position, leaf in enumerate(leaves)
        ]
        staged = _StagedDict(tree_unflatten(leaves, structure))
        weakref.finalize(staged, self._pool.give_back, buffer)
        return staged

    def synchronize_staging(self) -> None:
        """Nothing to wait for: `stage` returns when the copy is complete."""

    def close(self) -> None:
        """Free the buffers."""
        self._pool.clear()


def _refusal(state_dict: dict[str, Any]) -> CheckpointConfigError:
    rows, _ = tree_flatten_with_path(dict(state_dict))
    place = next(keystr(path) for path, leaf in rows if isinstance(leaf, ShardedTensor))
    return CheckpointConfigError(
        f"state_dict{place} is a ShardedTensor, which PooledStager does not copy. Use DTensors, or leave async_stager "
        "to torch.distributed.checkpoint"
    )


def _like(original: torch.Tensor, staged: torch.Tensor) -> torch.Tensor:
    if not isinstance(original, DTensor):
        return staged
    return DTensor.from_local(
        staged,
        original.device_mesh,
        original.placements,
        run_check=False,
        shape=original.shape,
        stride=original.stride(),
    )
