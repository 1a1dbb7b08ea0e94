"""Which directory a job uses in a sweep that proposes new values at each start.

Hydra counts jobs from 0 at every start. Under a sweeper that proposes values, job 0 then has different values than
before, and its directory holds another job's checkpoints. So a job with the values of an earlier job gets that job's
directory, and every other job gets a new one. If several have the same values, each gets a directory of its own, and
a trial that returns gets the one that it had.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf, open_dict, read_write

from hydra_ckpt.files import locked
from hydra_ckpt.jobs.differences import about_saving
from hydra_ckpt.launchers.claims import Claim, Start
from hydra_ckpt.sweeps.directories import job_directories, job_name
from hydra_ckpt.sweeps.record import FINISHED, read_record
from hydra_ckpt.sweeps.summary import overrides_of

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["directory_of", "keep_directories", "values_of", "values_of_job"]

log = logging.getLogger(__name__)

_RESOLVER = "hydra_ckpt.job_directory"
_BY_NUMBER = "${hydra.job.num}"


def keep_directories(config: DictConfig, sweep_dir: Path) -> Start | None:
    """Let returning jobs keep their directories, if directories are named by number and some exist.

    Args:
        config: The configuration of the sweep; an override for its jobs is added.
        sweep_dir: The sweep's directory.

    Returns:
        The start that begins; None if directories are not named by number.
    """
    raw: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    if raw["subdir"] != _BY_NUMBER:
        return None
    taken = [int(path.name) for path in job_directories(sweep_dir) if _is_numbered(path, sweep_dir)]
    start = Start.new(max(taken, default=-1) + 1)
    if not taken:
        return start
    log.info(
        "%s has jobs of an earlier start: returning jobs resume, new ones are numbered from %d", sweep_dir, start.first
    )
    with read_write(config), open_dict(config):
        config.hydra.overrides.hydra.append(f"hydra.sweep.subdir=${{{_RESOLVER}:{start.first},{start.name}}}")
    return start


def values_of(overrides: Iterable[str]) -> frozenset[str]:
    """What distinguishes one job of a sweep from another: its overrides, without those about saving."""
    return frozenset(item for item in overrides if not about_saving(item.lstrip("+~")))


def values_of_job(directory: Path) -> frozenset[str]:
    """The values of the job that a run directory belongs to."""
    record = read_record(directory)
    return values_of(record.overrides if record is not None else overrides_of(directory))


def directory_of(start: Start, config: DictConfig) -> str:
    """The directory of a job, relative to the sweep's: the value of `${hydra_ckpt.job_directory:FIRST,START}`.

    Any process may call it, and again for the same job.

    Args:
        start: The start that the job belongs to.
        config: The job's configuration.
    """
    hydra = config.hydra
    number, sweep_dir = int(hydra.job.num), Path(hydra.runtime.cwd, hydra.sweep.dir)  # jobs may change directory
    claim, mine = Claim(start.name, number), values_of(map(str, hydra.overrides.task))
    with locked(sweep_dir):
        same = [path for path in job_directories(sweep_dir) if values_of_job(path) == mine]
        earlier = sorted(path for path in same if _existed(path, sweep_dir, start.first))
        found = _given_to(claim, earlier) or _new(claim, start.first, sweep_dir)
    return job_name(sweep_dir, found)


def _new(claim: Claim, first: int, sweep_dir: Path) -> Path:
    """The directory with the next number, or the one that the job got when this was asked before."""
    for path in sorted(path for path in sweep_dir.iterdir() if not _existed(path, sweep_dir, first)):
        if Claim.of(path) == claim:
            return path
    for number in count(first):
        path = sweep_dir / str(number)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        if claim.write(path):
            return path
        path.rmdir()
        break
    return sweep_dir / str(first + (claim.number or 0))  # no two jobs of a start have this one


def _given_to(claim: Claim, same: list[Path]) -> Path | None:
    """The directory that a job has in its start, or gets now; None if it needs a new one.

    Args:
        claim: The job.
        same: The directories of earlier starts with the job's values.
    """
    claims = {path: Claim.of(path) for path in same}
    for path, found in claims.items():
        if found == claim:
            return path
    free = [path for path, found in claims.items() if found is None or found.start != claim.start]
    # Without a study, only a sampler with a seed proposes the same values again, and it does so in the same order.
    chosen = next((path for path in free if path.name == str(claim.number)), next(iter(free), None))
    if chosen is not None:
        claim.write(chosen)
        return chosen
    # A finished job is not run again: it may answer for several, as samplers of grids need it.
    return next((path for path in same if (record := read_record(path)) and record.state == FINISHED), None)


def _existed(path: Path, sweep_dir: Path, first: int) -> bool:
    """Whether a directory is from an earlier start."""
    return not (_is_numbered(path, sweep_dir) and int(path.name) >= first)


def _is_numbered(path: Path, sweep_dir: Path) -> bool:
    return path.parent == sweep_dir and path.name.isdecimal()
