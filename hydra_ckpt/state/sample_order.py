"""The order of an epoch: the dataset indices that a sampler gives, as a function of seed and epoch only."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from hydra_ckpt.state.seeded_batches import derive, generators_kept, seed_generators
from hydra_ckpt.storage.digests import digest_of

# Samplers whose whole randomness is one torch generator, which we provide.
GENERATOR_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
UNKNOWN_ORDER = ""
"""The fingerprint of an order that cannot be compared."""


def order_of(sampler: Any, seed: int, epoch: int) -> Sequence[Any]:
    """The dataset indices of one epoch, of all ranks together, in the order in which they are consumed."""
    if isinstance(sampler, SequentialSampler):
        return range(len(sampler))
    if isinstance(sampler, GENERATOR_SAMPLERS):
        sampler = copy.copy(sampler)
        sampler.generator = torch.Generator().manual_seed(derive(seed, epoch, "order"))
        with torch.device("cpu"):  # as the generator is
            return list(sampler)
    sampler.set_epoch(epoch)
    with generators_kept():
        seed_generators(seed, epoch, "order")
        return list(sampler)


def fingerprint_of(order: Sequence[Any]) -> str:
    """Equal for equal orders, in every process; `UNKNOWN_ORDER` if the indices are neither integers nor strings."""
    if isinstance(order, range):
        return f"0 to {len(order)}"
    try:
        indices = np.asarray(order)
    except (ValueError, TypeError, RuntimeError):
        return UNKNOWN_ORDER
    if indices.dtype.kind == "U":
        return f"{digest_of(repr(list(order)).encode()):016x}"
    if indices.dtype.kind not in "iu":
        return UNKNOWN_ORDER
    if indices.ndim == 1 and np.array_equal(indices, np.arange(len(indices))):
        return f"0 to {len(indices)}"
    return f"{digest_of(np.ascontiguousarray(indices, '<i8').data):016x}"
