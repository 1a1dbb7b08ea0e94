"""What the matching of models, of optimizers, and of the state around them has in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.loading.planning.labels import (
    called_here,
    part_of_label,
)
from hydra_ckpt.loading.planning.load_plan import LoadPlan
from hydra_ckpt.loading.sources.per_rank import ELSEWHERE
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.storage.dtypes import SAFETENSORS_DTYPE, TORCH_DTYPE
from hydra_ckpt.storage.read import Fetch


@dataclass
class Matcher:
    """Fills a plan with what one kind of objects needs.

    Args:
        source: The checkpoint, read.
        plan: The plan.
        strict: Whether a mismatch will be an error; then no targets are made for the state around it.
    """

    source: Source
    plan: LoadPlan
    strict: bool

    def leave_own(self, label: str, dotted: str, why: str = ELSEWHERE) -> None:
        """Note values that no rank gets here: an error, or left as built."""
        self.plan.mismatch.different[label] = why
        self.plan.mismatch.left.append(dotted)

    def derived_from_rank_0(self, label: str) -> None:
        """Note that all ranks get rank 0's values of something, by its label."""
        if part_of_label(label) not in self.source.available():
            return
        dotted = self.called_here(label)
        if dotted is not None and dotted not in {*self.source.notes.rederived, *self.plan.mismatch.left}:
            self.source.notes.derived(
                dotted, f"{dotted}: each rank had its own values; those of rank 0 are used on all ranks"
            )

    def called_here(self, label: str) -> str | None:
        """What reports call the object, or the part of it, that a label is about; None if there is none here."""
        models = self.source.shared.get("extra_state", {})
        return called_here(label, self.source.state, models, self._homes, self.owners)

    @cached_property
    def _homes(self) -> dict[str, list[int | None]]:
        """For `optimizer` and `lr_scheduler` the number of the saved object for each live one."""
        state, shared = self.source.state, self.source.shared
        saved = {"optimizer": shared.get("optimizer", {}).get("optimizers", []), "lr_scheduler": shared["lr_scheduler"]}
        live = {"optimizer": len(state.optimizers), "lr_scheduler": len(state.lr_schedulers)}
        return {kind: self.source.counterparts(kind, len(items), live[kind]) for kind, items in saved.items()}

    @cached_property
    def owners(self) -> dict[str, str]:
        """Name of a parameter to what the live optimizer that holds it is called; once optimizers have been matched."""
        names, fit = self.source.extractor.parameter_names(self.source.state), self.plan.fit
        holders = [] if fit is None else fit.live
        return {names[id(item)]: holder.called for holder in holders for item in holder.parameters}

    def keys(self, kind: str) -> list[str] | None:
        """The saved keys by which optimizers or schedulers were matched; None if they were matched by position."""
        here = self.source.state.keys[kind]
        found: list[str] | None = self.source.shared.get("keys", {}).get(kind)
        return None if here is None else found

    def skip(self, dotted: Sequence[str]) -> None:
        """Note objects of the checkpoint that the AppState lacks."""
        self.source.notes.skipped += dotted
        self.source.notes.texts += [f"in the checkpoint, but not used here: {', '.join(dotted)}"] if dotted else []

    def model_tensors(self) -> list[torch.Tensor]:
        """The models' tensors."""
        modules = [module for models in self.source.state.models.values() for module in models]
        return [item for module in modules for item in (*module.parameters(), *module.buffers())]

    def want(
        self, stored: Mapping[str, StoredTensor], wanted: Collection[str], targets: Mapping[str, torch.Tensor]
    ) -> None:
        """Read stored tensors into the targets that match; into new whole tensors if none does."""
        given = self.source.given
        self.plan.tensors.update({name: given[name] for name in wanted if name in given})
        for name in sorted(set(wanted) - given.keys()):
            if name not in stored:
                raise CorruptCheckpointError(self.source.root, f"the tensor {name} is missing from its files")
            spec = stored[name].spec
            target = targets.get(name)
            if target is None or (tuple(target.shape), SAFETENSORS_DTYPE[target.dtype]) != (spec.shape, spec.dtype):
                target = torch.empty(spec.shape, dtype=TORCH_DTYPE[spec.dtype], device="cpu")
            self.plan.tensors[name] = target
            item = self.source.extractor.localize(name, target)
            self.plan.fetches.append(Fetch(stored[name], item.box, item.tensor))
