"""Who may write a job's record: the process that runs the job, and no other one that was started in its directory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace

from hydra_ckpt.files import locked
from hydra_ckpt.jobs.run import HydraRun
from hydra_ckpt.sweeps.active import ActiveJob
from hydra_ckpt.sweeps.record import RUNNING, JobRecord, read_record
from hydra_ckpt.sweeps.summary import state_of, write_summary

__all__ = ["RecordKeeper"]

log = logging.getLogger(__name__)


class RecordKeeper:
    """Writes the record of the job that this process runs. Only the first rank writes.

    A job may be started in the directory of one that still runs. Which of them continues is decided when they take the
    lease of the checkpoints: until then the record of a live job is left alone, and the one who has taken the lease
    writes its own.

    Args:
        run: The job.
        record: Its record at the start.
    """

    def __init__(self, run: HydraRun, record: JobRecord) -> None:
        self._run = run
        self._record = record
        self._replaces: str | None = None  # the incarnation that wrote the record which this job may replace

    def begin(self) -> None:
        """The job has begun."""
        self._write(self._record, self._may_begin)

    def hold(self) -> None:
        """The job has become the only writer of its checkpoints."""
        self._write(self._record, lambda found: not self._is_mine(found))

    def end(self, record: JobRecord, active: ActiveJob) -> None:
        """The job has ended."""
        self._write(self._with_checkpoints(record, active), self._may_end)

    def _is_mine(self, found: JobRecord | None) -> bool:
        return found is not None and found.incarnation == self._record.incarnation

    def _may_begin(self, found: JobRecord | None) -> bool:
        if found is not None and state_of(found, self._run.output_dir) == RUNNING:
            log.info("%s: the record is that of a job that still runs there; it stays", self._run.output_dir)
            return False
        self._replaces = None if found is None else found.incarnation
        return True

    def _may_end(self, found: JobRecord | None) -> bool:
        """Whether no other job has taken the directory and lives, or has ended there since."""
        if found is None or self._is_mine(found) or found.incarnation == self._replaces:
            return True
        return found.state == RUNNING and state_of(found, self._run.output_dir) != RUNNING

    def _write(self, record: JobRecord, may: Callable[[JobRecord | None], bool]) -> None:
        """A job runs even if its record cannot be written."""
        if os.environ.get("RANK", "0") != "0":
            return
        run = self._run
        try:
            with locked(run.output_dir):
                if may(read_record(run.output_dir)):
                    record.write(run.output_dir)
            if run.sweep_dir is not None:
                write_summary(run.sweep_dir, run.output_dir)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the record, the job is worth more
            log.warning("the job's state could not be recorded: %s", error)

    def _with_checkpoints(self, record: JobRecord, active: ActiveJob) -> JobRecord:
        place = active.checkpoint_dir
        record = replace(record, best_so_far=None if active.best is None else active.best.as_data())
        if place is None:
            return record
        inside = place.is_relative_to(self._run.output_dir)
        return record.at(str(place.relative_to(self._run.output_dir) if inside else place))
