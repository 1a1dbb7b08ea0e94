"""Finds the checkpoints that a user's path refers to. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydra_ckpt.errors import CheckpointNotFoundError
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.pointers import read_pointer
from hydra_ckpt.values import refuse_url

__all__ = ["Located", "holds_checkpoints", "locate", "open_one"]

# Where a run keeps its checkpoints by default.
_DEFAULT_DIRECTORY = "checkpoints"


@dataclass(frozen=True)
class Located:
    """What a path on the command line refers to.

    Attributes:
        root: The checkpoint directory.
        only: The name of a single checkpoint; None for all in the directory.
    """

    root: Path
    only: str | None

    def wants(self, name: str) -> bool:
        """Whether the path refers to this checkpoint."""
        return self.only is None or name == self.only


def locate(given: Path, *, or_else: str = "") -> Located:
    """Find the checkpoint directory for a path, which may be that directory, a run's, or one checkpoint.

    Args:
        given: The path.
        or_else: What else was tried, for the message.

    Raises:
        CheckpointNotFoundError: The directory does not exist, or contains no checkpoint of hydra_ckpt.
    """
    refuse_url("DIR", given)
    path = given.resolve()
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise CheckpointNotFoundError(f"{given} {what}; name a checkpoint directory, a run directory or a checkpoint")
    if names.is_checkpoint_name(path.name) or (path / names.MANIFEST).exists():
        return Located(path.parent, path.name)
    for root in (path, path / _DEFAULT_DIRECTORY):
        if _holds_checkpoints(root):
            return Located(root, None)
    raise CheckpointNotFoundError(
        f"{given} holds no checkpoints: there is no epoch_<epoch>_step_<step> in it or in its {_DEFAULT_DIRECTORY}/. "
        f"{or_else}Name the run's checkpoint_dir"
    )


def open_one(given: Path) -> Checkpoint:
    """The checkpoint that a path names; of a directory with several, the one that LATEST names.

    Raises:
        CheckpointNotFoundError: There is none.
        CorruptCheckpointError: Its manifest is damaged.
    """
    located = locate(given)
    name = located.only or read_pointer(located.root, names.LATEST)
    if name is None:
        raise CheckpointNotFoundError(f"{located.root} has no {names.LATEST}; name one of its checkpoints")
    return Checkpoint.open(located.root / name)


def holds_checkpoints(directory: Path) -> bool:
    """Whether a path leads to checkpoints of one run: a checkpoint, their directory, or the run's."""
    path = directory.resolve()
    if names.is_checkpoint_name(path.name) or (path / names.MANIFEST).exists():
        return True
    return any(_holds_checkpoints(root) for root in (path, path / _DEFAULT_DIRECTORY))


def _holds_checkpoints(root: Path) -> bool:
    entries = root.iterdir() if root.is_dir() else ()
    return any(names.is_checkpoint_name(path.name) or names.parse_hidden(path.name) for path in entries)
