"""The position of a run in its directory: which step it continues from, and whether the way is clear for new ones."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.loading.changes import differing
from hydra_ckpt.loading.continuing import beginning_of
from hydra_ckpt.loading.restoring import Restorer
from hydra_ckpt.report import LoadReport
from hydra_ckpt.resolved import ResolvedConfig
from hydra_ckpt.state.app_state import AppState
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

    def restore(
        self, state: AppState, restore_from: str | os.PathLike[str] | None, parts: list[str] | None
    ) -> LoadReport | None:
        """Collective: load a checkpoint. Arguments and errors are those of `Checkpointer.load`."""
        restorer = self._restorer
        wanted, selector = restorer.wanted_parts(parts), restorer.selector(restore_from)
        # Loading only weights does not change the step of a run that has begun.
        moves = "progress" in wanted or (self._start_step is None and not self._is_settled)

        def begin_at(step: int) -> None:
            if moves:
                self._start_step = step
            # auto and latest find the run's own latest step; another run may be writing there meanwhile.
            is_own = restorer.continues or selector in ("auto", "latest")
            if not is_own and (selector is None or "progress" in wanted):
                self._refuse_later()

        may_continue = restore_from is None and not self._is_settled
        report = restorer.restore(state, selector, wanted, begin_at, may_continue=may_continue)
        if moves:
            resumes = report is not None and ("progress" in wanted or restorer.continues)
            self._resumed = report.path if report is not None and resumes else None
            self._origin, self._is_settled = restorer.origin, False  # a run that goes back must clear its way again
        return report

    def _refuse_later(self) -> None:
        """Collective: raise if there are later steps, and they must not be set aside.

        Raises:
            CheckpointExistsError: There are.
        """
        passed_over, on_conflict = self._restorer.passed_over, self._config.read.on_conflict
        self._channel.coordinator_step(
            "looking for later steps", lambda: self._directory.refuse_later(self._start_step, passed_over, on_conflict)
        )

    def settle(self) -> dict[str, Any] | None:
        """Collective, once: clear the way for new steps.

        Returns:
            What `Directory.settle` found; None if the way was clear.
        """
        if self._is_settled:
            return None
        found: dict[str, Any] = self._channel.coordinator_step("clearing the way for new steps", self._settle)
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
