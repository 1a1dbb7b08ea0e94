"""Optuna's studies: trials that an earlier start of a sweep left open are run again, with their values."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_ckpt.jobs.run import LauncherKind
from hydra_ckpt.launchers.asking import asked_in, watch_asking
from hydra_ckpt.launchers.places import values_of, values_of_job
from hydra_ckpt.sweeps.record import RUNNING, read_record
from hydra_ckpt.sweeps.summary import job_directories

__all__ = ["give_back"]

log = logging.getLogger(__name__)


def give_back(hydra: Any, sweep_dir: Path) -> None:
    """Let a stored study propose again the trials whose results it never received, and know those it proposes now.

    Such a trial belongs to a job of this sweep that was stopped, was killed, ended while the sweep was stopping, or
    never began. A trial of another sweep is left alone.

    Args:
        hydra: Hydra's own settings.
        sweep_dir: The sweep's directory, which only this process launches jobs in.
    """
    sweeper = hydra.sweeper
    name, storage = sweeper.get("study_name"), sweeper.get("storage")
    if "optuna" not in str(sweeper.get("_target_")) or name is None or storage is None:
        return
    watch_asking(sweep_dir)
    if not sweep_dir.is_dir():
        return
    jobs = _Jobs.of(sweep_dir, may_wait=LauncherKind.of(hydra) is LauncherKind.QUEUED)
    try:
        _give_back(str(name), _opened(storage), jobs)
    except Exception as error:  # noqa: BLE001 - a study's storage may fail in any way; the sweep then reports it
        log.warning("the study %s could not be searched for stopped trials: %s", name, error)


@dataclass
class _Jobs:
    """The jobs of a sweep's earlier starts, by their values.

    Attributes:
        sweep_dir: The sweep's directory.
        ended: Those that are not running.
        running: Those that are: jobs may outlive their launcher.
        may_wait: Whether a job without a directory may still begin by itself, in a launcher's queue.
    """

    sweep_dir: Path
    ended: list[frozenset[str]]
    running: list[frozenset[str]]
    may_wait: bool

    @classmethod
    def of(cls, sweep_dir: Path, *, may_wait: bool) -> _Jobs:
        jobs = cls(sweep_dir, [], [], may_wait)
        for path in job_directories(sweep_dir):
            record = read_record(path)
            is_running = record is not None and record.state_now(path) == RUNNING
            (jobs.running if is_running else jobs.ended).append(values_of_job(path))
        return jobs

    def give_up(self, trial: Any) -> bool:
        """Whether a trial that is recorded as running is not; each job counts for one trial."""
        values = values_of(f"{key}={value}" for key, value in trial.params.items())
        asked = asked_in(trial)
        is_mine = asked == str(self.sweep_dir.absolute())
        # A sweep that was moved is not another one.
        if asked is not None and not is_mine and Path(asked).is_dir():
            return False
        found = next((job for job in self.ended if values and values <= job), None)
        if found is not None:
            self.ended.remove(found)
            return True
        return is_mine and not self.may_wait and not any(values <= job for job in self.running)


def _opened(storage: Any) -> Any:
    from hydra.utils import instantiate

    return storage if isinstance(storage, str) else instantiate(storage)


def _give_back(name: str, storage: Any, jobs: _Jobs) -> None:
    import optuna

    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return  # the study is new
    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.RUNNING and jobs.give_up(trial):
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
