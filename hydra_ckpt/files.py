"""The seam to the file system: every change on disk passes through one `Files` object.

Tests wrap it to record or to fail operations (`hydra_ckpt.testing`); reading needs no seam and does not use it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import logging
import mmap
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from hydra_ckpt.direct import KINDS, PAGE, DirectWriter

log = logging.getLogger(__name__)

# The system call itself: where a file system has none of its own, `os.posix_fallocate` would write to every block, and
# so over what others write to the file. None on platforms without it.
_FALLOCATE = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
if _FALLOCATE is not None:
    _FALLOCATE.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_BLOCK = 512  # bytes that `st_blocks` counts in

# Linux caps one write at 2 GiB - 4 KiB; smaller calls also let a failing disk be noticed earlier.
_WRITE_BYTES = 64 << 20
# Less than this is sooner in the page cache than on its way to a device.
_DIRECT_BYTES = 256 << 10
_LOCK_WAIT_S = 20.0
# What a file system answers that cannot flush a directory.
_NO_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_MOUNTS = Path("/proc/self/mounts")


class OpenFile:
    """A file open for writing at given positions.

    Args:
        path: Where it lies.
        descriptor: Of the open file.
        direct: Whether large pieces go past the page cache where the file system can.
    """

    def __init__(self, path: Path, descriptor: int, *, direct: bool = False) -> None:
        self.path = path
        self._descriptor = descriptor
        self._direct = direct
        self._writer: DirectWriter | None = None
        self._reserved: bool | None = None

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        """Write all bytes of `data` from `offset` on."""
        view = memoryview(data).cast("B")
        if len(view) >= _DIRECT_BYTES and (writer := self._past_cache()) is not None:
            start = -offset % PAGE
            end = start + (len(view) - start) // PAGE * PAGE
            self._write(offset, view[:start])
            writer.write(offset + start, view[start:end])
            offset, view = offset + end, view[end:]
        self._write(offset, view)

    def _past_cache(self) -> DirectWriter | None:
        """Created for the first large piece; None if that is not possible, which only costs time."""
        if self._direct and self._writer is None:
            self._direct = False
            if _mounted_as(self.path, _MOUNTS) in KINDS:
                with suppress(OSError, RuntimeError):
                    self._writer = DirectWriter(self.path, self._descriptor)
        return self._writer

    def _write(self, offset: int, view: memoryview) -> None:
        while view:
            written = os.pwrite(self._descriptor, view[:_WRITE_BYTES], offset)
            view, offset = view[written:], offset + written

    def write_runs(self, offset: int, run: int, count: int, stride: int, data: memoryview) -> None:
        """Write `count` runs of `run` bytes, one every `stride` bytes, from contiguous `data`.

        Through a memory map in one strided copy where the file's space is reserved: thousands of short writes would
        each wait for the interpreter's lock beside a busy training thread. Elsewhere run by run, because a full disk
        fails a write, but ends a process that stores to a map.
        """
        if self._reserved is None:
            self._reserved = _is_reserved(self._descriptor)
        if self._reserved:
            self._map_runs(offset, run, count, stride, data)
        else:
            view = memoryview(data).cast("B")
            for number in range(count):
                self._write(offset + number * stride, view[number * run : (number + 1) * run])

    def _map_runs(self, offset: int, run: int, count: int, stride: int, data: memoryview) -> None:
        page = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = offset - page + (count - 1) * stride + run
        with mmap.mmap(self._descriptor, length, offset=page) as window:
            target = np.ndarray((count, run), np.uint8, buffer=window, offset=offset - page, strides=(stride, 1))
            target[...] = np.frombuffer(data, np.uint8).reshape(count, run)
            del target  # a map cannot close while an array refers to it

    def sync(self) -> None:
        """Return when everything written to the file is on disk."""
        if self._writer is not None:
            self._writer.flush()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file; not all of it is on disk unless `sync` came before."""
        if self._writer is not None:
            self._writer.close()
        os.close(self._descriptor)


class Files:
    """The local file system. Paths are absolute; errors are the operating system's own (`OSError`)."""

    def make_dir(self, path: Path) -> None:
        """Create a directory and its missing parents; one that exists is fine."""
        path.mkdir(parents=True, exist_ok=True)

    def allocate(self, path: Path, nbytes: int) -> None:
        """Create a new file of this size, with its space reserved where that can be, so that a full disk shows now."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if nbytes and not _reserve(descriptor, nbytes):
                os.ftruncate(descriptor, nbytes)
        finally:
            os.close(descriptor)

    @contextmanager
    def open(self, path: Path, *, direct: bool = False) -> Iterator[OpenFile]:
        """Open an existing file for writing at positions.

        Args:
            path: The file.
            direct: Write large pieces past the page cache where the file system can. Nobody may write to the file
                through a memory map, that is by `write_runs`.
        """
        file = OpenFile(path, os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), direct=direct)
        try:
            yield file
        finally:
            file.close()

    def write_new(self, path: Path, data: bytes) -> None:
        """Create a small file with this content, durably."""
        self.allocate(path, 0)
        with self.open(path) as file:
            file.write_at(0, data)
            file.sync()

    def sync_dir(self, path: Path) -> None:
        """Return when the directory's entries are on disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FLUSH:
                raise
            _warn_of_no_flush(path)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or directory a name that does not exist yet."""
        # rename(2) of a directory silently replaces an empty one.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "already there", str(target))
        source.rename(target)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file the name of another, replacing it atomically."""
        os.replace(source, target)

    def symlink(self, text: str, path: Path) -> None:
        """Create a symbolic link with this text."""
        path.symlink_to(text)

    def unlink(self, path: Path) -> None:
        """Remove a file or link; one that is gone already is fine."""
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and all below it; links are removed, not followed."""
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)


@functools.cache
def _warn_of_no_flush(path: Path) -> None:
    """Once for each directory."""
    log.warning(
        "the file system of %s cannot flush directories, like some network folders: after a power failure, new "
        "checkpoints may be missing there",
        path,
    )


def _reserve(descriptor: int, nbytes: int) -> bool:
    """Reserve a file's first bytes, none of which changes; False where the file system does not do that.

    Raises:
        OSError: There is no space.
    """
    while _FALLOCATE is not None and _FALLOCATE(descriptor, 0, 0, nbytes) != 0:
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return _FALLOCATE is not None


def _is_reserved(descriptor: int) -> bool:
    """Whether every byte of a file that is not empty has its place on disk.

    Blocks alone do not tell: a file system that reserves nothing may count those that say where the others are.
    """
    status = os.fstat(descriptor)
    return status.st_blocks * _BLOCK >= status.st_size and _reserve(descriptor, 1)


# File systems that may lose bytes when different hosts write to neighbouring ranges of one file.
_LOOSE = ("nfs", "cifs", "smb", "fuse", "9p", "afs", "vboxsf", "virtiofs", "sshfs")


def keeps_ranges_apart(path: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether byte ranges that different hosts write to one file stay apart; judged by the mount's type.

    Local file systems, Lustre and GPFS promise it; NFS, SMB, FUSE and object mounts do not. An unknown platform
    without a table of mounts counts as local.
    """
    return not _mounted_as(path, mounts).startswith(_LOOSE)


def _mounted_as(path: Path, mounts: Path) -> str:
    """The kind of file system of a path; empty if unknown."""
    try:
        rows = [line.split() for line in os.fsdecode(mounts.read_bytes()).splitlines()]
    except OSError:
        return ""
    place, kind, longest = os.path.realpath(path), "", 0
    for _, escaped, mounted, *_ in (row for row in rows if len(row) > 2):
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), escaped)
        inside = os.path.isabs(point) and os.path.commonpath([place, point]) == point
        if inside and len(point) >= longest:  # what was mounted last lies on top
            kind, longest = mounted, len(point)
    return kind


def write_atomically(files: Files, path: Path, data: bytes, nonce: str) -> None:
    """Replace or create a small file so that a reader, or a crash, sees the old or the new content, whole."""
    beside = path.with_name(f".{path.name}.{nonce}")
    files.unlink(beside)
    files.write_new(beside, data)
    files.replace(beside, path)
    files.sync_dir(path.parent)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory, where the file system has locks, so that writers of a file there take turns."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + _LOCK_WAIT_S
    try:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    break  # this file system has no locks
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
