"""Compares live objects with a checkpoint: what to read into which tensor, and everything that does not match."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from hydra_ckpt.errors import CorruptCheckpointError, some_of
from hydra_ckpt.hub.conversion import naming_of
from hydra_ckpt.layout.aliases import Naming
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.loading.labels import (
    called_here,
    called_in_reports,
    label_of_tensor,
    part_of_label,
    part_of_tensor,
)
from hydra_ckpt.loading.load_plan import LoadPlan
from hydra_ckpt.loading.per_rank import ELSEWHERE
from hydra_ckpt.loading.source import Source
from hydra_ckpt.loading.translation import Saved, translate
from hydra_ckpt.state import stages
from hydra_ckpt.state.capture import called, part_of, templates
from hydra_ckpt.state.local import Exporter, LocalTensor
from hydra_ckpt.state.meshes import explain
from hydra_ckpt.state.model import ModelMap
from hydra_ckpt.state.optimizer import SEPARATOR
from hydra_ckpt.state.optimizer_homes import has_parameters
from hydra_ckpt.state.optimizer_loading import Fit, fit, leave_reordered, moved_groups
from hydra_ckpt.state.optimizer_targets import homeless, targets
from hydra_ckpt.state.peft import adapters, changed_settings
from hydra_ckpt.state.places import Places
from hydra_ckpt.storage.decoding import foreign_meshes, own_names, placements, strides, tensor_names
from hydra_ckpt.storage.dtypes import SAFETENSORS_DTYPE, TORCH_DTYPE
from hydra_ckpt.storage.read import Fetch
from hydra_ckpt.store import names


def plan_load(source: Source, *, strict: bool) -> LoadPlan:
    """Compare a checkpoint with the live objects; local, and nothing is changed.

    Args:
        source: The checkpoint, read.
        strict: Whether a mismatch will be an error; then no targets are made for the state around it.
    """
    matcher = _Matcher(source, strict)
    matcher.match()
    return matcher.plan


@dataclass
class _Matcher:
    """Fills a plan part by part."""

    source: Source
    strict: bool
    plan: LoadPlan = field(default_factory=LoadPlan)

    def match(self) -> None:
        """Match every wanted part."""
        available = self.source.available()
        if "model" in available:
            self._match_models()
        if "optimizer" in available:
            self._match_optimizers()
        self._leave_own_extras()
        self._match_extras()
        self._note_plain()
        self._note_drifted()

    def _note_plain(self) -> None:
        """Report the plain data for which all ranks get rank 0's values."""
        for label in () if self.source.per_rank.is_here else self.source.per_rank.plain:
            self._derived_from_rank_0(label)

    def _note_drifted(self) -> None:
        """Report tensors of which all replicas get the first one's values, because they had drifted apart."""
        available, notes = self.source.available(), self.source.notes
        labels = [label for label in self.source.shared.get("drifted", ()) if part_of_tensor(label) in available]
        found = [called_in_reports(label) for label in labels]
        if found:
            notes.rederived += [name for name in found if name not in notes.rederived]
            notes.texts.append(
                f"replicas had drifted apart when this was saved; all have the first one's values now: {some_of(found)}"
            )

    def _derived_from_rank_0(self, label: str) -> None:
        if part_of_label(label) not in self.source.available():
            return
        state, shared = self.source.state, self.source.shared
        saved = {"optimizer": shared.get("optimizer", {}).get("optimizers", []), "lr_scheduler": shared["lr_scheduler"]}
        live = {"optimizer": len(state.optimizers), "lr_scheduler": len(state.lr_schedulers)}
        homes = {kind: self.source.counterparts(kind, len(items), live[kind]) for kind, items in saved.items()}
        names, fits = self.source.extractor.parameter_names(state), self.plan.fit
        holders = [] if fits is None else fits.live
        owners = {names[id(item)]: holder.called for holder in holders for item in holder.parameters}
        dotted = called_here(label, state, shared.get("extra_state", {}), homes, owners)
        if dotted is not None and dotted not in {*self.source.notes.rederived, *self.plan.mismatch.left}:
            self.source.notes.derived(
                dotted, f"{dotted}: each rank had its own values; those of rank 0 are used on all ranks"
            )

    def _leave_own(self, label: str, dotted: str, why: str = ELSEWHERE) -> None:
        """Note values that no rank gets here: an error, or left as built."""
        self.plan.mismatch.different[label] = why
        self.plan.mismatch.left.append(dotted)

    def _match_models(self) -> None:
        maps = self.source.extractor.maps(self.source.state)
        saved = self.source.models()
        live = {part_of(name): name for name in maps}
        if not saved & live.keys():
            self.plan.mismatch.unexpected += [f"the model {part}" for part in saved]
        elif saved - live.keys():
            self.source.notes.skipped += sorted(part.replace("/", ".") for part in saved - live.keys())
        self._note_adapters()
        for name, mapped in maps.items():
            if part_of(name) not in saved and saved & live.keys():
                self.plan.absent.add(called(name))  # the checkpoint does not have this object
                continue
            first = len(self.plan.fetches)
            self._match_model(name, mapped)
            self.plan.restored[called(name)] = self.plan.fetches[first:]

    def _match_model(self, name: str, mapped: ModelMap) -> None:
        stored = self.source.stored(part_of(name))
        prefix = f"{name}/" if name else ""
        items = mapped.locals(self.source.extractor.localize)
        held = {item.spec.name for item in items}
        naming = self._naming(name, stored, [item.spec for item in items])
        if naming is not None:
            held = {alias.name for key in held for alias in naming.by_source.get(key, ())}
            items = Exporter(naming)(items)
        strange = stored.keys() - held - set(mapped.omitted)
        taken = self._take_odd(name, mapped, items, stored, strange) if naming is None else set()
        self.plan.mismatch.unexpected += [prefix + key for key in strange - taken]
        own = self._match_own(name, prefix, mapped)
        # What was one tensor when it was saved, and is not here.
        ties = self.source.shared.get("ties", {}).get(name, {}) if naming is None else {}
        for item in items:
            key = item.spec.name
            if key in taken:
                continue
            if key in ties and key not in stored:
                self.source.notes.texts.append(f"{key} was one tensor with {ties[key]} when saved, and is not here")
            fits = self._match_tensor(prefix, item, stored.get(key) or stored.get(ties.get(key, key)))
            if fits is not None and (item.place.origin or item.spec.name) not in own:
                self.plan.fetches.append(Fetch(fits, item.box, item.tensor))
        if len(self.source.shared.get("entries", {}).get(name, [])) not in (0, mapped.parts):
            self.plan.mismatch.different[prefix + "state_dict()"] = "its entries belong to other parts of the model"

    def _take_odd(
        self,
        model: str,
        mapped: ModelMap,
        items: Sequence[LocalTensor],
        stored: Mapping[str, StoredTensor],
        strange: Collection[str],
    ) -> set[str]:
        """Read tensors separately that the model lacks, or has in another size, if its modules accept them.

        Returns:
            Their names.
        """
        resized = [
            item.spec.name
            for item in items
            if not item.place.mesh
            and (found := stored.get(item.spec.name)) is not None
            and found.spec.dtype == item.spec.dtype
            and found.spec.shape != item.spec.file_shape
        ]
        specs = {name: stored[name].spec for name in (*strange, *resized)}
        # Without memory: the sizes are a file's.
        odd = {name: torch.empty(one.shape, dtype=TORCH_DTYPE[one.dtype], device="meta") for name, one in specs.items()}
        taken = mapped.accepted(odd)
        for name in taken:
            target = torch.empty_like(odd[name], device="cpu")
            self.plan.resized.setdefault(model, {})[name] = target
            self.plan.fetches.append(Fetch(stored[name], Box.whole(specs[name].shape), target))
        return taken

    def _match_own(self, model: str, prefix: str, mapped: ModelMap) -> set[str]:
        """A model's tensors that are not taken from the shared ones; fetches this rank's own."""
        part = part_of(model)
        wanted = self.source.per_rank.names_in(part)
        if not wanted:
            return set()
        if not self.source.per_rank.is_here:
            buffers = sorted(wanted & mapped.buffers().keys())
            if buffers:
                self.source.notes.derived(
                    "buffers",
                    f"buffers, which differed between the ranks, are those of rank 0 on all ranks: {some_of(buffers)}",
                )
            experts = wanted & {slot.name for slot in mapped.slots} - set(buffers)
            for name in sorted(experts):
                self._leave_own(prefix + name, f"{called(model)}.{name}")
            return experts
        own = self.source.per_rank.overlay(part, {})
        for item in mapped.locals(self.source.extractor.localize):
            if item.spec.name in own:
                self._fetch_own(prefix, item, own[item.spec.name])
        return wanted

    def _fetch_own(self, prefix: str, item: LocalTensor, stored: StoredTensor) -> None:
        fits = self._match_tensor(prefix, item, stored)
        if fits is None:
            return
        if item.box.numel and fits.chunks[0].box != item.box:
            self.plan.mismatch.different[prefix + item.spec.name] = (
                "each rank had a different part of its own values; shard it as it was when it was saved"
            )
            return
        self.plan.fetches.append(Fetch(fits, item.box, item.tensor))

    def _note_adapters(self) -> None:
        """Report where an adapter's weights will have a different meaning than before."""
        for name, [model, *_] in self.source.state.models.items() if self.source.extractor.is_peft else ():
            for key, adapter in adapters(name, model).items():
                file = f"{part_of(key)}/{names.CONSOLIDATED}/adapter_config.json"
                if file in self.source.checkpoint.manifest.files:
                    changed = changed_settings(model, adapter, self.source.document(file))
                    self.source.notes.texts += [
                        f"the adapter {adapter!r} was trained with other settings: {text}" for text in changed
                    ]

    def _naming(self, name: str, stored: Mapping[str, StoredTensor], specs: Sequence[TensorSpec]) -> Naming | None:
        """From a model's live tensors to the stored ones; None if the names are the same."""
        mapped, part = self.source.extractor.maps(self.source.state)[name], part_of(name)
        saved = Saved(stored, self.source.naming(part), self.source.is_export(part))
        if self.source.extractor.is_peft:
            return saved.naming if saved.is_export else None
        found = translate(
            [spec.name for spec in specs], saved, lambda: naming_of(mapped, self.source.state.models[name][0], specs)
        )
        prefix = f"{name}/" if name else ""
        self.plan.mismatch.missing += [prefix + key for key in found.missing]
        self.plan.mismatch.different.update({prefix + key: text for key, text in found.different.items()})
        self.plan.mismatch.left += [f"{called(name)}.{key}" for key in [*found.missing, *found.different]]
        return found.naming

    def _match_tensor(self, prefix: str, item: LocalTensor, stored: StoredTensor | None) -> StoredTensor | None:
        """The stored tensor that fits a live one; None if none does."""
        key = prefix + item.spec.name
        left = f"model.{key.replace('/', '.', 1) if prefix else key}"
        if stored is None and left in self.source.shared.get("unsaved", ()):
            return None  # the report says that it is missing
        if stored is None:
            self.plan.mismatch.missing.append(key)
            self.plan.mismatch.left.append(left)
        elif (stored.spec.shape, stored.spec.dtype) != (item.spec.file_shape, item.spec.dtype):
            self.plan.mismatch.different[key] = (
                f"{stored.spec.dtype} {list(stored.spec.shape)} in the checkpoint, "
                f"{item.spec.dtype} {list(item.spec.file_shape)} in the model"
            )
            self.plan.mismatch.left.append(left)
        else:
            return stored if item.spec.flat is None else stored.on_grid(item.spec.shape)
        return None

    def _match_optimizers(self) -> None:
        described, named = self.source.shared["optimizer"], self.source.state.named_optimizers
        parameters = self.source.extractor.parameter_names(self.source.state)
        homes = self.source.counterparts("optimizer", len(described["optimizers"]), len(named))
        found = self.plan.fit = fit(described, named, parameters, homes)
        self._skip_wrappers(described, homes)
        stored = self.source.per_rank.overlay(names.OPTIMIZER, self.source.stored(names.OPTIMIZER))
        leave_reordered(described, found, parameters, {name: prod(item.spec.shape) for name, item in stored.items()})
        self._leave_own_state(found)
        mine = set(found.own)
        found.leave({*self.plan.mismatch.missing, *self.plan.mismatch.different})
        self.plan.absent.update(name for number, name in enumerate(named) if number in found.absent)
        self.plan.mismatch.missing += [f"optimizer: {name}" for name in found.missing]
        called_here = list(named)
        self.plan.mismatch.left += [f"optimizer.{name}" for name in [*found.missing, *sorted(found.left)]]
        self.plan.mismatch.left += [f"{called_here[number]}.state_dict()" for number in sorted(mine - found.own.keys())]
        if len(found.absent) < len(named):
            self.plan.mismatch.unexpected += [f"optimizer: {name}" for name in self.source.optimized - found.held]
        for name in self.source.shared.get("of_other_stages", []):
            found.different[name] = "it belongs to other pipeline stages, and fits only the same stages"
        if own_names(found.trees()) and not self.source.same_ranks:
            found.different["optimizer"] = (
                "it holds shards of a tensor subclass, which fit only the ranks that had them"
            )
        self.plan.mismatch.different.update(found.different)
        self.plan.mismatch.left += [place.replace(", group ", ".param_groups.") for place in found.different]
        self.source.notes.texts += found.notes
        self.source.notes.missing += found.lacking
        if found.lacking:
            self.source.notes.texts.append(f"not in the checkpoint, so left as it was built: {some_of(found.lacking)}")
        if self.strict and (found.missing or found.different):
            return
        shapes = {name: (item.spec.shape, TORCH_DTYPE[item.spec.dtype]) for name, item in stored.items()}
        into = targets(described, found, shapes, named, parameters, self._tensors())
        first = len(self.plan.fetches)
        self._want(stored, set(tensor_names(found.trees())), into)
        # Schedulers may write to options, as with PyTorch's own load_state_dict().
        state = set(tensor_names(found.state)) - set(tensor_names(found.options))
        self.plan.restored["optimizer"] = [item for item in self.plan.fetches[first:] if item.stored.spec.name in state]

    def _skip_wrappers(self, described: Mapping[str, Any], homes: Sequence[int | None]) -> None:
        """Note saved wrappers without parameters that the AppState lacks; other optimizers are known by theirs."""
        keys, saved = self._keys("optimizer"), described["optimizers"]
        bare = [number for number in map(int, described.get("own", ())) if not has_parameters(described, number)]
        left = [number for number in bare if number not in homes and number < len(saved)]
        self._skip([f"optimizer.{number if keys is None else keys[number]}" for number in sorted(left)])

    def _leave_own_state(self, found: Fit) -> None:
        """Refuse the optimizers' per-rank tensors, or start without them."""
        own = set() if self.source.per_rank.is_here else self.source.per_rank.names_in(names.OPTIMIZER)
        for label in sorted(found.drop(own)) if own else ():
            self._leave_own(f"optimizer: {label}", f"optimizer.{label.replace(SEPARATOR, '.')}")
        lost = homeless(self.source.shared["optimizer"], found, self._tensors())
        for label in sorted(found.drop(lost)) if lost else ():
            self._leave_own(f"optimizer: {label}", f"optimizer.{label.replace(SEPARATOR, '.')}", explain(lost[label]))

    def _tensors(self) -> list[torch.Tensor]:
        """The models' tensors."""
        modules = [module for models in self.source.state.models.values() for module in models]
        return [item for module in modules for item in (*module.parameters(), *module.buffers())]

    def _leave_own_extras(self) -> None:
        """Refuse extras with per-rank tensors, or leave them as built; for other objects use rank 0's tensors."""
        own = set() if self.source.per_rank.is_here else self.source.per_rank.names_in(names.EXTRAS)
        available = self.source.available()
        for name in sorted(own):
            label = label_of_tensor(name)
            if label.partition(".")[0] != "extras":
                self._derived_from_rank_0(label)
        for extra in self.source.state.extras if own and "extras" in available else ():
            # A tensor that several extras have bears the name of one of them.
            found = sorted(own.intersection(tensor_names(self.source.shared["extras"].get(extra))))
            if found:
                self._leave_own(f"extras: {found[0]}", f"extras.{extra}")
                del self.source.shared["extras"][extra]
                self.plan.absent.add(f"extras.{extra}")

    def _match_extras(self) -> None:
        available = self.source.available()
        live: Mapping[str, torch.Tensor] = {}
        if "lr_scheduler" in available:
            self._match_schedulers()
        if "extras" in available:
            live = templates(self.source.state)
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
        self._want(stored, wanted, {name: places.fresh(name, stored[name].spec) for name in wanted & stored.keys()})

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
        meshes, same_ranks = foreign_meshes(trees), self.source.same_ranks
        return Places(self.source.state, live, placements(trees), strides(trees), meshes, same_ranks)

    def _leave_homeless(self, live: Mapping[str, torch.Tensor]) -> None:
        """Refuse objects with DTensors whose mesh is not here, or leave them as built."""
        places = self._places(live, self._trees())
        lost = places.homeless()
        if not lost:
            return
        shared = self.source.shared
        holders = [(self.plan.schedulers, "")]
        holders.append((shared.get("extras", {}), "extras."))
        holders += [(states, f"{called(model)}.") for model, states in shared.get("extra_state", {}).items()]
        holders += [(part, f"{called(model)}.") for model, parts in shared.get("entries", {}).items() for part in parts]
        for held, prefix in holders:
            for key in list(held):
                for name in sorted(set(tensor_names(held[key])).intersection(lost)):
                    dotted = f"{prefix}{key}"
                    self._leave_own(f"{dotted} ({name})", dotted, explain(places.foreign[name]))
                    held.pop(key, None)
                    self.plan.absent.add(dotted)

    def _match_schedulers(self) -> None:
        """Find the saved state of each live scheduler; further live ones stay as they were built."""
        saved, live = self.source.shared["lr_scheduler"], list(self.source.state.named_schedulers)
        homes = self.source.counterparts("lr_scheduler", len(saved), len(live))
        self.plan.schedulers = {name: saved[home] for name, home in zip(live, homes, strict=True) if home is not None}
        self.plan.absent.update(set(live) - self.plan.schedulers.keys())
        if self.plan.schedulers and (moved := self._moved_groups()):
            self.plan.mismatch.different["lr_scheduler"] = (
                f"it identifies groups by position, and these had a different one: {some_of(moved)}. Build optimizers "
                "and groups in the order of the run that saved, or leave the schedulers out (restore_parts)"
            )
        keys = self._keys("lr_scheduler")
        if keys is not None:
            self._skip([f"lr_scheduler.{key}" for number, key in enumerate(keys) if number not in homes])
        elif len(saved) > len(live):
            self.plan.mismatch.different["lr_scheduler"] = (
                f"{len(saved)} in the checkpoint, {len(live)} in the AppState"
            )

    def _keys(self, kind: str) -> list[str] | None:
        """The saved keys by which optimizers or schedulers were matched; None if they were matched by position."""
        here = self.source.state.keys[kind]
        found: list[str] | None = self.source.shared.get("keys", {}).get(kind)
        return None if here is None else found

    def _skip(self, dotted: Sequence[str]) -> None:
        """Note objects of the checkpoint that the AppState lacks."""
        self.source.notes.skipped += dotted
        self.source.notes.texts += [f"in the checkpoint, but not used here: {', '.join(dotted)}"] if dotted else []

    def _moved_groups(self) -> list[str]:
        source, found = self.source, self.plan.fit
        if found is None or source.other_stages:
            return []
        described, live = source.shared["optimizer"], len(source.state.optimizers)
        homes: list[int | None] = list(range(live))
        if self._keys("lr_scheduler") is not None:  # by position, a scheduler belongs to the optimizer of its number
            homes = source.counterparts("optimizer", len(described["optimizers"]), live)
        return moved_groups(described, found, source.extractor.parameter_names(source.state), homes)

    def _keep_known_extras(self, live: Mapping[str, torch.Tensor]) -> None:
        """Leave out what only other stages' extras have; an extra without tensors yet takes everything."""
        for name, tree in self.source.shared["extras"].items() if self.source.other_stages else ():
            if any(place.startswith(f"{name}:") for place in live):
                self.source.shared["extras"][name] = stages.keep_known(tree, live)

    def _want(
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
                target = torch.empty(spec.shape, dtype=TORCH_DTYPE[spec.dtype])
            self.plan.tensors[name] = target
            item = self.source.extractor.localize(name, target)
            self.plan.fetches.append(Fetch(stored[name], item.box, item.tensor))
