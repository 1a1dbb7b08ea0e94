"""What each rank contributes to a save: its plan, agreed once and kept, and the small files around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hydra_ckpt.distributed import Channel, Group
from hydra_ckpt.hub.assets import model_assets, tokenizer_assets
from hydra_ckpt.layout.plan import WritePlan
from hydra_ckpt.layout.replicas import Share
from hydra_ckpt.planning import (
    Agreement,
    PartLayout,
    Parts,
    adapter_layout,
    agree,
    consolidated_layout,
    distcp_layout,
    lay_out_part,
    make_plan,
    own_layout,
    shard_layout,
    signature,
    state_layout,
    tensors_of,
)
from hydra_ckpt.resolved import ResolvedConfig
from hydra_ckpt.saving import Content, Merged
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Captured, part_of
from hydra_ckpt.state.local import LocalTensor
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.store import names

# Layouts that are remembered: a run alternates between few, but an extra may grow with every save.
_MAX_LAYOUTS = 4
# Below every fingerprint's number.
_NO_OPINION = -(1 << 62)


@dataclass(frozen=True)
class Planned:
    """A plan and the choices it was made by."""

    agreement: Agreement
    layouts: tuple[PartLayout, ...]
    plan: WritePlan
    merged: tuple[Merged, ...]
    total_bytes: int


@dataclass(frozen=True)
class Sources:
    """The live tensors of a plan's shares.

    Attributes:
        tensors: Position of the share to exactly the rows it writes, live.
        late: Positions whose copying may wait for the next optimizer step.
    """

    tensors: Mapping[int, torch.Tensor]
    late: frozenset[int]


class Contents:
    """Makes the contents of saves for one Checkpointer.

    Args:
        config: The settings.
        group: The ranks.
        channel: To them.
        stage: The pipeline rank.
        keeps_ranges: Whether the file system keeps byte ranges written by different hosts apart.
    """

    def __init__(
        self, config: ResolvedConfig, group: Group, channel: Channel, stage: int, *, keeps_ranges: bool
    ) -> None:
        self._config = config
        self._group = group
        self._channel = channel
        self._stage = stage
        self._keeps_ranges = keeps_ranges
        self._agreements: dict[str, Agreement] = {}
        self._plans: dict[tuple[str, bool, bool, bool], Planned] = {}
        self._held = ""
        self._tokenizer_files: tuple[object, dict[str, bytes]] = (None, {})

    def agree(self, captured: Captured | None, error: Exception | None = None) -> None:
        """Collective: see that the ranks still hold what they agreed on; if not, agree anew.

        In the steady state this is a reduction of three numbers. A rank must not find out alone that its layout is a
        new one: the others would go on to write, and it would wait for them.

        Args:
            captured: The state, taken apart.
            error: Why it could not be; then `captured` is None.

        Raises:
            TopologyError: The ranks do not fit together. Nothing was written.
            CheckpointError: Ranks have to agree anew, and one of them could not take its state apart.
        """
        self._held = signature(captured.parts) if captured is not None else ""
        known = self._agreements.get(self._held)
        opinion = int(known.fingerprint[:15], 16) if known is not None else None
        first, last = (_NO_OPINION, _NO_OPINION) if opinion is None else (opinion, -opinion)
        new = known is None and (captured is not None or not self._agreements)
        any_new, largest, smallest = self._group.largest("comparing layouts", [int(new), first, last])
        if not any_new and largest in (-smallest, _NO_OPINION):
            return
        self._channel.raise_together("taking the state apart", error)
        assert captured is not None  # raise_together has raised otherwise
        found = agree(captured.parts, self._channel, self._stage, self._config.write.state_dict_keys)
        self._remember(found)

    def _remember(self, agreement: Agreement) -> None:
        self._agreements.pop(self._held, None)
        self._agreements[self._held] = agreement
        kept = set(list(self._agreements)[-_MAX_LAYOUTS:])
        self._agreements = {held: found for held, found in self._agreements.items() if held in kept}
        self._plans = {key: found for key, found in self._plans.items() if key[0] in kept - {self._held}}

    def make(
        self, state: AppState, captured: Captured, *, consolidated: bool, export_only: bool, from_shards: bool = False
    ) -> tuple[Content, Sources]:
        """What this rank contributes.

        Args:
            state: The live objects.
            captured: The same, taken apart; the ranks have agreed on it.
            consolidated: Whether models are written as Hugging Face directories.
            export_only: Whether only those are written.
            from_shards: Whether those are made of published shards instead of the live tensors.
        """
        parts = {part: items for part, items in captured.parts.items() if not export_only or _is_model(part)}
        planned = self._plan(parts, consolidated, export_only, from_shards)
        leads = planned.agreement.leads and not export_only
        content = Content(
            planned.layouts,
            planned.plan,
            captured.shared if leads else None,
            None if export_only else captured.own,
            self._assets(state, consolidated, export_only) if self._channel.is_coordinator else {},
            {part: f"{part}/{names.CONSOLIDATED}" for part in parts if _is_model(part)} if consolidated else {},
            planned.total_bytes,
            planned.merged,
        )
        return content, _sources(tensors_of(parts), planned.plan.shares)

    def _plan(self, parts: Parts, consolidated: bool, export_only: bool, from_shards: bool) -> Planned:
        """The plan for some parts of the state last agreed on."""
        key = (self._held, consolidated, export_only, from_shards)
        if key not in self._plans:
            agreement = self._agreements[self._held]
            self._plans[key] = self._make_plan(parts, agreement, consolidated, export_only, from_shards)
        return self._plans[key]

    def _make_plan(
        self, parts: Parts, agreement: Agreement, consolidated: bool, export_only: bool, from_shards: bool
    ) -> Planned:
        specs = {part: agreement.specs[part] for part in agreement.specs if agreement.specs[part]}
        merging = consolidated and (from_shards or self._merges(agreement))
        models = [part for part in specs if _is_model(part)]
        if export_only:
            # Where shards are merged, those of the published checkpoint serve: nothing is written by the ranks.
            specs = {part: specs[part] for part in models if not merging}
        layouts = tuple(self._layout(part, agreement, consolidated and not merging) for part in specs)
        plan = make_plan(parts, agreement, layouts, self._channel.rank, self._channel.world_size)
        merged = tuple(self._merged(part, agreement) for part in models) if merging else ()
        written = sum(spec.nbytes for layout in layouts for spec in agreement.specs[layout.part])
        written += sum(file.nbytes for item in merged for file in item.files)
        return Planned(agreement, layouts, plan, merged, written)

    def _merges(self, agreement: Agreement) -> bool:
        """Whether consolidated files are merged from shards by one rank."""
        write = self._config.write
        return not write.is_peft and (
            write.single_rank_consolidation or write.staging_dir is not None or not self._shares_files(agreement)
        )

    def _shares_files(self, agreement: Agreement) -> bool:
        """Whether ranks may fill one file together."""
        wanted = self._config.write.shared_writes
        return agreement.one_host or self._keeps_ranges if wanted is None else wanted

    def _merged(self, part: str, agreement: Agreement) -> Merged:
        layout = consolidated_layout(part, self._config.hub.diffusers_compatible)
        return Merged(part, tuple(lay_out_part(layout, agreement)))

    def _layout(self, part: str, agreement: Agreement, consolidated: bool) -> PartLayout:
        if self._config.write.format == "torch_save" and part != names.EXTRAS:
            return distcp_layout(part)
        shared = self._shares_files(agreement)
        if not _is_model(part):
            nbytes = sum(spec.nbytes for spec in agreement.specs[part])
            return state_layout(part, nbytes, self._channel.world_size) if shared else own_layout(part)
        if self._config.write.is_peft:
            return adapter_layout(part)
        if consolidated:
            return consolidated_layout(part, self._config.hub.diffusers_compatible)
        return shard_layout(part)

    def _assets(self, state: AppState, consolidated: bool, export_only: bool) -> dict[str, bytes]:
        """Coordinator only: the small files by path in the checkpoint."""
        found = {}
        if not export_only:
            found = {f"{names.CONFIG}/{name}": text.encode() for name, text in self._config.hydra_texts}
        for name, modules in state.models.items() if consolidated else ():
            place = f"{part_of(name)}/{names.CONSOLIDATED}"
            assets = {**model_assets(modules[0]), **self._tokenizer(state.tokenizer)}
            found.update({f"{place}/{path}": data for path, data in assets.items()})
        return found

    def _tokenizer(self, tokenizer: object) -> dict[str, bytes]:
        """A tokenizer's files; saving a large one takes long, so only once."""
        if self._tokenizer_files[0] is not tokenizer:
            self._tokenizer_files = (tokenizer, tokenizer_assets(tokenizer))
        return self._tokenizer_files[1]


def model_sources(sources: Sources, plan: WritePlan) -> Sources:
    """Those of the models' own files only."""
    wanted = {piece.share for piece in plan.pieces if plan.all_files[piece.file].path.startswith(f"{names.MODEL}/")}
    return Sources({position: sources.tensors[position] for position in wanted}, frozenset())


def _is_model(part: str) -> bool:
    return part == names.MODEL or part.startswith(f"{names.MODEL}/")


def _sources(tensors: list[LocalTensor], shares: Mapping[int, Share]) -> Sources:
    found, late = {}, set()
    for position, share in shares.items():
        item = tensors[position]
        whole = not item.tensor.dim() or (share.start, share.stop) == (0, item.tensor.shape[0])
        rows = item.tensor if whole else item.tensor[share.start : share.stop]
        dtype = TORCH_DTYPE[share.spec.dtype]
        # An adapter may want another element type in the files; that makes a copy, now.
        found[position] = rows if rows.dtype == dtype else rows.to(dtype)
        if item.late and rows.dtype == dtype:
            late.add(position)
    return Sources(found, frozenset(late))
