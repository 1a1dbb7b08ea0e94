"""The tensors of one save, handed from the training thread to the background thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hydra_ckpt.errors import CheckpointError, counted
from hydra_ckpt.saving.live_shares import Sources
from hydra_ckpt.storage.lanes import Lanes
from hydra_ckpt.storage.memory import available_bytes
from hydra_ckpt.storage.pool import BufferPool
from hydra_ckpt.storage.staging import Snapshot, Staging, borrow

# How long a change under way may need to finish: seconds, and multiples of the time the copies took.
_WATCH_S, _WATCH_COPIES = 0.02, 2
# How many torn tensors a message names.
_NAMED = 8


class Staged:
    """Bytes the background will write: copied, still being copied, or read in place.

    Empty for a save that has nothing to write.
    """

    def __init__(self) -> None:
        self._sources: Sources | None = None
        self._pool: BufferPool | None = None
        self._staging: Staging | None = None
        self._snapshot: Snapshot | None = None
        self._error: Exception | None = None
        self._copy_s = 0.0
        self._changed: list[int] = []
        self._label: Callable[[int], str] = str
        self._lock = threading.Lock()
        self._sealed = threading.Event()

    @classmethod
    def borrowed(cls, sources: Sources, pool: BufferPool) -> Staged:
        """For a save that training waits for: tensors in host memory that keep their dtype are not copied."""
        staged = cls()
        staged._sources, staged._pool = sources, pool
        Lanes.of(sources.tensors.values()).meet()  # another thread will read them
        return staged

    @classmethod
    def copied(cls, sources: Sources, pool: BufferPool, deferred: frozenset[int]) -> Staged:
        """Copy now, except for what may wait until `finish`.

        An error (no memory) is kept and raised in the background, which reports it to the other ranks.
        """
        staged = cls()
        staged._label = sources.label
        try:
            _check_memory(pool.layout(sources.tensors, sources.casts, sources.plan).nbytes, pool)
            staging = Staging(sources.tensors, pool, sources.casts, deferred, sources.plan)
            staged._snapshot = staging.snapshot
            staging.begin()
            if deferred:
                staged._staging = staging
            else:
                staging.finish()
        except Exception as error:
            staged._error = error
        return staged

    def finish(self) -> None:
        """Copy the rest. After this, live tensors that were copied may change."""
        begun = time.monotonic()
        try:
            if self._staging is not None and self._error is None:
                self._staging.finish()
        except Exception as error:
            self._error = error
        self._copy_s = time.monotonic() - begun

    def let_change(self) -> None:
        """Training thread, after `finish`: check that nothing changed too early. From now on the state may change."""
        with self._lock:
            if self._staging is not None and not self._sealed.is_set():
                self._changed = self._staging.changed()
                self._staging.forget()
            self._sealed.set()

    def watch(self) -> None:
        """Background thread, after `finish`: check that the copies equal the tensors at the time of the save.

        An in-place change that overlaps the last copy is counted only once it has finished, which takes about as long
        as copying what it changes.
        """
        if self._staging is not None and self._error is None:
            try:
                self._compare(self._staging)
            except Exception as error:
                self._error = error
        with self._lock:
            self._staging = None

    def _compare(self, staging: Staging) -> None:
        torn = set(staging.torn())
        if staging.comes_late:
            self._sealed.wait(_WATCH_S + _WATCH_COPIES * self._copy_s)
        self.let_change()
        torn.update(self._changed)
        if torn:
            raise _torn(list(dict.fromkeys(self._label(key) for key in sorted(torn))))

    def snapshot(self) -> Snapshot:
        """The bytes to write; raises the error if copying failed."""
        if self._error is not None:
            raise self._error
        if self._snapshot is None:
            assert self._sources is not None  # made by `borrowed`
            self._snapshot = borrow(self._sources.tensors, self._sources.casts, self._pool)
        return self._snapshot

    def release(self) -> None:
        """Release the memory. Idempotent."""
        if self._snapshot is not None:
            self._snapshot.release()
        self._sources = self._staging = None
        self._label = str


def _torn(names: list[str]) -> CheckpointError:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return CheckpointError(
        f"{counted(len(names), 'tensor')} changed while being copied, between save() and the optimizer's next step "
        f"(weights swapped for an average, or scaled): {', '.join(names[:_NAMED])}{more}. Set "
        "checkpoint.wait_for_staging=true to copy everything before save() returns, or make the change before the "
        "save or after PendingSave.wait_staged()"
    )


def _check_memory(needed: int, pool: BufferPool) -> None:
    """A failed save is better than a process killed for lack of memory.

    Raises:
        CheckpointError: There is no room for the copy.
    """
    if not pool.holds(needed) and (available := available_bytes()) < needed:
        raise CheckpointError(
            f"an asynchronous save needs {needed / 1e9:.3g} GB of host memory for its copy, but only "
            f"{available / 1e9:.3g} GB is available; set checkpoint.is_async=false to save without a copy"
        )
