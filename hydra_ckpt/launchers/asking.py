"""What this process adds to Optuna's `Study.ask`, for which Optuna and Hydra's sweeper have no hook."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from hydra_ckpt.launchers.claims import Claim, Start
from hydra_ckpt.launchers.holding import identity_of

__all__ = ["Sweep", "is_of", "place_of", "place_trial", "watch_asking"]

log = logging.getLogger(__name__)

_SWEEP = "hydra_ckpt:sweep"
_DIRECTORY = "hydra_ckpt:directory"
# By these Optuna 2 finds out which points of a grid are taken. It writes new ones when a trial is asked for again.
_POINT = ("grid_id", "search_space")

_PLACE = "hydra_ckpt:place"


@dataclass(frozen=True)
class Sweep:
    """A sweep, as trials know it.

    Attributes:
        directory: Its directory, absolute.
        identity: The random text in that directory.
    """

    directory: Path
    identity: str


@dataclass(frozen=True)
class _Launch:
    """The sweep that this process launches.

    Attributes:
        study: The name of its study.
        sweep: The sweep.
        start: This start of it; None if its jobs are not numbered.
        asked: The numbers of the trials that were asked for, in this order: the sweeper numbers its jobs so.
    """

    study: str
    sweep: Sweep
    start: Start | None
    asked: list[int] = field(default_factory=list)

    def place(self, former: Any) -> dict[str, Any]:
        """Where the job of a trial runs that is about to be asked for, as plain data.

        Args:
            former: The trial as it was before, if it comes back.
        """
        if self.start is None:
            return {}
        number = len(self.asked)
        given = None if former is None else former.system_attrs.get(_PLACE)
        if isinstance(given, dict) and "start" not in given and (self.sweep.directory / str(given["name"])).is_dir():
            Claim(self.start.name, number).write(self.sweep.directory / str(given["name"]))
            return given
        # A sweep that continues numbers its new directories when their jobs begin; each has a claim.
        name = "" if self.start.first else str(number)
        return {"name": name, "start": self.start.name, "number": number}


_launch: _Launch | None = None


def watch_asking(study: str, sweep: Sweep, start: Start | None) -> None:
    """From now on, trials that this process asks for know their sweep and job, and those that come back keep both.

    Trials that come back keep their grid point, too.

    Args:
        study: The name of the sweep's study.
        sweep: The sweep.
        start: This start of the sweep; None if its jobs are not numbered.
    """
    global _launch  # noqa: PLW0603 - the method of a class has one wrapper, also for the next sweep of the process
    from optuna.study import Study

    if _launch is None:
        Study.ask = _watched(Study.ask)  # type: ignore[method-assign]
    _launch = _Launch(study, sweep, start)


def is_of(sweep: Sweep, trial: Any) -> bool:
    """Whether a trial is proved to have been asked for in a sweep, which may have been moved since.

    Paths prove nothing: other hosts may have other directories there, or not see the right one.
    """
    known = trial.system_attrs
    if known.get(_SWEEP) != sweep.identity:
        return False
    directory = Path(str(known.get(_DIRECTORY)))
    # The sweep may be a copy, and the original still at work.
    return (
        directory == sweep.directory or identity_of(directory) != sweep.identity or directory.samefile(sweep.directory)
    )


def place_of(trial: Any) -> tuple[str, Claim | None] | None:
    """Where a trial's job ran, if it is known.

    Returns:
        The directory's name, and the claim which the right directory has, unless the name is certain.
    """
    found = trial.system_attrs.get(_PLACE)
    if not isinstance(found, dict) or "name" not in found:
        return None
    return str(found["name"]), Claim(found["start"], found["number"]) if "start" in found else None


def place_trial(study: Any, trial: Any, name: str) -> None:
    """Let a trial that comes back have its job's directory again.

    Args:
        study: The study.
        trial: The trial.
        name: The directory, relative to the sweep's.
    """
    study._storage.set_trial_system_attr(trial._trial_id, _PLACE, {"name": name})  # noqa: SLF001 - no public way


def _watched(ask: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(ask)
    def watched(study: Any, *args: Any, **kwargs: Any) -> Any:
        launch = _launch
        if launch is None or study.study_name != launch.study:
            return ask(study, *args, **kwargs)
        before = _trials(study)
        trial = ask(study, *args, **kwargs)
        try:
            _note(launch, study, trial, before)
        except Exception as error:  # noqa: BLE001 - a storage may fail in any way; the trial is worth more
            log.warning("trial %d: nothing could be recorded about it: %s", trial.number, error)
        launch.asked.append(trial.number)
        return trial

    return watched


def _note(launch: _Launch, study: Any, trial: Any, before: list[Any]) -> None:
    """Record in the study what is known about a trial that was asked for."""
    former = next((item for item in before if item.number == trial.number), None)
    place = launch.place(former)
    known = {**_point(launch, study, trial, before), _PLACE: place}
    known |= {_SWEEP: launch.sweep.identity, _DIRECTORY: str(launch.sweep.directory)}
    for key, value in known.items():
        study._storage.set_trial_system_attr(trial._trial_id, key, value)  # noqa: SLF001 - no public way


def _trials(study: Any) -> list[Any]:
    try:
        found: list[Any] = study.get_trials(deepcopy=False)
    except Exception as error:  # noqa: BLE001 - the sweeper will report what is wrong with the storage
        log.debug("trials cannot be listed: %s", error)
        return []
    return found


def _point(launch: _Launch, study: Any, trial: Any, before: list[Any]) -> dict[str, Any]:
    """The grid point that a trial must have, if the sampler has chosen another one; empty if it may keep it.

    Args:
        launch: The sweep that this process launches.
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
    if not any(_point_of(item) == point and _is_taken(item, launch.asked) for item in same):
        return {}
    # All points are taken, and the sampler repeats one. If an earlier start finished it, its job is not run again.
    done = (item for item in same if item.state.name == "COMPLETE" and item.number not in launch.asked)
    return next((_point_of(item) for item in done if is_of(launch.sweep, item)), {})


def _is_taken(trial: Any, asked: list[int]) -> bool:
    """Whether the result of a trial is known, or will be: this process has asked for it."""
    return trial.state.name == "COMPLETE" or (trial.state.name == "RUNNING" and trial.number in asked)


def _point_of(trial: Any) -> dict[str, Any]:
    attributes = trial.system_attrs
    return {key: attributes[key] for key in _POINT} if all(key in attributes for key in _POINT) else {}
