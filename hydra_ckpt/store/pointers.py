"""Pointers: names such as LATEST that lead to a checkpoint, moved atomically.

A pointer is a relative symbolic link; where the file system refuses links it is a text file, NAME.txt.
"""

from __future__ import annotations

import errno
from pathlib import Path

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.files import Files, write_atomically
from hydra_ckpt.store import names

_LINKS_REFUSED = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_MAX_TEXT = 4096


def move_pointer(files: Files, root: Path, pointer: str, target: str) -> None:
    """Coordinator only: let `pointer` lead to the checkpoint `target` (a name in `root`)."""
    if read_pointer(root, pointer) != target:
        point(files, root, pointer, target)


def point(files: Files, root: Path, pointer: str, target: str) -> None:
    """Coordinator only: let `pointer` lead anywhere, by a path seen from `root`; atomically."""
    nonce = names.nonce()
    beside = root / f".{pointer}.{nonce}"
    try:
        files.symlink(target, beside)
    except OSError as error:
        if error.errno not in _LINKS_REFUSED:
            raise
        write_atomically(files, root / f"{pointer}.txt", (target + "\n").encode(), nonce)
        return
    try:
        files.replace(beside, root / pointer)
    except OSError:
        files.unlink(beside)
        raise
    files.unlink(root / f"{pointer}.txt")
    files.sync_dir(root)


def remove_pointer(files: Files, root: Path, pointer: str) -> None:
    """Coordinator only: remove a pointer in either form."""
    files.unlink(root / pointer)
    files.unlink(root / f"{pointer}.txt")


def protected(root: Path) -> set[str]:
    """The checkpoints that pointers in a directory lead to, or into: LATEST, BEST, and any a user has made.

    Raises:
        CorruptCheckpointError: LATEST or BEST says something that cannot be read, or a pointer cannot be opened; what
            it protects is then unknown.
    """
    found = set()
    for pointer in sorted(pointers_in(root)):
        try:
            target = _text_of(root, pointer)
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptCheckpointError(root / pointer, f"the pointer cannot be read ({error})") from None
        name = _name_in(root, target)
        if name is not None:
            found.add(name)
        elif pointer in (names.LATEST, names.BEST):
            raise CorruptCheckpointError(root / pointer, f"the pointer leads to no checkpoint but to {target!r}")
    return found


def pointers_in(root: Path) -> set[str]:
    """Names of all pointers in a directory, the user's own included."""
    return {path.name.removesuffix(".txt") for path in root.iterdir() if path.is_symlink() or path.suffix == ".txt"}


def _text_of(root: Path, pointer: str) -> str:
    """What a pointer says, whatever it is."""
    link, text = root / pointer, root / f"{pointer}.txt"
    if link.is_symlink():
        return str(link.readlink())
    if text.is_symlink():
        return str(text.readlink())
    with text.open(encoding="utf-8", errors="replace") as file:
        return file.read(_MAX_TEXT).strip()


def _name_in(root: Path, target: str) -> str | None:
    """The checkpoint in `root` that a path leads to or into, over links."""
    try:
        inside = (root / target).resolve().relative_to(root.resolve())
    except (ValueError, RuntimeError):  # elsewhere; a NUL; links in a circle
        return None
    return inside.parts[0] if inside.parts and names.is_checkpoint_name(inside.parts[0]) else None


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
