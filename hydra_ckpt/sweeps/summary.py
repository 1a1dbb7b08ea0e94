"""The summary of a sweep: every job, its state, and its checkpoints; can be built from disk at any time."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from hydra_ckpt import metrics as metric
from hydra_ckpt.errors import CheckpointError, CheckpointFormatError, CorruptCheckpointError
from hydra_ckpt.files import Files, locked, write_atomically
from hydra_ckpt.jobs.yaml_text import MAX_BYTES, parse_yaml
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.lease import is_held
from hydra_ckpt.store.pointers import point, read_pointer
from hydra_ckpt.store.small_files import read_small_file
from hydra_ckpt.sweeps.directories import job_directories, job_name, mark
from hydra_ckpt.sweeps.planned import PlannedJob, not_begun
from hydra_ckpt.sweeps.record import INTERRUPTED, RECORD, RUNNING, WAITING, JobRecord, read_record

log = logging.getLogger(__name__)

SUMMARY = "checkpoints_summary.json"
VERSION = 1
_DEFAULT_DIRECTORY = "checkpoints"
_HYDRA = ".hydra"


def is_sweep(directory: Path) -> bool:
    """Whether a directory belongs to a sweep: it has a summary, or a job below it has our record or checkpoints.

    There would be nothing to report about other Hydra runs.
    """
    return (directory / SUMMARY).is_file() or any(_is_ours(path) for path in job_directories(directory))


def _is_ours(job: Path) -> bool:
    return (job / RECORD).is_file() or bool(_checkpoints_in(job / _DEFAULT_DIRECTORY))


def _checkpoints_in(root: Path) -> list[str]:
    """The names of a directory's checkpoints by step; none if it is missing or cannot be listed."""
    try:
        below = [path.name for path in root.iterdir()] if root.is_dir() else []
    except OSError as error:
        log.warning("a directory of checkpoints is left out of the summary: %s", error)
        return []
    return sorted((name for name in below if names.is_checkpoint_name(name)), key=names.step_of)


def summarize(sweep_dir: Path) -> dict[str, Any]:
    """The summary as plain data. Reads only.

    Args:
        sweep_dir: The sweep's directory, absolute.
    """
    jobs = [_job(sweep_dir, path) for path in job_directories(sweep_dir)]
    waiting = [_waiting(job) for job in not_begun(sweep_dir, [(job["job"], job["overrides"]) for job in jobs])]
    jobs = sorted([*jobs, *waiting], key=lambda job: (not job["job"], _natural(job["job"])))
    return {"version": VERSION, "best": _best(jobs), "jobs": jobs}


def write_summary(sweep_dir: Path, job: Path | None = None) -> dict[str, Any]:
    """Write the summary, and point BEST to the best checkpoint of all jobs; each is replaced atomically.

    Args:
        sweep_dir: The sweep's directory, absolute.
        job: The directory of the job that causes this, absolute.

    Returns:
        The summary.

    Raises:
        OSError: It cannot be written.
    """
    if job is not None:
        mark(sweep_dir, job)
    with locked(sweep_dir):
        summary = summarize(sweep_dir)
        text = json.dumps(finite(summary), indent=1, ensure_ascii=False) + "\n"
        # A lone surrogate, as from a file name that is not UTF-8, becomes the escape that JSON has for it.
        write_atomically(Files(), sweep_dir / SUMMARY, text.encode(errors="backslashreplace"), names.nonce())
        if summary["best"] is not None:
            point(Files(), sweep_dir, names.BEST, summary["best"]["checkpoint"])
    return summary


def finite(data: Any) -> Any:
    """The same data without NaN and infinities, which JSON does not have."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts job 10 after job 9."""
    pieces = re.split(r"(\d+)", name)
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def _job(sweep_dir: Path, path: Path) -> dict[str, Any]:
    record = read_record(path)
    root = checkpoints_of(record, path)
    found = _Found(sweep_dir, root)
    return {
        "job": job_name(sweep_dir, path),
        "overrides": list(record.overrides) if record else overrides_of(path),
        "state": state_of(record, path),
        "objective": record.objective if record else None,
        "error": record.error if record else None,
        "started": record.started if record else None,
        "ended": record.ended if record else None,
        "checkpoints": len(found.names),
        "metric": found.metric,
        "best_so_far": record.best_so_far if record else None,
        "last": found.entry(found.last),
        "best": found.entry(found.best),
    }


def _waiting(job: PlannedJob) -> dict[str, Any]:
    """A job that has not begun."""
    unknown = ("objective", "error", "started", "ended", "metric", "best_so_far", "last", "best")
    known = {"job": job.name, "overrides": list(job.overrides), "state": WAITING, "checkpoints": 0}
    return {**known, **dict.fromkeys(unknown)}


class _Found:
    """A job's checkpoints. Opens only those that LATEST and BEST point to."""

    def __init__(self, sweep_dir: Path, root: Path) -> None:
        self._sweep_dir = sweep_dir
        self.names = _checkpoints_in(root)
        self.last = _opened(root, read_pointer(root, names.LATEST) or next(reversed(self.names), None))
        self.best = _opened(root, read_pointer(root, names.BEST))

    @property
    def metric(self) -> dict[str, Any] | None:
        """The job's deciding metric and its best value."""
        if self.best is None:
            return None
        details = [item.manifest.details for item in (self.last, self.best) if item is not None]
        decided = next((str(item["deciding_metric"]) for item in details if "deciding_metric" in item), "")
        values = self.best.metrics
        key = next((key for key in (decided, metric.DEFAULT_KEY) if key in values), next(iter(values), None))
        mode = next((str(item["best_metric_mode"]) for item in details if "best_metric_mode" in item), "min")
        return None if key is None else {"name": key, "mode": mode, "value": values[key]}

    def entry(self, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
        """A checkpoint as plain data; paths are relative to the sweep's directory."""
        if checkpoint is None:
            return None
        path = job_name(self._sweep_dir, checkpoint.path)
        exports = {part: f"{path}/{place}" for part, place in sorted(checkpoint.manifest.exports.items())}
        return {"path": path, "step": checkpoint.step, "epoch": checkpoint.epoch, "exports": exports}


def _opened(root: Path, name: str | None) -> Checkpoint | None:
    try:
        return None if name is None else Checkpoint.open(root / name)
    except CheckpointFormatError as error:
        log.warning("left out of the summary: %s", error)
        return None
    except (CheckpointError, OSError) as error:
        log.debug("left out of the summary: %s", error)
        return None


def checkpoints_of(record: JobRecord | None, path: Path) -> Path:
    """The directory of a job's checkpoints; where it would be by default, if it is not recorded.

    Args:
        record: The job's record, if it has one.
        path: The job's directory.
    """
    return path / ((record.checkpoint_dir if record else None) or _DEFAULT_DIRECTORY)


def state_of(record: JobRecord | None, path: Path) -> str:
    """A job's current state.

    Args:
        record: The job's record, if it has one.
        path: The job's directory.
    """
    root = checkpoints_of(record, path)
    if record is None:
        return RUNNING if is_held(root) else "unknown"
    state = record.state_now(path)
    # A process on another host cannot be checked, but its heartbeat in the directory can.
    return RUNNING if state == INTERRUPTED and record.ended is None and is_held(root) else state


def overrides_of(path: Path) -> list[str]:
    """The overrides that Hydra recorded, for a job without our record."""
    try:
        found = parse_yaml(read_small_file(path / _HYDRA / "overrides.yaml", MAX_BYTES).decode())
    except (OSError, CorruptCheckpointError, UnicodeDecodeError) as error:
        log.debug("no overrides in %s: %s", path, error)
        return []
    return [str(item) for item in found] if isinstance(found, list) else []


def _best(jobs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best of the jobs' best checkpoints; the first of equals."""
    best: dict[str, Any] | None = None
    for job in jobs:
        if job["metric"] is None or (best is not None and job["metric"]["name"] != best["metric"]["name"]):
            continue
        before = None if best is None else best["metric"]["value"]
        if metric.is_better(job["metric"]["value"], before, job["metric"]["mode"]):
            best = {"job": job["job"], "checkpoint": job["best"]["path"], "metric": job["metric"]}
    return best
