"""Which checkpoint a run resumes from: the requested one, or the best one that is intact."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.errors import (
    CheckpointConfigError,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    rebuild,
)
from hydra_ckpt.loading.continuing import Beginning
from hydra_ckpt.loading.load import Load
from hydra_ckpt.loading.notes import PARTS
from hydra_ckpt.loading.sources.foreign_source import ForeignSource, open_foreign
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.report import LoadReport
from hydra_ckpt.resolved import ReadOptions
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Extractor
from hydra_ckpt.state.ranks import Topology
from hydra_ckpt.storage.pickled import is_foreign
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.directory import Directory
from hydra_ckpt.store.readers import reading

log = logging.getLogger(__name__)

_ATTEMPTS = 5
_FRESH = {"none", "null", "no", "false", "off"}
_SELECTORS = {"auto", "latest", "best"}


class Restorer:
    """Chooses a checkpoint and loads it.

    Args:
        options: The configured options.
        directory: The checkpoint directory; used by the coordinator only.
        extractor: Knows the models' maps.
        channel: To the other ranks.
        topology: How they are arranged.
        patience_s: How long ranks look for a checkpoint that rank 0 has opened, in seconds.

    Attributes:
        passed_over: Damaged checkpoints that an automatic choice skipped: name to what is wrong. Equal on all ranks.
        continues: Whether the last choice was the run's own newest checkpoint, instead of what it once began from.
            Equal on all ranks.
        origin: What the run began from, as of the last choice; see `Beginning.choose`. Equal on all ranks.
    """

    def __init__(
        self,
        options: ReadOptions,
        directory: Directory,
        extractor: Extractor,
        channel: Channel,
        topology: Topology,
        patience_s: float,
    ) -> None:
        self._options = options
        self._directory = directory
        self._extractor = extractor
        self._channel = channel
        self._topology = topology
        self._patience_s = patience_s
        self._beginning = Beginning(directory, options.on_conflict)
        self.passed_over: dict[str, str] = {}
        self.continues = False
        self.origin: dict[str, str] | None = None

    def wanted_parts(self, parts: list[str] | None) -> tuple[str, ...]:
        """The parts to load: the argument if given, otherwise the configured ones, otherwise all.

        Raises:
            CheckpointConfigError: A part does not exist.
        """
        wanted = tuple(parts) if parts is not None else self._options.parts or PARTS
        unknown = sorted(set(wanted) - set(PARTS))
        if unknown:
            raise CheckpointConfigError(f"restore_parts: unknown {', '.join(unknown)}; choose from {', '.join(PARTS)}")
        return wanted

    def selector(self, restore_from: str | os.PathLike[str] | None) -> str | None:
        """What to resume from: the argument if given, otherwise the configured one; None for a fresh start."""
        given = self._options.restore_from if restore_from is None else os.fspath(restore_from)
        if restore_from is not None and not str(given).strip():
            raise CheckpointConfigError("restore_from='': name a checkpoint, or auto, latest, best, none")
        word = (given or "none").strip().lower()
        if word in _FRESH:
            return None
        return word if word in _SELECTORS else os.path.expanduser(str(given))  # noqa: PTH111 - an unknown user may stay

    def restore(
        self,
        state: AppState,
        selector: str | None,
        parts: tuple[str, ...],
        begin_at: Callable[[int], None] = lambda _: None,
        *,
        may_continue: bool = False,
    ) -> LoadReport | None:
        """Collective: load the checkpoint that a selector means; `auto` skips damaged ones.

        Args:
            state: The objects to load into.
            selector: As `selector` returns it.
            parts: What to load; a run that continues loads everything.
            begin_at: Called with the step that training will continue from, before anything is loaded; may refuse it by
                raising.
            may_continue: Whether a run that has begun from this before continues from its own newest checkpoint.

        Returns:
            What was loaded, or None for a fresh start.

        Raises:
            CorruptCheckpointError: The requested checkpoint is damaged, or all are and live tensors were overwritten
                before that was detected.
        """
        overwritten: CorruptCheckpointError | None = None
        touched: frozenset[str] = frozenset()
        while True:
            with ExitStack() as lease:
                load = self._choose(state, selector, parts, lease, may_continue=may_continue)
                if load is None:
                    if overwritten is not None:
                        raise overwritten
                    begin_at(0)
                    if self._channel.is_coordinator and selector is not None:
                        log.info("nothing to resume from in %s: starting fresh", self._directory.root)
                    return None
                begin_at(load.source.checkpoint.step if "progress" in parts or self.continues else 0)
                try:
                    report = self._finish(load)
                except CorruptCheckpointError as error:
                    if load.touched:
                        touched |= load.touched
                        overwritten = _undefined(error)
                    if selector != "auto" and not self.continues:
                        raise overwritten or error from None
                    self._pass_over({load.source.checkpoint.name: str(error)})
                    continue
            if overwritten is not None and not touched <= set(report.loaded):
                raise overwritten  # only loading the same parts makes every tensor whole again
            return report

    def _choose(
        self, state: AppState, selector: str | None, parts: tuple[str, ...], lease: ExitStack, *, may_continue: bool
    ) -> Load | None:
        """Collective: choose a checkpoint and protect it from pruning until the lease ends; None if there is none."""
        for attempt in range(_ATTEMPTS):
            choice = self._channel.coordinator_step(
                f"looking for restore_from={selector}",
                lambda: self._beginning.choose(selector, self.passed_over, may_continue=may_continue),
            )
            self._pass_over(choice["passed_over"])
            self.continues, self.origin = choice["continues"], choice["origin"]
            if choice["path"] is None:
                return None
            try:
                return self._open(state, Path(choice["path"]), PARTS if self.continues else parts, lease)
            except CheckpointNotFoundError:
                # A run has pruned it since it was chosen, so there are newer ones.
                if attempt == _ATTEMPTS - 1:
                    raise
        return None

    def _pass_over(self, damaged: Mapping[str, str]) -> None:
        for name in sorted(set(damaged) - set(self.passed_over)) if self._channel.is_coordinator else ():
            log.warning("skipping the damaged checkpoint %s: %s", name, damaged[name])
        self.passed_over.update(damaged)

    def _open(self, state: AppState, path: Path, parts: tuple[str, ...], lease: ExitStack) -> Load:
        """Collective: open a checkpoint, protected from pruning until the lease ends.

        Rank 0, which chose it, opens it first; then it is known to exist, and the others keep looking for it.
        """
        opened: list[Checkpoint] = []

        def open_first() -> bool:
            foreign = is_foreign(path)
            opened.append(self._opened(path, lease, foreign=foreign, patience_s=0.0))
            return foreign

        foreign = bool(self._channel.coordinator_step(f"opening {path}", open_first))
        error: Exception | None = None
        try:
            if not opened:
                opened.append(self._opened(path, lease, foreign=foreign, patience_s=self._patience_s))
        except CheckpointError as known:
            error = known
        self._channel.raise_together(f"opening {path}", error)
        kind = ForeignSource if foreign else Source
        source = kind(opened[0], state, self._extractor, self._channel, self._topology, parts)
        return Load(source, self._channel, verify=self._options.verify, strict=self._options.strict)

    def _opened(self, path: Path, lease: ExitStack, *, foreign: bool, patience_s: float) -> Checkpoint:
        if foreign:
            return open_foreign(path, allow_pickle=self._options.allow_pickle)
        try:
            checkpoint = Checkpoint.open(path, patience_s=patience_s)
            lease.enter_context(reading(path))
        except CheckpointNotFoundError as unseen:
            if self._channel.is_coordinator:
                raise
            raise CheckpointNotFoundError(
                f"{unseen}; rank 0 has opened it. checkpoint.checkpoint_dir must be one directory shared by all hosts"
            ) from unseen
        except OSError as gone:
            raise CheckpointNotFoundError(f"{path} is gone, or cannot be read: {gone}") from gone
        return checkpoint

    def _finish(self, load: Load) -> LoadReport:
        report = load.run()
        self._extractor.localize.forget()  # what was replaced must not be kept alive
        for note in report.notes if self._channel.is_coordinator else ():
            log.warning("%s: %s", load.source.checkpoint.name, note)
        if self._channel.is_coordinator:
            claims = ("exact", "trusted", "rederived", "missing", "skipped")
            said = "; ".join(f"{claim}: {', '.join(found)}" for claim in claims if (found := getattr(report, claim)))
            log.info("loaded %s (step %d); %s", report.path, report.step, said)
        return replace(report, passed_over=dict(self.passed_over))


def _undefined(error: CorruptCheckpointError) -> CorruptCheckpointError:
    text = (
        f"{error}. Tensors were overwritten before this was detected: the state of model and optimizer is undefined. "
        "Load another checkpoint, or rebuild them, before training continues"
    )
    return rebuild(CorruptCheckpointError, text, vars(error))
