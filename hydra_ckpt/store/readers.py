"""Readers' leases: a checkpoint that somebody reads is not pruned.

A reader holds a shared lock on the manifest. It changes nothing on disk, needs no right to write, and ends with the
reader's process. Where a file system has no locks, or does not pass them on to other hosts, there is no lease.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra_ckpt.store import names

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL}


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Keep a published checkpoint from being pruned for as long as this is held.

    Raises:
        FileNotFoundError: It is gone already.
    """
    descriptor = os.open(checkpoint / names.MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(descriptor, fcntl.LOCK_SH)
        # Retired between the opening and the lock: what the name leads to now is not what is locked.
        (checkpoint / names.MANIFEST).stat()
        yield
    finally:
        os.close(descriptor)


def is_read(checkpoint: Path) -> bool:
    """Whether anybody holds a lease on a checkpoint at this moment."""
    descriptor = os.open(checkpoint / names.MANIFEST, os.O_RDWR | os.O_CLOEXEC)
    try:
        return not _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Whether the lock was given, or there are none."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
