"""Pointers: names such as LATEST that lead to a checkpoint, moved atomically.

A pointer is a relative symbolic link; if the file system refuses links, or a directory has that name, it is a text
file, NAME.txt. Such a directory is left by a copy that followed links; it is never touched.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.files import Files, write_atomically
from hydra_ckpt.store import names
from hydra_ckpt.store.small_files import read_small_file

log = logging.getLogger(__name__)

_LINKS_REFUSED = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_MAX_TEXT = 4096


def move_pointer(files: Files, root: Path, pointer: str, target: str) -> None:
    """Coordinator only: make `pointer` lead to the checkpoint `target` (a name in `root`)."""
    if read_pointer(root, pointer) != target:
        point(files, root, pointer, target)


def point(files: Files, root: Path, pointer: str, target: str) -> None:
    """Coordinator only: point `pointer` anywhere, atomically; `target` is a path relative to `root`."""
    link, beside = root / pointer, root / f".{pointer}.{names.nonce()}"
    if _is_directory(link):
        log.warning(
            "%s is a directory and not a link, probably from a copy that followed links; it is not touched, and "
            "%s.txt leads to %s instead. Remove the directory, or give it another name",
            *(link, pointer, target),
        )
        _write_text(files, root, pointer, target)
        return
    try:
        files.symlink(target, beside)
    except OSError as error:
        if error.errno not in _LINKS_REFUSED:
            raise
        _write_text(files, root, pointer, target)
        return
    try:
        files.replace(beside, link)
    except OSError:
        files.unlink(beside)
        raise
    _unlink(files, root / f"{pointer}.txt")
    files.sync_dir(root)


def _write_text(files: Files, root: Path, pointer: str, target: str) -> None:
    write_atomically(files, root / f"{pointer}.txt", (target + "\n").encode(), names.nonce())


def remove_pointer(files: Files, root: Path, pointer: str) -> None:
    """Coordinator only: remove a pointer in either form."""
    _unlink(files, root / pointer)
    _unlink(files, root / f"{pointer}.txt")


def _unlink(files: Files, path: Path) -> None:
    if not _is_directory(path):
        files.unlink(path)


def _is_directory(path: Path) -> bool:
    """Whether this is a directory, not a link to one."""
    return not path.is_symlink() and path.is_dir()  # `is_dir` fails on a link whose text is no valid path


@dataclass(frozen=True, slots=True)
class Protected:
    """What pointers keep.

    Attributes:
        names: The checkpoints that pointers lead to, or into.
        lost: LATEST and BEST, if they exist but cannot be followed.
    """

    names: frozenset[str]
    lost: frozenset[str]


def protected(root: Path) -> Protected:
    """The checkpoints that pointers in a directory lead to: LATEST, BEST, and any a user has made."""
    found, lost = set(), set()
    for pointer in sorted(pointers_in(root)):
        name = error = None
        try:
            name = _name_in(root, target := _text_of(root, pointer))
        except (OSError, CorruptCheckpointError) as unreadable:
            error = unreadable
        if name is not None:
            found.add(name)
        elif pointer in (names.LATEST, names.BEST):
            lost.add(pointer)
            why = f"cannot be read: {error}" if error else f"leads to {target!r}, which is not a checkpoint"
            log.warning("the pointer %s %s", root / pointer, why)
        elif error is not None:
            log.warning("%s is not treated as a pointer: %s", root / pointer, error)
    return Protected(frozenset(found), frozenset(lost))


def pointers_in(root: Path) -> set[str]:
    """Names of all pointers in a directory, including the user's own."""
    return {
        path.name.removesuffix(".txt")
        for path in root.iterdir()
        if (path.is_symlink() or path.suffix == ".txt") and not names.is_prepared(path.name)
    }


def _text_of(root: Path, pointer: str) -> str:
    """A pointer's text, whatever it is; empty if it is too long for a pointer."""
    link, text = root / pointer, root / f"{pointer}.txt"
    if link.is_symlink():
        return str(link.readlink())
    if text.is_symlink():
        return str(text.readlink())
    if text.is_file() and text.stat().st_size > _MAX_TEXT:
        return ""
    return read_small_file(text, _MAX_TEXT).decode(errors="replace").strip()


def _name_in(root: Path, target: str) -> str | None:
    """The checkpoint in `root` that a path leads to or into, following links."""
    try:
        inside = (root / target).resolve().relative_to(root.resolve())
    except (ValueError, RuntimeError, OSError):  # elsewhere; a NUL; a loop of links; a name too long
        return None
    return inside.parts[0] if inside.parts and names.is_checkpoint_name(inside.parts[0]) else None


def pointed_path(root: Path, pointer: str) -> Path | None:
    """The directory that a pointer leads to, anywhere; None if it leads to none."""
    try:
        place = root / pointer
        if not os.path.lexists(place):
            place = root / _text_of(root, pointer)
        found = place.resolve()
    except (OSError, CorruptCheckpointError, ValueError, RuntimeError):
        return None
    return found if os.path.isdir(found) and found != root.resolve() else None  # noqa: PTH112 - pathlib raises


def read_pointer(root: Path, pointer: str) -> str | None:
    """The name a pointer leads to, whether or not that exists; None if there is no usable pointer."""
    link = root / pointer
    try:
        if link.is_symlink():
            target = str(link.readlink())
        else:
            target = read_small_file(root / f"{pointer}.txt", _MAX_TEXT).decode(errors="replace").strip()
    except (OSError, CorruptCheckpointError):
        return None
    # A pointer may only lead to a sibling.
    return target if names.is_checkpoint_name(target) else None
