"""Staging: copies of tensors in buffers that are allocated once, so that training can continue."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.storage.lanes import Lanes, Pair
from hydra_ckpt.storage.memory import bytes_of, is_plain_memory
from hydra_ckpt.storage.pool import SMALL_BYTES, Buffer, BufferPool, Slots
from hydra_ckpt.storage.samples import Samples

_NO_CASTS: Mapping[int, torch.dtype] = {}


@dataclass
class Snapshot:
    """Tensors' bytes at one moment, by key; `release` when they are written.

    Attributes:
        sources: Key to row-major bytes.
    """

    sources: Mapping[int, memoryview] = field(default_factory=dict)
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
    """View tensors in place, copying only those outside plain host memory or needed in another element type.

    For synchronous saves: nothing may change the tensors until the snapshot is released.

    Args:
        tensors: Live tensors by key.
        casts: Element types, where they are not the tensors' own.
        pool: Lends the memory for what changes its type.
    """
    snapshot = Snapshot()
    if casts:
        changed = Staging({key: tensors[key] for key in casts}, pool or BufferPool(), casts)
        changed.begin()
        changed.finish()
        snapshot = changed.snapshot
    found = dict(snapshot.sources)
    for key, tensor in tensors.items():
        if key not in casts:
            found[key] = bytes_of(tensor if is_plain_memory(tensor) else _to_host(tensor))
    snapshot.sources = found
    return snapshot


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


class Staging:
    """Copies of tensors in one buffer of a pool: some made at once, the others later and compared with samples.

    Args:
        tensors: Live tensors by key.
        pool: Lends the buffer.
        casts: Element types of the copies, where they are not the tensors' own.
        deferred: Keys of tensors that may be copied later. Small ones are copied at once.
        plan: See `BufferPool.layout`.
    """

    def __init__(
        self,
        tensors: Mapping[int, torch.Tensor],
        pool: BufferPool,
        casts: Mapping[int, torch.dtype] = _NO_CASTS,
        deferred: Collection[int] = frozenset(),
        plan: object = None,
    ) -> None:
        layout = pool.layout(tensors, casts, plan)
        self._buffer = pool.take(layout.nbytes)
        self._slots = self._buffer.slots(layout)
        self._tensors, self._casts = tensors, casts
        self._deferred = {
            key: tensors[key] for key in layout.single if key in deferred and tensors[key].nbytes > SMALL_BYTES
        }
        self._lanes = Lanes.of(tensors.values())
        self._rest: list[Pair] = []
        self._samples: Samples | None = None
        self._versions: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._freed: list[int] = []
        self.snapshot = Snapshot(self._slots.views, pool, self._buffer)

    @property
    def comes_late(self) -> bool:
        """Whether live tensors are left that must not change before `finish`."""
        return bool(self._deferred)

    @torch.no_grad()
    def begin(self) -> None:
        """In the training thread: copy what does not come late, and take samples of what does.

        Never waits for an accelerator: work that is queued later on its current stream comes after these reads.
        """
        targets = self._slots.targets
        packed = _pack(self._slots, self._tensors)
        early = [(targets[key], self._tensors[key]) for key in self._slots.layout.single if key not in self._deferred]
        self._lanes.follow()
        self._lanes.copy(early)
        self._lanes.lead()
        self._versions = {key: _version(tensor) for key, tensor in self._deferred.items()}
        self._sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in self._deferred.items()}
        self._samples = Samples(self._deferred, self._casts, self._buffer)
        self._lanes.follow()
        deferred = [(targets[key], tensor) for key, tensor in self._deferred.items()]
        self._rest = [*packed, *self._samples.pending, *deferred]

    @torch.no_grad()
    def finish(self) -> None:
        """In any thread: copy what is left; afterwards the live tensors may change."""
        self._freed = [
            key for key, tensor in self._deferred.items() if tensor.untyped_storage().nbytes() < self._sizes[key]
        ]
        freed = {id(self._deferred[key]) for key in self._freed}
        self._lanes.copy([pair for pair in self._rest if id(pair[1]) not in freed])
        self._lanes.synchronize()
        self._rest, self._tensors = [], {}
        if self._samples is not None:
            self._samples.pending = []

    def changed(self) -> list[int]:
        """Keys of late tensors that have changed since the beginning, according to PyTorch's version counters.

        A change counts only when it is complete, so one that was under way during the copy may show later.
        """
        return [key for key, tensor in self._deferred.items() if _version(tensor) != self._versions[key]]

    def torn(self) -> list[int]:
        """Keys of late tensors whose copies do not agree with the samples taken at the beginning.

        Among them are those whose memory was freed before the copy.
        """
        unlike = [] if self._samples is None else self._samples.unlike(self._slots.views)
        return [*unlike, *self._freed]

    def forget(self) -> None:
        """Let go of the live tensors: from now on they may change."""
        self._deferred = {}


def _version(tensor: torch.Tensor) -> int:
    """PyTorch's count of a tensor's changes in place, which its views share; those through `.data` escape it."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - documented for autograd, and in no other place


def _pack(slots: Slots, tensors: Mapping[int, torch.Tensor]) -> list[Pair]:
    """Gather small tensors of a kind side by side, on their device; returns what remains to be copied to the host."""
    pairs = []
    for keys, target in slots.packs:
        sources = [tensors[key] for key in keys]
        if sources[0].device.type == "cpu":
            torch.stack(sources, out=target)
        else:  # untested on GPU
            pairs.append((target, torch.stack(sources)))
    return pairs


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
        layout = self._pool.layout(local)
        buffer = self._pool.take(layout.nbytes)
        targets = buffer.slots(layout).targets
        lanes = Lanes.of(local.values())
        lanes.follow()
        lanes.copy([(targets[key], tensor) for key, tensor in local.items()])
        lanes.synchronize()
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
