"""What a save writes for each part, and the plan of its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.layout.blocks import BLOCK_SHARDS
from hydra_ckpt.layout.plan import WritePlan
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.resolved import WriteOptions
from hydra_ckpt.saving.agreement import Agreement, Parts
from hydra_ckpt.saving.save import Merged
from hydra_ckpt.saving.write_planning import (
    BESIDE,
    PartLayout,
    adapter_layout,
    apart_layout,
    consolidated_layout,
    distcp_layout,
    lay_out_part,
    make_plan,
    own_layout,
    shard_layout,
    state_layout,
)
from hydra_ckpt.state.local import Exporter, LocalTensor
from hydra_ckpt.storage.naming import encode_naming
from hydra_ckpt.store import names
from hydra_ckpt.store.parts import is_of_models


@dataclass(frozen=True)
class Agreed:
    """What the ranks agreed on for a state, and what follows for exports.

    Attributes:
        agreement: The agreement.
        namings: Model part to how its export names and stores the tensors.
        exporters: Model part to what applies its naming.
        kept: Parts whose export holds every tensor bit for bit, so training can resume from it.
        row_contiguous: Whether all ranks hold whole rows of every tensor, and so fill files without a memory map.
    """

    agreement: Agreement
    namings: Mapping[str, TensorMapping]
    exporters: Mapping[str, Exporter]
    kept: frozenset[str]
    row_contiguous: bool = False

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


class Outputs:
    """Plans what is written for models, optimizers and the state around them, and into which files.

    Args:
        write: The settings.
        diffusers_compatible: Whether exported files are named as diffusers names them.
        channel: To the other ranks; not used to communicate.
        keeps_ranges: Whether different hosts can safely write byte ranges of one file on this file system.

    Attributes:
        block_shards: How many neighbouring ranks share a file of state outside models, if there are more of them.
    """

    def __init__(
        self, write: WriteOptions, channel: Channel, *, diffusers_compatible: bool, keeps_ranges: bool
    ) -> None:
        self._write, self._channel = write, channel
        self._diffusers_compatible, self._keeps_ranges = diffusers_compatible, keeps_ranges
        self.block_shards = BLOCK_SHARDS

    def arrange(self, everything: Parts, agreed: Agreed, inline: bool, export_only: bool) -> Parts:
        """What is written, by the part its layout is for."""
        found: dict[str, Sequence[LocalTensor]] = {}
        for part, items in everything.items():
            if not is_of_models(part):
                found.update({} if export_only else {part: items})
                continue
            own, export = _places(part, agreed, inline, export_only)
            if own is not None:
                found[own] = items
            if export is not None:
                found[export] = items if agreed.namings[part].is_plain else agreed.exporters[part](items)
        return found

    def plan(self, parts: Parts, agreed: Agreed, consolidated: bool, merging: bool, export_only: bool) -> Planned:
        """Lay out all files, and plan what this rank writes into them.

        Args:
            parts: What `arrange` returned.
            agreed: What the ranks agreed on.
            consolidated: Whether models are written as Hugging Face directories.
            merging: Whether one rank merges these from shards.
            export_only: Whether only those directories are written.
        """
        specs: dict[str, tuple[TensorSpec, ...]] = {}
        layouts: list[PartLayout] = []
        models = [part for part, found in agreed.agreement.specs.items() if is_of_models(part) and found]
        for part, found in agreed.agreement.specs.items():
            if not found or (export_only and not is_of_models(part)):
                continue
            if not is_of_models(part):
                specs[part] = found
                layouts.append(self._state_layout(part, agreed.agreement))
                continue
            own, export = _places(part, agreed, consolidated and not merging, export_only)
            if own is not None:
                specs[own] = found
                distcp = self._write.format == "torch_save"
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
            row_contiguous=agreed.row_contiguous,
            read_again=merging,
        )
        merged = tuple(self._merged(part, agreed) for part in models) if merging else ()
        written = sum(spec.nbytes for found in specs.values() for spec in found)
        written += sum(file.nbytes for item in merged for file in item.files)
        return Planned(tuple(layouts), plan, merged, written)

    def merges(self, agreement: Agreement) -> bool:
        """Whether consolidated files are merged from shards by one rank."""
        write = self._write
        return not write.is_peft and (
            write.single_rank_consolidation or write.staging_dir is not None or not self._shares_files(agreement)
        )

    def _shares_files(self, agreement: Agreement) -> bool:
        """Whether ranks may write into one file together."""
        wanted = self._write.shared_writes
        return agreement.one_host or self._keeps_ranges if wanted is None else wanted

    def _merged(self, part: str, agreed: Agreed) -> Merged:
        naming = agreed.namings[part]
        specs = naming.specs(agreed.agreement.specs[part])
        layout = self._export_layout(part, naming)
        return Merged(part, tuple(lay_out_part(layout, replace(agreed.agreement, specs={part: specs}))), naming)

    def _export_layout(self, part: str, naming: TensorMapping) -> PartLayout:
        if self._write.is_peft:
            return adapter_layout(part)
        layout = consolidated_layout(part, self._diffusers_compatible)
        return replace(layout, grouped=naming.files or None)

    def _state_layout(self, part: str, agreement: Agreement) -> PartLayout:
        if part == names.OWN:
            return apart_layout(part)
        if self._write.format == "torch_save" and part != names.EXTRAS:
            return distcp_layout(part)
        nbytes = sum(spec.nbytes for spec in agreement.specs[part])
        shared = self._shares_files(agreement)
        if not shared:
            return own_layout(part)
        return state_layout(part, nbytes, self._channel.world_size, self.block_shards)


def _places(part: str, agreed: Agreed, inline: bool, export_only: bool) -> tuple[str | None, str | None]:
    """The plan's parts for a model's own tensors and for its export; None if it is not written.

    Training resumes from an export that holds everything bit for bit; otherwise both are written.
    """
    if not inline:
        return (None if export_only else part), None
    if export_only or part in agreed.kept:
        return None, part
    return part, BESIDE + part
