"""Who holds a checkpoint directory: the record in `owner.json`, and what can be proved about its process."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.jobs.restarts import (
    ELASTIC,
    SLURM,
    job_of_this_process,
    launch_of_this_process,
    restarts_of_this_process,
)
from hydra_ckpt.store import names
from hydra_ckpt.store.small_files import open_regular, read_whole

__all__ = ["Owner", "Record", "look", "opened", "process_identity", "read_open", "read_owner"]

_PROC = Path("/proc")
_MAX_BYTES = 1 << 20
# Fields of /proc/PID/stat, counted from the state, which is the first after the name.
_STATE, _THREADS, _START_TICKS = 0, 17, 19


@dataclass(frozen=True)
class Owner:
    """The writer of a directory.

    Attributes:
        incarnation: Random text, new at every start.
        host: Name of the host of rank 0.
        pid: Rank 0's process ID.
        started: When that process started, Unix time in seconds. For people: it changes when the clock is set.
        job: The scheduler's ID of the job, kept when it is requeued; empty if there is none.
        run: The sweep and job number the directory belongs to; empty outside a sweep.
        released: Whether it has released the directory; the record of the last writer stays.
        boot: Boot ID of its host; empty if unknown.
        namespace: The namespaces in which `pid` and `ticks` are counted.
        ticks: When the process started, in clock ticks since boot.
        restarts: How often the job was restarted, by the name and ID of its launcher.
        launch: A digest of what stays the same when the run is restarted.
        root: The directory that this record is for, absolute, as its process sees it. In a copy it is another one.
    """

    incarnation: str
    host: str
    pid: int
    started: float
    job: str = ""
    run: str = ""
    released: bool = False
    boot: str = ""
    namespace: str = ""
    ticks: int = 0
    restarts: Mapping[str, int] = field(default_factory=dict)
    launch: str = ""
    root: str = ""

    @classmethod
    def here(cls, run: str = "", root: Path | None = None) -> Owner:
        """The record of this process, for a directory."""
        process = _stat(os.getpid())
        return cls(
            names.nonce(),
            socket.gethostname(),
            os.getpid(),
            psutil.Process().create_time() if process is not None else time.time(),
            job_of_this_process(),
            run,
            boot=_boot() if process is not None else "",
            namespace=_namespace(),
            ticks=int(process[_START_TICKS]) if process is not None else 0,
            restarts=restarts_of_this_process(),
            launch=launch_of_this_process(),
            root=str(root.absolute()) if root is not None else "",
        )

    @classmethod
    def from_data(cls, data: Any) -> Owner | None:
        """The owner that plain data describes; None if the data is invalid. Unknown keys are left out."""
        if not isinstance(data, dict):
            return None
        try:
            owner = cls(**{item.name: data[item.name] for item in fields(cls) if item.name in data})
        except TypeError:
            return None
        return owner if owner._makes_sense() else None

    def _makes_sense(self) -> bool:
        texts = (self.incarnation, self.host, self.job, self.run, self.boot, self.namespace, self.launch, self.root)
        numbers = (self.pid, self.ticks)
        return (
            all(isinstance(text, str) for text in texts)
            and all(type(number) is int and number >= 0 for number in numbers)
            and type(self.started) in {int, float}
            and -math.inf < self.started < math.inf  # JSON as Python reads it has NaN and infinities
            and type(self.restarts) is dict
            and all(type(count) is int for count in self.restarts.values())
        )

    def to_bytes(self) -> bytes:
        """The record's file content."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def lives(self) -> bool | None:
        """Whether its process is alive; None if this process cannot determine that.

        It can only within the same boot of the same host and the same PID namespace. Host names and wall-clock times
        prove nothing.
        """
        if not self.boot or (self.boot, self.namespace) != (_boot(), _namespace()):
            return None
        if not _exists(self.pid):
            return False
        process = _stat(self.pid)
        if process is None:
            return None  # hidden: another user's (the option hidepid of /proc)
        if int(process[_START_TICKS]) != self.ticks:
            return False
        # A zombie process keeps its ID, but no longer writes.
        return process[_STATE] not in "ZX" or int(process[_THREADS]) > 1

    def is_requeued(self, other: Owner) -> bool:
        """Whether this is the other's job, requeued by Slurm: everything that ran before has been ended."""
        return _restarted(SLURM, self.restarts, other.restarts) > 0

    def is_restarted(self, other: Owner) -> bool:
        """Whether torchrun has started the other's ranks again."""
        slurm = _restarted(SLURM, self.restarts, other.restarts)
        return slurm == 0 and _restarted(ELASTIC, self.restarts, other.restarts) > 0


def _restarted(name: str, mine: Mapping[str, int], theirs: Mapping[str, int]) -> int:
    """How many more restarts of one kind the first has seen; negative if it is not the same job."""
    counts = [{key: count for key, count in found.items() if key.startswith(f"{name}=")} for found in (mine, theirs)]
    if counts[0].keys() != counts[1].keys():
        return -1
    return sum(counts[0].values()) - sum(counts[1].values())


def process_identity(pid: int) -> str:
    """A text that identifies a process uniquely, also over time; empty if that is not possible."""
    process = _stat(pid)
    return "" if process is None else f"{_boot()} {_namespace()} {pid} {process[_START_TICKS]}"


def _boot() -> str:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    """Where process IDs and start times are counted; containers have separate namespaces."""
    found = []
    for kind in ("pid", "time"):
        try:
            found.append(str((_PROC / "self/ns" / kind).readlink()))
        except OSError:
            continue
    return " ".join(found)


def _exists(pid: int) -> bool:
    """Whether there is a process of this number in this process's namespace, whoever it belongs to."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None if it cannot be read, or shows another namespace."""
    try:
        # Where /proc was mounted for another PID namespace, its numbers mean other processes.
        if (_PROC / "self").readlink() != Path(str(os.getpid())):
            return None
        text = (_PROC / str(pid) / "stat").read_bytes().decode(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the process name before it may contain anything


@dataclass(frozen=True)
class Record:
    """A record of ownership as read from disk.

    Attributes:
        raw: The file's content; None if there is no file.
        beat: Its modification time in nanoseconds, by the file server's clock.
        owner: The owner it names; None if there is none, or if it is invalid.
    """

    raw: bytes | None
    beat: int = 0
    owner: Owner | None = None


def look(path: Path) -> Record:
    """Read a record. Opening the file makes a network file system query its server.

    A record that is not a regular file, or far too large, has no owner.

    Raises:
        OSError: It exists but cannot be read: it may belong to a live run.
    """
    try:
        with opened(path) as descriptor:
            return read_open(descriptor, path)
    except (FileNotFoundError, NotADirectoryError):
        return Record(None)
    except CorruptCheckpointError as error:
        if isinstance(error.__cause__, OSError) and not path.is_symlink() and path.is_file():
            raise error.__cause__ from None
        return Record(b"")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a file opened for reading; see `open_regular`."""
    descriptor = open_regular(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_open(descriptor: int, path: Path) -> Record:
    """The record in an open file at a path."""
    raw = read_whole(descriptor, path, _MAX_BYTES)
    try:
        owner = Owner.from_data(json.loads(raw))
    except (ValueError, RecursionError):
        owner = None
    return Record(raw, os.fstat(descriptor).st_mtime_ns, owner)


def read_owner(root: Path) -> tuple[Owner, float] | None:
    """The owner on record and the age of its heartbeat in seconds by this host's clock; None if none can be read."""
    try:
        record = look(root / names.OWNER)
    except OSError:
        return None
    return None if record.owner is None else (record.owner, time.time() - record.beat / 1e9)
