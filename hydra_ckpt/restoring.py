"""Which checkpoint a run resumes from: what was asked for, or the best one that is whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra_ckpt.directory import Directory
from hydra_ckpt.distributed import Channel
from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, CorruptCheckpointError
from hydra_ckpt.foreign import ForeignLoad, is_foreign, open_foreign
from hydra_ckpt.loading import PARTS, Load
from hydra_ckpt.report import LoadReport
from hydra_ckpt.resolved import ReadOptions
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Extractor
from hydra_ckpt.store.catalog import Checkpoint

log = logging.getLogger(__name__)

_FRESH = {"none", "null", "no", "false", "off"}


class Restorer:
    """Chooses a checkpoint and loads it.

    Args:
        options: What is configured.
        directory: Where checkpoints lie; used by the coordinator only.
        extractor: Knows the models' maps.
        channel: To the other ranks.

    Attributes:
        passed_over: Damaged checkpoints that an automatic choice went past: name to what is wrong. Equal on all ranks.
    """

    def __init__(self, options: ReadOptions, directory: Directory, extractor: Extractor, channel: Channel) -> None:
        self._options = options
        self._directory = directory
        self._extractor = extractor
        self._channel = channel
        self.passed_over: dict[str, str] = {}

    def wanted_parts(self, parts: list[str] | None) -> tuple[str, ...]:
        """The parts to load: those given, else those configured, else all.

        Raises:
            CheckpointConfigError: There is no such part.
        """
        wanted = tuple(parts) if parts is not None else self._options.parts or PARTS
        unknown = sorted(set(wanted) - set(PARTS))
        if unknown:
            raise CheckpointConfigError(f"restore_parts: unknown {', '.join(unknown)}; choose from {', '.join(PARTS)}")
        return wanted

    def restore(self, state: AppState, restore_from: str | None, parts: tuple[str, ...]) -> LoadReport | None:
        """Collective: load the checkpoint that a selector means; `auto` goes past damaged ones.

        Args:
            state: The objects to load into.
            restore_from: The selector; None for the configured one.
            parts: What to load.

        Returns:
            What was loaded, or None for a fresh start.
        """
        selector = self._options.restore_from if restore_from is None else restore_from
        if selector is None or selector.strip().lower() in _FRESH:
            return None
        while True:
            choice = self._channel.coordinator_step(
                f"looking for restore_from={selector}", lambda: self._choose(selector)
            )
            self._pass_over(choice["passed_over"])
            if choice["path"] is None:
                return None
            path = Path(choice["path"])
            try:
                return self._load(state, path, parts)
            except CorruptCheckpointError as error:
                if selector != "auto":
                    raise
                self._pass_over({path.name: str(error)})

    def _choose(self, selector: str) -> dict[str, Any]:
        """Coordinator only: see `Directory.choose`; a path may also lead to a checkpoint of another tool."""
        for path in (self._directory.root / selector, Path.cwd() / selector):
            if is_foreign(path):
                return {"path": str(path.resolve()), "passed_over": {}}
        return self._directory.choose(selector, self.passed_over)

    def _pass_over(self, damaged: Mapping[str, str]) -> None:
        for name in sorted(set(damaged) - set(self.passed_over)):
            log.warning("the damaged checkpoint %s is passed over: %s", name, damaged[name])
        self.passed_over.update(damaged)

    def _load(self, state: AppState, path: Path, parts: tuple[str, ...]) -> LoadReport:
        error: Exception | None = None
        checkpoint = None
        foreign = is_foreign(path)
        try:
            allow_pickle = self._options.allow_pickle
            checkpoint = open_foreign(path, allow_pickle=allow_pickle) if foreign else Checkpoint.open(path)
        except CheckpointError as known:
            error = known
        self._channel.raise_together(f"opening {path}", error)
        assert checkpoint is not None  # raise_together has raised otherwise
        kind = ForeignLoad if foreign else Load
        load = kind(checkpoint, state, self._extractor, self._channel, parts, self._options.verify)
        report = load.run()
        for note in report.notes:
            log.warning("%s: %s", path.name, note)
        log.info("loaded %s (step %d): %s", path, report.step, ", ".join(report.loaded))
        return replace(report, passed_over=dict(self.passed_over))
