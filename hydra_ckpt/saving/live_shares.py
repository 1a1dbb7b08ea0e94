"""The live tensors of a plan's shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from hydra_ckpt.layout.plan import WritePlan
from hydra_ckpt.saving.agreement import Parts
from hydra_ckpt.saving.write_planning import (
    BESIDE,
    tensors_of,
)
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.store.parts import is_of_models


@dataclass(frozen=True)
class Sources:
    """The live tensors of a plan's shares.

    Attributes:
        tensors: Position of the share to exactly the live rows it writes.
        deferred: Positions that may be copied as late as the next optimizer step.
        casts: Dtypes to write, where they differ from the tensors' own.
        plan: Fixes everything but the values; the same object as long as nothing else changes.
        label: What messages call the tensor at a position.
    """

    tensors: Mapping[int, torch.Tensor]
    deferred: frozenset[int]
    casts: Mapping[int, torch.dtype]
    plan: object = None
    label: Callable[[int], str] = str


def model_sources(sources: Sources, plan: WritePlan) -> Sources:
    """The sources of the models' own files only."""
    wanted = {piece.share for piece in plan.pieces if is_of_models(plan.all_files[piece.file].path)}
    return Sources({position: sources.tensors[position] for position in wanted}, frozenset(), {})


def sources_of(parts: Parts, plan: WritePlan) -> Sources:
    """What this rank writes, of the live tensors of these parts."""
    tensors = tensors_of(parts)
    found, casts, deferred = {}, {}, []
    for position, share in plan.shares.items():
        item = tensors[position]
        sizes = item.place.box.sizes  # faster than querying the tensor
        whole = not sizes or (share.start == 0 and share.stop == sizes[0])
        found[position] = item.tensor if whole else item.tensor[share.start : share.stop]
        dtype = TORCH_DTYPE[share.spec.dtype]
        if dtype != item.tensor.dtype:
            casts[position] = dtype
        if item.deferred:
            deferred.append(position)
    return Sources(found, frozenset(deferred), casts, plan, partial(_label, parts))


def _label(parts: Parts, position: int) -> str:
    """The part and live name of the tensor at a position in `tensors_of`."""
    for part, items in parts.items():
        if position < len(items):
            place = items[position].place
            return f"{part.removeprefix(BESIDE)}: {place.origin or place.spec.name}"
        position -= len(items)
    raise IndexError(position)
