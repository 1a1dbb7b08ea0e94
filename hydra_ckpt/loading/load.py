"""One load: read the small files, plan, read and verify the rest, install. Nothing changes until all of it matches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.tensor import DTensor

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.errors import CheckpointError, KeyMismatchError
from hydra_ckpt.loading.installing import Installer, Notes
from hydra_ckpt.loading.load_plan import LoadPlan
from hydra_ckpt.loading.matching import plan_load
from hydra_ckpt.loading.source import Source
from hydra_ckpt.report import LoadReport
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Extractor
from hydra_ckpt.state.optimizer import SEPARATOR
from hydra_ckpt.state.optimizer_loading import empty_states
from hydra_ckpt.state.ranks import Topology
from hydra_ckpt.storage.distcp import fetch_distcp
from hydra_ckpt.storage.ledger import Ledger, Span, join
from hydra_ckpt.storage.read import Fetch, fetch
from hydra_ckpt.storage.verify import checks, findings, share_out
from hydra_ckpt.store.catalog import Checkpoint

log = logging.getLogger(__name__)

PARTS = ("model", "optimizer", "lr_scheduler", "dataloader", "rng", "extras", "progress")


@dataclass
class Load:
    """Loads one checkpoint into an AppState.

    Args:
        checkpoint: The checkpoint to load.
        state: The live objects to load into.
        extractor: Provides the models' maps.
        channel: To the other ranks.
        topology: How they are arranged.
        parts: Which parts are wanted.
        verify: Whether every byte is checked against its digest.
        strict: Whether a mismatch is an error; if not, the object stays as it was built.
        kind: The class that reads this kind of checkpoint.

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
    kind: type[Source] = Source
    touched: frozenset[str] = frozenset()
    _notes: Notes = field(default_factory=Notes)
    _ledger: Ledger | None = None

    def run(self) -> LoadReport:
        """Collective: load.

        Raises:
            CorruptCheckpointError: Bytes are not what was written; raised on all ranks. The tensors of the parts in
                `touched` may have been overwritten by then.
            KeyMismatchError: Names, shapes or dtypes differ; nothing was changed.
        """
        source = self.kind(
            self.checkpoint, self.state, self.extractor, self.channel, self.topology, self.parts, self._notes
        )
        plan = self._plan(source)
        self.touched = frozenset(source.available() & {"model", "optimizer"})
        read_bytes = [0]

        def read() -> list[Span]:
            read_bytes[0], spans = self._read(source, plan)
            return spans

        self._verify_rest(self._together("reading the checkpoint", read, join))
        self._together("installing the checkpoint", lambda: self._install(source, plan))
        return self._report(source, plan, read_bytes[0])

    def _report(self, source: Source, plan: LoadPlan, read_bytes: int) -> LoadReport:
        # The step of a foreign directory is known only once it has been read.
        checkpoint, notes, available = source.checkpoint, self._notes, source.available()
        step, epoch = (checkpoint.step, checkpoint.epoch) if "progress" in self.parts else (0, 0)
        elsewhere = {*notes.trusted, *notes.rederived, *notes.missing, *notes.skipped}
        loaded = (part for part in PARTS if part in available and plan.takes_any(part, len(self.state.optimizers)))
        return LoadReport(
            step=step,
            epoch=epoch,
            path=checkpoint.path,
            metrics=checkpoint.metrics,
            loaded=tuple(loaded),
            exact=tuple(name for name in notes.exact if name not in elsewhere),
            trusted=tuple(notes.trusted),
            missing=tuple(dict.fromkeys(notes.missing)),
            skipped=(*(part for part in PARTS if part not in available and source.has(part)), *notes.skipped),
            rederived=tuple(notes.rederived),
            notes=tuple(notes.texts),
            read_bytes=read_bytes,
        )

    def _together(self, what: str, step: Callable[[], Any], decide: Callable[[list[Any]], Any] = lambda _: None) -> Any:
        """Collective: do a local step and raise everywhere if it fails anywhere; otherwise decide from its results."""
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

    def _plan(self, source: Source) -> LoadPlan:
        """Collective: find out what to read, and list everything that does not match."""
        plans: list[LoadPlan] = []

        def compare() -> dict[str, Any]:
            self.extractor.refresh(self.state)
            source.read()
            plans.append(plan_load(source, strict=self.strict))
            return vars(plans[0].mismatch)

        found = self._together("comparing the checkpoint with the live objects", compare, _merge_mismatches)
        if not self.strict:
            self._leave(found)
        elif any(found.values()):
            self._verify_headers()
            raise KeyMismatchError(
                f"{self.checkpoint.path} does not fit",
                missing=found["missing"],
                unexpected=found["unexpected"],
                mismatched=found["different"],
                remedy="Load it into the model and optimizer it was saved from, choose another checkpoint or fewer "
                "parts (restore_from, restore_parts), or load only what fits with checkpoint.load_strict=false.",
            )
        return plans[0]

    def _leave(self, found: Mapping[str, Any]) -> None:
        """Note what stays as it was built, and what is not used; equal on all ranks."""
        self._notes.missing += found["left"]
        self._notes.skipped += found["unexpected"]
        if found["left"]:
            self._notes.texts.append(f"left as built (checkpoint.load_strict=false): {', '.join(found['left'])}")
        if found["unexpected"]:
            self._notes.texts.append(f"not loaded: {', '.join(found['unexpected'])}")

    def _verify_headers(self) -> None:
        """Collective: check that the mismatch is not due to a damaged name: headers are compared with their digests."""

        def verify() -> None:
            manifest = self.checkpoint.manifest
            everything = checks(self.checkpoint.path, manifest.files, manifest.digests)
            headers = [check for check in everything if check.region.offset == 0]
            for error in findings(self.checkpoint.path, share_out(headers, self.channel.rank, self.channel.world_size)):
                raise error

        if self.verify:
            self._together("verifying the checkpoint's names", verify)

    def _read(self, source: Source, plan: LoadPlan) -> tuple[int, list[Span]]:
        """Read; returns the number of bytes read, and the digests compared while reading."""
        root, manifest = self.checkpoint.path, self.checkpoint.manifest
        if self.verify:
            self._ledger = Ledger(checks(root, manifest.files, manifest.digests))
        count = self._fetch(source, plan.fetches, self._ledger)
        return count, [] if self._ledger is None else self._ledger.done()

    def _fetch(self, source: Source, wanted: Sequence[Fetch], ledger: Ledger | None) -> int:
        """Read, in the order of the files; returns the number of bytes."""
        root = self.checkpoint.path
        ordered = sorted(wanted, key=lambda item: (item.stored.chunks[0].file, item.stored.chunks[0].offset))
        foreign = [item for item in ordered if item.stored.chunks[0].file.endswith(".distcp")]
        own = [item for item in ordered if not item.stored.chunks[0].file.endswith(".distcp")]
        return fetch(root, own, ledger) + fetch_distcp(root, foreign, source.lengths)

    def _verify_rest(self, done: Sequence[Sequence[int]]) -> None:
        """Collective: compare, once each, the digests that no rank compared while reading."""
        ledger = self._ledger
        if ledger is None:
            return

        def verify() -> None:
            rest = ledger.left((first, behind) for first, behind in done)
            for error in findings(self.checkpoint.path, share_out(rest, self.channel.rank, self.channel.world_size)):
                raise error

        self._together("verifying the checkpoint", verify)

    def _install(self, source: Source, plan: LoadPlan) -> None:
        installer = Installer(
            self.state,
            self.extractor,
            shared=source.shared,
            own=source.own,
            tensors=plan.tensors,
            same_ranks=source.same_ranks,
            other_stages=source.other_stages,
            schedulers=plan.schedulers,
            restored=plan.restored,
            read_again=lambda items: self._fetch(source, items, None),
            resized=plan.resized,
            like=lambda name: self._like(source, name),
            notes=self._notes,
        )
        available = source.available()
        if "model" in available:
            installer.models(plan.absent)
        if "optimizer" in available:
            assert plan.fit is not None  # made while comparing
            installer.optimizers(plan.fit, empty_states(source.shared["optimizer"]))
        installer.objects(available)
        if "rng" in self.parts:
            installer.rng(self.checkpoint, self.topology, self.channel.world_size)
        if "progress" in self.parts:
            self._notes.exact.append("progress")
        installer.note_new(self.parts, available, plan.absent, plan.mismatch.left)

    def _like(self, source: Source, name: str) -> DTensor:
        """The parameter whose mesh and placements a shard of a tensor subclass had."""
        parameter = source.shared["optimizer"].get("meshes", {}).get(name, name.split(SEPARATOR, maxsplit=1)[0])
        known = self.extractor.parameter_names(self.state)
        for modules in self.state.models.values():
            for item in (item for module in modules for item in module.parameters()):
                if known.get(id(item)) == parameter and isinstance(item, DTensor):
                    return item
        raise CheckpointError(f"{name}: a shard of a tensor subclass that belongs to no sharded parameter here")


def _merge_mismatches(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Coordinator only: missing is what any rank misses; unexpected is what no rank holds."""
    unexpected = set(found[0]["unexpected"]).intersection(*(item["unexpected"] for item in found[1:]))
    missing = {name for item in found for name in item["missing"]}
    different = {name: text for item in found for name, text in item["different"].items()}
    left = {name for item in found for name in item["left"]}
    return {"missing": sorted(missing), "unexpected": sorted(unexpected), "different": different, "left": sorted(left)}
