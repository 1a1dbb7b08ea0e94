"""The file layer of a run that may lose its directory: it checks the lease before every change that could do harm.

A process can still be stopped between the check and the change. A late change does no harm:

- A replacement file is prepared in the checkpoint directory itself, under a hidden name. A run that takes over removes
  such files after it has taken the lease, so a late replacement has no source file.
- The hidden name of a retired checkpoint contains the incarnation of the run that retired it; see `recovery.put_back`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from hydra_ckpt.files import Files, OpenFile

__all__ = ["FencedFiles", "replace_prepared"]


class FencedFiles(Files):
    """Coordinator only: a file layer that renames, replaces and removes nothing once the lease is lost.

    Args:
        inner: The file layer that does the work.
        fence: Raises if another run holds the directory.
    """

    def __init__(self, inner: Files, fence: Callable[[], None]) -> None:
        self._inner = inner
        self._fence = fence

    def make_dir(self, path: Path) -> None:
        """See `Files`."""
        self._inner.make_dir(path)

    def allocate(self, path: Path, nbytes: int) -> None:
        """See `Files`."""
        self._inner.allocate(path, nbytes)

    @contextmanager
    def open(self, path: Path, *, direct: bool = False) -> Iterator[OpenFile]:
        """See `Files`."""
        opened: AbstractContextManager[OpenFile] = self._inner.open(path, direct=direct)
        with opened as file:
            yield file

    def write_new(self, path: Path, data: bytes) -> None:
        """See `Files`."""
        self._inner.write_new(path, data)

    def sync_dir(self, path: Path) -> None:
        """See `Files`."""
        self._inner.sync_dir(path)

    def symlink(self, text: str, path: Path) -> None:
        """See `Files`."""
        self._inner.symlink(text, path)

    def rename(self, source: Path, target: Path) -> None:
        """See `Files`; only while the lease is held."""
        self._fence()
        self._inner.rename(source, target)

    def replace(self, source: Path, target: Path) -> None:
        """See `Files`; only while the lease is held."""
        self._fence()
        self._inner.replace(source, target)

    def unlink(self, path: Path) -> None:
        """See `Files`; only while the lease is held."""
        if os.path.lexists(path):
            self._fence()
            self._inner.unlink(path)

    def remove_tree(self, path: Path) -> None:
        """See `Files`; only while the lease is held."""
        self._fence()
        self._inner.remove_tree(path)


def replace_prepared(files: Files, prepared: Path, target: Path, data: bytes) -> None:
    """Replace or create a small file, prepared under a name that is removed by a run that takes over.

    Args:
        files: The file layer.
        prepared: Where it is written first. Leftovers of an earlier attempt are removed.
        target: The file to replace.
        data: Its content.
    """
    files.unlink(prepared)
    files.write_new(prepared, data)
    files.replace(prepared, target)
    files.sync_dir(target.parent)
