"""Staging: copies of tensors in buffers that are allocated once, so that training may go on.

Pages touched for the first time cost five to twenty times the copy itself; a pool that keeps its buffers pays
once. A buffer is lent to one snapshot at a time and comes back when that snapshot is released.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hydra_ckpt.storage.memory import bytes_of, is_plain_memory

# Starts of tensors in a buffer: a cache line, and a multiple of every element size.
_ALIGNMENT = 64


class BufferPool:
    """Host memory that outlives a save. Safe to use from several threads.

    Args:
        pinned: Allocate page-locked memory, for copies from an accelerator. Untested on GPU.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def prewarm(self, nbytes: int) -> None:
        """Allocate and touch a buffer of at least this size, unless one is free."""
        self.give_back(self.take(nbytes))

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer (1-D, uint8) of at least `nbytes`; its pages are resident."""
        with self._lock:
            fitting = [buffer for buffer in self._free if buffer.numel() >= nbytes]
            # Only buffers that fit are worth keeping: what a larger state outgrew goes back to the system.
            self._free = fitting[1:]
        if fitting:
            return fitting[0]
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=self._pinned).fill_(0)

    def give_back(self, buffer: torch.Tensor) -> None:
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
    _buffer: torch.Tensor | None = None

    def release(self) -> None:
        """Let go of the memory. Idempotent."""
        self.sources = {}
        if self._pool is not None and self._buffer is not None:
            self._pool.give_back(self._buffer)
        self._buffer = None


@torch.no_grad()
def borrow(tensors: Mapping[int, torch.Tensor]) -> Snapshot:
    """Look at tensors where they lie, copying only those not in plain host memory.

    For synchronous saves: nothing may change the tensors until the snapshot is released.
    """
    return Snapshot(
        {key: bytes_of(tensor if is_plain_memory(tensor) else _to_host(tensor)) for key, tensor in tensors.items()}
    )


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


class Staging:
    """Copies of tensors in one buffer of a pool, made in as many steps as the caller likes.

    Args:
        tensors: Live tensors by key.
        pool: Lends the buffer.
    """

    def __init__(self, tensors: Mapping[int, torch.Tensor], pool: BufferPool) -> None:
        self._live = dict(tensors)
        offsets, total = _positions(tensors.values())
        buffer = pool.take(total)
        self._targets = {
            key: _slot(buffer, offset, tensor) for offset, (key, tensor) in zip(offsets, tensors.items(), strict=True)
        }
        sources = {key: bytes_of(target) for key, target in self._targets.items()}
        self.snapshot = Snapshot(sources, pool, buffer)

    @torch.no_grad()
    def copy(self, keys: Iterable[int] | None = None) -> None:
        """Copy these tensors, or all that are left; afterwards they may change."""
        wanted = list(self._live) if keys is None else list(keys)
        _copy([(self._targets[key], self._live.pop(key)) for key in wanted])


def staged_bytes(tensors: Mapping[int, torch.Tensor]) -> int:
    """The size of the buffer that `stage` takes for these tensors."""
    return _positions(tensors.values())[1]


def _positions(tensors: Any) -> tuple[list[int], int]:
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _slot(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    part = buffer[offset : offset + like.numel() * like.element_size()]
    return part.view(like.dtype).view(like.shape)


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy sources to host targets; accelerator copies run on their own stream, behind the work queued so far."""
    devices = {source.device for _, source in pairs if source.is_cuda}
    streams = {}
    for device in devices:  # untested on GPU
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        streams[device].wait_event(torch.cuda.current_stream(device).record_event())
    for target, source in pairs:
        if source.is_cuda:
            with torch.cuda.stream(streams[source.device]):
                target.copy_(source, non_blocking=True)
                source.record_stream(streams[source.device])
        else:
            target.copy_(source)
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
        local = {
            position: leaf.to_local() if isinstance(leaf, DTensor) else leaf
            for position, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor)
        }
        offsets, total = _positions(local.values())
        buffer = self._pool.take(total)
        targets = {
            key: _slot(buffer, offset, tensor) for offset, (key, tensor) in zip(offsets, local.items(), strict=True)
        }
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
