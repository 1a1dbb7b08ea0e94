"""What this process adds to Optuna's `Study.ask`, for which Optuna and Hydra's sweeper have no hook."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

__all__ = ["asked_in", "watch_asking"]

log = logging.getLogger(__name__)

_SWEEP = "hydra_ckpt:sweep"
# By these Optuna 2 finds out which points of a grid are taken. It writes new ones when a trial is asked for again.
_POINT = ("grid_id", "search_space")

_sweep: Path | None = None  # the sweep that this process launches


def watch_asking(sweep_dir: Path) -> None:
    """From now on, trials that this process asks for know their sweep, and those that come back keep their grid point.

    Args:
        sweep_dir: The sweep's directory.
    """
    global _sweep  # noqa: PLW0603 - the method of a class has one wrapper, also for the next sweep of the process
    from optuna.study import Study

    if _sweep is None:
        Study.ask = _watched(Study.ask)  # type: ignore[method-assign]
    _sweep = sweep_dir.absolute()


def asked_in(trial: Any) -> str | None:
    """The sweep's directory in which a trial was asked for, if it is known."""
    found = trial.system_attrs.get(_SWEEP)
    return found if isinstance(found, str) else None


def _watched(ask: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(ask)
    def watched(study: Any, *args: Any, **kwargs: Any) -> Any:
        points = _points_of_waiting(study)
        trial = ask(study, *args, **kwargs)
        try:
            for key, value in {**points.get(trial._trial_id, {}), _SWEEP: str(_sweep)}.items():  # noqa: SLF001
                study._storage.set_trial_system_attr(trial._trial_id, key, value)  # noqa: SLF001 - no public way
        except Exception as error:  # noqa: BLE001 - a storage may fail in any way; the trial is worth more
            log.warning("trial %d: nothing could be recorded about it: %s", trial.number, error)
        return trial

    return watched


def _points_of_waiting(study: Any) -> dict[int, dict[str, Any]]:
    """The grid points of trials that wait with their values, by the trials' IDs in the storage."""
    import optuna

    try:
        trials = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
    except Exception as error:  # noqa: BLE001 - the sweeper will report what is wrong with the storage
        log.debug("waiting trials cannot be listed: %s", error)
        return {}
    return {
        trial._trial_id: {key: trial.system_attrs[key] for key in _POINT if key in trial.system_attrs}  # noqa: SLF001
        for trial in trials
        if trial.params
    }
