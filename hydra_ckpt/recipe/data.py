"""Text as windows of bytes, from files that always exist or from your own."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.recipe.tokenizer import BYTE_OFFSET

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet

    from numpy.typing import NDArray

    from hydra_ckpt.recipe.settings import DataSettings

__all__ = ["Windows", "load_windows"]

# Third-party packages and tests are not part of the standard library's own text.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests"})
_BETWEEN_FILES = b"\n\n"


class Windows(Dataset[torch.Tensor]):
    """Consecutive windows of `seq_len` bytes, each as int64 token ids of shape (seq_len,)."""

    def __init__(self, text: NDArray[np.uint8], seq_len: int) -> None:
        self._windows = text[: len(text) // seq_len * seq_len].reshape(-1, seq_len)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Token ids of window `index`."""
        return torch.from_numpy(self._windows[index].astype(np.int64) + BYTE_OFFSET)


def load_windows(settings: DataSettings) -> tuple[Windows, Windows]:
    """Reads the text and keeps its last part for validation.

    Args:
        settings: `path` is a file, a directory of text files, or None for Python's own standard library.

    Returns:
        Windows to train on and windows to validate on.

    Raises:
        CheckpointConfigError: `data.path` does not exist or holds too little text.
    """
    text = np.frombuffer(_read(settings), dtype=np.uint8)
    total = len(text) // settings.seq_len
    held_out = max(1, int(total * settings.val_fraction))
    if total - held_out < 1:
        raise CheckpointConfigError(
            f"data.path={settings.path} holds {len(text)} bytes of text: too few for windows of "
            f"data.seq_len={settings.seq_len} bytes to train on and to validate on"
        )
    cut = (total - held_out) * settings.seq_len
    return Windows(text[:cut], settings.seq_len), Windows(text[cut:], settings.seq_len)


def _read(settings: DataSettings) -> bytes:
    """At most `max_bytes` of the files' contents, in an order that every machine and every rank agrees on."""
    text = bytearray()
    for file in _files(settings.path):
        content = file.read_bytes()
        if b"\0" in content:
            continue  # not text
        text += content + _BETWEEN_FILES
        if len(text) >= settings.max_bytes:
            break
    return bytes(text[: settings.max_bytes])


def _files(path: str | None) -> Iterator[Path]:
    if path is None:
        library = _below(Path(sysconfig.get_path("stdlib")), left_out=_NOT_LIBRARY)
        yield from (file for file in library if file.suffix == ".py")
    elif Path(path).is_dir():
        yield from _below(Path(path))
    elif Path(path).is_file():
        yield Path(path)
    else:
        raise CheckpointConfigError(f"data.path={path}: there is no such file or directory, seen from {Path.cwd()}")


def _below(directory: Path, left_out: AbstractSet[str] = frozenset()) -> Iterator[Path]:
    """Files in order of their names, then those of the directories below; nothing hidden."""
    entries = sorted((entry for entry in directory.iterdir() if not entry.name.startswith(".")), key=lambda e: e.name)
    yield from (entry for entry in entries if entry.is_file())
    for entry in entries:
        if entry.is_dir() and entry.name not in left_out:
            yield from _below(entry, left_out)
