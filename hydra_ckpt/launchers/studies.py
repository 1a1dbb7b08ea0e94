"""Optuna's studies: trials that an earlier start of a sweep left open are run again, with their values."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra_ckpt.launchers.asking import watch_asking
from hydra_ckpt.launchers.places import values_of, values_of_job
from hydra_ckpt.sweeps.record import RUNNING, read_record
from hydra_ckpt.sweeps.summary import job_directories

__all__ = ["give_back"]

log = logging.getLogger(__name__)


def give_back(sweeper: Any, sweep_dir: Path) -> None:
    """Let a stored study propose again the trials whose results it never received, and know those it proposes now.

    Such a trial belongs to a job of this sweep that was stopped, was killed, or ended while the sweep was stopping.
    A trial without a directory in this sweep may belong to another process, and is left alone.

    Args:
        sweeper: Hydra's settings of the sweeper.
        sweep_dir: The sweep's directory.
    """
    name, storage = sweeper.get("study_name"), sweeper.get("storage")
    if "optuna" not in str(sweeper.get("_target_")) or name is None or storage is None:
        return
    watch_asking(sweep_dir)
    if not sweep_dir.is_dir():
        return
    try:
        _give_back(str(name), _opened(storage), _ended(sweep_dir))
    except Exception as error:  # noqa: BLE001 - a study's storage may fail in any way; the sweep then reports it
        log.warning("the study %s could not be searched for stopped trials: %s", name, error)


def _opened(storage: Any) -> Any:
    from hydra.utils import instantiate

    return storage if isinstance(storage, str) else instantiate(storage)


def _ended(sweep_dir: Path) -> list[frozenset[str]]:
    """The values of the sweep's jobs that are not running."""
    found = []
    for path in job_directories(sweep_dir):
        record = read_record(path)
        if record is None or record.state_now() != RUNNING:
            found.append(values_of_job(path))
    return found


def _give_back(name: str, storage: Any, jobs: list[frozenset[str]]) -> None:
    import optuna

    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return  # the study is new
    for trial in study.trials:
        values = values_of(f"{key}={value}" for key, value in trial.params.items())
        job = next((job for job in jobs if values and values <= job), None)
        if trial.state == optuna.trial.TrialState.RUNNING and job is not None:
            jobs.remove(job)
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
