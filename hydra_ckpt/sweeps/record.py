"""The record of a Hydra job, in a file of its run directory."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.files import Files, write_atomically
from hydra_ckpt.store import names
from hydra_ckpt.store.owner import Owner
from hydra_ckpt.store.small_files import read_small_file
from hydra_ckpt.sweeps.objective import plain_objective, read_objective, written_objective

log = logging.getLogger(__name__)

RECORD = "hydra_ckpt_job.json"
_MAX_BYTES = 64 << 20

RUNNING, FINISHED, STOPPED, FAILED, INTERRUPTED = "running", "finished", "stopped", "failed", "interrupted"
WAITING = "waiting"


@dataclass(frozen=True)
class JobRecord:
    """One job.

    Attributes:
        state: running; finished; stopped (by a signal, a file or the time limit, to be continued); failed;
            interrupted (by Ctrl-C, or it died); waiting (it never began, because the sweep was stopped).
        overrides: Its command-line overrides.
        config: Its configuration as plain data, interpolations unresolved.
        owner: The process that last ran it.
        started: When it started, Unix time in seconds.
        ended: When it ended, Unix time in seconds; None while it runs, or if it died.
        objective: What its function returned, if that is plain data that can be recorded exactly.
        has_objective: Whether it returned anything that could be recorded.
        error: The error it failed with.
        requeue: Whether it was stopped by a signal or the time limit, rather than by a STOP file.
        checkpoint_dir: Where its checkpoints are, relative to the run directory if inside it; None if it has none.
        best_so_far: The best value of the metric that decides, as `metric`, `mode` and `value`. It may have been
            measured at a step that was not saved. None if there is none.
        series: Random text, equal in all starts of the job with this configuration (other settings about saving aside).
    """

    state: str
    overrides: tuple[str, ...] = ()
    config: Any = None
    owner: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0
    ended: float | None = None
    objective: Any = None
    has_objective: bool = False
    error: str | None = None
    requeue: bool = False
    checkpoint_dir: str | None = None
    best_so_far: dict[str, Any] | None = None
    series: str = ""

    @classmethod
    def begin(
        cls, overrides: tuple[str, ...], config: Any, directory: Path | None = None, series: str = ""
    ) -> JobRecord:
        """The record of a job that starts in this process, in a run directory."""
        return cls(RUNNING, overrides, config, asdict(Owner.here(root=directory)), time.time(), series=series)

    def end(self, state: str, **known: Any) -> JobRecord:
        """The record with the job ended."""
        return replace(self, state=state, ended=time.time(), **known)

    def returned(self, value: Any) -> JobRecord:
        """The record with the job finished and its result; without it if that cannot be recorded."""
        try:
            plain = plain_objective(value)
        except Exception as error:  # noqa: BLE001 - objects of other libraries, and what their conversions raise
            log.warning("the job's result, a %s, cannot be recorded: %s", type(value).__name__, error)
            return self.end(FINISHED)
        return self.end(FINISHED, objective=plain, has_objective=True)

    def at(self, checkpoint_dir: str) -> JobRecord:
        """The record with the directory of the job's checkpoints."""
        return replace(self, checkpoint_dir=checkpoint_dir)

    @property
    def incarnation(self) -> str:
        """The random text of the start that wrote it."""
        return str(self.owner.get("incarnation"))

    def state_now(self, directory: Path | None = None) -> str:
        """The current state; a job whose process ended while it was running is interrupted.

        Args:
            directory: The run directory that the record was read from. If it is a copy, the job runs elsewhere.
        """
        owner = Owner.from_data(self.owner)
        if self.state != RUNNING:
            return self.state
        lives = owner is not None and owner.lives() and not (directory and _is_copy(owner, directory))
        return RUNNING if lives else INTERRUPTED

    def write(self, directory: Path) -> None:
        """Write the record atomically.

        Raises:
            OSError: It cannot be written.
        """
        data = {**asdict(self), "objective": written_objective(self.objective)}
        write_atomically(Files(), directory / RECORD, (json.dumps(data) + "\n").encode(), names.nonce())


def _is_copy(owner: Owner, directory: Path) -> bool:
    """Whether the directory that a record was written for exists elsewhere; a guess, like the state itself."""
    try:
        return Path(owner.root).is_absolute() and not Path(owner.root).samefile(directory)
    except (OSError, ValueError):  # it was moved; a NUL in the path is a ValueError
        return False


_FIELDS = frozenset(item.name for item in fields(JobRecord))


def read_record(directory: Path) -> JobRecord | None:
    """The record of a run directory; None if it is missing or unreadable."""
    path = directory / RECORD
    try:
        data = json.loads(read_small_file(path, _MAX_BYTES))
        known = {key: value for key, value in data.items() if key in _FIELDS}  # a later version may have more
        known |= {"overrides": tuple(map(str, data["overrides"])), "objective": read_objective(data["objective"])}
        record = JobRecord(**known)
        if Owner.from_data(record.owner) is None:
            return None
    except (
        OSError,
        CorruptCheckpointError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        MemoryError,
    ):
        return None
    return record if _is_sound(record) else None


def _is_sound(record: JobRecord) -> bool:
    """Whether the fields have the types that readers expect."""
    texts = (record.error, record.checkpoint_dir, record.series)
    return (
        record.state in (RUNNING, FINISHED, STOPPED, FAILED, INTERRUPTED, WAITING)
        and all(value is None or isinstance(value, str) for value in texts)
        and type(record.best_so_far) in (dict, type(None))
        and all(value is None or type(value) in (int, float) for value in (record.started, record.ended))
    )
