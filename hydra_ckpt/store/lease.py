"""The lease: which run may write to a checkpoint directory.

`owner.json` names the run, its incarnation (new at every start), host and process; its modification time is the
heartbeat. A second live writer is refused. A lease whose process is gone from this host, whose run comes back
(a requeued job), or whose heartbeat is old is taken over at once. One whose heartbeat lies in the future says nothing
about its age: whether it still changes is watched.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from hydra_ckpt.errors import CheckpointError, CheckpointExistsError
from hydra_ckpt.files import Files, write_atomically
from hydra_ckpt.store import names

log = logging.getLogger(__name__)

HEARTBEAT_S = 15.0
STALE_S = 120.0
# Seconds between two looks at a heartbeat that is watched.
_LOOK_S = 1.0
# Identity of a job that schedulers keep when they start it again.
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Owner:
    """Who writes.

    Attributes:
        incarnation: Random, new at every start.
        host: Name of the host of rank 0.
        pid: Its process.
        started: When that process started, Unix time in seconds: a reused pid has another.
        job: The scheduler's identity of the job, kept when it is requeued; empty if there is none.
        run: The sweep and job number the directory belongs to; empty outside a sweep.
        released: Whether it has let go of the directory; the record of who wrote last stays.
    """

    incarnation: str
    host: str
    pid: int
    started: float
    job: str = ""
    run: str = ""
    released: bool = False

    @classmethod
    def here(cls, run: str = "") -> Owner:
        """This process."""
        jobs = (f"{name}={os.environ[name]}" for name in _JOB_VARIABLES if os.environ.get(name, "none") != "none")
        started = psutil.Process().create_time()
        return cls(names.nonce(), socket.gethostname(), os.getpid(), started, next(jobs, ""), run)


def read_owner(root: Path) -> tuple[Owner, float] | None:
    """The owner on record and the age of its heartbeat in seconds; None where there is none, or no readable one."""
    path = root / names.OWNER
    try:
        age = time.time() - path.stat().st_mtime
        owner = Owner(**json.loads(path.read_text()))
        texts = (owner.incarnation, owner.host, owner.job, owner.run)
        if not all(isinstance(text, str) for text in texts) or type(owner.pid) is not int or owner.pid < 0:
            return None
        return replace(owner, started=float(owner.started)), age
    except (FileNotFoundError, IsADirectoryError, ValueError, TypeError):
        return None


def acquire(files: Files, root: Path, owner: Owner) -> Owner | None:
    """Coordinator only: become the directory's writer.

    Returns:
        The one before, if that is known.

    Raises:
        CheckpointExistsError: Another live run writes to it, or it belongs to another job of a sweep.
    """
    record = read_owner(root)
    if record is not None:
        other, age = record
        if other.run and owner.run and other.run != owner.run:
            raise CheckpointExistsError(
                f"{root} belongs to the sweep job {other.run}; this is {owner.run}. "
                "Give each job a directory of its own: a relative checkpoint.checkpoint_dir does"
            )
        if is_alive(other, age, owner) and not (_is_ahead(other, age, owner) and _has_stopped(root, other)):
            raise CheckpointExistsError(
                f"{root} is being written by another run: host {other.host}, process {other.pid}, last sign of life "
                f"{max(age, 0.0):.0f} s ago. Stop that run, or set another checkpoint.checkpoint_dir"
            )
    write_atomically(files, root / names.OWNER, _text(owner), owner.incarnation)
    return record[0] if record is not None else None


def _is_ahead(other: Owner, age: float, owner: Owner) -> bool:
    """Whether all that speaks for an owner's life is a heartbeat so far in the future that the clocks must differ."""
    return other.host != owner.host and age < -STALE_S


def _has_stopped(root: Path, other: Owner) -> bool:
    """Whether a heartbeat stays the same for as long as one may be old, by this process's own clock."""
    log.warning(
        "the last sign of life of host %s, process %d, which holds %s, lies in the future: the clocks differ. Looking "
        "for a new one for %.0f s",
        other.host,
        other.pid,
        root,
        STALE_S,
    )
    began, seen = time.monotonic(), _heartbeat(root)
    while seen is not None and time.monotonic() - began < STALE_S:
        time.sleep(_LOOK_S)
        if _heartbeat(root) != seen:
            record = read_owner(root)
            return record is None or record[0].released
    return True


def _heartbeat(root: Path) -> int | None:
    """The time of the last heartbeat, in nanoseconds of whichever clock; None where there is no owner."""
    try:
        return (root / names.OWNER).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _text(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner), indent=1) + "\n").encode()


def is_held(root: Path) -> bool:
    """Whether a live run writes to a directory, as far as can be told from here."""
    record = read_owner(root)
    return record is not None and is_alive(*record, Owner.here())


def is_alive(other: Owner, age: float, owner: Owner) -> bool:
    """Whether the process of an owner lives.

    Args:
        other: The owner on record.
        age: Of its last sign of life, in seconds.
        owner: Who asks.
    """
    if other.released:
        return False
    if other.host == owner.host:
        if other.incarnation in _RELEASED:
            return False
        try:
            process = psutil.Process(other.pid)
            # A killed process that nobody has waited for keeps its number, but writes no more.
            return bool(abs(process.create_time() - other.started) < 1) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
    if other.job and other.job == owner.job:
        return False
    return age < STALE_S


# Incarnations of this process that have let go, for directories where that could not be written down.
_RELEASED: set[str] = set()


def release(files: Files, root: Path, owner: Owner) -> None:
    """Coordinator only: let go of the directory, unless somebody else has it by now."""
    _RELEASED.add(owner.incarnation)
    try:
        check(root, owner)
        write_atomically(files, root / names.OWNER, _text(replace(owner, released=True)), owner.incarnation)
    except (OSError, CheckpointError):
        return  # it is free as soon as this process has ended


def check(root: Path, owner: Owner) -> None:
    """Make sure that nobody has taken over.

    Raises:
        CheckpointError: Another incarnation holds the lease: this process must not publish.
    """
    record = read_owner(root)
    if record is None or record[0].incarnation != owner.incarnation:
        holder = f"host {record[0].host}, process {record[0].pid}" if record else "nobody (owner.json is gone)"
        raise CheckpointError(
            f"{root} is no longer held by this run but by {holder}; "
            "this process was taken for dead and must not publish"
        )


def beat(root: Path, owner: Owner) -> None:
    """Give a sign of life."""
    try:
        check(root, owner)
        os.utime(root / names.OWNER)
    except (OSError, CheckpointError):
        return  # the next save says what is wrong
