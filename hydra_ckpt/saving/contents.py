"""What each rank contributes to a save: its plan, agreed once and cached, and the small files around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hydra_ckpt.config import SaveConsolidatedMode
from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.distributed.group import Group
from hydra_ckpt.distributed.vote import Vote
from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.hub.card import SaveInfo
from hydra_ckpt.hub.model_export import ModelExport, ReferenceHints
from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.resolved import ResolvedConfig
from hydra_ckpt.saving.agreement import Parts, agree
from hydra_ckpt.saving.companion_files import SmallFiles
from hydra_ckpt.saving.comparing import Comparer, Look
from hydra_ckpt.saving.drift import Judgement
from hydra_ckpt.saving.live_shares import Sources, sources_of
from hydra_ckpt.saving.outputs import Agreed, Outputs, Planned
from hydra_ckpt.saving.save import Content
from hydra_ckpt.saving.watching import label_of
from hydra_ckpt.saving.write_planning import (
    is_row_contiguous,
    signature,
)
from hydra_ckpt.state.capture import Captured
from hydra_ckpt.state.local import Exporter, LocalTensor
from hydra_ckpt.state.packing import Packed, pack_json
from hydra_ckpt.store import names
from hydra_ckpt.store.parts import is_of_models

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Number of layouts cached: a run alternates between few, but an extra may grow with every save.
_MAX_LAYOUTS = 4
# Below every fingerprint's number.
_NO_OPINION = -(1 << 62)


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
        outputs: Plans the files.
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
        self.outputs = Outputs(
            config.write, channel, diffusers_compatible=config.hub.diffusers_compatible, keeps_ranges=keeps_ranges
        )
        self._export = ModelExport(config.hub, required=config.write.consolidated is not SaveConsolidatedMode.FALSE)
        self._settled: dict[str, Agreed] = {}
        self._plans: dict[tuple[str, bool, bool, bool], Planned] = {}
        self._held = ""
        self._small_files = SmallFiles(config, self._export)

    def agree(self, captured: Captured | None, error: Exception | None = None, *, trouble: bool = False) -> bool:
        """Collective: check that the ranks still hold what they agreed on; if not, agree again.

        In the steady state this is a reduction of four numbers. A rank must not act alone on a new layout: the others
        would start to write while it waits for them.

        Args:
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
        self._remember(self._settle(replace(captured, parts=parts)))
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

    def compare(self, look: Look | None) -> Judgement | None:
        """Collective: check whether the ranks hold the same, and plan for what differs.

        Args:
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
            self.agree(look.captured)
        return found

    def _remember(self, found: Agreed) -> None:
        self._settled.pop(self._held, None)
        self._settled[self._held] = found
        kept = set(list(self._settled)[-_MAX_LAYOUTS:])
        self._settled = {held: agreed for held, agreed in self._settled.items() if held in kept}
        self._plans = {key: plan for key, plan in self._plans.items() if key[0] in kept - {self._held}}

    def make(
        self,
        captured: Captured,
        *,
        consolidated: bool,
        export_only: bool,
        from_shards: bool = False,
        made: SaveInfo | None = None,
    ) -> tuple[Content, Sources]:
        """What this rank contributes.

        Args:
            captured: The state, taken apart; the ranks have agreed on it.
            consolidated: Whether models are written as Hugging Face directories.
            export_only: Whether only those directories are written.
            from_shards: Whether they are built from published shards instead of the live tensors.
            made: The save, for model cards; None if nothing will be written.
        """
        agreed = self._settled[self._held]
        merging = consolidated and (from_shards or self.outputs.merges(agreed.agreement))
        known = self.comparer.known
        parts = self.outputs.arrange(known.arranged(captured.parts), agreed, consolidated and not merging, export_only)
        key = (self._held, consolidated, export_only, from_shards)
        if key not in self._plans:
            self._plans[key] = self.outputs.plan(parts, agreed, consolidated, merging, export_only)
        planned = self._plans[key]
        leads = agreed.agreement.leads and not export_only
        models = [part for part in captured.parts if is_of_models(part)]
        small_files = {}
        if self._channel.is_coordinator:
            small_files = self._small_files.collect(captured, agreed, consolidated, export_only, made)
        content = Content(
            planned.layouts,
            planned.plan,
            self._shared(captured) if leads else None,
            None if export_only else captured.own.packed(plain=known.plain_of(captured)),
            small_files,
            {part: f"{part}/{names.CONSOLIDATED}" for part in models} if consolidated else {},
            planned.total_bytes,
            planned.merged,
            captured.omitted,
        )
        return content, sources_of(parts, planned.plan)

    def check(self, captured: Captured) -> None:
        """Coordinator only: check that exports can be made as configured, long before one is due.

        Raises:
            CheckpointError: Something they need is missing.
        """
        self._small_files.check(captured, self._settled[self._held])

    def _shared(self, captured: Captured) -> Packed:
        """What ranks holding the same tensors share, with the names of what each stores for itself."""
        own = self.comparer.known.own
        everything = [label_of(part, item.spec.name) for part, items in captured.parts.items() for item in items]
        tensors = [label for label in everything if label in own]
        # This includes labels that this rank does not hold.
        labels = sorted(own.difference(everything))
        drifted = sorted(self.comparer.known.drifted)
        return pack_json({**captured.shared, "per_rank": {"plain": labels, "tensors": tensors}, "drifted": drifted})

    def _settle(self, captured: Captured) -> Agreed:
        """Collective: agree on what all ranks hold, and how it is exported."""
        order = self._config.write.state_dict_keys
        agreement = agree(captured.parts, self._channel, self._stage, order, captured.adapted, captured.objects)
        models = captured.models
        specs = {part: agreement.specs[part] for part in models}
        namings = {}
        for part, found in specs.items():
            if self._config.write.is_peft:
                namings[part] = TensorMapping.unchanged(found)  # the names are already right
            else:
                said = self._channel.coordinator_step(
                    "looking at the reference model", partial(self._export.wanted, models[part][0])
                )
                adapted = agreement.adapted.get(part)
                namings[part] = self._export.naming(models[part][0], found, ReferenceHints(**said), adapted)
        kept = frozenset(part for part, naming in namings.items() if naming.is_plain or naming.keeps(specs[part]))
        exporters = {part: Exporter(naming) for part, naming in namings.items()}
        agreed = Agreed(agreement, namings, exporters, kept)
        # Something missing is found here, where the error reaches all ranks.
        self._channel.coordinator_step(
            "collecting the small files of exports",
            lambda: len(self._small_files.collect(captured, agreed, False, False, None)),
        )
        own, error = False, None
        try:
            own = all(is_row_contiguous(item) for items in self._everything(captured.parts, agreed) for item in items)
        except Exception as failure:
            error = CheckpointError(f"looking at the parts of tensors: {type(failure).__name__}: {failure}")
            error.__cause__ = failure
        return replace(
            agreed, row_contiguous=self._channel.conclude("comparing how tensors are split", error, own, all)
        )

    def _everything(self, parts: Parts, agreed: Agreed) -> Iterator[Sequence[LocalTensor]]:
        """All tensors that may be written, in their own form and as exported."""
        for part, items in parts.items():
            yield items
            if is_of_models(part) and not agreed.namings[part].is_plain:
                yield agreed.exporters[part](items)
