"""Records of ownership in directories that were copied or moved.

A record names the directory it was written for, as its process sees it. Everything else in it stays true in a copy: the
process still exists, and writes somewhere else.
"""

from __future__ import annotations

import os
from pathlib import Path

from hydra_ckpt.files import Files
from hydra_ckpt.store import names
from hydra_ckpt.store.owner import Owner, look

__all__ = ["belongs_to_same_job", "is_copy", "looks_like_copy"]

_JOB = ", job "
# What decides which file a path leads to.
_VIEWS = ("ns/mnt", "root")


def is_copy(files: Files, root: Path, other: Owner) -> bool:
    """Whether the record in a directory is proved to be a copy: its live process holds another directory.

    Paths and inode numbers prove nothing, because a directory has others under another mount. So a file that is created
    here must not appear there, while it exists here.

    Args:
        files: The file layer.
        root: The directory; a file is created in it for a moment.
        other: The owner on record. Its process lives in this boot and PID namespace.
    """
    there = _held_elsewhere(root, other)
    if there is None:
        return False
    probe = f".{names.OWNER}.{names.nonce()}"
    try:
        files.write_new(root / probe, b"")
        appears = os.path.lexists(there / probe)
        # A run that takes the lease removes such files, also under another mount of this directory.
        return not appears and os.path.lexists(root / probe) and _held_elsewhere(root, other) is not None
    except OSError:
        return False
    finally:
        _remove(files, root / probe)


def looks_like_copy(root: Path, other: Owner) -> bool:
    """The same without writing anything; a guess for display. Another mount of one directory looks like a copy."""
    return _held_elsewhere(root, other) is not None


def _held_elsewhere(root: Path, other: Owner) -> Path | None:
    """The directory that a live process holds, if it can be found and has another inode than this one."""
    there = _as_seen_by(other)
    try:
        if there is None or there.samefile(root):
            return None
        held = look(there / names.OWNER).owner
    except (OSError, ValueError):  # a NUL in the path is a ValueError
        return None
    return there if held is not None and held.incarnation == other.incarnation and not held.released else None


def _as_seen_by(other: Owner) -> Path | None:
    """A live process's directory; None if its path may mean another directory for this process."""
    process = Path("/proc", str(other.pid))
    try:
        same = all((process / view).readlink() == Path("/proc/self", view).readlink() for view in _VIEWS)
    except OSError:
        return None  # another user's process
    # Through the process's own root: in a chroot, "/" is another directory under the same name.
    return Path(f"{process}/root{other.root}") if same and other.root.startswith("/") else None


def _remove(files: Files, path: Path) -> None:
    try:
        files.unlink(path)
    except OSError:
        return  # the next run that takes the lease removes it


def belongs_to_same_job(mine: Owner, other: Owner) -> bool:
    """Whether a directory belongs to the same job of a sweep, also if the whole sweep was moved or copied."""
    if not mine.run or not other.run or mine.run == other.run:
        return True
    place = _place_in_sweep(mine)
    return place is not None and place == _place_in_sweep(other)


def _place_in_sweep(owner: Owner) -> tuple[str, str] | None:
    """A job's name and its directory as seen from the sweep's; None if the directory is not inside the sweep's."""
    sweep, found, job = owner.run.rpartition(_JOB)
    if not found or not owner.root.startswith(f"{sweep}/"):
        return None
    return job, owner.root.removeprefix(f"{sweep}/")
