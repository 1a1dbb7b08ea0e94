"""Detects and refuses directories where another system keeps its checkpoints. Reads only."""

from __future__ import annotations

import os
from pathlib import Path

from hydra_ckpt.errors import CheckpointConfigError, some_of
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import is_checkpoint_directory
from hydra_ckpt.store.pointers import pointed_path

# Names found in our checkpoints, however damaged or unfinished, and not in those of other systems.
_MARKS = (names.MANIFEST, names.TOKEN, names.DIGESTS, names.PROGRESS)
# Extensions of files that hold weights and state; directories also count, other files do not.
_SUFFIXES = frozenset({".safetensors", ".distcp", ".metadata", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npz"})


def refuse_strangers(root: Path) -> None:
    """Raise if another system keeps its checkpoints in a directory.

    Args:
        root: A checkpoint directory; one that does not exist belongs to no system.

    Raises:
        CheckpointConfigError: It holds directories or pointers of another system; the message names them.
    """
    found = strangers(root)
    if found:
        raise CheckpointConfigError(
            f"checkpoint.checkpoint_dir={root} holds checkpoints of another system ({some_of(found)}): they are named "
            f"or placed like ours, but have no {names.MANIFEST}. Nothing was changed. Choose another "
            "checkpoint.checkpoint_dir. A directory that torch.distributed.checkpoint or accelerate has written can be "
            "loaded with checkpoint.restore_from=PATH"
        )


def strangers(root: Path) -> list[str]:
    """What another system must have written to a directory: its steps, and pointers to them."""
    if not root.is_dir():
        return []
    steps = [path.name for path in sorted(root.iterdir()) if is_checkpoint_directory(path) and _is_strange(path)]
    return [*steps, *(text for pointer in (names.LATEST, names.BEST) if (text := _strange_pointer(root, pointer)))]


def _strange_pointer(root: Path, pointer: str) -> str | None:
    """A pointer that leads to another system's checkpoint, with its target."""
    target = pointed_path(root, pointer)
    if target is None or not _is_strange(target) or is_checkpoint_directory(target):
        return None
    return f"{pointer} -> {os.path.relpath(target, root)}"


def _is_strange(directory: Path) -> bool:
    """Whether a directory looks like a checkpoint, but not like one of ours."""
    try:
        below = list(directory.iterdir())
    except OSError:
        return False
    content = any(path.suffix in _SUFFIXES or path.name in _SUFFIXES or path.is_dir() for path in below)
    return content and {path.name for path in below}.isdisjoint(_MARKS)
