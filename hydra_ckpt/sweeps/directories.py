"""Where the jobs of a sweep have their directories."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from hydra_ckpt.errors import CorruptCheckpointError, printable
from hydra_ckpt.files import Files, locked, write_atomically
from hydra_ckpt.store import names
from hydra_ckpt.store.small_files import read_small_file
from hydra_ckpt.sweeps.record import RECORD

__all__ = ["job_directories", "job_name", "mark"]

log = logging.getLogger(__name__)

_HYDRA = ".hydra"
# How deep jobs are looked for; deeper where a job has left this file.
_DEPTH = 4
_MARK = ".hydra_ckpt_jobs_below"
# Jobs that are not below the sweep's directory, as a list of paths relative to it. A list that could not be read is
# kept under another name, and read again later: perhaps the disk failed for a moment.
_OUTSIDE = ".hydra_ckpt_jobs_outside.json"
_OUTSIDE_KEPT = ".hydra_ckpt_jobs_outside.{}.json"
_MAX_BYTES = 16 << 20


def job_directories(sweep_dir: Path) -> Iterator[Path]:
    """Run directories of a sweep's jobs: below the sweep's directory, and others that our jobs recorded (`mark`)."""
    yield from _below(sweep_dir, _DEPTH)
    for name in _outside(sweep_dir):
        path = Path(os.path.normpath(os.path.join(os.path.realpath(sweep_dir), name)))  # noqa: PTH118
        if _can_be_job(path):
            yield path


def job_name(sweep_dir: Path, job: Path) -> str:
    """The path of a job's directory, or of anything in it, relative to the sweep's directory."""
    return os.path.relpath(os.path.realpath(job), os.path.realpath(sweep_dir))


def mark(sweep_dir: Path, job: Path) -> None:
    """Record where a job is, if it would not be found otherwise.

    Directories between the sweep's and the job's, which only jobs named by values with slashes have, get a file. Any of
    them may itself be another job's. Jobs elsewhere are listed in a file of the sweep's directory.

    Args:
        sweep_dir: The sweep's directory.
        job: The job's directory.

    Raises:
        OSError: It cannot be written.
    """
    name = job_name(sweep_dir, job)
    parts = Path(name).parts
    if os.pardir not in parts and sweep_dir in job.parents:
        for count in range(1, len(parts)):
            (sweep_dir.joinpath(*parts[:count]) / _MARK).touch()
        return
    with locked(sweep_dir):
        if name not in _outside(sweep_dir):
            _add_outside(sweep_dir, name)


def _add_outside(sweep_dir: Path, name: str) -> None:
    """Add a job to the list. A list that cannot be read is moved, not replaced."""
    path = sweep_dir / _OUTSIDE
    try:
        known = _read_outside(path)
    except (OSError, CorruptCheckpointError) as error:
        kept = path.with_name(_OUTSIDE_KEPT.format(names.nonce()))
        Files().rename(path, kept)
        log.warning("a list of jobs cannot be read and was renamed %s: %s", kept.name, printable(str(error)))
        known = []
    text = json.dumps(sorted([*known, name]))
    write_atomically(Files(), path, text.encode(), names.nonce())


def _outside(sweep_dir: Path) -> list[str]:
    """All jobs that are listed; what cannot be read is left out, with a warning."""
    found: dict[str, None] = {}
    for path in (sweep_dir / _OUTSIDE, *sorted(sweep_dir.glob(_OUTSIDE_KEPT.format("*")))):
        try:
            found |= dict.fromkeys(_read_outside(path))
        except (OSError, CorruptCheckpointError) as error:
            log.warning("jobs outside %s are left out: %s", sweep_dir, printable(str(error)))
    return list(found)


def _read_outside(path: Path) -> list[str]:
    """The jobs in a list; none if there is no such file.

    Raises:
        OSError: It cannot be read.
        CorruptCheckpointError: It cannot be read, or is not a list.
    """
    try:
        found = json.loads(read_small_file(path, _MAX_BYTES))
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError, MemoryError) as error:
        raise CorruptCheckpointError(path, f"is not JSON: {error}") from error
    if not isinstance(found, list):
        raise CorruptCheckpointError(path, "is not a list of paths")
    return [name for name in found if isinstance(name, str) and "\0" not in name]


def _can_be_job(path: Path) -> bool:
    try:
        return path.is_dir() and is_job(path)
    except (OSError, ValueError):
        return False


def _below(directory: Path, depth: int) -> Iterator[Path]:
    try:
        below = sorted(path for path in directory.iterdir() if not path.is_symlink() and path.is_dir())
    except OSError:
        return
    for path in below:
        found, is_marked = is_job(path), os.path.lexists(path / _MARK)
        if found:
            yield path
        if is_marked or (depth > 1 and not found and not _is_other(path)):
            yield from _below(path, depth - 1)


def is_job(path: Path) -> bool:
    """Whether a directory is a job's: it has our record, or Hydra's."""
    return os.path.lexists(path / RECORD) or (not _is_other(path) and (path / _HYDRA).is_dir())


def _is_other(path: Path) -> bool:
    """Whether a directory's name says that it is no job's, unless our record is in it."""
    return path.name.startswith(".") or names.is_checkpoint_name(path.name)
