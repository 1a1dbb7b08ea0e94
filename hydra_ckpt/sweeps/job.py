"""Jobs that can be started again: finished ones are not rerun, interrupted ones continue."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from omegaconf import OmegaConf

from hydra_ckpt.errors import CheckpointConfigError, CheckpointExistsError
from hydra_ckpt.jobs.differences import about_beginning, about_saving, differences, shown
from hydra_ckpt.jobs.launch import first_rank_says
from hydra_ckpt.jobs.run import HydraRun, LauncherKind
from hydra_ckpt.store import names
from hydra_ckpt.sweeps.active import RESUMABLE, ActiveJob, activated, shield
from hydra_ckpt.sweeps.keeping import RecordKeeper
from hydra_ckpt.sweeps.record import FAILED, FINISHED, INTERRUPTED, RECORD, STOPPED, WAITING, JobRecord, read_record
from hydra_ckpt.sweeps.stopping import Halt, JobStopped, ends_in_exception, halt, halted

log = logging.getLogger(__name__)

_Task = TypeVar("_Task", bound=Callable[..., Any])

_CHOICES = ("raise", "run")
_STOP = "STOP"
_SIGNALS = "callbacks.checkpoint.signals"


def resumable_job(function: _Task | None = None, *, on_change: str | None = None) -> Any:
    """Make a Hydra job resumable; goes below `@hydra.main`.

        @hydra.main(version_base="1.3", config_path="conf", config_name="config")
        @hydra_ckpt.resumable_job
        def main(cfg): ...

    Started again in the same run directory (the same `hydra.sweep.dir`, or the same `hydra.run.dir`):

    - a job that has finished with this configuration is not rerun; its recorded result is returned, or None if it ended
      by `sys.exit(0)` or returned what is not plain data;
    - any other job runs, and its callback resumes from its newest checkpoint.

    A job stopped by a signal or the time limit ends the program, including the rest of a sweep, with the callback's
    `exit_code`. Under a launcher that runs several jobs at once it ends with `JobStopped` instead, and the others
    finish; see docs/sweeps.md. Each job of a sweep updates the sweep's `checkpoints_summary.json`. Outside Hydra, and
    in a single run with `checkpoint.enabled=false`, it does nothing.

    Collective: call it on every rank of a launch; the first rank decides for all.

    Args:
        function: The job.
        on_change: What to do if the directory belongs to a job with another configuration (settings under
            `checkpoint` and `callbacks.checkpoint` aside): "raise", or "run" it and resume from that job's checkpoints.
            By default a sweep raises, because its jobs may have been renumbered, and a single run runs.

    Returns:
        The function, wrapped.

    Raises:
        CheckpointExistsError: When called: see `on_change`.
        JobStopped: When called, under a launcher that runs several jobs at once.
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
            if run.launcher is LauncherKind.SIDE_BY_SIDE:
                shield(OmegaConf.select(cfg, _SIGNALS, default="SIGTERM") if OmegaConf.is_config(cfg) else "SIGTERM")
            if run.sweep_dir is None and not _checkpoints(config):
                return task(cfg, *args, **kwargs)  # a run without checkpointing leaves no trace
            decision = json.loads(first_rank_says("job", lambda: json.dumps(_decide(run, config, on_change))))
            if "refuse" in decision:
                raise CheckpointExistsError(decision["refuse"])
            if "stop" in decision:
                raise _stopped(run, decision["stop"], decision["exit_code"])
            if "objective" in decision:
                log.info("%s", decision["why"])
                return _result(run, decision["objective"])
            record = JobRecord.begin(run.overrides, config, run.output_dir, decision["series"])
            return _run(run, record, decision["continues"], lambda: task(cfg, *args, **kwargs))

        setattr(job, RESUMABLE, True)
        return job  # type: ignore[return-value]

    return decorate if function is None else decorate(function)


def _checkpoints(config: Any) -> bool:
    """Whether checkpointing is on; True if the setting is not in its usual place."""
    settings = config.get("checkpoint") if isinstance(config, dict) else None
    return not isinstance(settings, dict) or settings.get("enabled") is not False


def _plain(cfg: Any) -> Any:
    plain = OmegaConf.to_container(cfg, resolve=False, enum_to_str=True) if OmegaConf.is_config(cfg) else cfg
    return json.loads(json.dumps(plain, default=str))


def _decide(run: HydraRun, config: Any, on_change: str | None) -> dict[str, Any]:
    """First rank only: what to do with a job, as plain data."""
    order = _order(run)
    record = read_record(run.output_dir)
    if order is not None:
        if record is None:
            waiting = JobRecord.begin(run.overrides, config, run.output_dir).end(WAITING)
            RecordKeeper(run, waiting).begin()
        return {"stop": f"job {run.name} waits; no more jobs start: {order.why}", "exit_code": order.exit_code}
    if record is None or record.config is None or record.state == WAITING:
        return _new_series()
    unlike = differences(record.config, config)
    if not unlike and record.state == FINISHED:
        known = "" if record.has_objective else " without a result that could be recorded"
        why = f"the job has already finished{known}; to rerun it, remove {run.output_dir / RECORD}"
        return {"objective": record.objective, "why": why}
    begins_alike = not any(about_beginning(found.key) for found in unlike)
    unlike = [found for found in unlike if not about_saving(found.key)]
    if not unlike:
        return {"series": record.series, "continues": True} if begins_alike and record.series else _new_series()
    if (on_change or ("raise" if run.sweep_dir is not None else "run")) == "raise":
        told = shown(unlike)
        return {
            "refuse": f"{run.output_dir} belongs to a job with another configuration ({told}). Choose another "
            "hydra.sweep.dir, keep the order of the jobs, or remove this directory; "
            '@resumable_job(on_change="run") resumes from its checkpoints'
        }
    return _new_series()  # the changes are logged when the run resumes


def _new_series() -> dict[str, Any]:
    return {"series": names.nonce(), "continues": False}


def _order(run: HydraRun) -> Halt | None:
    """First rank only: why no more jobs of the sweep may start; None if they may."""
    if run.sweep_dir is not None and (run.sweep_dir / _STOP).exists():
        return Halt(f"{run.sweep_dir / _STOP} exists; remove it to continue", 0, running=True)
    return halted(run)


def _run(run: HydraRun, record: JobRecord, continues: bool, task: Callable[[], Any]) -> Any:
    keeper = RecordKeeper(run, record)
    with activated() as active:
        active.on_hold = keeper.hold
        active.series, active.continues = record.series, continues
        keeper.begin()
        value = None
        try:
            value = task()
        except BaseException as error:
            keeper.end(_ended_by(record, error, active), active)
            if not (isinstance(error, SystemExit) and _survives_exit(run, error, active)):
                raise
        else:
            ended = _ended_stopped(record, active) if active.stopped else record.returned(value)
            keeper.end(ended, active)
        if active.stopped:
            _end_stopped(run, active)
        return _result(run, value)


def _survives_exit(run: HydraRun, error: SystemExit, active: ActiveJob) -> bool:
    """Whether a job's `sys.exit()` only ends the job, and not the program, with other jobs beside or after it.

    Raises:
        RuntimeError: The job has failed, and must not end others that run beside it.
    """
    if active.stopped:
        return ends_in_exception(run)
    is_done = not error.code and not active.trains
    if not is_done and run.launcher is not LauncherKind.ONE_BY_ONE:
        raise RuntimeError(f"job {run.name} ended by sys.exit({error.code!r}) before it was done") from error
    return is_done and run.sweep_dir is not None


def _result(run: HydraRun, value: Any) -> Any:
    """What a job returned; raises if a sweeper cannot use it.

    Optuna's sweeper crashes on a NaN; a trial that raises counts as failed, as `max_failure_rate` allows.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    if run.is_judged and any(map(_is_nan, values)):
        raise RuntimeError(f"job {run.name} returned {value}: it has finished, but a sweeper cannot use NaN")
    return value


def _is_nan(value: Any) -> bool:
    try:
        return math.isnan(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _end_stopped(run: HydraRun, active: ActiveJob) -> None:
    """End a stopped job so that it is run again, unless it may simply return."""
    if active.exit_code is None:
        # A file stopped this job alone. Its partial result must not count for its values.
        if run.is_judged:
            raise _stopped(run, f"job {run.name} was stopped ({active.reason})", 0)
        return
    if run.sweep_dir is None:
        if active.exit_code:
            raise SystemExit(active.exit_code)
        return
    _requeue(active)
    why = f"job {run.name} was stopped ({active.reason})"
    _halt_others(run, Halt(why, active.exit_code, running=False))
    raise _stopped(run, why, active.exit_code)


def _stopped(run: HydraRun, why: str, exit_code: int) -> BaseException:
    """The exception that ends a job which the sweep's next start will run."""
    message = f"{why}. Run the same command again to continue it"
    log.warning("%s", message)
    if run.sweep_dir is not None and ends_in_exception(run):
        return JobStopped(message, exit_code, run.sweep_dir)
    return SystemExit(exit_code)


def _requeue(active: ActiveJob) -> None:
    """Let the launcher put the job back into its queue, which ends the process; returns if it does not."""
    try:
        if active.requeue is not None:
            active.requeue()
    except Exception as error:  # noqa: BLE001 - any error of a launcher; it must not make the job count as failed
        log.warning("the launcher will not restart the job: %s", error)


def _halt_others(run: HydraRun, order: Halt) -> None:
    try:
        if os.environ.get("RANK", "0") == "0":
            halt(run, order)
    except OSError as error:
        log.warning("the other jobs could not be told that the sweep has stopped: %s", error)


def _ended_stopped(record: JobRecord, active: ActiveJob) -> JobRecord:
    return record.end(STOPPED, requeue=active.exit_code is not None)


def _ended_by(record: JobRecord, error: BaseException, active: ActiveJob) -> JobRecord:
    if isinstance(error, SystemExit):
        if active.stopped:
            return _ended_stopped(record, active)
        if error.code:
            return record.end(FAILED, error=f"exit code {error.code}")
        if active.trains:  # some programs exit so when a signal comes
            return record.end(INTERRUPTED, error="sys.exit(0) before on_train_end()")
        return record.end(FINISHED)
    if isinstance(error, Exception):
        return record.end(FAILED, error=f"{type(error).__name__}: {error}")
    return record.end(INTERRUPTED, error=type(error).__name__)
