"""Optuna's studies: trials that an earlier start of a sweep left open are run again, with their values."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_ckpt.jobs.run import LauncherKind
from hydra_ckpt.launchers.asking import Sweep, is_of, place_of, place_trial, watch_asking
from hydra_ckpt.launchers.claims import Claim, Start
from hydra_ckpt.launchers.holding import identify
from hydra_ckpt.launchers.places import values_of, values_of_job
from hydra_ckpt.sweeps.directories import job_directories, job_name
from hydra_ckpt.sweeps.record import RUNNING, read_record

__all__ = ["give_back"]

log = logging.getLogger(__name__)


def give_back(hydra: Any, sweep_dir: Path, start: Start | None) -> None:
    """Let a stored study propose again the trials whose results it never received, and know those it proposes now.

    Such a trial belongs to a job of this sweep that was stopped, was killed, ended while the sweep was stopping, or
    never began. A trial is left alone unless it is proved to be of this sweep.

    Args:
        hydra: Hydra's own settings.
        sweep_dir: The sweep's directory, which only this process launches jobs in.
        start: This start of the sweep; None if its jobs are not numbered.
    """
    sweeper = hydra.sweeper
    name, storage = sweeper.get("study_name"), sweeper.get("storage")
    if "optuna" not in str(sweeper.get("_target_")) or name is None or storage is None:
        return
    sweep = Sweep(sweep_dir.absolute(), identify(sweep_dir))
    watch_asking(str(name), sweep, start)
    jobs = _Jobs.of(sweep, may_wait=LauncherKind.of(hydra) is LauncherKind.QUEUED)
    try:
        _give_back(str(name), _opened(storage), jobs, start)
    except Exception as error:  # noqa: BLE001 - a study's storage may fail in any way; the sweep then reports it
        log.warning("the study %s could not be searched for stopped trials: %s", name, error)


@dataclass
class _Jobs:
    """The jobs of a sweep's earlier starts: their directories and values.

    Attributes:
        sweep: The sweep.
        ended: Those that are not running.
        running: Those that are: jobs may outlive their launcher.
        may_wait: Whether a job without a directory may still begin by itself, in a launcher's queue.
    """

    sweep: Sweep
    ended: dict[Path, frozenset[str]]
    running: dict[Path, frozenset[str]]
    may_wait: bool

    @classmethod
    def of(cls, sweep: Sweep, *, may_wait: bool) -> _Jobs:
        jobs = cls(sweep, {}, {}, may_wait)
        for path in job_directories(jobs.sweep.directory):
            record = read_record(path)
            is_running = record is not None and record.state_now(path) == RUNNING
            (jobs.running if is_running else jobs.ended)[path] = values_of_job(path)
        return jobs

    def of_trial(self, trial: Any) -> Path | None:
        """The directory of a trial's job, if it is known and there is one."""
        place = place_of(trial)
        if place is None:
            return None
        name, claim = place
        jobs = {**self.ended, **self.running}
        claimed = None if claim is None else next((path for path in jobs if Claim.of(path) == claim), None)
        path = claimed or self.sweep.directory / name
        return path if path in jobs and _values(trial) <= jobs[path] else None

    def take(self, trial: Any) -> Path | None:
        """Any job that has ended with a trial's values; it is then no other trial's."""
        values = _values(trial)
        found = next((path for path, job in self.ended.items() if values and values <= job), None)
        if found is not None:
            del self.ended[found]
        return found

    def never_ran(self, trial: Any) -> bool:
        """Whether a trial without a job will not get one."""
        values = _values(trial)
        return not self.may_wait and not any(values <= job for job in self.running.values())


def _values(trial: Any) -> frozenset[str]:
    return values_of(f"{key}={value}" for key, value in trial.params.items())


def _opened(storage: Any) -> Any:
    from hydra.utils import instantiate

    return storage if isinstance(storage, str) else instantiate(storage)


def _give_back(name: str, storage: Any, jobs: _Jobs, start: Start | None) -> None:
    import optuna

    states = optuna.trial.TrialState
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return  # the study is new
    trials = [
        trial for trial in study.trials if trial.state in (states.RUNNING, states.WAITING) and is_of(jobs.sweep, trial)
    ]
    owned = {trial.number: path for trial in trials if (path := jobs.of_trial(trial)) is not None}
    ended = {path for path in owned.values() if jobs.ended.pop(path, None) is not None}
    for trial in trials:
        path = owned.get(trial.number)
        is_open = trial.state == states.RUNNING
        if path is None and is_open:
            path = jobs.take(trial)
            comes_back = path is not None or jobs.never_ran(trial)
        else:
            comes_back = is_open and path in ended
        if path is not None and start is not None:
            place_trial(study, trial, job_name(jobs.sweep.directory, path))
            Claim(start.name).write(path)
        if comes_back:
            _wait_again(study, trial)
            log.info("trial %d of the study %s had not finished; it runs again", trial.number, name)


def _wait_again(study: Any, trial: Any) -> None:
    """Put a trial back among the waiting ones. It keeps its number and values."""
    import optuna

    storage, waiting = study._storage, optuna.trial.TrialState.WAITING  # noqa: SLF001 - there is no public way
    if hasattr(storage, "set_trial_state_values"):
        storage.set_trial_state_values(trial._trial_id, waiting)  # noqa: SLF001
    else:
        storage.set_trial_state(trial._trial_id, waiting)  # noqa: SLF001 - Optuna 2, which Hydra's sweeper needs
