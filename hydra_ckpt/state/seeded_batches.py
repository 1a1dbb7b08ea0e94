"""Batches whose random choices depend on their position, not on the process that makes them.

The inner loader of `hydra_ckpt.state.dataloader` asks its workers for whole batches; here they are made. Before each
sample the CPU generators of torch, `random` and NumPy are seeded from (seed, epoch, position in the epoch), which
costs about 10 microseconds a sample. Randomness drawn from other generators is the dataset's own business.
"""

from __future__ import annotations

import random
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from hydra_ckpt.jobs.worker_signals import leave_to_parent, watched_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["BatchRequest", "SeededBatches", "WorkerStart", "derive", "generators_kept", "seed_generators"]

T = TypeVar("T")


@dataclass(frozen=True)
class BatchRequest:
    """A request to a worker: one batch.

    Attributes:
        key: Seed and epoch.
        samples: Position in the epoch, over all ranks, and dataset index of each sample.
    """

    key: tuple[int, int]
    samples: list[tuple[int, Any]]


class SeededBatches(Dataset[T]):
    """Answers a request with a collated batch, every generator seeded before each sample and before collation."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[Any], T], *, batched: bool) -> None:
        self.dataset = dataset
        self._collate = collate
        self._batched = batched

    def __getitem__(self, request: BatchRequest) -> T:
        """Makes the batch; in the training process, the generators afterwards are in the same state as before."""
        with generators_kept():
            samples = self._load(request)
            seed_generators(*request.key, request.samples[0][0], "collate")
            return self._collate(samples if self._batched else samples[0])

    def _load(self, request: BatchRequest) -> list[Any]:
        load_many = getattr(self.dataset, "__getitems__", None)
        if load_many and self._batched:
            seed_generators(*request.key, request.samples[0][0], "batch")
            return list(load_many([index for _, index in request.samples]))
        loaded = []
        for position, index in request.samples:
            seed_generators(*request.key, position, "sample")
            loaded.append(self.dataset[index])
        return loaded


class WorkerStart:
    """Shows the user's own dataset in `get_worker_info()`, then runs the user's `worker_init_fn`.

    Stop signals are left to the training process.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self._then = then
        self._signals: frozenset[int] = frozenset()  # a forked worker has them from its parent

    def __getstate__(self) -> dict[str, Any]:
        """Called to send it to a worker that is not forked."""
        return {**vars(self), "_signals": watched_signals.numbers}

    def __call__(self, worker: int) -> None:
        """Called by torch in each worker process, after it has seeded it."""
        if self._signals:
            leave_to_parent(self._signals)
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, SeededBatches):
            # The class refuses assignment; what a worker sets on "its" dataset must reach the user's, not our wrapper.
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self._then is not None:
            self._then(worker)


def derive(*parts: int | str) -> int:
    """A 64-bit seed, unrelated to those of neighbouring numbers, the same on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def seed_generators(*parts: int | str) -> None:
    """Seeds torch's CPU generator, `random` and NumPy's global generator from `parts`."""
    seed = derive(*parts)
    # Not torch.manual_seed(): in a worker it queues a call for CUDA each time, and the queue only grows.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def generators_kept() -> AbstractContextManager[None]:
    """Puts the three generators back at the end. A worker process has nothing to keep, and is spared the cost."""
    return nullcontext() if get_worker_info() is not None else _kept()


@contextmanager
def _kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
