"""Compares live optimizers with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from hydra_ckpt.errors import some_of
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.loading.planning.matcher import Matcher
from hydra_ckpt.state.meshes import explain
from hydra_ckpt.state.optimizer import SEPARATOR
from hydra_ckpt.state.optimizer_homes import has_parameters
from hydra_ckpt.state.optimizer_joint import leave_joint
from hydra_ckpt.state.optimizer_loading import Fit, fit
from hydra_ckpt.state.optimizer_targets import homeless, targets
from hydra_ckpt.storage.decoding import own_names, tensor_names
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.store import names
from hydra_ckpt.store.parts import part_of


class OptimizerMatcher(Matcher):
    """Matches the state and the options of optimizers."""

    def match(self) -> None:
        """Match every optimizer of the AppState."""
        described, named = self.source.shared["optimizer"], self.source.state.named_optimizers
        parameters = self.source.extractor.parameter_names(self.source.state)
        homes = self.source.counterparts("optimizer", len(described["optimizers"]), len(named))
        found = self.plan.fit = fit(described, named, parameters, homes, self.source.shared.get("unsaved", ()))
        self._skip_wrappers(described, homes)
        stored = self.source.per_rank.overlay(names.OPTIMIZER, self.source.stored(names.OPTIMIZER))
        gone = {*self.plan.mismatch.missing, *self.plan.mismatch.different}
        mine = set(found.own)
        leave_joint(described, found, parameters, self._sizes(stored), {*gone, *found.missing})
        self._leave_own_state(found)
        found.leave(gone)
        self.plan.absent.update(name for number, name in enumerate(named) if number in found.absent)
        self._note_missing(found, mine, list(named))
        if len(found.absent) < len(named):
            strange = self.source.optimized - found.held
            self.plan.mismatch.unexpected.update({f"optimizer: {name}": _dotted(name) for name in strange})
        for name in self.source.shared.get("of_other_stages", []):
            found.different[name] = (
                "it fits only a model with the same tensors"
                if self.source.channel.world_size == 1
                else "it belongs to other pipeline stages, and fits only the same stages"
            )
        if own_names(found.trees()) and not self.source.same_ranks:
            found.different["optimizer"] = (
                "it holds shards of a tensor subclass, which fit only the ranks that had them"
            )
        self.plan.mismatch.different.update(found.different)
        self.plan.mismatch.left += [place.replace(", group ", ".param_groups.") for place in found.different]
        self.source.notes.texts += found.notes
        if self.strict and (self.plan.mismatch.missing or self.plan.mismatch.different):
            return
        shapes = {name: (item.spec.shape, TORCH_DTYPE[item.spec.dtype]) for name, item in stored.items()}
        into = targets(described, found, shapes, named, parameters, self.model_tensors())
        first = len(self.plan.fetches)
        self.want(stored, set(tensor_names(found.trees())), into)
        # Schedulers may write to options, as with PyTorch's own load_state_dict().
        state = set(tensor_names(found.state)) - set(tensor_names(found.options))
        self.plan.restored["optimizer"] = [item for item in self.plan.fetches[first:] if item.stored.spec.name in state]

    def _note_missing(self, found: Fit, had_own: set[int], called: Sequence[str]) -> None:
        """Note what the checkpoint lacks, and what else stays as it is.

        Args:
            found: What fits.
            had_own: Numbers of the optimizers for which the checkpoint has own state.
            called: What the live optimizers are called.
        """
        unsaved = tuple(f"{name}." for name in self.source.shared.get("unsaved", ()))  # the report names these
        lacked, lacking = (
            [name for name in names if not name.startswith(unsaved)] for names in (found.lacked, found.lacking)
        )
        mismatch, notes = self.plan.mismatch, self.source.notes
        mismatch.missing += [*(f"optimizer: {name}" for name in found.missing), *lacked]
        mismatch.left += [_dotted(name) for name in [*found.missing, *sorted(found.left)]]
        mismatch.left += [f"{called[number]}.state_dict()" for number in sorted(had_own - found.own.keys())]
        mismatch.left += [*lacked, *found.dropped]
        notes.missing += lacking
        notes.texts += [f"not in the checkpoint, so left as it was built: {some_of(lacking)}"] if lacking else []

    def _sizes(self, states: Mapping[str, StoredTensor]) -> dict[str, int]:
        """The numbers of elements of all saved tensors of models and optimizers, by name."""
        tensors = dict(states)
        for name in self.source.state.models:
            prefix = f"{name}/" if name else ""
            tensors.update({prefix + key: item for key, item in self.source.stored(part_of(name)).items()})
        return {name: prod(item.spec.shape) for name, item in tensors.items()}

    def _skip_wrappers(self, described: Mapping[str, Any], homes: Sequence[int | None]) -> None:
        """Note saved wrappers without parameters that the AppState lacks; other optimizers are known by theirs."""
        keys, saved = self.keys("optimizer"), described["optimizers"]
        bare = [number for number in map(int, described.get("own", ())) if not has_parameters(described, number)]
        left = [number for number in bare if number not in homes and number < len(saved)]
        self.skip([f"optimizer.{number if keys is None else keys[number]}" for number in sorted(left)])

    def _leave_own_state(self, found: Fit) -> None:
        """Refuse the optimizers' per-rank tensors, or start without them."""
        own = set() if self.source.per_rank.is_here else self.source.per_rank.names_in(names.OPTIMIZER)
        for label in sorted(found.drop(own)) if own else ():
            self.leave_own(f"optimizer: {label}", _dotted(label))
        lost = homeless(self.source.shared["optimizer"], found, self.model_tensors())
        for label in sorted(found.drop(lost)) if lost else ():
            self.leave_own(f"optimizer: {label}", _dotted(label), explain(lost[label]))


def _dotted(name: str) -> str:
    """What reports call a parameter's state, or a tensor in it. Example: `optimizer.gen.w.mu` for `gen/w:mu`."""
    return f"optimizer.{name.replace('/', '.', 1).replace(SEPARATOR, '.')}"
