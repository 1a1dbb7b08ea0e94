"""The lease: which run may write to a checkpoint directory.

`owner.json` names the run, its incarnation (new at every start) and its process; the file's modification time is the
heartbeat. A run takes the lease immediately if it is free, or if the holder is proved dead. If nothing can be proved
about a holder, its heartbeat is watched: if it does not change for three beats, by this process's own clock, the holder
is dead. If the holder is alive, the run is refused.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from hydra_ckpt.errors import CheckpointError, CheckpointExistsError, TakenOverError
from hydra_ckpt.files import Files
from hydra_ckpt.store import names
from hydra_ckpt.store.leftovers import sweep_prepared
from hydra_ckpt.store.owner import Owner, Record, look, opened, read_open, read_owner
from hydra_ckpt.store.relocated import belongs_to_same_job, is_copy, looks_like_copy

__all__ = ["Lease", "Times", "is_held"]

log = logging.getLogger(__name__)

# Incarnations of this process that have released their lease, for directories in which that could not be recorded.
_RELEASED: set[str] = set()


@dataclass(frozen=True)
class Times:
    """How long things take, in seconds.

    Attributes:
        heartbeat_s: Interval between two signs of life.
        stale_s: A heartbeat that does not change for this long belongs to a dead run: a little over three beats.
        grace_s: How long a restarted run waits for its own former processes to end.
        look_s: Interval between two readings of a watched heartbeat.
    """

    heartbeat_s: float = 15.0
    stale_s: float = 50.0
    grace_s: float = 30.0
    look_s: float = 0.5


class Lease:
    """A run's hold on a directory. Coordinator only; any thread may call.

    Args:
        files: The file layer.
        root: The checkpoint directory.
        owner: This process.
        times: How long to wait.
        may_wait: Whether to wait for a holder that may be dead; if not, it is refused.
    """

    def __init__(self, files: Files, root: Path, owner: Owner, times: Times, *, may_wait: bool = True) -> None:
        self._files = files
        self._root = root
        self._path = root / names.OWNER
        self._owner = owner
        self._times = times
        self._may_wait = may_wait
        self._directory: int | None = None  # a descriptor of the directory, while the lease is held
        self._confirmed = float("-inf")  # when this run last saw that it holds the lease
        self._lock = threading.Lock()

    # -- taking ----------------------------------------------------------------------------------------------------

    def acquire(self) -> Owner | None:
        """Become the directory's writer.

        Returns:
            The previous writer, if known.

        Raises:
            CheckpointExistsError: Another live run writes to it, or it belongs to another job of a sweep.
        """
        previous = None
        self._let_go()
        _RELEASED.discard(self._owner.incarnation)  # a start that failed has released it, and is tried again
        while True:
            record = look(self._path)
            if self._holds(record):
                break
            previous = record.owner
            free = record if previous is None else self._await_end(previous, record)
            if free is not None and not self._claim(free):
                self._await_claimant(self._claim_path(free))
        self._directory = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._confirmed = time.monotonic()
        return previous

    def _is_mine(self, record: Record) -> bool:
        return record.owner is not None and record.owner.incarnation == self._owner.incarnation

    def _holds(self, record: Record) -> bool:
        return self._is_mine(record) and record.owner is not None and not record.owner.released

    def _await_end(self, other: Owner, record: Record) -> Record | None:
        """Wait until a holder is known to be dead.

        Returns:
            The record found then, or None if it has been replaced.

        Raises:
            CheckpointExistsError: It is alive, or waiting is not allowed.
        """
        self._refuse_other_job(other)
        began = changed = time.monotonic()
        beats, told = False, False
        while not self._is_free(other):
            now = time.monotonic()
            lives = other.lives()
            waits = self._may_wait and (now - began < self._times.grace_s and self._is_former(other))
            if (lives or beats) and not waits:
                raise self._refusal(other, record)
            if not self._may_wait:
                raise self._unproved(other)
            if lives is None and now - changed >= self._times.stale_s:
                break
            told = told or self._tell(other, lives)
            time.sleep(self._times.look_s)
            found = look(self._path)
            if found.raw != record.raw:
                return None
            beats = found.beat != record.beat
            record, changed = found, time.monotonic() if beats else changed
        return record

    def _is_free(self, other: Owner) -> bool:
        """Whether a holder has released the lease, or is proved to have stopped writing."""
        if other.released or other.incarnation in _RELEASED:
            return True
        lives = other.lives()
        if lives:
            return self._owner.is_requeued(other) or is_copy(self._files, self._root, other)
        return lives is False or self._owner.is_requeued(other) or self._owner.is_restarted(other)

    def _is_former(self, other: Owner) -> bool:
        """Whether a holder is another process of this same run, which may be about to end."""
        itself = (other.boot, other.namespace, other.pid) == (self._owner.boot, self._owner.namespace, self._owner.pid)
        return bool(other.launch) and other.launch == self._owner.launch and not itself

    def _tell(self, other: Owner, lives: bool | None) -> bool:
        if lives:
            log.warning(
                "%s is still held by an earlier start of this run (host %s, process %d); waiting %.0f s at most",
                *(self._root, other.host, other.pid, self._times.grace_s),
            )
        else:
            log.warning(
                "%s is held by a run on host %s, process %d, and this process cannot tell whether it is still alive. "
                "Watching its heartbeat for %.0f s",
                *(self._root, other.host, other.pid, self._times.stale_s),
            )
        return True

    def _claim(self, judged: Record) -> bool:
        """Replace the record that was judged; returns False if another run was doing the same.

        If several runs have judged the same record, only one creates the file that replaces it. The run that takes
        over removes all such files, so a late run has no file left to put in place.
        """
        self._refuse_directory()
        prepared = self._claim_path(judged)
        try:
            self._files.write_new(prepared, self._owner.to_bytes())
        except FileExistsError:
            return False
        except FileNotFoundError:  # removed by a run that has taken over meanwhile
            return self._root.is_dir() or self._raise_gone()
        except OSError:
            with suppress(OSError):
                self._files.unlink(prepared)
            raise
        if look(self._path) != judged:
            self._files.unlink(prepared)
            return True
        with suppress(FileNotFoundError):
            self._files.replace(prepared, self._path)
            self._files.sync_dir(self._root)
            self._sweep()
        return True

    def _claim_path(self, judged: Record) -> Path:
        return self._root / f".{names.OWNER}.after-{hashlib.blake2b(judged.raw or b'', digest_size=6).hexdigest()}"

    def _raise_gone(self) -> bool:
        raise CheckpointError(f"{self._root} is gone: it was removed or renamed while this run wrote to it")

    def _sweep(self) -> None:
        for path in self._root.iterdir():
            if path.name.startswith(f".{names.OWNER}."):
                sweep_prepared(self._files, path)

    def _await_claimant(self, prepared: Path) -> None:
        """Wait while another run takes the lease; removes what a dead run has left."""
        first, began = look(prepared), time.monotonic()
        while first.raw is not None and look(prepared) == first:
            waited = time.monotonic() - began
            dead = first.owner is not None and first.owner.lives() is False
            if not dead and not self._may_wait and waited > self._times.look_s:
                raise CheckpointExistsError(f"{self._root} is being taken by another run right now; try again")
            if dead or waited >= self._times.stale_s:
                self._files.unlink(prepared)
                return
            time.sleep(min(self._times.look_s, 0.05))

    # -- refusing --------------------------------------------------------------------------------------------------

    def _refuse_directory(self) -> None:
        if not self._path.is_symlink() and self._path.is_dir():
            raise CheckpointExistsError(
                f"{self._path} is a directory, and the file that says which run writes to {self._root} must be in its "
                "place. Remove the directory, or give it another name"
            )

    def _refuse_other_job(self, other: Owner) -> None:
        if not belongs_to_same_job(self._owner, other):
            raise CheckpointExistsError(
                f"{self._root} belongs to the sweep job {other.run}; this is {self._owner.run}. Give each job its own "
                "directory, for example by a relative checkpoint.checkpoint_dir; or, if the directory was copied or "
                f"moved here for this job, remove {self._path}"
            )

    def _refusal(self, other: Owner, record: Record) -> CheckpointExistsError:
        if (other.boot, other.namespace, other.pid) == (self._owner.boot, self._owner.namespace, self._owner.pid):
            return CheckpointExistsError(
                f"{self._root} is being written by another run in this same process ({other.pid}), which was not "
                "closed. Call close() on its CheckpointCallback or Checkpointer (callback.close()), or end the "
                "process: restart a notebook's kernel. A `with` block closes it by itself"
            )
        age = max(time.time() - record.beat / 1e9, 0.0)
        return CheckpointExistsError(
            f"{self._root} is being written by another run: {_named(other)}, last sign of life "
            f"{age:.0f} s ago. Stop that run, or set another checkpoint.checkpoint_dir{self._if_relocated(other)}"
        )

    def _if_relocated(self, other: Owner) -> str:
        """What to do if the record may be a copy, as far as this process knows."""
        if other.root in ("", str(self._root)):
            return ""
        return f". That run writes to {other.root}: if {self._root} is a copy of it, remove {self._path}"

    def _unproved(self, other: Owner) -> CheckpointExistsError:
        return CheckpointExistsError(
            f"{self._root} may still be written by another run: host {other.host}, process {other.pid}; this process "
            f"cannot tell whether it is alive. If you know that it has ended, remove {self._path}"
            f"{self._if_relocated(other)}"
        )

    # -- holding ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check that no other run has taken over. If the record is simply gone, take the lease again.

        Raises:
            CheckpointError: Another incarnation holds the lease: this process must not publish.
        """
        self._refuse_fork()
        with self._lock:
            if self._is_replaced():
                raise CheckpointError(
                    f"{self._root} is not the directory that this run began in: that one was renamed or removed, and "
                    "another one has its path. Nothing is written here; move the former one back, or start the run "
                    "again"
                )
            record = look(self._path)
            if record.owner is None and self._has_held_lately():
                self._claim(record)
                record = look(self._path)
            if self._is_mine(record):
                self._confirmed = time.monotonic()
                return
        if record.owner is None and not self._root.is_dir():
            self._raise_gone()
        if record.owner is None:
            raise CheckpointError(
                f"{self._root} is no longer held by this run: {self._path} is gone, or cannot be read. Another run may "
                "have begun here meanwhile; start this one again"
            )
        raise TakenOverError(
            f"{self._root} is no longer held by this run but by {_named(record.owner)}; "
            "this process was presumed dead and must not publish"
        )

    def _is_replaced(self) -> bool:
        """Whether another directory has the path now. The open one keeps its identity also where inodes are made up."""
        try:
            return self._directory is not None and not os.path.samestat(os.fstat(self._directory), self._root.stat())
        except FileNotFoundError:
            return False  # it is gone, which is told apart
        except OSError as error:
            return error.errno == errno.ESTALE

    def _has_held_lately(self) -> bool:
        """Whether the lease was confirmed so recently that no other run can have presumed this one dead."""
        return time.monotonic() - self._confirmed < self._times.stale_s

    def _refuse_fork(self) -> None:
        if os.getpid() != self._owner.pid:
            raise CheckpointError(
                f"{self._root} is held by process {self._owner.pid}, and this process is a fork of it; only the "
                "original process saves"
            )

    def beat(self) -> None:
        """Give a sign of life."""
        try:
            self.check()
            with opened(self._path) as descriptor:
                if self._is_mine(read_open(descriptor, self._path)):
                    os.utime(descriptor)  # on this file, even if it has been replaced by now
        except (OSError, CheckpointError):
            return  # the next save reports the problem

    def release(self) -> None:
        """Release the directory, unless another run has taken it. Does nothing in a forked process."""
        if os.getpid() != self._owner.pid:
            return
        _RELEASED.add(self._owner.incarnation)
        prepared = self._path.with_name(f".{names.OWNER}.{self._owner.incarnation}")
        try:
            if self._is_replaced() or not self._holds(look(self._path)):
                return
            self._files.unlink(prepared)
            self._files.write_new(prepared, replace(self._owner, released=True).to_bytes())
            if self._is_mine(look(self._path)):
                self._files.replace(prepared, self._path)
                self._files.sync_dir(self._root)
            else:
                self._files.unlink(prepared)
        except OSError:
            return  # it becomes free when this process ends
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._directory is not None:
            os.close(self._directory)
        self._directory = None


def _named(owner: Owner) -> str:
    """A run, for people."""
    job = f", job {owner.job}" if owner.job else ""
    return f"host {owner.host}, process {owner.pid}{job}"


def is_held(root: Path) -> bool:
    """Whether a live run writes to a directory; if nothing can be proved, a guess for display."""
    found = read_owner(root)
    if found is None or found[0].released or found[0].incarnation in _RELEASED:
        return False
    owner, age = found
    lives = owner.lives()
    return abs(age) < Times().stale_s if lives is None else lives and not looks_like_copy(root, owner)
