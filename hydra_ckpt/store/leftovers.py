"""Removes what a run that died has left. Leftovers that cannot be removed are harmless and must not prevent a start."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra_ckpt.files import Files
from hydra_ckpt.store import names

__all__ = ["left_if_stuck", "sweep_prepared"]

log = logging.getLogger(__name__)


@contextmanager
def left_if_stuck(path: Path) -> Iterator[None]:
    """Warn if something cannot be removed, and continue."""
    try:
        yield
    except OSError as error:
        log.warning("%s, left by a run that died, cannot be removed: %s", path, error)


def sweep_prepared(files: Files, path: Path) -> None:
    """Remove a file prepared to replace a pointer or small file, but never a user's file."""
    if names.is_prepared(path.name) and (path.is_symlink() or not path.is_dir()):
        with left_if_stuck(path):
            files.unlink(path)
