"""Compares live models with a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from hydra_ckpt.errors import some_of
from hydra_ckpt.hub.conversion import naming_of
from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.loading.planning.matcher import Matcher
from hydra_ckpt.loading.planning.overlaps import overwritten
from hydra_ckpt.loading.planning.translation import Saved, translate
from hydra_ckpt.state.capture import called
from hydra_ckpt.state.local import Exporter, LocalTensor
from hydra_ckpt.state.model_map import ModelMap
from hydra_ckpt.state.peft import adapters, changed_settings
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.read import Fetch
from hydra_ckpt.store import names
from hydra_ckpt.store.parts import part_of


class ModelMatcher(Matcher):
    """Matches the tensors of models."""

    def match(self) -> None:
        """Match every model of the AppState."""
        maps = self.source.extractor.maps(self.source.state)
        saved = self.source.models()
        live = {part_of(name): name for name in maps}
        if not saved & live.keys():
            self.plan.mismatch.unexpected.update({f"the model {part}": part.replace("/", ".", 1) for part in saved})
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
        self._leave_overwritten()

    def _leave_overwritten(self) -> None:
        """Refuse tensors that share memory here with others of other values, or leave them as they are."""
        maps, restored = self.source.extractor.maps(self.source.state), self.plan.restored
        pairs = [(name, item) for name in maps for item in restored.get(called(name), ())]
        lost = overwritten(self.source, [item for _, item in pairs])
        for number, by in lost.items():
            (model, item), (other, overwriting) = pairs[number], pairs[by]
            key = item.stored.spec.name
            self.plan.mismatch.different[f"{model}/{key}" if model else key] = (
                f"it shares memory with {called(other)}.{overwriting.stored.spec.name} here, and the two have "
                "different values in the checkpoint"
            )
            self.plan.mismatch.left.append(f"{called(model)}.{key}")
        left = {id(pairs[number][1]) for number in lost}
        self.plan.fetches[:] = [item for item in self.plan.fetches if id(item) not in left]
        for dotted, items in restored.items() if left else ():
            restored[dotted] = [item for item in items if id(item) not in left]

    def _match_model(self, name: str, mapped: ModelMap) -> None:
        stored = self.source.stored(part_of(name))
        prefix = f"{name}/" if name else ""
        self._miss_own_state(name, prefix, mapped)  # first: hooks may exchange buffers in state_dict()
        items = mapped.locals(self.source.extractor.localize)
        held = {item.spec.name for item in items}
        naming = self._naming(name, stored, [item.spec for item in items])
        if naming is not None:
            held = {alias.name for key in held for alias in naming.by_source.get(key, ())}
            items = Exporter(naming)(items)
        strange = stored.keys() - held - set(mapped.omitted)
        taken = self._take_odd(name, mapped, items, stored, strange) if naming is None else set()
        self.plan.mismatch.unexpected.update({prefix + key: f"{called(name)}.{key}" for key in strange - taken})
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

    def _miss_own_state(self, model: str, prefix: str, mapped: ModelMap) -> None:
        """Refuse own state of modules that the checkpoint lacks and that does not go away without it, or leave it.

        Other tools do not store it, and other pipeline stages have theirs.
        """
        shared = self.source.shared
        is_pipeline = self.source.other_stages and self.source.channel.world_size > 1
        if is_pipeline or model not in shared.get("extra_state", {}):
            return
        lost = mapped.beyond.extra_states.keys() - shared["extra_state"][model].keys()
        lacking = mapped.beyond.lacking(called(model), shared.get("entries", {}).get(model, []))
        for name in sorted(lost | mapped.beyond.outlasting(lacking)):
            dotted = f"{called(model)}.{name}"
            if dotted not in shared.get("unsaved", ()):
                self.plan.mismatch.missing.append(prefix + name)
                self.plan.mismatch.left.append(dotted)

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
            Their names, and the names of the model's tensors that its modules make from them.
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
        taken = mapped.beyond.accepted(odd)
        ties = self.source.shared.get("ties", {}).get(model, {})
        lost = [name for item in items if ties.get(name := item.spec.name, name) not in stored and name not in stored]
        renamed, made = mapped.beyond.renamed({name: odd[name] for name in strange if name not in taken}, lost)
        self.plan.made[model] = made
        taken |= renamed
        for name in taken:
            target = torch.empty_like(odd[name], device="cpu")
            self.plan.resized.setdefault(model, {})[name] = target
            self.plan.fetches.append(Fetch(stored[name], Box.whole(specs[name].shape), target))
        return taken | made

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
                self.leave_own(prefix + name, f"{called(model)}.{name}")
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

    def _naming(
        self, name: str, stored: Mapping[str, StoredTensor], specs: Sequence[TensorSpec]
    ) -> TensorMapping | None:
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
