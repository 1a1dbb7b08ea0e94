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
_asked: set[int] = set()  # numbers of the trials that it has asked for


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
    _asked.clear()


def asked_in(trial: Any) -> str | None:
    """The sweep's directory in which a trial was asked for, if it is known."""
    found = trial.system_attrs.get(_SWEEP)
    return found if isinstance(found, str) else None


def _watched(ask: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(ask)
    def watched(study: Any, *args: Any, **kwargs: Any) -> Any:
        before = _trials(study)
        trial = ask(study, *args, **kwargs)
        try:
            known = {**_point(study, trial, before), _SWEEP: str(_sweep)}
            _asked.add(trial.number)
            for key, value in known.items():
                study._storage.set_trial_system_attr(trial._trial_id, key, value)  # noqa: SLF001 - no public way
        except Exception as error:  # noqa: BLE001 - a storage may fail in any way; the trial is worth more
            log.warning("trial %d: nothing could be recorded about it: %s", trial.number, error)
        return trial

    return watched


def _trials(study: Any) -> list[Any]:
    try:
        found: list[Any] = study.get_trials(deepcopy=False)
    except Exception as error:  # noqa: BLE001 - the sweeper will report what is wrong with the storage
        log.debug("trials cannot be listed: %s", error)
        return []
    return found


def _point(study: Any, trial: Any, before: list[Any]) -> dict[str, Any]:
    """The grid point that a trial must have, if the sampler has chosen another one; empty if it may keep it.

    Args:
        study: The study.
        trial: The trial that was asked for.
        before: The study's trials before that.
    """
    point = _point_of(study._storage.get_trial(trial._trial_id))  # noqa: SLF001
    if not point:
        return {}
    former = next((item for item in before if item.number == trial.number), None)
    if former is not None and former.params:
        return _point_of(former)  # it comes back with its values
    same = [item for item in before if _point_of(item).get("search_space") == point["search_space"]]
    if not any(_point_of(item) == point and _is_taken(item) for item in same):
        return {}
    # All points are taken, and the sampler repeats one. If an earlier start finished it, its job is not run again.
    done = (item for item in same if item.state.name == "COMPLETE" and item.number not in _asked)
    return next((_point_of(item) for item in done if asked_in(item) == str(_sweep)), {})


def _is_taken(trial: Any) -> bool:
    """Whether the result of a trial is known, or will be: this process has asked for it."""
    return trial.state.name == "COMPLETE" or (trial.state.name == "RUNNING" and trial.number in _asked)


def _point_of(trial: Any) -> dict[str, Any]:
    attributes = trial.system_attrs
    return {key: attributes[key] for key in _POINT} if all(key in attributes for key in _POINT) else {}
