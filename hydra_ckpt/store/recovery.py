"""What a run does to a directory before writing there: publish complete drafts, remove the others."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from hydra_ckpt.errors import CheckpointError, CheckpointExistsError, CheckpointFormatError
from hydra_ckpt.files import Files
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Catalog, Checkpoint, scan
from hydra_ckpt.store.draft import Draft, discard, publish_draft
from hydra_ckpt.store.leftovers import left_if_stuck, sweep_prepared
from hydra_ckpt.store.pointers import move_pointer, read_pointer, remove_pointer

log = logging.getLogger(__name__)


def recover(files: Files, root: Path, previous: str | None, incarnation: str, *, not_beyond: int | None = None) -> None:
    """Coordinator only, holding the lease: clean up the directory after a crash.

    Args:
        files: The file layer.
        root: The checkpoint directory.
        previous: The incarnation that held the lease before, if known.
        incarnation: That of this run.
        not_beyond: The step the run has already loaded; complete drafts of later steps are removed, not published,
            because the run will write those steps itself.
    """
    for path in sorted(root.iterdir()):
        hidden = names.parse_hidden(path.name)
        if hidden is None:
            sweep_prepared(files, path)
            continue
        name, kind = hidden
        if kind == "draft":
            _finish_or_sweep(files, path, name, not_beyond)
        elif kind == "deleting" and not (is_late(path.name, previous) and _put_back(files, path, name)):
            _sweep(files, path)
            _adopt(files, path, name, incarnation)
    _move_left_pointers(files, scan(root))


def _sweep(files: Files, path: Path) -> None:
    with left_if_stuck(path):
        discard(files, path)


def _adopt(files: Files, path: Path, name: str, incarnation: str) -> None:
    """Take over a retired checkpoint that could not be deleted; the next start would think that it was retired late."""
    if path.exists():
        with left_if_stuck(path):
            files.rename(path, path.with_name(names.retired_name(name, "deleting", incarnation)))


def is_late(name: str, previous: str | None) -> bool:
    """Whether a directory to be deleted was retired by a run that no longer held the lease.

    Every run that takes over deletes what the previous run has retired. So anything retired by an older run came late.

    Args:
        name: The hidden directory's name.
        previous: The incarnation that held the lease last, if known.
    """
    retired_by = names.retired_by(name)
    return previous is not None and retired_by is not None and retired_by != previous


def put_back(files: Files, root: Path, incarnation: str, known: Collection[str]) -> None:
    """Coordinator only, holding the lease: publish again what another run has retired since this run took over.

    That run was stopped between its last check of the lease and the rename, and continued later.

    Args:
        files: The file layer.
        root: The checkpoint directory.
        incarnation: This run's incarnation.
        known: Names of the hidden directories that existed when this run took over.
    """
    for path in sorted(root.iterdir()):
        retired_by = names.retired_by(path.name)
        hidden = names.parse_hidden(path.name)
        if hidden is not None and retired_by not in (None, incarnation) and path.name not in known:
            _put_back(files, path, hidden[0])


def _put_back(files: Files, path: Path, name: str) -> bool:
    """Publish a retired checkpoint again if it is whole and its name is free.

    Returns:
        Whether it must stay: it is published again, or may be later, or a newer version wrote it.
    """
    target = path.parent / name
    try:
        Checkpoint.open(path).check_files()
    except CheckpointFormatError as error:
        log.warning("a checkpoint of a newer version is left alone: %s", error)
        return True
    except CheckpointError as error:
        if unanswered := isinstance(error.__cause__, OSError):  # it may be whole, and readable the next time
            log.warning("a retired checkpoint is left alone: %s", error)
        return unanswered
    if not names.is_checkpoint_name(name) or os.path.lexists(target):
        return target.is_symlink()  # it leads to what was moved, perhaps to a disk that is not mounted now
    try:
        files.rename(path, target)
        files.sync_dir(path.parent)
    except OSError as error:
        log.warning(
            "%s had been retired by a run that no longer held the directory; it stays retired: %s", target, error
        )
    else:
        log.warning("%s had been retired by a run that no longer held the directory; it has been put back", target)
    return True


def _finish_or_sweep(files: Files, path: Path, name: str, not_beyond: int | None) -> None:
    try:
        draft = Checkpoint.open(path)
        draft.check_files()
    except CheckpointFormatError as error:
        log.warning("the draft of a newer version is left alone: %s", error)
        return
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):  # it may be whole, and readable the next time
            log.warning("a draft is left alone: %s", error)
        else:
            _sweep(files, path)
        return
    wanted = not_beyond is None or draft.step <= not_beyond
    if wanted and (path.parent / name).is_symlink():
        log.warning("%s is complete, but a symbolic link has its name; it is left alone", path)
    elif wanted and names.is_checkpoint_name(name) and not (path.parent / name).exists():
        publish_draft(files, Draft(path, name, ""))
        log.info("%s was complete when its run ended; it is published now", path.parent / name)
    else:
        _sweep(files, path)


def _move_left_pointers(files: Files, catalog: Catalog) -> None:
    pending = [item for item in catalog.checkpoints if item.pointers_pending]
    for item in pending:
        latest = _latest_step(catalog)
        if latest is None or latest < item.step:
            move_pointer(files, catalog.root, names.LATEST, item.name)
        files.unlink(item.path / names.TOKEN)


def _latest_step(catalog: Catalog) -> int | None:
    target = read_pointer(catalog.root, names.LATEST)
    if target is not None and (target in catalog.newer or target in catalog.links):
        return names.step_of(target)
    latest = catalog.pointed(names.LATEST)
    return None if latest is None else latest.step


def set_aside(files: Files, paths: Iterable[Path], kind: str, incarnation: str) -> None:
    """Coordinator only: hide directories without deleting them; `kind` is corrupt or aside."""
    for path in paths:
        hidden = path.with_name(names.retired_name(path.name, kind, incarnation))
        files.rename(path, hidden)
        log.warning("%s was set aside as %s", path, hidden.name)


def in_the_way(catalog: Catalog, start_step: int) -> list[Path]:
    """The published checkpoints after the step that a run starts from."""
    return [item.path for item in catalog.checkpoints if item.step > start_step]


def conflict_error(paths: list[Path], start_step: int) -> CheckpointExistsError:
    """The error for checkpoints in the way of a run that goes back."""
    listed = ", ".join(path.name for path in paths)
    return CheckpointExistsError(
        f"starting at step {start_step}, but {paths[0].parent} already holds later steps: {listed}. Set "
        "checkpoint.on_conflict=set_aside to move them aside, another checkpoint.checkpoint_dir, or "
        f"restore_from={paths[-1].name} to continue from the newest; to read weights only, restore_parts=[model]"
    )


def repoint(files: Files, catalog: Catalog, pointer: str, instead: Checkpoint | None) -> None:
    """Coordinator only: if a pointer or its target is gone, point it to `instead`, or remove it.

    A pointer to a checkpoint of a newer format, or to a link in a checkpoint's place, stays as it is.
    """
    target = read_pointer(catalog.root, pointer)
    kept = (*catalog.newer, *catalog.links)
    if target is not None and (target in kept or catalog.find(target) is not None):
        return
    if instead is not None:
        move_pointer(files, catalog.root, pointer, instead.name)
    elif target is not None:
        remove_pointer(files, catalog.root, pointer)
