"""The position of a run in its directory: which step it continues from, and whether the way is clear for new ones."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.loading.changes import differing
from hydra_ckpt.loading.continuing import beginning_of
from hydra_ckpt.loading.restoring import Restorer
from hydra_ckpt.resolved import ResolvedConfig
from hydra_ckpt.store.directory import Directory
from hydra_ckpt.sweeps.active import active_job

log = logging.getLogger(__name__)


class RunPosition:
    """The position of one run; equal on all ranks.

    Args:
        config: The settings.
        directory: The checkpoint directory; used by the coordinator only.
        channel: To the other ranks.
        restorer: Knows which damaged checkpoints it has passed over.
    """

    def __init__(self, config: ResolvedConfig, directory: Directory, channel: Channel, restorer: Restorer) -> None:
        self._config, self._directory, self._channel, self._restorer = config, directory, channel, restorer
        self._start_step: int | None = None
        self._resumed: Path | None = None
        self._origin: dict[str, str] | None = None
        self._is_open = self._is_settled = False

    def open(self) -> None:
        """Collective, once: become the directory's writer."""
        if not self._is_open:
            self._channel.coordinator_step("opening the checkpoint directory", self._open)
            self._is_open = True

    def _open(self) -> None:
        """Rank 0 only."""
        self._directory.open(self._start_step)
        job = active_job()
        if job is not None and job.on_hold is not None:
            job.on_hold()

    @property
    def is_settled(self) -> bool:
        """Whether the run has begun, and the way is clear for its steps."""
        return self._is_settled

    def is_moved_by(self, parts: Collection[str]) -> bool:
        """Whether loading these parts determines the run's step; loading only weights does not change it."""
        return "progress" in parts or (self._start_step is None and not self._is_settled)

    def begin_at(self, step: int) -> None:
        """Set the step that training will continue from."""
        self._start_step = step

    def refuse_later(self) -> None:
        """Collective: raise if there are later steps, and they must not be set aside.

        Raises:
            CheckpointExistsError: There are.
        """
        passed_over, on_conflict = self._restorer.passed_over, self._config.read.on_conflict
        self._channel.coordinator_step(
            "looking for later steps", lambda: self._directory.refuse_later(self._start_step, passed_over, on_conflict)
        )

    def resume(self, path: Path | None) -> None:
        """Set the checkpoint that the run continues from; a run that goes back must clear its way again."""
        self._resumed, self._origin = path, self._restorer.origin
        self._is_settled = False

    def settle(self) -> dict[str, Any] | None:
        """Collective, once: clear the way for new steps.

        Returns:
            What `Directory.settle` found; None if the way was clear.
        """
        if self._is_settled:
            return None
        found: dict[str, Any] = self._channel.coordinator_step(
            "clearing the way for new steps",
            self._settle,
        )
        self._is_settled = True
        return found

    def _settle(self) -> dict[str, Any]:
        """Rank 0 only."""
        self._directory.beginning = beginning_of(self._origin)
        return self._directory.settle(
            self._start_step,
            self._restorer.passed_over,
            self._config.read.on_conflict,
            self._resumed,
            is_another=self._is_another_job(),
        )

    def _is_another_job(self) -> bool:
        """Rank 0 only: whether this job of a sweep continues from a checkpoint of a job with other values.

        Under `resumable_job` that happens only with `on_change="run"`, which declares it to be the same job.
        """
        if self._resumed is None or self._config.where.owner is None or active_job() is not None:
            return False
        found = differing(self._resumed, dict(self._config.hydra_texts))
        if found:
            told = "; ".join(map(str, found))
            log.warning(
                "%s is from a sweep job with other values (%s): its metrics do not count here", self._resumed, told
            )
        return bool(found)
