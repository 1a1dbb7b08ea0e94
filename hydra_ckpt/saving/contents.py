"""What each rank contributes to a save: its plan, agreed once and cached, and the small files around it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from hydra_ckpt.config import SaveConsolidatedMode
from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.distributed.group import Group
from hydra_ckpt.distributed.vote import Vote
from hydra_ckpt.errors import CheckpointConfigError, CheckpointError
from hydra_ckpt.hub.assets import tokenizer_assets
from hydra_ckpt.hub.card import Made
from hydra_ckpt.hub.export import ModelExport, Wanted
from hydra_ckpt.layout.aliases import Naming
from hydra_ckpt.layout.blocks import BLOCK_SHARDS
from hydra_ckpt.layout.plan import WritePlan
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.resolved import ResolvedConfig
from hydra_ckpt.saving.agreement import Agreement, Parts, agree
from hydra_ckpt.saving.comparing import Comparer, Look
from hydra_ckpt.saving.drift import Judgement
from hydra_ckpt.saving.planning import (
    BESIDE,
    PartLayout,
    adapter_layout,
    apart_layout,
    consolidated_layout,
    distcp_layout,
    is_of_rows,
    lay_out_part,
    make_plan,
    own_layout,
    shard_layout,
    signature,
    state_layout,
    tensors_of,
)
from hydra_ckpt.saving.save import Content, Merged
from hydra_ckpt.saving.watching import label_of
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Captured, part_of
from hydra_ckpt.state.local import Exporter, LocalTensor
from hydra_ckpt.state.packing import Packed, pack_json
from hydra_ckpt.state.peft import adapters
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.naming import encode_naming
from hydra_ckpt.store import names

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Number of layouts cached: a run alternates between few, but an extra may grow with every save.
_MAX_LAYOUTS = 4
# Below every fingerprint's number.
_NO_OPINION = -(1 << 62)


@dataclass(frozen=True)
class Agreed:
    """What the ranks agreed on for a state, and what follows for exports.

    Attributes:
        agreement: The agreement.
        namings: Model part to how its export names and stores the tensors.
        exporters: Model part to what applies its naming.
        kept: Parts whose export holds every tensor bit for bit, so training can resume from it.
        of_rows: Whether all ranks hold whole rows of every tensor, and so fill files without a memory map.
    """

    agreement: Agreement
    namings: Mapping[str, Naming]
    exporters: Mapping[str, Exporter]
    kept: frozenset[str]
    of_rows: bool = False

    @cached_property
    def naming_files(self) -> dict[str, bytes]:
        """Model part to its naming, encoded."""
        return {part: encode_naming(naming) for part, naming in self.namings.items()}


@dataclass(frozen=True)
class Planned:
    """A plan and the choices it is based on."""

    layouts: tuple[PartLayout, ...]
    plan: WritePlan
    merged: tuple[Merged, ...]
    total_bytes: int


@dataclass(frozen=True)
class Sources:
    """The live tensors of a plan's shares.

    Attributes:
        tensors: Position of the share to exactly the live rows it writes.
        late: Positions that may be copied as late as the next optimizer step.
        casts: Dtypes to write, where they differ from the tensors' own.
        plan: Fixes everything but the values; the same object as long as nothing else changes.
        label: What messages call the tensor at a position.
    """

    tensors: Mapping[int, torch.Tensor]
    late: frozenset[int]
    casts: Mapping[int, torch.dtype]
    plan: object = None
    label: Callable[[int], str] = str


class Contents:
    """Makes the contents of saves for one Checkpointer.

    Args:
        config: The settings.
        group: The ranks.
        channel: To the other ranks.
        stage: The pipeline rank.
        keeps_ranges: Whether different hosts can safely write byte ranges of one file on this file system.
        moe_mesh: The mesh of expert parallelism, or None.

    Attributes:
        comparer: Knows which values differ between ranks.
        block_shards: How many neighbouring ranks share a file of state outside models, if there are more of them.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        group: Group,
        channel: Channel,
        stage: int,
        *,
        keeps_ranges: bool,
        moe_mesh: DeviceMesh | None = None,
    ) -> None:
        self._config = config
        self._vote = Vote(group, "comparing layouts", 4)
        self._channel = channel
        self.comparer = Comparer(group, channel, moe_mesh, raises=config.write.raises_drift)
        self._stage = stage
        self._keeps_ranges = keeps_ranges
        self.block_shards = BLOCK_SHARDS
        self._export = ModelExport(config.hub, required=config.write.consolidated is not SaveConsolidatedMode.FALSE)
        self._settled: dict[str, Agreed] = {}
        self._plans: dict[tuple[str, bool, bool, bool], Planned] = {}
        self._held = ""
        self._tokenizer_files: tuple[object, dict[str, bytes]] = (None, {})

    def agree(
        self, state: AppState, captured: Captured | None, error: Exception | None = None, *, trouble: bool = False
    ) -> bool:
        """Collective: check that the ranks still hold what they agreed on; if not, agree again.

        In the steady state this is a reduction of four numbers. A rank must not act alone on a new layout: the others
        would start to write while it waits for them.

        Args:
            state: The live objects.
            captured: The state, taken apart.
            error: Why the state could not be taken apart; then `captured` is None.
            trouble: Whether this rank has to settle something about the previous save.

        Returns:
            Whether any rank has to.

        Raises:
            TopologyError: The ranks do not fit together. Nothing was written.
            CheckpointError: The ranks have to agree again, and one of them could not take its state apart.
        """
        parts = {} if captured is None else self.comparer.known.arranged(captured.parts)
        self._held = signature(parts, captured.objects) if captured is not None else ""
        known = self._settled.get(self._held)
        opinion = int(known.agreement.fingerprint[:15], 16) if known is not None else None
        first, last = (_NO_OPINION, _NO_OPINION) if opinion is None else (opinion, -opinion)
        new = known is None and (captured is not None or not self._settled)
        any_new, largest, smallest, any_trouble = self._vote.ask([int(new), first, last, int(trouble)])
        if not any_new and largest in (-smallest, _NO_OPINION):
            return bool(any_trouble)
        self._channel.raise_together("taking the state apart", error)
        assert captured is not None  # raise_together has raised otherwise
        self._remember(self._settle(state, replace(captured, parts=parts)))
        return bool(any_trouble)

    def look(self, captured: Captured, *, full: bool) -> Look | None:
        """Digest what other ranks also hold, for `compare`; None on a single rank.

        Args:
            captured: The state, taken apart; the ranks have agreed on it.
            full: Whether to digest every byte.
        """
        if self._channel.world_size == 1:
            return None
        return self.comparer.look(captured, self._settled[self._held].agreement, full=full)

    def compare(self, state: AppState, look: Look | None) -> Judgement | None:
        """Collective: check whether the ranks hold the same, and plan for what differs.

        Args:
            state: The live objects.
            look: What `look` returned; None if it failed on this rank, and then nothing is compared.

        Returns:
            What was found; None if there is nothing new.

        Raises:
            TopologyError: Tensors of one name are different experts, and nothing says which rank has which.
        """
        if self._channel.world_size == 1:
            return None
        found = self.comparer.compare(look)
        if found is not None:
            assert look is not None  # otherwise nothing would have been compared
            self._plans = {}
            self.agree(state, look.captured)
        return found

    def _remember(self, found: Agreed) -> None:
        self._settled.pop(self._held, None)
        self._settled[self._held] = found
        kept = set(list(self._settled)[-_MAX_LAYOUTS:])
        self._settled = {held: agreed for held, agreed in self._settled.items() if held in kept}
        self._plans = {key: plan for key, plan in self._plans.items() if key[0] in kept - {self._held}}

    def make(
        self,
        state: AppState,
        captured: Captured,
        *,
        consolidated: bool,
        export_only: bool,
        from_shards: bool = False,
        made: Made | None = None,
    ) -> tuple[Content, Sources]:
        """What this rank contributes.

        Args:
            state: The live objects.
            captured: The same, taken apart; the ranks have agreed on it.
            consolidated: Whether models are written as Hugging Face directories.
            export_only: Whether only those directories are written.
            from_shards: Whether they are built from published shards instead of the live tensors.
            made: The save, for model cards; None if nothing will be written.
        """
        agreed = self._settled[self._held]
        merging = consolidated and (from_shards or self._merges(agreed.agreement))
        known = self.comparer.known
        parts = self._arrange(known.arranged(captured.parts), agreed, consolidated and not merging, export_only)
        key = (self._held, consolidated, export_only, from_shards)
        if key not in self._plans:
            self._plans[key] = self._make_plan(parts, agreed, consolidated, merging, export_only)
        planned = self._plans[key]
        leads = agreed.agreement.leads and not export_only
        models = [part for part in captured.parts if _is_model(part)]
        content = Content(
            planned.layouts,
            planned.plan,
            self._shared(captured) if leads else None,
            None if export_only else captured.own.packed(plain=known.plain_of(captured)),
            self._assets(state, agreed, consolidated, export_only, made) if self._channel.is_coordinator else {},
            {part: f"{part}/{names.CONSOLIDATED}" for part in models} if consolidated else {},
            planned.total_bytes,
            planned.merged,
            captured.omitted,
        )
        return content, _sources(parts, planned.plan)

    def _shared(self, captured: Captured) -> Packed:
        """What ranks holding the same tensors share, with the names of what each stores for itself."""
        own = self.comparer.known.own
        everything = [label_of(part, item.spec.name) for part, items in captured.parts.items() for item in items]
        tensors = [label for label in everything if label in own]
        # This includes labels that this rank does not hold.
        labels = sorted(own.difference(everything))
        drifted = sorted(self.comparer.known.drifted)
        return pack_json({**captured.shared, "per_rank": {"plain": labels, "tensors": tensors}, "drifted": drifted})

    def _settle(self, state: AppState, captured: Captured) -> Agreed:
        """Collective: agree on what all ranks hold, and how it is exported."""
        order = self._config.write.state_dict_keys
        agreement = agree(captured.parts, self._channel, self._stage, order, captured.adapted, captured.objects)
        models = self._models(state)
        specs = {part: agreement.specs[part] for part in models}
        namings = {}
        for part, found in specs.items():
            if self._config.write.is_peft:
                namings[part] = Naming.unchanged(found)  # the names are already right
            else:
                said = self._channel.coordinator_step(
                    "looking at the reference model", partial(self._export.wanted, models[part][0])
                )
                adapted = agreement.adapted.get(part)
                namings[part] = self._export.naming(models[part][0], found, Wanted(**said), adapted)
        kept = frozenset(part for part, naming in namings.items() if naming.is_plain or naming.keeps(specs[part]))
        exporters = {part: Exporter(naming) for part, naming in namings.items()}
        agreed = Agreed(agreement, namings, exporters, kept)
        # Something missing is found here, where the error reaches all ranks.
        self._channel.coordinator_step(
            "collecting the small files of exports", lambda: len(self._assets(state, agreed, False, False, None))
        )
        own, error = False, None
        try:
            own = all(is_of_rows(item) for items in self._everything(captured.parts, agreed) for item in items)
        except Exception as failure:
            error = CheckpointError(f"looking at the parts of tensors: {type(failure).__name__}: {failure}")
            error.__cause__ = failure
        return replace(agreed, of_rows=self._channel.conclude("comparing how tensors are split", error, own, all))

    def _everything(self, parts: Parts, agreed: Agreed) -> Iterator[Sequence[LocalTensor]]:
        """All tensors that may be written, in their own form and as exported."""
        for part, items in parts.items():
            yield items
            if _is_model(part) and not agreed.namings[part].is_plain:
                yield agreed.exporters[part](items)

    def _arrange(self, everything: Parts, agreed: Agreed, inline: bool, export_only: bool) -> Parts:
        """What is written, by the part its layout is for."""
        found: dict[str, Sequence[LocalTensor]] = {}
        for part, items in everything.items():
            if not _is_model(part):
                found.update({} if export_only else {part: items})
                continue
            own, export = _places(part, agreed, inline, export_only)
            if own is not None:
                found[own] = items
            if export is not None:
                found[export] = items if agreed.namings[part].is_plain else agreed.exporters[part](items)
        return found

    def _make_plan(self, parts: Parts, agreed: Agreed, consolidated: bool, merging: bool, export_only: bool) -> Planned:
        specs: dict[str, tuple[TensorSpec, ...]] = {}
        layouts: list[PartLayout] = []
        models = [part for part, found in agreed.agreement.specs.items() if _is_model(part) and found]
        for part, found in agreed.agreement.specs.items():
            if not found or (export_only and not _is_model(part)):
                continue
            if not _is_model(part):
                specs[part] = found
                layouts.append(self._state_layout(part, agreed.agreement))
                continue
            own, export = _places(part, agreed, consolidated and not merging, export_only)
            if own is not None:
                specs[own] = found
                distcp = self._config.write.format == "torch_save"
                layouts.append(distcp_layout(own) if distcp else shard_layout(own))
            if export is not None:
                specs[export] = agreed.namings[part].specs(found)
                layout = self._export_layout(part, agreed.namings[part])
                layouts.append(replace(layout, part=export, beside=export != part))
        agreement = replace(agreed.agreement, specs=specs)
        plan = make_plan(
            parts,
            agreement,
            layouts,
            self._channel.rank,
            self._channel.world_size,
            of_rows=agreed.of_rows,
            read_again=merging,
        )
        merged = tuple(self._merged(part, agreed) for part in models) if merging else ()
        written = sum(spec.nbytes for found in specs.values() for spec in found)
        written += sum(file.nbytes for item in merged for file in item.files)
        return Planned(tuple(layouts), plan, merged, written)

    def _merges(self, agreement: Agreement) -> bool:
        """Whether consolidated files are merged from shards by one rank."""
        write = self._config.write
        return not write.is_peft and (
            write.single_rank_consolidation or write.staging_dir is not None or not self._shares_files(agreement)
        )

    def _shares_files(self, agreement: Agreement) -> bool:
        """Whether ranks may write into one file together."""
        wanted = self._config.write.shared_writes
        return agreement.one_host or self._keeps_ranges if wanted is None else wanted

    def _merged(self, part: str, agreed: Agreed) -> Merged:
        naming = agreed.namings[part]
        specs = naming.specs(agreed.agreement.specs[part])
        layout = self._export_layout(part, naming)
        return Merged(part, tuple(lay_out_part(layout, replace(agreed.agreement, specs={part: specs}))), naming)

    def _export_layout(self, part: str, naming: Naming) -> PartLayout:
        if self._config.write.is_peft:
            return adapter_layout(part)
        layout = consolidated_layout(part, self._config.hub.diffusers_compatible)
        return replace(layout, grouped=naming.files or None)

    def _state_layout(self, part: str, agreement: Agreement) -> PartLayout:
        if part == names.OWN:
            return apart_layout(part)
        if self._config.write.format == "torch_save" and part != names.EXTRAS:
            return distcp_layout(part)
        nbytes = sum(spec.nbytes for spec in agreement.specs[part])
        shared = self._shares_files(agreement)
        if not shared:
            return own_layout(part)
        return state_layout(part, nbytes, self._channel.world_size, self.block_shards)

    def _assets(
        self, state: AppState, agreed: Agreed, consolidated: bool, export_only: bool, made: Made | None
    ) -> dict[str, bytes]:
        """Coordinator only: the small files by path in the checkpoint.

        The files of an export are included even without one, so that it can be made later.
        """
        found = {}
        if not export_only:
            found = {f"{names.CONFIG}/{name}": text.encode() for name, text in self._config.hydra_texts}
        for part, (model, adapter) in self._models(state).items():
            place = f"{part}/{names.CONSOLIDATED if consolidated else names.ASSETS}"
            naming = agreed.namings[part]
            assets = self._export.assets(model, naming, adapter, has_tokenizer=state.tokenizer is not None)
            assets.update(self._tokenizer(state.tokenizer))
            if made is not None:
                assets.update(self._export.card(model, made))
            found.update({f"{place}/{path}": data for path, data in assets.items()})
            if not export_only and not self._config.write.is_peft and not (consolidated and naming.is_plain):
                found[f"{part}/{names.NAMING}"] = agreed.naming_files[part]
        return found

    def check(self, state: AppState) -> None:
        """Coordinator only: check that exports can be made as configured, long before one is due.

        Raises:
            CheckpointError: Something they need is missing.
        """
        agreed, directory = self._settled[self._held], self._config.write.staging_dir
        for part, (model, adapter) in self._models(state).items():
            self._export.assets(model, agreed.namings[part], adapter, has_tokenizer=state.tokenizer is not None)
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=directory):
                    pass
            except OSError as error:
                raise CheckpointConfigError(
                    f"checkpoint.staging_dir={directory} cannot be written to: {error.strerror}. Name a local directory"
                ) from None

    def _models(self, state: AppState) -> dict[str, tuple[nn.Module, str]]:
        """Part to its model, and to the name of its adapter if it holds only that (otherwise empty)."""
        found = {}
        for name, modules in state.models.items():
            keys = adapters(name, modules[0]) if self._config.write.is_peft else {name: ""}
            found.update({part_of(key): (modules[0], adapter) for key, adapter in keys.items()})
        return found

    def _tokenizer(self, tokenizer: object) -> dict[str, bytes]:
        """A tokenizer's files; cached, because saving a large tokenizer is slow."""
        if self._tokenizer_files[0] is not tokenizer:
            self._tokenizer_files = (tokenizer, tokenizer_assets(tokenizer))
        return self._tokenizer_files[1]


def model_sources(sources: Sources, plan: WritePlan) -> Sources:
    """The sources of the models' own files only."""
    wanted = {piece.share for piece in plan.pieces if plan.all_files[piece.file].path.startswith(f"{names.MODEL}/")}
    return Sources({position: sources.tensors[position] for position in wanted}, frozenset(), {})


def _is_model(part: str) -> bool:
    return part == names.MODEL or part.startswith(f"{names.MODEL}/")


def _places(part: str, agreed: Agreed, inline: bool, export_only: bool) -> tuple[str | None, str | None]:
    """The plan's parts for a model's own tensors and for its export; None if it is not written.

    Training resumes from an export that holds everything bit for bit; otherwise both are written.
    """
    if not inline:
        return (None if export_only else part), None
    if export_only or part in agreed.kept:
        return None, part
    return part, BESIDE + part


def _sources(parts: Parts, plan: WritePlan) -> Sources:
    tensors = tensors_of(parts)
    found, casts, late = {}, {}, []
    for position, share in plan.shares.items():
        item = tensors[position]
        sizes = item.place.box.sizes  # faster than querying the tensor
        whole = not sizes or (share.start == 0 and share.stop == sizes[0])
        found[position] = item.tensor if whole else item.tensor[share.start : share.stop]
        dtype = TORCH_DTYPE[share.spec.dtype]
        if dtype != item.tensor.dtype:
            casts[position] = dtype
        if item.late:
            late.append(position)
    return Sources(found, frozenset(late), casts, plan, partial(_label, parts))


def _label(parts: Parts, position: int) -> str:
    """The part and live name of the tensor at a position in `tensors_of`."""
    for part, items in parts.items():
        if position < len(items):
            place = items[position].place
            return f"{part.removeprefix(BESIDE)}: {place.origin or place.spec.name}"
        position -= len(items)
    raise IndexError(position)
