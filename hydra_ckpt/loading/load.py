"""One load: compare, read and verify, install. Nothing is changed before everything fits."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.errors import CheckpointError, CorruptCheckpointError, KeyMismatchError, some_of
from hydra_ckpt.hub.conversion import naming_of
from hydra_ckpt.layout.aliases import Naming
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.loading.installing import Installer, Notes
from hydra_ckpt.loading.per_rank import ELSEWHERE, PerRank, owner_of
from hydra_ckpt.loading.translation import Saved, translate
from hydra_ckpt.report import LoadReport
from hydra_ckpt.state import stages
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Extractor, called, part_of, templates, unpack
from hydra_ckpt.state.local import Exporter, LocalTensor
from hydra_ckpt.state.model import ModelMap
from hydra_ckpt.state.optimizer import SEPARATOR
from hydra_ckpt.state.optimizer_loading import Fit, empty_states, fit, targets
from hydra_ckpt.state.peft import adapters, changed_settings
from hydra_ckpt.state.places import Places
from hydra_ckpt.state.ranks import Topology
from hydra_ckpt.storage.distcp import fetch_distcp, stored_tensors
from hydra_ckpt.storage.dtypes import SAFETENSORS_DTYPE, TORCH_DTYPE
from hydra_ckpt.storage.header import read_tensors
from hydra_ckpt.storage.ledger import Ledger, Span, join
from hydra_ckpt.storage.naming import decode_naming
from hydra_ckpt.storage.read import Fetch, fetch
from hydra_ckpt.storage.tree import own_names, placements, strides, tensor_names
from hydra_ckpt.storage.verify import checks, findings, read_small, share_out
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint

log = logging.getLogger(__name__)

PARTS = ("model", "optimizer", "lr_scheduler", "dataloader", "rng", "extras", "progress")


@dataclass
class _Mismatch:
    """What does not fit between a checkpoint and the live objects.

    Attributes:
        missing: Names that the checkpoint lacks.
        unexpected: Names that the live objects lack.
        different: Name to how the two differ.
        left: What stays as it was built because of the missing and different ones, by dotted name.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


@dataclass
class Load:
    """Loads one checkpoint into an AppState.

    Args:
        checkpoint: What to load.
        state: Into what.
        extractor: Knows the models' maps.
        channel: To the other ranks.
        topology: How they are arranged.
        parts: Which parts are wanted.
        verify: Whether every byte is checked against its digest.
        strict: Whether what does not fit is an error, or left as it was built.

    Attributes:
        touched: The parts whose live tensors may have been written to; equal on all ranks.
    """

    checkpoint: Checkpoint
    state: AppState
    extractor: Extractor
    channel: Channel
    topology: Topology
    parts: Collection[str]
    verify: bool
    strict: bool = True
    touched: frozenset[str] = frozenset()
    _shared: dict[str, Any] = field(default_factory=dict)
    _own: dict[str, Any] | None = None
    _fetches: list[Fetch] = field(default_factory=list)
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _lengths: dict[tuple[str, int], int] = field(default_factory=dict)
    _notes: Notes = field(default_factory=Notes)
    _ledger: Ledger | None = None
    _read_bytes: int = 0
    _fit: Fit | None = None
    _other_stages: bool = False
    _optimized: set[str] = field(default_factory=set)
    _absent: set[str] = field(default_factory=set)
    _per_rank: PerRank = field(default_factory=PerRank)

    def run(self) -> LoadReport:
        """Collective: load.

        Raises:
            CorruptCheckpointError: Bytes are not what was written; raised on all ranks. The tensors of the parts in
                `touched` may have been overwritten by then.
            KeyMismatchError: Names, shapes or element types differ; nothing was changed.
        """
        self._compare()
        self.touched = frozenset(self._available() & {"model", "optimizer"})
        compared = self._together("reading the checkpoint", self._read, join)
        self._verify_rest(compared)
        self._together("installing the checkpoint", self._install)
        step, epoch = (self.checkpoint.step, self.checkpoint.epoch) if "progress" in self.parts else (0, 0)
        loaded = tuple(part for part in PARTS if part in self._available() and self._took_any(part))
        notes = self._notes
        skipped = [part for part in PARTS if part not in self._available() and self._holds(part)]
        return LoadReport(
            step=step,
            epoch=epoch,
            path=self.checkpoint.path,
            metrics=self.checkpoint.metrics,
            loaded=loaded,
            exact=tuple(notes.exact),
            trusted=tuple(notes.trusted),
            missing=tuple(dict.fromkeys(notes.missing)),
            skipped=(*skipped, *notes.skipped),
            rederived=tuple(notes.rederived),
            notes=tuple(notes.texts),
            read_bytes=self._read_bytes,
        )

    def _together(self, what: str, step: Callable[[], Any], decide: Callable[[list[Any]], Any] = lambda _: None) -> Any:
        """Collective: do a local step and raise everywhere if it fails anywhere; else decide from what it gave."""
        error: Exception | None = None
        given = None
        try:
            given = step()
        except CheckpointError as known:
            error = known
        except Exception as unknown:
            log.debug("%s failed", what, exc_info=True)
            error = CheckpointError(f"{what} ({self.checkpoint.path}): {type(unknown).__name__}: {unknown}")
            error.__cause__ = unknown
        return self.channel.conclude(what, error, given, decide)

    @property
    def _root(self) -> Path:
        return self.checkpoint.path

    @property
    def _same_ranks(self) -> bool:
        """Whether each rank finds what it saved itself."""
        return self.topology.equals(self.checkpoint.manifest.topology)

    def _holds(self, part: str) -> bool:
        """Whether the checkpoint has something of this part."""
        if part in ("rng", "dataloader"):
            return self._own is not None and self._own.get(part) is not None
        return part in ("model", "progress") or bool(self._shared.get(part))

    def _took_any(self, part: str) -> bool:
        """Whether anything of an available part was installed."""
        return part != "optimizer" or self._fit is None or len(self._fit.absent) < len(self.state.optimizers)

    def _available(self) -> set[str]:
        """The parts that are wanted, in the checkpoint, and have an object to take them."""
        takers = {
            "model": True,
            "optimizer": bool(self.state.optimizers),
            "lr_scheduler": bool(self.state.lr_schedulers),
            "dataloader": hasattr(self.state.dataloader, "load_state_dict"),
            "rng": True,
            "extras": bool(set(self.state.extras) & set(self._shared.get("extras", {}))),
            "progress": True,
        }
        return {part for part in self.parts if takers[part] and self._holds(part)}

    # -- progress ------------------------------------------------------------------------------------------------

    def _read_progress(self) -> None:
        files = self.checkpoint.manifest.files
        shared = [name for name in files if name.startswith(f"{names.PROGRESS}/shared-")]
        documents = [self._json(name) for name in sorted(shared)]
        if not documents:
            raise CorruptCheckpointError(self._root, "it holds no progress")
        self._shared, notes = stages.combine(documents, self.extractor.held(self.state), len(self.state.lr_schedulers))
        self._other_stages = self._shared not in documents
        self._optimized = stages.optimized(documents)
        self._notes.texts += notes
        counterpart = self.topology.counterpart(self.checkpoint.manifest.topology)
        rank = self.channel.rank if self._same_ranks else counterpart or 0
        own = f"{names.PROGRESS}/rank-{rank:05d}.safetensors"
        if own in files:
            self._own = unpack(self._root / own, read_small(self._root, own, files[own]))
            if not self._same_ranks and counterpart is None and not self._own.get("dataloader_is_global"):
                self._leave_data(self._own)
        is_here = self._same_ranks and not self._other_stages
        record = self.checkpoint.manifest.parts.get(names.OWN)
        rank_here = self.channel.rank if is_here else None
        self._per_rank = PerRank.read(self._root, self._shared, self._own, record, rank_here)

    def _leave_data(self, own: dict[str, Any]) -> None:
        """Drop the state of a data loader that belongs to one rank of another division of the data."""
        if own.get("dataloader") is None or not hasattr(self.state.dataloader, "load_state_dict"):
            return
        own["dataloader"] = None
        if "dataloader" in self.parts:
            self._notes.derived(
                "dataloader",
                f"the data loader starts anew: its state belongs to one of "
                f"{len(self.checkpoint.manifest.topology.get('leaders', []))} data-parallel ranks, and this run has "
                f"{len(self.topology.leaders)}. A loader that resumable() made goes on with any number of ranks",
            )

    def _json(self, name: str) -> dict[str, Any]:
        data = read_small(self._root, name, self.checkpoint.manifest.files[name])
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(self._root / name, f"is not JSON of ours: {error}") from None

    # -- comparing -----------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        """Collective: find out what to read, and list everything that does not fit."""
        mismatch = _Mismatch()

        def compare() -> dict[str, Any]:
            self.extractor.refresh(self.state)
            self._read_progress()
            self._match(mismatch)
            return vars(mismatch)

        found = self._together("comparing the checkpoint with the live objects", compare, _merge_mismatches)
        if not self.strict:
            self._leave(found)
        elif any(found.values()):
            self._verify_headers()
            raise KeyMismatchError(
                f"{self._root} does not fit",
                missing=found["missing"],
                unexpected=found["unexpected"],
                mismatched=found["different"],
                remedy="Load it into the model and optimizer it was saved from, choose another checkpoint or fewer "
                "parts (restore_from, restore_parts), or take over what fits with checkpoint.load_strict=false.",
            )

    def _leave(self, found: Mapping[str, Any]) -> None:
        """Note what stays as it was built, and what nobody takes; equal on all ranks."""
        self._notes.missing += found["left"]
        self._notes.skipped += found["unexpected"]
        if found["left"]:
            self._notes.texts.append(f"left as built (checkpoint.load_strict=false): {', '.join(found['left'])}")
        if found["unexpected"]:
            self._notes.texts.append(f"not taken over: {', '.join(found['unexpected'])}")

    def _verify_headers(self) -> None:
        """Collective: see that it is not a damaged name that fits nothing: headers are compared with their digests."""

        def verify() -> None:
            manifest = self.checkpoint.manifest
            everything = checks(self._root, manifest.files, manifest.digests)
            headers = [check for check in everything if check.region.offset == 0]
            for error in findings(self._root, share_out(headers, self.channel.rank, self.channel.world_size)):
                raise error

        if self.verify:
            self._together("verifying the checkpoint's names", verify)

    def _match(self, mismatch: _Mismatch) -> None:
        if "model" in self._available():
            self._match_models(mismatch)
        if "optimizer" in self._available():
            self._match_optimizers(mismatch)
        self._leave_own_extras(mismatch)
        self._match_extras(mismatch)
        self._note_plain()

    def _note_plain(self) -> None:
        """Say of which plain data all ranks get what rank 0 had."""
        kinds = {"extra_state": "model"}
        available = self._available()
        for label in () if self._per_rank.is_here else self._per_rank.plain:
            kind = label.partition(".")[0]
            if kinds.get(kind, kind) in available:
                self._derived_from_rank_0(label.rstrip("."))

    def _derived_from_rank_0(self, label: str) -> None:
        self._notes.derived(label, f"{label}: each rank had values of its own; those of rank 0 are taken on all ranks")

    def _leave_own(self, mismatch: _Mismatch, label: str, dotted: str) -> None:
        """Note values that each rank had for itself and that nobody gets here: an error, or left as built."""
        mismatch.different[label] = ELSEWHERE
        mismatch.left.append(dotted)

    def _stored(self, part: str) -> dict[str, StoredTensor]:
        record = self.checkpoint.manifest.parts.get(part)
        if record is None:
            return {}
        if record.format == "distcp":
            self._lengths.update({(f"{part}/{row[5]}", row[6]): row[7] for row in record.index})
            return stored_tensors(self._root / names.MANIFEST, part, record.index)
        return read_tensors(self._root, list(record.files))

    def _match_models(self, mismatch: _Mismatch) -> None:
        maps = self.extractor.maps(self.state)
        saved = self._saved_models()
        live = {part_of(name): name for name in maps}
        if not saved & live.keys():
            mismatch.unexpected += [f"the model {part}" for part in saved]
        elif saved - live.keys():
            self._notes.skipped += sorted(part.replace("/", ".") for part in saved - live.keys())
        self._note_adapters()
        for name, mapped in maps.items():
            if part_of(name) not in saved and saved & live.keys():
                self._absent.add(called(name))  # an object that the checkpoint does not have
                continue
            self._match_model(mismatch, name, mapped)

    def _match_model(self, mismatch: _Mismatch, name: str, mapped: ModelMap) -> None:
        stored = self._stored(part_of(name))
        prefix = f"{name}/" if name else ""
        items = mapped.locals(self.extractor.localize)
        held = {item.spec.name for item in items}
        naming = self._naming(mismatch, name, stored, [item.spec for item in items])
        if naming is not None:
            held = {alias.name for key in held for alias in naming.by_source.get(key, ())}
            items = Exporter(naming)(items)
        mismatch.unexpected += [prefix + key for key in stored.keys() - held - set(mapped.omitted)]
        own = self._match_own(mismatch, name, prefix, mapped)
        for item in items:
            fits = self._match_tensor(mismatch, prefix, item, stored.get(item.spec.name))
            if fits is not None and (item.place.origin or item.spec.name) not in own:
                self._fetches.append(Fetch(fits, item.box, item.tensor))
        if len(self._shared.get("entries", {}).get(name, [])) not in (0, mapped.parts):
            mismatch.different[prefix + "state_dict()"] = "its entries are those of other parts of the model"

    def _match_own(self, mismatch: _Mismatch, model: str, prefix: str, mapped: ModelMap) -> set[str]:
        """The tensors of a model that are not taken from what the ranks share; this rank's own are fetched."""
        part = part_of(model)
        wanted = self._per_rank.names_in(part)
        if not wanted:
            return set()
        if not self._per_rank.is_here:
            buffers = sorted(wanted & mapped.buffers().keys())
            if buffers:
                self._notes.derived(
                    "buffers",
                    f"buffers, which each rank had for itself, are those of rank 0 on all ranks: {some_of(buffers)}",
                )
            experts = wanted & {slot.name for slot in mapped.slots} - set(buffers)
            for name in sorted(experts):
                self._leave_own(mismatch, prefix + name, f"{called(model)}.{name}")
            return experts
        own = self._per_rank.overlay(part, {})
        for item in mapped.locals(self.extractor.localize):
            if item.spec.name in own:
                self._fetch_own(mismatch, prefix, item, own[item.spec.name])
        return wanted

    def _fetch_own(self, mismatch: _Mismatch, prefix: str, item: LocalTensor, stored: StoredTensor) -> None:
        fits = self._match_tensor(mismatch, prefix, item, stored)
        if fits is None:
            return
        if item.box.numel and fits.chunks[0].box != item.box:
            mismatch.different[prefix + item.spec.name] = (
                "each rank had another part of its own values; shard it as then"
            )
            return
        self._fetches.append(Fetch(fits, item.box, item.tensor))

    def _note_adapters(self) -> None:
        """Say where an adapter's weights will mean something else than they did."""
        for name, [model, *_] in self.state.models.items() if self.extractor.is_peft else ():
            for key, adapter in adapters(name, model).items():
                file = f"{part_of(key)}/{names.CONSOLIDATED}/adapter_config.json"
                if file in self.checkpoint.manifest.files:
                    changed = changed_settings(model, adapter, self._json(file))
                    self._notes.texts += [
                        f"the adapter {adapter!r} was trained with other settings: {text}" for text in changed
                    ]

    def _naming(
        self, mismatch: _Mismatch, name: str, stored: Mapping[str, StoredTensor], specs: Sequence[TensorSpec]
    ) -> Naming | None:
        """From a model's live tensors to the stored ones; None where the names are the same."""
        mapped, part = self.extractor.maps(self.state)[name], part_of(name)
        saved = Saved(stored, self._saved_naming(part), self._is_export(part))
        if self.extractor.is_peft:
            return saved.naming if saved.is_export else None
        found = translate(
            [spec.name for spec in specs], saved, lambda: naming_of(mapped, self.state.models[name][0], specs)
        )
        prefix = f"{name}/" if name else ""
        mismatch.missing += [prefix + key for key in found.missing]
        mismatch.different.update({prefix + key: text for key, text in found.different.items()})
        mismatch.left += [f"{called(name)}.{key}" for key in [*found.missing, *found.different]]
        return found.naming

    def _saved_models(self) -> set[str]:
        """The parts that hold models."""
        return {part for part in self.checkpoint.manifest.parts if part.split("/")[0] == names.MODEL}

    def _is_export(self, part: str) -> bool:
        """Whether the files of a model are an export, and have its names."""
        record = self.checkpoint.manifest.parts.get(part)
        return record is not None and all(names.CONSOLIDATED in Path(file).parts for file in record.files)

    def _saved_naming(self, part: str) -> Naming | None:
        """How the saved model's tensors are called in its export, where they are called otherwise."""
        name = f"{part}/{names.NAMING}"
        listed = self.checkpoint.manifest.files
        return decode_naming(self._root / name, read_small(self._root, name, listed[name])) if name in listed else None

    def _match_tensor(
        self, mismatch: _Mismatch, prefix: str, item: LocalTensor, stored: StoredTensor | None
    ) -> StoredTensor | None:
        """The stored tensor that fits a live one; None where none does."""
        key = prefix + item.spec.name
        left = f"model.{key.replace('/', '.', 1) if prefix else key}"
        if stored is None:
            mismatch.missing.append(key)
            mismatch.left.append(left)
        elif (stored.spec.shape, stored.spec.dtype) != (item.spec.file_shape, item.spec.dtype):
            mismatch.different[key] = (
                f"{stored.spec.dtype} {list(stored.spec.shape)} in the checkpoint, "
                f"{item.spec.dtype} {list(item.spec.file_shape)} in the model"
            )
            mismatch.left.append(left)
        else:
            return stored if item.spec.flat is None else stored.on_grid(item.spec.shape)
        return None

    def _match_optimizers(self, mismatch: _Mismatch) -> None:
        described, named = self._shared["optimizer"], self.state.named_optimizers
        parameters = self.extractor.parameter_names(self.state)
        found = self._fit = fit(described, named, parameters)
        self._leave_own_state(mismatch, found)
        found.leave({*mismatch.missing, *mismatch.different})
        self._absent.update(name for number, name in enumerate(named) if number in found.absent)
        mismatch.missing += [f"optimizer: {name}" for name in found.missing]
        mismatch.left += [f"optimizer.{name}" for name in found.missing]
        mismatch.unexpected += (
            [f"optimizer: {name}" for name in self._optimized - found.held] if self._fit_any() else []
        )
        for name in self._shared.get("of_other_stages", []):
            found.different[name] = "it is of other pipeline stages, and fits only the same ones"
        if own_names(found.trees()) and not self._same_ranks:
            found.different["optimizer"] = (
                "it holds shards of a tensor subclass, which fit only the ranks that had them"
            )
        mismatch.different.update(found.different)
        mismatch.left += [place.replace(", group ", ".") for place in found.different]
        self._notes.texts += found.notes
        if self.strict and (found.missing or found.different):
            return
        stored = self._per_rank.overlay(names.OPTIMIZER, self._stored(names.OPTIMIZER))
        shapes = {name: (item.spec.shape, TORCH_DTYPE[item.spec.dtype]) for name, item in stored.items()}
        into = targets(described, found, shapes, named, parameters)
        self._want(stored, set(tensor_names(found.trees())), into)

    def _fit_any(self) -> bool:
        """Whether any live optimizer finds anything."""
        return self._fit is not None and len(self._fit.absent) < len(self.state.optimizers)

    def _leave_own_state(self, mismatch: _Mismatch, found: Fit) -> None:
        """Refuse the optimizers' tensors that each rank had for itself, or begin without them."""
        own = set() if self._per_rank.is_here else self._per_rank.names_in(names.OPTIMIZER)
        if not own:
            return
        lost = found.drop(own)
        for label in sorted(lost):
            self._leave_own(mismatch, f"optimizer: {label}", f"optimizer.{label.replace(SEPARATOR, '.')}")

    def _leave_own_extras(self, mismatch: _Mismatch) -> None:
        """Refuse the extras' tensors that each rank had for itself, or leave these extras; others' are rank 0's."""
        own = set() if self._per_rank.is_here else self._per_rank.names_in(names.EXTRAS)
        available = self._available()
        for name in sorted(own):
            kind, label = owner_of(name)
            if kind != "extras":
                if ("model" if kind == "extra_state" else kind) in available:
                    self._derived_from_rank_0(label)
            elif kind in available and label in self.state.extras:
                self._leave_own(mismatch, f"extras: {name}", f"extras.{label}")
                self._shared["extras"].pop(label, None)
                self._absent.add(f"extras.{label}")

    def _match_extras(self, mismatch: _Mismatch) -> None:
        available = self._available()
        live: Mapping[str, torch.Tensor] = {}
        shared = self._shared
        trees = [shared.get("extra_state", {}), shared.get("entries", {})] if "model" in available else []
        if "lr_scheduler" in available:
            trees.append(self._match_schedulers(mismatch))
        if "extras" in available:
            live = templates(self.state)
            self._keep_known_extras(live)
            trees += [tree for name, tree in shared["extras"].items() if name in self.state.extras]
        if own_names(trees) and not self._same_ranks:
            mismatch.different["extras"] = (
                "they hold shards of a tensor subclass, which fit only the ranks that had them"
            )
        stored = self._per_rank.overlay(names.EXTRAS, self._stored(names.EXTRAS))
        wanted = set(tensor_names(trees))
        # Never into the live tensors: the objects take their state over themselves.
        places = Places(self.state, live, placements(trees), strides(trees))
        self._want(stored, wanted, {name: places.fresh(name, stored[name].spec) for name in wanted & stored.keys()})

    def _match_schedulers(self, mismatch: _Mismatch) -> list[Any]:
        """The saved states that live schedulers take, in order; further live ones begin as they were built."""
        saved, live = self._shared["lr_scheduler"], list(self.state.named_schedulers)
        self._absent.update(live[len(saved) :])
        if len(saved) > len(live):
            mismatch.different["lr_scheduler"] = f"{len(saved)} in the checkpoint, {len(live)} in the AppState"
        return list(saved[: len(live)])

    def _keep_known_extras(self, live: Mapping[str, torch.Tensor]) -> None:
        """Leave out what only other stages' extras have; one that has no tensors yet takes everything."""
        for name, tree in self._shared["extras"].items() if self._other_stages else ():
            if any(place.startswith(f"{name}:") for place in live):
                self._shared["extras"][name] = stages.keep_known(tree, live)

    def _want(
        self, stored: Mapping[str, StoredTensor], wanted: Collection[str], targets: Mapping[str, torch.Tensor]
    ) -> None:
        """Read stored tensors into the targets that fit; into whole ones of their own where none does."""
        for name in sorted(wanted):
            if name not in stored:
                raise CorruptCheckpointError(self._root, f"the tensor {name} is missing from its files")
            spec = stored[name].spec
            target = targets.get(name)
            if target is None or (tuple(target.shape), SAFETENSORS_DTYPE[target.dtype]) != (spec.shape, spec.dtype):
                target = torch.empty(spec.shape, dtype=TORCH_DTYPE[spec.dtype])
            self._tensors[name] = target
            item = self.extractor.localize(name, target)
            self._fetches.append(Fetch(stored[name], item.box, item.tensor))

    # -- bytes ---------------------------------------------------------------------------------------------------

    def _read(self) -> list[Span]:
        """Read; returns the digests that were compared on the way."""
        if self.verify:
            manifest = self.checkpoint.manifest
            self._ledger = Ledger(checks(self._root, manifest.files, manifest.digests))
        ordered = sorted(self._fetches, key=lambda item: (item.stored.chunks[0].file, item.stored.chunks[0].offset))
        foreign = [item for item in ordered if item.stored.chunks[0].file.endswith(".distcp")]
        own = [item for item in ordered if not item.stored.chunks[0].file.endswith(".distcp")]
        self._read_bytes = fetch(self._root, own, self._ledger) + fetch_distcp(self._root, foreign, self._lengths)
        return [] if self._ledger is None else self._ledger.done()

    def _verify_rest(self, done: Sequence[Sequence[int]]) -> None:
        """Collective: compare the digests that no rank has compared while it read, each once."""
        ledger = self._ledger
        if ledger is None:
            return

        def verify() -> None:
            rest = ledger.left((first, behind) for first, behind in done)
            for error in findings(self._root, share_out(rest, self.channel.rank, self.channel.world_size)):
                raise error

        self._together("verifying the checkpoint", verify)

    # -- installing ----------------------------------------------------------------------------------------------

    def _install(self) -> None:
        installer = Installer(
            self.state,
            self.extractor,
            shared=self._shared,
            own=self._own,
            tensors=self._tensors,
            same_ranks=self._same_ranks,
            like=self._like,
            notes=self._notes,
        )
        available = self._available()
        if "model" in available:
            installer.models(self._absent)
        if "optimizer" in available:
            assert self._fit is not None  # made while comparing
            installer.optimizers(self._fit, empty_states(self._shared["optimizer"]))
        installer.objects(available)
        if "rng" in self.parts:
            installer.rng(self.checkpoint, self.topology, self.channel.world_size)
        if "progress" in self.parts:
            self._notes.exact.append("progress")
        installer.note_new(self.parts, available, self._absent)

    def _like(self, name: str) -> DTensor:
        """The parameter whose mesh and placements a shard of a tensor subclass had."""
        parameter = self._shared["optimizer"].get("meshes", {}).get(name, name.split(SEPARATOR, maxsplit=1)[0])
        known = self.extractor.parameter_names(self.state)
        for modules in self.state.models.values():
            for item in (item for module in modules for item in module.parameters()):
                if known.get(id(item)) == parameter and isinstance(item, DTensor):
                    return item
        raise CheckpointError(f"{name}: a shard of a tensor subclass, and no sharded parameter here that it belongs to")


def _merge_mismatches(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Coordinator only: missing is what any rank misses; unexpected is what no rank holds."""
    unexpected = set(found[0]["unexpected"]).intersection(*(item["unexpected"] for item in found[1:]))
    missing = {name for item in found for name in item["missing"]}
    different = {name: text for item in found for name, text in item["different"].items()}
    left = {name for item in found for name in item["left"]}
    return {"missing": sorted(missing), "unexpected": sorted(unexpected), "different": different, "left": sorted(left)}
