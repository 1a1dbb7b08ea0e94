"""One load: read the small files, plan, read and verify the rest, install. Nothing changes until all of it matches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.errors import CheckpointError, KeyMismatchError
from hydra_ckpt.loading.installing.install import Installer
from hydra_ckpt.loading.notes import PARTS, Notes
from hydra_ckpt.loading.planning.load_plan import LoadPlan, Mismatch
from hydra_ckpt.loading.planning.match import plan_load
from hydra_ckpt.loading.reading import Reader
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.report import LoadReport
from hydra_ckpt.storage.ledger import join

log = logging.getLogger(__name__)
_OTHER_NAMES = (
    " If the model's own loading takes the older names, load an export of the checkpoint (hydra-ckpt export) into it "
    "once with its load_state_dict(), and save again: load_strict=false would leave these weights as they were built."
)


class Load:
    """Loads one checkpoint into an AppState.

    Args:
        source: The checkpoint, opened, with the live objects to load into and the parts that are wanted.
        channel: To the other ranks.
        verify: Whether every byte is checked against its digest.
        strict: Whether a mismatch is an error; if not, the object stays as it was built.

    Attributes:
        source: As given.
        touched: The parts whose live tensors may have been written to; equal on all ranks.
    """

    def __init__(self, source: Source, channel: Channel, *, verify: bool, strict: bool) -> None:
        self.source, self._channel, self._strict = source, channel, strict
        self._reader = Reader(source.checkpoint, channel, verify)
        self.touched: frozenset[str] = frozenset()

    def run(self) -> LoadReport:
        """Collective: load.

        Raises:
            CorruptCheckpointError: Bytes are not what was written; raised on all ranks. The tensors of the parts in
                `touched` may have been overwritten by then.
            KeyMismatchError: Names, shapes or dtypes differ; nothing was changed.
        """
        source, reader = self.source, self._reader
        plan = self._plan()
        self.touched = frozenset(source.available() & {"model", "optimizer"})
        compared = self._together("reading the checkpoint", lambda: reader.read(source, plan.fetches), join)
        self._together("verifying the checkpoint", lambda: reader.verify_rest(compared))
        installer = Installer(source, plan, partial(reader.read_again, source))

        def install() -> dict[str, Any]:
            installer.install()
            return vars(source.notes)

        source.notes = Notes(**self._together("installing the checkpoint", install, Notes.of_all_ranks))
        return _report(source, plan, reader.read_bytes)

    def _plan(self) -> LoadPlan:
        """Collective: find out what to read, and everything that does not match."""
        source, plans = self.source, list[LoadPlan]()

        def compare() -> dict[str, Any]:
            source.extractor.refresh(source.state)
            source.read()
            plans.append(plan_load(source, strict=self._strict))
            return vars(plans[0].mismatch)

        found = Mismatch(
            **self._together("comparing the checkpoint with the live objects", compare, Mismatch.of_all_ranks)
        )
        if not self._strict:
            source.notes.leave(found.left, list(found.unexpected.values()))
        elif found:
            self._together("verifying the checkpoint's names", self._reader.verify_headers)
            raise KeyMismatchError(
                f"{source.root} does not fit",
                missing=found.missing,
                unexpected=found.unexpected,
                mismatched=found.different,
                remedy="Load it into the model and optimizer it was saved from, choose another checkpoint or fewer "
                "parts (restore_from, restore_parts), or load only what fits with checkpoint.load_strict=false."
                + (_OTHER_NAMES if found.missing and found.unexpected else ""),
            )
        return plans[0]

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
            error = CheckpointError(f"{what} ({self.source.root}): {type(unknown).__name__}: {unknown}")
            error.__cause__ = unknown
        return self._channel.conclude(what, error, given, decide)


def _report(source: Source, plan: LoadPlan, read_bytes: int) -> LoadReport:
    # The step of a foreign directory is known only once it has been read.
    checkpoint, notes, available = source.checkpoint, source.notes, source.available()
    step, epoch = (checkpoint.step, checkpoint.epoch) if "progress" in source.parts else (0, 0)
    loaded = (part for part in PARTS if part in available and plan.takes_any(part, len(source.state.optimizers)))
    return LoadReport(
        step=step,
        epoch=epoch,
        path=checkpoint.path,
        metrics=checkpoint.metrics,
        loaded=tuple(loaded),
        exact=notes.only_exact(),
        trusted=tuple(notes.trusted),
        missing=tuple(dict.fromkeys(notes.missing)),
        skipped=(*(part for part in PARTS if part not in available and source.has(part)), *notes.skipped),
        rederived=tuple(notes.rederived),
        notes=tuple(notes.texts),
        read_bytes=read_bytes,
    )
