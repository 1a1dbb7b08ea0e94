"""A DataLoader that stops and continues exactly.

`resumable(loader)` takes a plain `torch.utils.data.DataLoader` and returns a loader whose position can be saved and
restored, so that a resumed run sees bit for bit the batches an uninterrupted one would have seen: with shuffling,
worker processes and random augmentation, in the middle of an epoch.

Three rules make that true:

- The order of an epoch is a function of (seed, epoch) only. Continuing at a position means slicing that order; skipped
  samples are never loaded.
- A sample is a function of (seed, epoch, its position in that order) only. It does not depend on the worker that makes
  it, on what that worker made before, or on how many ranks share the work.
- Only batches handed to the caller count, not those that workers have prefetched.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
)

from hydra_ckpt.errors import CheckpointConfigError, TopologyError
from hydra_ckpt.jobs.worker_signals import blocked_in_workers
from hydra_ckpt.state.sample_order import GENERATOR_SAMPLERS, UNKNOWN_ORDER, fingerprint_of, order_of
from hydra_ckpt.state.seeded_batches import BatchRequest, SeededBatches, WorkerStart, derive

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["ResumableLoader", "resumable"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_STATE_VERSION = 1
_STATE_KEYS = frozenset({"version", "seed", "epoch", "batches", "position", "samples"})


def resumable(loader: DataLoader[T], seed: int = 0, *, rank: int = 0, world_size: int = 1) -> ResumableLoader[T]:
    """Makes a plain DataLoader resumable.

    Its batches and workers are rebuilt from its settings; the given loader itself is not iterated. A generator given
    to it or to its sampler is replaced by one derived from `seed`.

    Args:
        loader: A loader over a map-style dataset. Its batch size is the batch of one rank.
        seed: Decides the order and every random choice made while loading.
        rank: This process's index among the data-parallel ranks. Ranks that share a model replica (tensor or
            pipeline parallel peers) give the same index and so see the same batches.
        world_size: The number of data-parallel ranks. Each global batch of `world_size * batch_size` samples is
            split into consecutive parts; a last, shorter one is filled up from the start of the epoch, so that
            every rank yields equally many batches of equal size.

    Raises:
        CheckpointConfigError: The loader's order cannot be reproduced; the message says what to do instead.
        TopologyError: `rank` is not below `world_size`.
    """
    return ResumableLoader(loader, seed, rank=rank, world_size=world_size)


class ResumableLoader(Generic[T]):
    """Iterates like the DataLoader it was made from, and keeps track of its position.

    A new `iter()` starts the current epoch from its beginning, also after a loop was left with `break`, unless that had
    its last batch; only after `load_state_dict()` does it continue at the loaded position. When an iteration ends,
    `epoch` moves on by one.

    Attributes:
        state_is_global: Says that its state is equal on all ranks and fits any number of them; of its class.
        dataset: The dataset of the loader it was made from.
        batch_size: Samples in a batch of this rank; None if the loader does not batch.
        drop_last: Whether a last, shorter global batch is left out.
        seed: Decides order and random choices; a loaded state brings its own.
        epoch: The epoch being iterated, or the next one between two iterations.
        is_between_epochs: Whether an iteration has come to its end, and the next one has not begun.
    """

    state_is_global = True

    def __init__(self, loader: DataLoader[T], seed: int = 0, *, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise TopologyError(f"resumable(): rank={rank} must be between 0 and world_size - 1 = {world_size - 1}")
        _refuse_what_cannot_be_exact(loader)
        batching = loader.batch_sampler
        self.dataset = loader.dataset
        self.batch_size = batching.batch_size if isinstance(batching, BatchSampler) else None
        self.drop_last = isinstance(batching, BatchSampler) and batching.drop_last
        self.seed = seed
        self.epoch = 0
        self.is_between_epochs = False
        self._rank, self._world_size = rank, world_size
        self._sampler = _sampler_of(loader)
        self._position = 0
        self._batches = 0
        self._goes_on = self._resumed = self._is_spent = False
        self._known_order: tuple[tuple[int, int], Sequence[Any] | str] | None = None
        self._requests = _Requests()
        self._generator = torch.Generator()
        self._loader = self._rebuild(loader)

    def __len__(self) -> int:
        """Batches that this rank yields in a whole epoch."""
        return self._batches_in(len(self._sampler))

    def __iter__(self) -> Iterator[T]:
        """Yields the batches that are left of this epoch, then moves on to the next one."""
        self.is_between_epochs = False
        if self._is_spent and not self._goes_on:
            self.set_epoch(self.epoch + 1)  # its last batch was taken, but the end was not reached
        if not self._goes_on:
            if self._resumed and self._position:
                log.warning(
                    "The resumed dataloader was abandoned at batch %d of epoch %d and restarts that epoch: when an "
                    "iterator is dropped, its position in the data is lost.",
                    self._batches,
                    self.epoch,
                )
            self._position = self._batches = 0
        self._resumed, self._goes_on = self._goes_on, False
        order = order_of(self._sampler, self.seed, self.epoch)
        self._known_order = (self.seed, self.epoch), order
        self._requests.left = self._requests_left(order)
        self._generator.manual_seed(derive(self.seed, self.epoch, "workers"))
        left = self._batches_in(len(order) - self._position)
        with blocked_in_workers(), torch.device("cpu"):  # as its generator is; what loads the data has its own default
            batches = iter(self._loader)
        for number, batch in enumerate(batches, start=1):
            # Counted before the caller works on it: a save made in the loop's body includes this batch.
            self._position = min(self._position + self._global_batch, len(order))
            self._batches += 1
            self._is_spent = number == left
            yield batch
        self.set_epoch(self.epoch + 1)
        self.is_between_epochs = True

    def set_epoch(self, epoch: int) -> None:
        """Moves to the beginning of an epoch. Naming the current one changes nothing, so a loaded position stays."""
        if epoch != self.epoch:
            self.epoch, self._position, self._batches = epoch, 0, 0
            self._goes_on = self._is_spent = False

    def state_dict(self) -> dict[str, Any]:
        """The stream's position, as plain data, equal on every rank.

        `position` counts the samples of all ranks; `order` is equal for equal orders of this epoch.
        """
        return {
            "version": _STATE_VERSION,
            "seed": self.seed,
            "epoch": self.epoch,
            "batches": self._batches,
            "position": self._position,
            "samples": len(self._sampler),
            "order": self._fingerprint(self.seed, self.epoch),
            "sampler": type(self._sampler).__name__,
        }

    def _fingerprint(self, seed: int, epoch: int) -> str:
        """The fingerprint of an epoch's order; of the one being iterated, it is that at its beginning."""
        known = self._known_order[1] if self._known_order and self._known_order[0] == (seed, epoch) else None
        if not isinstance(known, str):
            known = fingerprint_of(order_of(self._sampler, seed, epoch) if known is None else known)
            self._known_order = (seed, epoch), known
        return known

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, at the next `iter()`, with the seed of `state`.

        Batch size and number of ranks may have changed; the remaining samples still come in the same order.

        Raises:
            CheckpointConfigError: The state is of another kind, or belongs to an epoch of another length or order.
        """
        self._check(state)
        self.is_between_epochs = self._is_spent = False
        if state["seed"] != self.seed:
            log.info("The dataloader continues with the checkpoint's seed %s, not %s.", state["seed"], self.seed)
        self.seed, self.epoch = state["seed"], state["epoch"]
        self._position, self._batches = state["position"], state["batches"]
        self._goes_on = True

    def _check(self, state: dict[str, Any]) -> None:
        if not state.keys() >= _STATE_KEYS or state["version"] != _STATE_VERSION:
            raise CheckpointConfigError(
                f"the dataloader's state in the checkpoint, {state}, was not written by this version of resumable(); "
                "resume without the dataloader, or with the loader that wrote it"
            )
        samples = len(self._sampler)
        if state["position"] and state["samples"] != samples:
            raise CheckpointConfigError(
                f"the checkpoint is at sample {state['position']} of an epoch of {state['samples']} samples, but the "
                f"dataset now gives {samples}: the remaining samples would be different. Restore the data, or resume "
                "without the dataloader"
            )
        if state["samples"] == samples:
            self._check_order(state)

    def _check_order(self, state: dict[str, Any]) -> None:
        """Refuse a state whose epoch has another order here. States of earlier versions do not say what it was."""
        self._known_order = None  # the sampler may have changed
        saved = state.get("order", UNKNOWN_ORDER)
        if saved == UNKNOWN_ORDER or self._fingerprint(state["seed"], state["epoch"]) in (saved, UNKNOWN_ORDER):
            return
        here, there = type(self._sampler).__name__, state.get("sampler", "another one")
        raise CheckpointConfigError(
            f"the checkpoint is at sample {state['position']} of epoch {state['epoch']}, whose samples were in another "
            f"order ({there}) than they are here ({here}): the remaining samples would be different. Build the loader "
            "as in the run that saved (shuffle=, sampler=, with the weights or indices that it had then), or "
            "resume without the dataloader"
        )

    @property
    def _global_batch(self) -> int:
        return (self.batch_size or 1) * self._world_size

    def _batches_in(self, samples: int) -> int:
        return samples // self._global_batch if self.drop_last else -(-samples // self._global_batch)

    def _requests_left(self, order: Sequence[Any]) -> Iterator[BatchRequest]:
        """This rank's part of each global batch that is left, made one by one as workers ask."""
        key, start, step = (self.seed, self.epoch), self._position, self._global_batch
        for number in range(self._batches_in(len(order) - start)):
            begin = start + number * step
            wanted = min(step, len(order) - begin)
            share = -(-wanted // self._world_size)
            mine = range(begin + self._rank * share, begin + (self._rank + 1) * share)
            # Past the end of the epoch it is filled up from its start.
            yield BatchRequest(key, [(position, order[position % len(order)]) for position in mine])

    def _rebuild(self, loader: DataLoader[T]) -> DataLoader[T]:
        """A copy of the loader, with our requests instead of its sampler, and whole batches instead of samples."""
        return DataLoader(
            SeededBatches(loader.dataset, loader.collate_fn, batched=self.batch_size is not None),
            batch_size=None,
            sampler=self._requests,
            collate_fn=_unchanged,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=WorkerStart(loader.worker_init_fn),
            multiprocessing_context=loader.multiprocessing_context,
            # Its own one: iterating a DataLoader otherwise draws a number from the process's default generator.
            generator=self._generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )


class _Requests:
    """The inner loader's sampler: hands on what is left of the current epoch."""

    def __init__(self) -> None:
        self.left: Iterable[BatchRequest] = ()

    def __iter__(self) -> Iterator[BatchRequest]:
        return iter(self.left)


def _unchanged(batch: T) -> T:
    return batch


def _sampler_of(loader: DataLoader[Any]) -> Any:
    batching = loader.batch_sampler
    return batching.sampler if isinstance(batching, BatchSampler) else loader.sampler


def _refuse_what_cannot_be_exact(loader: DataLoader[Any]) -> None:
    """Raises CheckpointConfigError, saying what to do, for a loader whose order cannot be reproduced."""
    kind, batching, sampler = type(loader).__name__, loader.batch_sampler, _sampler_of(loader)
    if hasattr(loader, "state_dict"):
        _refuse(f"{kind} already has a state_dict()", "pass it to AppState unchanged")
    if type(loader).__iter__ is not DataLoader.__iter__:
        _refuse(f"{kind} iterates in its own way", "make the plain DataLoader resumable, not what wraps it")
    if isinstance(loader.dataset, IterableDataset):
        _refuse(
            "an IterableDataset decides its own order",
            "make it map-style, or give AppState a loader that has state_dict() and load_state_dict()",
        )
    if not getattr(loader, "in_order", True):
        _refuse("in_order=False yields batches as they come", "leave in_order at True")
    if batching is not None and type(batching) is not BatchSampler:
        _refuse(f"{type(batching).__name__} forms its own batches", "give sampler= and batch_size= instead")
    if isinstance(sampler, DistributedSampler):
        _refuse(
            "a DistributedSampler knows only one rank's samples",
            "use shuffle= on the loader and pass rank= and world_size= to resumable()",
        )
    if type(sampler) not in (SequentialSampler, *GENERATOR_SAMPLERS) and not hasattr(sampler, "set_epoch"):
        _refuse(
            f"only {type(sampler).__name__} itself knows its order",
            "give it a set_epoch(epoch) method that alone decides the order, or use shuffle=",
        )


def _refuse(reason: str, remedy: str) -> NoReturn:
    raise CheckpointConfigError(f"resumable(): {reason}, so it cannot continue exactly; {remedy}.")
