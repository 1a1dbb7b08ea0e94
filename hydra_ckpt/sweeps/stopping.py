"""How a stopped job ends where others run beside it, and what the other jobs of its sweep are told."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from hydra_ckpt.errors import CorruptCheckpointError, printable
from hydra_ckpt.files import Files, write_atomically
from hydra_ckpt.jobs.run import HydraRun, LauncherKind
from hydra_ckpt.store import names
from hydra_ckpt.store.owner import process_identity
from hydra_ckpt.store.small_files import read_small_file
from hydra_ckpt.sweeps.record import FAILED, read_record
from hydra_ckpt.sweeps.summary import job_directories

__all__ = [
    "Halt",
    "JobStopped",
    "SweepStopped",
    "arrived",
    "begin_sweep",
    "ends_in_exception",
    "halt",
    "halt_jobs",
    "halted",
]

log = logging.getLogger(__name__)

# By whether running jobs are meant: a job that stops must not take back what all were told.
_HALTS = {True: ".hydra_ckpt_halt_all.json", False: ".hydra_ckpt_halt.json"}
_MAX_BYTES = 1 << 20


class JobStopped(Exception):  # noqa: N818 - it is no error
    """A job of a sweep was stopped before its end, and is to be continued by the next start of the sweep.

    Raised by `resumable_job` under launchers that run several jobs at once (joblib, submitit). It is an ordinary
    exception, because that is the only ending of a job under which such launchers let the other jobs finish.

    Pickled, it becomes a `SweepStopped`. So it arrives in the launcher's process, where the sweeper raises what a job
    ended with: that ends the sweep without another job, and no study takes the job for a failed trial.

    Attributes:
        exit_code: What the program exits with.
        sweep_dir: The sweep's directory.
    """

    def __init__(self, message: str, exit_code: int, sweep_dir: Path) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.sweep_dir = sweep_dir

    def __reduce__(self) -> tuple[Any, ...]:
        return arrived, (str(self), self.exit_code, str(self.sweep_dir))


class SweepStopped(SystemExit):
    """`JobStopped` in the launcher's process.

    Attributes:
        message: What was stopped, and why.
    """

    def __init__(self, message: str, exit_code: int, sweep_dir: Path) -> None:
        super().__init__(exit_code)
        self.message = message
        self._exit_code = exit_code
        self._sweep_dir = sweep_dir

    @property
    def code(self) -> int:
        """The exit code: 1 where another job of this start has failed, because the sweeper will not say so."""
        return 1 if _failed_jobs(self._sweep_dir) else self._exit_code

    @code.setter
    def code(self, value: int) -> None:
        self._exit_code = value

    def __str__(self) -> str:
        return self.message


def arrived(message: str, exit_code: int, sweep_dir: str) -> SweepStopped:
    """What a `JobStopped` is in the launcher's process."""
    log.warning("%s", message)
    return SweepStopped(message, exit_code, Path(sweep_dir))


def _failed_jobs(sweep_dir: Path) -> list[str]:
    """The jobs of a sweep that have failed since this process began; they are logged."""
    began = psutil.Process().create_time()
    found = []
    for directory in job_directories(sweep_dir):
        record = read_record(directory)
        if record is not None and record.state == FAILED and (record.ended or 0.0) >= began:
            found.append(directory.name)
            log.error("job %s failed: %s", directory.name, printable(str(record.error)))
    return found


@dataclass(frozen=True)
class Halt:
    """What the jobs of one launcher are told: none of them begins any more.

    Attributes:
        why: For people.
        exit_code: What the program exits with.
        running: Whether jobs that run already save and stop as well.
    """

    why: str
    exit_code: int
    running: bool


_begun = False  # whether this process launches a sweep, and replaces what its jobs end in: see `begin_sweep`


def begin_sweep(sweep_dir: Path) -> None:
    """A sweep begins in this process, whose Hydra callback calls `arrived` for each `JobStopped`.

    Args:
        sweep_dir: The sweep's directory. What an earlier start has told its jobs there is withdrawn.
    """
    global _begun  # noqa: PLW0603 - jobs that run in this process are called by Hydra
    _begun = True
    for name in _HALTS.values():
        try:
            (sweep_dir / name).unlink(missing_ok=True)
        except OSError as error:
            log.debug("%s stays: %s", sweep_dir / name, error)  # it names another process


def ends_in_exception(run: HydraRun) -> bool:
    """Whether a stopped job of a sweep ends in `JobStopped`, and otherwise in SystemExit.

    In the launcher's own process only where a sweeper has asked for the jobs after it already: these are recorded as
    waiting, so that the next start knows of them.
    """
    if run.sweep_dir is None:
        return False
    return run.launcher is not LauncherKind.ONE_BY_ONE or (run.is_judged and _begun)


def halt(run: HydraRun, order: Halt) -> None:
    """Tell the other jobs of this job's launcher that no further one begins; later starts are not concerned.

    Raises:
        OSError: It cannot be written.
    """
    if run.sweep_dir is not None and ends_in_exception(run) and run.launcher is not LauncherKind.QUEUED:
        halt_jobs(run.sweep_dir, _launcher(run), order)


def halt_jobs(sweep_dir: Path, launcher: int, order: Halt) -> None:
    """Tell the jobs of a launcher that no further one begins.

    Args:
        sweep_dir: The sweep's directory.
        launcher: The launcher's process.
        order: What to tell.

    Raises:
        OSError: It cannot be written.
    """
    data = {**asdict(order), "launcher": process_identity(launcher)}
    write_atomically(Files(), sweep_dir / _HALTS[order.running], (json.dumps(data) + "\n").encode(), names.nonce())


def halted(run: HydraRun) -> Halt | None:
    """What the jobs of this job's launcher were told."""
    if run.sweep_dir is None or run.launcher is LauncherKind.QUEUED:
        return None
    launcher = process_identity(_launcher(run))
    orders = (_read(run.sweep_dir / name, launcher) for name in _HALTS.values())
    return next((order for order in orders if order is not None), None)


def _read(path: Path, launcher: str) -> Halt | None:
    """What a file tells the jobs of a launcher."""
    try:
        data = json.loads(read_small_file(path, _MAX_BYTES))
        order = Halt(str(data["why"]), int(data["exit_code"]), data["running"] is True)
        return order if launcher and launcher == data["launcher"] else None
    except (OSError, CorruptCheckpointError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _launcher(run: HydraRun) -> int:
    """The process that launches the jobs: this one, or the one that has started it."""
    return os.getpid() if run.launcher is LauncherKind.ONE_BY_ONE else os.getppid()
