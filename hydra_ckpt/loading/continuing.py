"""Which checkpoint a run begins from: what `restore_from` means, or its own newest one if it has begun before."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import CheckpointError, CheckpointNotFoundError, one_line
from hydra_ckpt.storage.pickled import index_of, is_foreign
from hydra_ckpt.store.catalog import Checkpoint, scan
from hydra_ckpt.store.directory import Directory
from hydra_ckpt.store.origin import FRESH, LAUNCHES, ORIGIN, Origin, launches, launches_in, token_of, token_of_foreign
from hydra_ckpt.sweeps.active import active_job
from hydra_ckpt.sweeps.record import RECORD

__all__ = ["Beginning", "beginning_of"]

log = logging.getLogger(__name__)

_SHOWN = 100  # characters of a selector in an error
# These find the newest checkpoint of the run's own directory, so a run that is started again continues anyway.
_OWN = ("auto", "latest")


class Beginning:
    """Chooses what a run begins from. Rank 0 only.

    Args:
        directory: The run's directory.
        on_conflict: "raise" or "set_aside".
    """

    def __init__(self, directory: Directory, on_conflict: str) -> None:
        self._directory = directory
        self._sets_aside = on_conflict == "set_aside"

    def choose(self, selector: str | None, passed_over: Mapping[str, str], *, may_continue: bool) -> dict[str, Any]:
        """The checkpoint to load, as plain data.

        Args:
            selector: What is asked for; None for a fresh start.
            passed_over: Names of damaged checkpoints, and what is wrong with them.
            may_continue: Whether a run that has begun from that before continues with its own newest checkpoint.

        Returns:
            `path` (None for a fresh start), `passed_over`, `continues` (whether it is the run's own newest one, instead
            of what was asked for) and `origin` (what the run began from, None if that is unknown).

        Raises:
            CheckpointError: There is no such checkpoint, or it is damaged, and the run has not begun from it before.
        """
        failure: CheckpointError | None = None
        found: dict[str, Any] = {"path": None, "passed_over": {}}
        try:
            if selector is not None:
                found = self._find(selector, passed_over)
        except CheckpointError as error:
            failure = error
        if selector in _OWN:
            return _raise(failure) if failure else _chosen(found, _origin_in(found["path"]))
        wanted = self._wanted(selector, found["path"])
        if may_continue and (own := self._own(wanted, passed_over)) is not None:
            if own["path"] is not None:
                return _chosen(own, _origin_in(own["path"]), continues=True)
            found["passed_over"] = own["passed_over"]  # all that it had is damaged
        return _raise(failure) if failure else _chosen(found, wanted)

    def _find(self, selector: str, passed_over: Mapping[str, str]) -> dict[str, Any]:
        """See `Directory.choose`; a path may also lead to a checkpoint of another tool."""
        for path in (self._directory.root / selector, Path.cwd() / selector):
            if _can_exist(path, selector) and is_foreign(path):
                return {"path": str(path.resolve()), "passed_over": {}}
        return self._directory.choose(selector, passed_over)

    def _wanted(self, selector: str | None, path: str | None) -> Origin:
        if selector is None:
            return Origin(FRESH)
        if path is None:
            return Origin(selector, os.path.realpath(self._directory.root / selector) if "\0" not in selector else "")
        resolved = Path(path).resolve()
        index = index_of(resolved)
        if index is None:
            return Origin(selector, str(resolved), token_of(resolved))
        return Origin(selector, str(resolved), token_of_foreign(index))

    def _own(self, wanted: Origin, passed_over: Mapping[str, str]) -> dict[str, Any] | None:
        """The newest intact checkpoint of the run that has begun from an origin.

        Returns:
            What `Directory.choose` finds, without a path if all of them are damaged. None if this start is another run.
        """
        if not any(self._is_its(item, wanted) for item in scan(self._directory.root).checkpoints):
            return None
        choice = self._directory.choose("auto", passed_over)
        chosen = None if choice["path"] is None else Checkpoint.open(Path(choice["path"]))
        if chosen is None or not self._is_its(chosen, wanted):
            return {**choice, "path": None}
        _tell(chosen, wanted)
        return choice

    def _is_its(self, checkpoint: Checkpoint, wanted: Origin) -> bool:
        """Whether this start continues the run that wrote a checkpoint."""
        found = Origin.of(checkpoint)
        return found is not None and wanted.is_begun_by(
            found, is_restart=_is_restarted(checkpoint), sets_aside=self._sets_aside
        )


def _chosen(found: Mapping[str, Any], origin: Origin | None, *, continues: bool = False) -> dict[str, Any]:
    return {**found, "continues": continues, "origin": None if origin is None else origin.as_data()}


def _raise(error: CheckpointError) -> dict[str, Any]:
    raise error


def _origin_in(path: str | None) -> Origin | None:
    """What the run that wrote a checkpoint began from."""
    return None if path is None else Origin.of(Checkpoint.open(Path(path)))


def _is_restarted(checkpoint: Checkpoint) -> bool:
    """Whether a launcher has started the run that wrote a checkpoint, and now starts it again."""
    known = launches_in(checkpoint.manifest.details)
    return any(again and name in known for name, again in _launches().items())


def _launches() -> dict[str, bool]:
    """See `launches`; a job of Hydra is also started again if its record says that it has not finished."""
    job = active_job()
    return launches() | ({f"hydra job {job.series}": job.continues} if job is not None and job.series else {})


def _tell(chosen: Checkpoint, wanted: Origin) -> None:
    found, job = Origin.of(chosen), active_job()
    by_hand = f"remove {RECORD} and " if job is not None and job.continues else ""
    log.warning(  # it is not what the setting says
        "restore_from=%s: this run began from %s and continues from its own newest checkpoint, %s (step %d). To begin "
        "again, set another checkpoint.checkpoint_dir (or another run directory), or %sstart it by hand with "
        "checkpoint.on_conflict=set_aside",
        one_line(wanted.selector),
        one_line(found.path if found else "") or "nothing",
        one_line(str(chosen.path)),
        chosen.step,
        by_hand,
    )


def beginning_of(origin: Mapping[str, str] | None) -> dict[str, Any]:
    """What the run's checkpoints record about its start.

    Args:
        origin: What it began from, as `Beginning.choose` returns it.
    """
    names = sorted(_launches())
    return {**({ORIGIN: dict(origin)} if origin else {}), **({LAUNCHES: names} if names else {})}


def _can_exist(path: Path, selector: str) -> bool:
    """Whether the system can be asked for a path.

    Raises:
        CheckpointNotFoundError: It cannot: the path is too long, or lies where this user may not look.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        why = error.strerror if isinstance(error, OSError) else str(error)
        shown = selector if len(selector) < _SHOWN else f"{selector[:_SHOWN]}... ({len(selector)} characters)"
        raise CheckpointNotFoundError(
            f"restore_from={shown}: there can be no such directory here ({why}); name a checkpoint, a path, or auto, "
            "latest, best, none"
        ) from error
    return True
