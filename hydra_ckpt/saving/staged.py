"""The tensors of one save between the training thread and the background."""

from __future__ import annotations

import threading
import time

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.saving.contents import Sources
from hydra_ckpt.storage.memory import available_bytes
from hydra_ckpt.storage.staging import BufferPool, Snapshot, Staging, borrow, staged_bytes

# How long a change that was under way may need to end: seconds, and multiples of what the copies took.
_WATCH_S, _WATCH_COPIES = 0.02, 2


class Staged:
    """Bytes that the background will write: copied, still being copied, or looked at where they lie.

    Made empty for a save that has nothing to write.
    """

    def __init__(self) -> None:
        self._sources: Sources | None = None
        self._pool: BufferPool | None = None
        self._staging: Staging | None = None
        self._snapshot: Snapshot | None = None
        self._error: Exception | None = None
        self._copy_s = 0.0
        self._lock = threading.Lock()
        self._sealed = threading.Event()

    @classmethod
    def borrowed(cls, sources: Sources, pool: BufferPool) -> Staged:
        """For a save that training waits for: no copies of what lies in host memory and keeps its element type."""
        staged = cls()
        staged._sources, staged._pool = sources, pool
        return staged

    @classmethod
    def copied(cls, sources: Sources, pool: BufferPool, late: frozenset[int]) -> Staged:
        """Copy now, except for what may wait until `finish`.

        An error (no memory) is kept and raised in the background, where the other ranks hear of it.
        """
        staged = cls()
        if not late:
            staged._sealed.set()
        try:
            _check_memory(staged_bytes(sources.tensors, sources.casts), pool)
            staged._staging = Staging(sources.tensors, pool, sources.casts)
            staged._snapshot = staged._staging.snapshot
            staged._staging.copy(sources.tensors.keys() - late)
        except Exception as error:
            staged._error = error
        return staged

    def finish(self) -> None:
        """Copy what is left. Afterwards the live tensors may change, if they were copied."""
        begun = time.monotonic()
        try:
            if self._staging is not None and self._error is None:
                self._staging.copy()
        except Exception as error:
            self._error = error
        self._copy_s = time.monotonic() - begun

    def let_change(self) -> None:
        """For the training thread, behind `finish`: see that nothing was changed too early; from now on it may be."""
        with self._lock:
            self._seal()

    def watch(self) -> None:
        """For the background, behind `finish`: the same, where training does not come by soon.

        A change that was under way while the last bytes were copied shows only when it has ended, which takes about as
        long as copying what it changes.
        """
        if self._staging is not None:
            self._sealed.wait(_WATCH_S + _WATCH_COPIES * self._copy_s)
            self.let_change()

    def _seal(self) -> None:
        if self._staging is not None and self._error is None and not self._sealed.is_set():
            try:
                self._staging.check()
            except CheckpointError as error:
                self._error = error
        self._staging = None
        self._sealed.set()

    def snapshot(self) -> Snapshot:
        """The bytes to write; raises what went wrong in copying them."""
        if self._error is not None:
            raise self._error
        if self._snapshot is None:
            assert self._sources is not None  # made by `borrowed`
            self._snapshot = borrow(self._sources.tensors, self._sources.casts, self._pool)
        return self._snapshot

    def release(self) -> None:
        """Let go of the memory. Idempotent."""
        if self._snapshot is not None:
            self._snapshot.release()
        self._sources = self._staging = None


def _check_memory(needed: int, pool: BufferPool) -> None:
    """Better one save that fails than a process that the system kills.

    Raises:
        CheckpointError: There is no room for the copy.
    """
    if not pool.holds(needed) and (available := available_bytes()) < needed:
        raise CheckpointError(
            f"an asynchronous save needs {needed / 1e9:.3g} GB of host memory for its copy, and "
            f"{available / 1e9:.3g} GB are available; checkpoint.is_async=false writes without a copy"
        )
