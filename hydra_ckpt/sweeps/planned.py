"""The jobs of a sweep whose list is known at its start: those that have not begun are in the summary, too."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.files import Files, write_atomically
from hydra_ckpt.store import names
from hydra_ckpt.store.small_files import read_small_file

__all__ = ["PlannedJob", "not_begun", "write_plan"]

log = logging.getLogger(__name__)

_PLAN = ".hydra_ckpt_plan.json"
_MAX_BYTES = 16 << 20
_MOST = 10_000  # jobs; a larger plan would make every summary slow


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A job that a sweep will run.

    Attributes:
        name: Its directory, relative to the sweep's; empty if that is not known before it begins.
        overrides: Its overrides.
    """

    name: str
    overrides: tuple[str, ...]


def write_plan(sweep_dir: Path, jobs: Sequence[PlannedJob]) -> None:
    """Record the jobs of the start that begins; without jobs, or with too many, there is no record."""
    path = sweep_dir / _PLAN
    try:
        if not 0 < len(jobs) <= _MOST:
            path.unlink(missing_ok=True)
            return
        sweep_dir.mkdir(parents=True, exist_ok=True)
        data = [[job.name, *job.overrides] for job in jobs]
        write_atomically(Files(), path, json.dumps(data).encode(), names.nonce())
    except OSError as error:
        log.warning("%s: jobs that have not begun will be missing in its summary: %s", sweep_dir, error)


def not_begun(sweep_dir: Path, begun: Iterable[tuple[str, Sequence[str]]]) -> list[PlannedJob]:
    """The planned jobs that have no directory yet.

    Args:
        sweep_dir: The sweep's directory.
        begun: Names and overrides of the jobs that have one.
    """
    left, taken = _read(sweep_dir / _PLAN), set()
    for name, overrides in begun:
        taken.add(name)
        same = [job for job in left if sorted(job.overrides) == sorted(overrides)]
        if same:
            left.remove(next((job for job in same if job.name == name), same[0]))
    return [PlannedJob("" if job.name in taken else job.name, job.overrides) for job in left]


def _read(path: Path) -> list[PlannedJob]:
    try:
        data = json.loads(read_small_file(path, _MAX_BYTES))
        jobs = [PlannedJob(name, tuple(overrides)) for name, *overrides in data[:_MOST]]
        return [job for job in jobs if all(isinstance(text, str) for text in (job.name, *job.overrides))]
    except (OSError, CorruptCheckpointError, ValueError, TypeError, KeyError, RecursionError, MemoryError):
        return []
