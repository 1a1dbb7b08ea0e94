"""Compares schedulers, extras and what modules have beside their tensors with a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from hydra_ckpt.errors import some_of
from hydra_ckpt.loading.planning.labels import (
    label_of_tensor,
)
from hydra_ckpt.loading.planning.match_schedulers import SchedulerMatcher
from hydra_ckpt.loading.planning.matcher import Matcher
from hydra_ckpt.state import stage_documents as stages
from hydra_ckpt.state.capture import called, templates
from hydra_ckpt.state.fresh_tensors import Lay, Places
from hydra_ckpt.state.meshes import explain
from hydra_ckpt.storage.decoding import own_names, tensor_names
from hydra_ckpt.store import names


class AroundMatcher(Matcher):
    """Matches the state around models and optimizers."""

    def _leave_own_extras(self) -> None:
        """Refuse extras with per-rank tensors, or leave them as built; for other objects use rank 0's tensors."""
        own = set() if self.source.per_rank.is_here else self.source.per_rank.names_in(names.EXTRAS)
        available = self.source.available()
        for name in sorted(own):
            label = label_of_tensor(name)
            if label.partition(".")[0] != "extras":
                self.derived_from_rank_0(label)
        for extra in self.source.state.extras if own and "extras" in available else ():
            # A tensor that several extras have bears the name of one of them.
            found = sorted(own.intersection(tensor_names(self.source.shared["extras"].get(extra))))
            if found:
                self.leave_own(f"extras: {found[0]}", f"extras.{extra}")
                del self.source.shared["extras"][extra]
                self.plan.absent.add(f"extras.{extra}")

    def match(self) -> None:
        """Match schedulers, extras, and what the modules of requested models have beside their tensors."""
        self._leave_own_extras()
        available = self.source.available()
        live: Mapping[str, torch.Tensor] = {}
        if "lr_scheduler" in available:
            SchedulerMatcher(self.source, self.plan, self.strict).match()
        if "extras" in available:
            live = self._live_extras()
            self._keep_known_extras(live)
        self._leave_homeless(live)
        trees = self._trees()
        if own_names(trees) and not self.source.same_ranks:
            self.plan.mismatch.different["extras"] = (
                "they hold shards of a tensor subclass, which fit only the ranks that had them"
            )
        stored = self.source.per_rank.overlay(names.EXTRAS, self.source.stored(names.EXTRAS))
        wanted = set(tensor_names(trees))
        # Never read into the live tensors: the objects load their state themselves.
        places = self._places(live, trees)
        targets = {name: places.fresh(name, stored[name].spec) for name in sorted(wanted & stored.keys())}
        self._note_gathered(places.gathered(targets))
        self.want(stored, wanted, targets)

    def _live_extras(self) -> Mapping[str, torch.Tensor]:
        """The tensors that extras have now, if they count: asking a fresh object for its state may change it."""
        return {} if self._as_saved else templates(self.source.state)

    @property
    def _as_saved(self) -> bool:
        """Whether tensors get the kind and the place that they were saved with; earlier versions recorded neither."""
        source = self.source
        if not (source.same_ranks and source.shared.get("tells_places")) or source.other_stages:
            return False
        return Places(source.state, {}, Lay.of(self._trees()), as_saved=True).fits()

    def _trees(self) -> list[Any]:
        """The encoded data whose tensors are in the part `extras`."""
        shared, available = self.source.shared, self.source.available()
        kinds = ("extra_state", "entries", "metadata") if "model" in available else ()
        trees: list[Any] = [shared.get(kind, {}) for kind in kinds]
        trees.append(self.plan.schedulers)
        if "extras" in available:
            trees += [tree for name, tree in shared["extras"].items() if name in self.source.state.extras]
        return trees

    def _places(self, live: Mapping[str, torch.Tensor], trees: Any) -> Places:
        return Places(self.source.state, live, Lay.of(trees), as_saved=self._as_saved)

    def _leave_homeless(self, live: Mapping[str, torch.Tensor]) -> None:
        """Refuse objects with DTensors whose mesh is not here, or leave them as built."""
        places = self._places(live, self._trees())
        lost = places.homeless()
        if not lost:
            return
        for held, prefix in self._holders():
            for key in list(held):
                for name in sorted(set(tensor_names(held[key])).intersection(lost)):
                    dotted = f"{prefix}{key}"
                    self.leave_own(f"{dotted} ({name})", dotted, explain(places.lay.foreign[name]))
                    held.pop(key, None)
                    self.plan.absent.add(dotted)

    def _holders(self) -> list[tuple[dict[str, Any], str]]:
        """Encoded states by key, and what precedes the key in reports."""
        shared = self.source.shared
        holders = [(self.plan.schedulers, "")]
        holders.append((shared.get("extras", {}), "extras."))
        holders += [(states, f"{called(model)}.") for model, states in shared.get("extra_state", {}).items()]
        holders += [(part, f"{called(model)}.") for model, parts in shared.get("entries", {}).items() for part in parts]
        return holders

    def _note_gathered(self, gathered: Collection[str]) -> None:
        """Note the objects whose DTensors become plain tensors, because the model is on several other meshes here."""
        for held, prefix in self._holders() if gathered else ():
            for key, tree in held.items():
                names = sorted(set(tensor_names(tree)).intersection(gathered))
                if names and (prefix != "extras." or key in self.source.state.extras):
                    dotted = f"{prefix}{key}"
                    why = "on a mesh that is not here, and is a plain whole tensor now"
                    self.source.notes.derived(dotted, f"{dotted}: {some_of(names)} was {why}")

    def _keep_known_extras(self, live: Mapping[str, torch.Tensor]) -> None:
        """Leave out what only other stages' extras have; an extra without tensors yet takes everything."""
        for name, tree in self.source.shared["extras"].items() if self.source.other_stages else ():
            if any(place.startswith(f"{name}:") for place in live):
                self.source.shared["extras"][name] = stages.keep_known(tree, live)
