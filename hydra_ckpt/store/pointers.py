"""Pointers: names such as LATEST that lead to a checkpoint, moved atomically.

A pointer is a relative symbolic link; where the file system refuses links it is a text file, NAME.txt.
"""

from __future__ import annotations

import errno
from pathlib import Path

from hydra_ckpt.files import Files, write_atomically
from hydra_ckpt.store import names

_LINKS_REFUSED = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_MAX_TEXT = 4096


def move_pointer(files: Files, root: Path, pointer: str, target: str) -> None:
    """Coordinator only: let `pointer` lead to the checkpoint `target` (a name in `root`)."""
    if read_pointer(root, pointer) == target:
        return
    nonce = names.nonce()
    beside = root / f".{pointer}.{nonce}"
    try:
        files.symlink(target, beside)
    except OSError as error:
        if error.errno not in _LINKS_REFUSED:
            raise
        write_atomically(files, root / f"{pointer}.txt", (target + "\n").encode(), nonce)
        return
    files.replace(beside, root / pointer)
    files.unlink(root / f"{pointer}.txt")
    files.sync_dir(root)


def remove_pointer(files: Files, root: Path, pointer: str) -> None:
    """Coordinator only: remove a pointer in either form."""
    files.unlink(root / pointer)
    files.unlink(root / f"{pointer}.txt")


def read_pointer(root: Path, pointer: str) -> str | None:
    """The name a pointer leads to, whether or not that exists; None where there is no usable pointer."""
    link, text = root / pointer, root / f"{pointer}.txt"
    if link.is_symlink():
        target = str(link.readlink())
    elif text.is_file() and not text.is_symlink() and text.stat().st_size <= _MAX_TEXT:
        target = text.read_text(errors="replace").strip()
    else:
        return None
    # A pointer leads to a sibling, nowhere else.
    return target if names.is_checkpoint_name(target) else None
