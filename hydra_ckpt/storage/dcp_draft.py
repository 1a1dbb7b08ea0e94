"""The draft of a save through DCP: the coordinator makes it, the other ranks find it, and a failed save removes it.

DCP's plan cache keeps what a writer puts into a plan and hands it back at later saves, so a plan must not contain
anything that belongs to one save. A plan carries only the coordinator's session, which stays the same as long as its
process lives; the session and the target name the draft. What belongs to one save is in the draft: a token, and the
layout of the files, which the ranks read. `finish` accepts only results that bear the token.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, CheckpointExistsError, CorruptCheckpointError
from hydra_ckpt.files import Files, write_atomically
from hydra_ckpt.layout.file_layout import FileLayout
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.dcp_layout import STATE
from hydra_ckpt.store import names
from hydra_ckpt.store.draft import Draft, discard, publish_draft
from hydra_ckpt.store.manifest import read_manifest, read_sealed, seal

ASSIGNMENT = ".assignment"
_PATIENCE_S = 60.0
_RETRY_S = 0.01


@dataclass(frozen=True)
class Session:
    """What a plan carries: a random text that identifies the coordinator's process."""

    nonce: str


@dataclass(frozen=True)
class Assignment:
    """What the coordinator sends to the ranks in one save.

    Attributes:
        root: The draft's directory.
        token: Of this save alone.
        files: The files that the ranks fill together.
    """

    root: Path
    token: str
    files: tuple[FileLayout, ...]


def session() -> Session:
    """This process's session. A forked process has its own."""
    return _session_of(os.getpid())


@lru_cache(maxsize=1)
def _session_of(process: int) -> Session:  # noqa: ARG001 - what the cache goes by
    return Session(names.nonce())


def draft_path(target: Path, session: Session) -> Path:
    """The path of a target's draft."""
    return target.parent / names.hidden_name(target.name, "draft", session.nonce)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Check that a directory can be published here.

    Args:
        target: It must not exist, or be an empty directory.
        overwrite: Accept a checkpoint, which is then replaced.

    Raises:
        CheckpointExistsError: It exists and is not empty.
        CheckpointConfigError: It is a mount point, whose name cannot be given to another directory.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointExistsError(f"{target} exists and is not a directory; save into a new directory")
    if not target.exists():
        return
    if target.is_mount():
        raise CheckpointConfigError(f"{target} is a mount point; save into a directory below it")
    if any(target.iterdir()) and not (overwrite and _is_ours(target)):
        remedy = (
            "overwrite=True replaces only what SafetensorsWriter wrote; move the directory away first"
            if overwrite
            else "save into a new directory, or set overwrite=True to replace a checkpoint of SafetensorsWriter"
        )
        raise CheckpointExistsError(f"{target} exists already and is not empty; {remedy}")


def _is_ours(target: Path) -> bool:
    try:
        return STATE in read_manifest(target).parts
    except CheckpointError:
        return False


def begin_draft(files: Files, target: Path) -> Draft:
    """Coordinator only: make an empty draft with a fresh token, replacing what a failed save left."""
    path = draft_path(target, session())
    discard(files, path)
    draft = Draft(path, target.name, names.nonce())
    try:
        files.make_dir(path)
        files.write_new(path / names.TOKEN, draft.token.encode())
    except OSError:
        discard(files, path)
        raise
    return draft


def announce(files: Files, draft: Draft, assignment: Assignment) -> None:
    """Coordinator only: announce the assignment to the other ranks."""
    body = [[file.path, [[spec.name, spec.dtype, spec.shape] for spec in file.tensors]] for file in assignment.files]
    data = seal({"token": assignment.token, "files": body})
    write_atomically(files, draft.path / ASSIGNMENT, data, draft.token)


def give_up(files: Files, draft: Draft) -> None:
    """Coordinator only: stop ranks that wait for the assignment. Works on a full disk too."""
    with suppress(OSError):  # then they wait until their patience ends
        files.unlink(draft.path / names.TOKEN)


def await_assignment(path: Path) -> Assignment | None:
    """Any other rank: what the coordinator has announced in the draft at `path`; None if it gave up.

    Raises:
        CheckpointError: The draft does not exist, or nothing was announced.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return _parse(path, read_sealed(path / ASSIGNMENT))
        except FileNotFoundError:
            if path.is_dir() and not (path / names.TOKEN).exists():
                return None
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{path} does not exist, or rank 0 has announced nothing in it. All ranks must save to the same "
                "directory, shared by all hosts, not on a local disk; and a planner class that caches plans must "
                "save in one process group only"
            )
        time.sleep(_RETRY_S)


def _parse(root: Path, body: dict[str, object]) -> Assignment:
    try:
        files = tuple(
            FileLayout(path, tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in tensors))
            for path, tensors in body["files"]  # type: ignore[attr-defined]
        )
        return Assignment(root, str(body["token"]), files)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(root / ASSIGNMENT, f"cannot be read: {error!r}") from None


def publish(files: Files, draft: Draft, *, overwrite: bool) -> None:
    """Coordinator only: give a complete draft its name, replacing an empty directory or an old checkpoint.

    If the process dies between the two renames, both directories remain under hidden names.
    """
    target = draft.target
    check_target(target, overwrite=overwrite)
    if not target.exists():
        publish_draft(files, draft)
        return
    aside = target.with_name(names.hidden_name(target.name, "deleting"))
    files.rename(target, aside)
    try:
        publish_draft(files, draft)
    except BaseException:
        files.rename(aside, target)
        raise
    discard(files, aside)
