"""What a load reads, and into what, and everything that does not match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hydra_ckpt.state.optimizer_loading import Fit
from hydra_ckpt.storage.read import Fetch


@dataclass
class Mismatch:
    """The mismatches between a checkpoint and the live objects.

    Attributes:
        missing: Names that the checkpoint lacks.
        unexpected: Names that the live objects lack, to what reports call them.
        different: Name to how the two differ.
        left: What stays as it was built because of these, by dotted name.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: dict[str, str] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether anything does not match."""
        return any(vars(self).values())

    @staticmethod
    def of_all_ranks(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Coordinator only: missing is what any rank misses; unexpected is what no rank holds."""
        unexpected = set(found[0]["unexpected"]).intersection(*(item["unexpected"] for item in found[1:]))
        missing = {name for item in found for name in item["missing"]}
        different = {name: text for item in found for name, text in item["different"].items()}
        left = {name for item in found for name in item["left"]}
        return {
            "missing": sorted(missing),
            "unexpected": {name: found[0]["unexpected"][name] for name in sorted(unexpected)},
            "different": different,
            "left": sorted(left),
        }


@dataclass
class LoadPlan:
    """What one rank reads, and into what.

    Attributes:
        fetches: Boxes of stored tensors, with the tensors that receive them.
        restored: Those of tensors that live on in an object, by its dotted name: each model, and the
            state that `optimizer` has for parameters.
        tensors: The tensors that encoded values refer to, by name; to be filled.
        resized: For each model the saved buffers of another size than the live ones, which their modules will accept,
            and tensors of other names, which their hooks rename.
        made: For each model the names of tensors that hooks make from these.
        fit: The part of the optimizers' state that fits; None if none is loaded.
        schedulers: Dotted name of a live scheduler to its saved state, encoded.
        absent: Single objects that the checkpoint does not have, by dotted name.
        mismatch: All mismatches.
    """

    fetches: list[Fetch] = field(default_factory=list)
    restored: dict[str, Sequence[Fetch]] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    resized: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    made: dict[str, set[str]] = field(default_factory=dict)
    fit: Fit | None = None
    schedulers: dict[str, Any] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    mismatch: Mismatch = field(default_factory=Mismatch)

    def takes_any(self, part: str, optimizers: int) -> bool:
        """Whether anything of an available part is installed."""
        if part == "lr_scheduler":
            return bool(self.schedulers)
        return part != "optimizer" or self.fit is None or len(self.fit.absent) < optimizers
