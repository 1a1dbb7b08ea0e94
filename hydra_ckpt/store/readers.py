"""Readers' leases: a checkpoint that is being read is not pruned.

A reader holds a shared lock on the manifest. The lock changes nothing on disk, needs no write permission, and ends with
the reader's process. If a file system has no locks, or does not share them with other hosts, there is no lease.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra_ckpt.errors import CheckpointError, CorruptCheckpointError
from hydra_ckpt.store import names
from hydra_ckpt.store.small_files import open_regular

log = logging.getLogger(__name__)

# A run that prunes holds its lock for an instant.
_PATIENCE_S = 5.0
_RETRY_S = 0.05


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Keep a published checkpoint from being pruned for as long as this is held.

    Raises:
        FileNotFoundError: It is already gone.
        CorruptCheckpointError: Its manifest cannot be opened.
        CheckpointError: Another process keeps it locked. That is no damage, so it is not passed over.
    """
    descriptor = open_regular(checkpoint / names.MANIFEST)
    try:
        _share(descriptor, checkpoint / names.MANIFEST)
        # Raises if it was retired between open and lock: then the locked file is not the one with this name.
        (checkpoint / names.MANIFEST).stat()
        yield
    finally:
        os.close(descriptor)


def is_read(checkpoint: Path) -> bool:
    """Whether a reader holds a lease on a checkpoint right now; True if that cannot be determined."""
    try:
        descriptor = open_regular(checkpoint / names.MANIFEST, write=True)
    except (OSError, CorruptCheckpointError) as error:
        log.warning("%s is kept, because it is unknown whether it is being read (%s)", checkpoint, error)
        return True
    try:
        return not _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _share(descriptor: int, manifest: Path) -> None:
    """Take a shared lock, but do not wait for ever: the process that holds the file may be stopped."""
    deadline = time.monotonic() + _PATIENCE_S
    while not _lock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB):
        if time.monotonic() >= deadline:
            raise CheckpointError(
                f"{manifest} has been locked by another process for {_PATIENCE_S:.0f} s, so the checkpoint cannot be "
                "read safely: a run or `hydra-ckpt prune` there may be stopped. Find the process (lsof, fuser or "
                "/proc/locks), let it continue or end it, and start again"
            )
        time.sleep(_RETRY_S)


def _lock(descriptor: int, kind: int) -> bool:
    """Whether the lock was granted, or the file system has none."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError as error:  # file systems have many ways to say that
        log.debug("no lock: %s", error)
    return True
