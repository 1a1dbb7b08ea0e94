"""Jobs that can be started again: what is finished is not run anew, what was interrupted goes on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, CheckpointExistsError
from hydra_ckpt.jobs.differences import about_saving, differences
from hydra_ckpt.jobs.launch import first_rank_says
from hydra_ckpt.jobs.run import HydraRun
from hydra_ckpt.sweeps.record import FAILED, FINISHED, INTERRUPTED, RECORD, STOPPED, JobRecord, read_record
from hydra_ckpt.sweeps.summary import write_summary

log = logging.getLogger(__name__)

_Task = TypeVar("_Task", bound=Callable[..., Any])

_CHOICES = ("raise", "run")
_STOP = "STOP"


@dataclass
class ActiveJob:
    """The job that runs in this process now; its callback tells what happens to it.

    Attributes:
        checkpoint_dir: Where its checkpoints lie.
        stopped: Whether it was asked to stop before its end.
        exit_code: What the program exits with where the job stopped to be continued later; None where it did not.
    """

    checkpoint_dir: Path | None = None
    stopped: bool = False
    exit_code: int | None = None


# A process runs one job at a time; it is None again behind each of them.
_active: ActiveJob | None = None


def active_job() -> ActiveJob | None:
    """The job this process runs under `resumable_job`, or None."""
    return _active


def resumable_job(function: _Task | None = None, *, on_change: str | None = None) -> Any:
    """Make a Hydra job resumable; goes below `@hydra.main`.

        @hydra.main(version_base="1.3", config_path="conf", config_name="config")
        @hydra_ckpt.resumable_job
        def main(cfg): ...

    Started again in the same run directory (the same `hydra.sweep.dir`, or the same `hydra.run.dir`):

    - a job that has finished with this configuration is not run; what it returned then is returned again;
    - any other job runs, and its callback resumes from its newest checkpoint.

    A job stopped by a signal or the time limit ends the program, the rest of a sweep too, with the callback's
    `exit_code`. Each job of a sweep updates the sweep's `checkpoints_summary.json`. Outside Hydra, and in a single run
    with `checkpoint.enabled=false`, it does nothing.

    Collective: every rank of a launch; the first one decides for all.

    Args:
        function: The job.
        on_change: What happens where the directory belongs to a job with another configuration (settings under
            `checkpoint` and `callbacks.checkpoint` aside): "raise", or "run" it and go on from that job's checkpoints.
            By default a sweep raises, because its jobs may have been renumbered, and a single run runs.

    Returns:
        The function, wrapped.

    Raises:
        CheckpointExistsError: When called: see `on_change`.
    """
    if on_change is not None and on_change not in _CHOICES:
        raise CheckpointConfigError(f"resumable_job(on_change={on_change!r}): expected one of {', '.join(_CHOICES)}")

    def decorate(task: _Task) -> _Task:
        @wraps(task)
        def job(cfg: Any, *args: Any, **kwargs: Any) -> Any:
            run = HydraRun.current()
            if run is None:
                return task(cfg, *args, **kwargs)
            config = _plain(cfg)
            if run.sweep_dir is None and not _checkpoints(config):
                return task(cfg, *args, **kwargs)  # what is switched off leaves no trace
            decision = json.loads(first_rank_says("job", lambda: json.dumps(_decide(run, config, on_change))))
            if "refuse" in decision:
                raise CheckpointExistsError(decision["refuse"])
            if "stop" in decision:
                log.warning("%s", decision["stop"])
                raise SystemExit(0)
            if "objective" in decision:
                log.info("%s", decision["why"])
                return decision["objective"]
            return _run(run, JobRecord.begin(run.overrides, config), lambda: task(cfg, *args, **kwargs))

        return job  # type: ignore[return-value]

    return decorate if function is None else decorate(function)


def _checkpoints(config: Any) -> bool:
    """Whether a configuration has checkpointing on, as far as it stands in the usual place."""
    settings = config.get("checkpoint") if isinstance(config, dict) else None
    return not isinstance(settings, dict) or settings.get("enabled") is not False


def _plain(cfg: Any) -> Any:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(cfg, resolve=False, enum_to_str=True) if OmegaConf.is_config(cfg) else cfg
    return json.loads(json.dumps(plain, default=str))


def _decide(run: HydraRun, config: Any, on_change: str | None) -> dict[str, Any]:
    """First rank only: what is to be done with a job, as plain data."""
    if run.sweep_dir is not None and (run.sweep_dir / _STOP).exists():
        return {"stop": f"no further job begins: {run.sweep_dir / _STOP} is there; remove it to go on"}
    record = read_record(run.output_dir)
    if record is None or record.config is None:
        return {}
    unlike = differences(record.config, config)
    if not unlike and record.state == FINISHED and record.has_objective:
        where = run.output_dir / RECORD
        return {"objective": record.objective, "why": f"the job is finished already; to run it anew, remove {where}"}
    unlike = [found for found in unlike if not about_saving(found.key)]
    if not unlike:
        return {}
    if (on_change or ("raise" if run.sweep_dir is not None else "run")) == "raise":
        told = "; ".join(map(str, unlike))
        return {
            "refuse": f"{run.output_dir} belongs to a job with another configuration ({told}). Choose another "
            "hydra.sweep.dir, keep the order of the jobs, or remove this directory; "
            '@resumable_job(on_change="run") goes on from its checkpoints'
        }
    return {}  # what has changed is told where the run resumes


def _run(run: HydraRun, record: JobRecord, task: Callable[[], Any]) -> Any:
    with _activated() as active:
        _write(run, record)
        try:
            value = task()
        except BaseException as error:
            _write(run, _with_checkpoints(run, _ended_by(record, error, active), active))
            raise
        ended = record.end(STOPPED) if active.stopped else record.returned(value)
        _write(run, _with_checkpoints(run, ended, active))
        if active.exit_code is not None and (active.exit_code or run.sweep_dir is not None):
            raise SystemExit(active.exit_code)
        return value


@contextmanager
def _activated() -> Iterator[ActiveJob]:
    global _active  # noqa: PLW0603 - the process has one job, and code far below it has to find it
    before, _active = _active, ActiveJob()
    try:
        yield _active
    finally:
        _active = before


def _ended_by(record: JobRecord, error: BaseException, active: ActiveJob) -> JobRecord:
    if isinstance(error, SystemExit):
        if active.stopped:
            return record.end(STOPPED)
        return record.end(FAILED, error=f"exit code {error.code}") if error.code else record.end(FINISHED)
    if isinstance(error, Exception):
        return record.end(FAILED, error=f"{type(error).__name__}: {error}")
    return record.end(INTERRUPTED, error=type(error).__name__)


def _with_checkpoints(run: HydraRun, record: JobRecord, active: ActiveJob) -> JobRecord:
    place = active.checkpoint_dir
    if place is None:
        return record
    inside = place.is_relative_to(run.output_dir)
    return record.at(str(place.relative_to(run.output_dir) if inside else place))


def _write(run: HydraRun, record: JobRecord) -> None:
    """First rank only. A job whose record cannot be written runs all the same."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        record.write(run.output_dir)
        if run.sweep_dir is not None:
            write_summary(run.sweep_dir)
    except (OSError, CheckpointError) as error:
        log.warning("the job's state could not be recorded: %s", error)
