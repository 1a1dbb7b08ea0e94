"""The only reader of small files in a checkpoint directory, which may come from anyone."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from hydra_ckpt.errors import CorruptCheckpointError

# The process has no descriptor left, which says nothing about the file.
_NOT_THE_FILE = {errno.EMFILE, errno.ENFILE}
_NO_LINKS = {errno.ELOOP, errno.EMLINK}


def read_small_file(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """Read a regular file whole. A pipe or a device is refused without waiting for it.

    Args:
        path: The file. Its directory may be a link, the file itself may not.
        limit: The most bytes it may have.
        follow: Whether the file itself may also be a link.

    Raises:
        FileNotFoundError: It does not exist.
        CorruptCheckpointError: It is a link, not a regular file, too large, or cannot be read.
    """
    try:
        descriptor = open_regular(path, follow=follow)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    try:
        return read_whole(descriptor, path, limit)
    finally:
        os.close(descriptor)


def read_whole(descriptor: int, path: Path, limit: int) -> bytes:
    """Read an open regular file whole.

    Args:
        descriptor: The file's descriptor, at its beginning; see `open_regular`.
        path: The file, for the error.
        limit: The most bytes it may have.

    Raises:
        CorruptCheckpointError: It is too large, or cannot be read.
    """
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise CorruptCheckpointError(path, f"is larger than {limit} bytes")
        return _read(descriptor, limit)
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from error


def _read(descriptor: int, limit: int) -> bytes:
    """Read up to the limit without trusting the size, which is 0 for files in /proc."""
    pieces, missing = [], limit
    while missing and (piece := os.read(descriptor, min(missing, 1 << 20))):
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def open_regular(path: Path, *, follow: bool = False, write: bool = False) -> int:
    """Open a regular file, without waiting for anything.

    Args:
        path: The file.
        follow: Whether the file itself may be a link.
        write: Whether to also open it for writing, which locks on NFS need, if this process may.

    Returns:
        The descriptor; the caller closes it.

    Raises:
        FileNotFoundError: It does not exist.
        CorruptCheckpointError: It is a link, not a regular file, or cannot be opened.
    """
    flags = os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = _open(path, flags, write=write)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        raise unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptCheckpointError(path, "is not a regular file")
    return descriptor


def _open(path: Path, flags: int, *, write: bool) -> int:
    if write:
        try:
            return os.open(path, os.O_RDWR | flags)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
                raise
    return os.open(path, os.O_RDONLY | flags)


def size_of(path: Path) -> int:
    """The size of a regular file in bytes; a link is followed.

    Raises:
        CorruptCheckpointError: It is missing, not a regular file, or cannot be examined.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptCheckpointError(path, "the file is missing") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise CorruptCheckpointError(path, "is not a regular file")
    return found.st_size


def unreadable(path: Path, error: Exception) -> CorruptCheckpointError:
    """Turn an error of the operating system into one about the file.

    Raises:
        OSError: The error is not about the file: this process has too many files open.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number in _NOT_THE_FILE:
        raise error
    if number in _NO_LINKS:
        return CorruptCheckpointError(path, "is a symbolic link, which is not followed")
    if number == errno.ENXIO:
        return CorruptCheckpointError(path, "is not a regular file")
    text = error.strerror if isinstance(error, OSError) else str(error)
    return CorruptCheckpointError(path, f"cannot be read: {text or type(error).__name__}")
