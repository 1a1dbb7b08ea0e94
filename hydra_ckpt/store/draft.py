"""From draft to checkpoint: an unfinished directory becomes visible whole, or never.

    create   .epoch_0_step_9.draft-1f…/ with a random token in it
    (write)  every rank, having read the token back
    publish  manifest written whole; directories flushed; renamed; parent flushed

A draft with a complete manifest is complete: any run that finds it may publish it. Any other draft is removed.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from hydra_ckpt.errors import CheckpointError, CheckpointExistsError, CorruptCheckpointError
from hydra_ckpt.files import Files
from hydra_ckpt.store import names
from hydra_ckpt.store.manifest import Manifest, to_bytes
from hydra_ckpt.store.small_files import read_small_file

_RETRY_S = 0.05
_MAX_TOKEN_BYTES = 4096
TAKEN_BACK_WITHIN_S = 1.0
"""In seconds. A name that has been visible for longer stays: a rank that was cut off may have seen it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Draft:
    """A directory being written.

    Attributes:
        path: The hidden directory.
        name: Its name once published.
        token: The random text in it.
    """

    path: Path
    name: str
    token: str

    @property
    def target(self) -> Path:
        """Where it will be published."""
        return self.path.parent / self.name


def create_draft(files: Files, root: Path, name: str, *, replaces: bool = False) -> Draft:
    """Coordinator only: make the hidden directory.

    Args:
        files: The file layer.
        root: The checkpoint directory.
        name: What the checkpoint will be called.
        replaces: Whether one of this name may be published, and will be set aside when the draft is complete.

    Raises:
        CheckpointExistsError: A checkpoint of this name is already published.
    """
    if os.path.lexists(root / name) and not replaces:
        raise CheckpointExistsError(
            f"{root / name} already exists and is not overwritten. Save under another step, or move that directory "
            f"away first"
        )
    draft = Draft(root / names.hidden_name(name, "draft"), name, names.nonce())
    try:
        files.make_dir(draft.path)
        files.write_new(draft.path / names.TOKEN, draft.token.encode())
    except OSError:
        discard(files, draft.path)
        raise
    return draft


def join_draft(path: Path, name: str, token: str, *, patience_s: float) -> Draft:
    """Find the coordinator's draft from another process, perhaps on another host.

    Raises:
        CheckpointError: The draft does not appear: the directory is not the coordinator's.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            found = read_small_file(path / names.TOKEN, _MAX_TOKEN_BYTES).decode(errors="replace")
        except (OSError, CorruptCheckpointError) as error:
            found = str(error)
        if found == token:
            return Draft(path, name, token)
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{path} is not the directory that rank 0 writes to (its token reads {found!r} here). "
                "checkpoint.checkpoint_dir must be one directory shared by all hosts, not a local disk"
            )
        time.sleep(_RETRY_S)


def complete_draft(files: Files, draft: Draft, manifest: Manifest) -> None:
    """Coordinator only: write the manifest; after this the draft is complete."""
    sync_tree(files, draft.path)
    files.write_new(draft.path / names.MANIFEST, to_bytes(manifest))
    files.sync_dir(draft.path)


def sync_tree(files: Files, root: Path) -> None:
    """Flush the entries of a directory and of all directories below it."""
    for directory in sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True):
        files.sync_dir(directory)
    files.sync_dir(root)


def publish_draft(files: Files, draft: Draft) -> Path:
    """Coordinator only: give a complete draft its name, atomically and durably."""
    files.rename(draft.path, draft.target)
    renamed = time.monotonic()
    try:
        files.sync_dir(draft.path.parent)
    except OSError as error:
        # It may not be durable, so it is not published: rename it back, where an abort finds it.
        if time.monotonic() - renamed < TAKEN_BACK_WITHIN_S and _is_taken_back(files, draft):
            raise
        log.warning("%s is published, but a power failure may still undo that: %s", draft.target, error)
    return draft.target


def _is_taken_back(files: Files, draft: Draft) -> bool:
    try:
        files.rename(draft.target, draft.path)
    except OSError:
        return False
    return True


def discard(files: Files, path: Path) -> None:
    """Remove a draft, or its remains."""
    if path.exists():
        files.remove_tree(path)
