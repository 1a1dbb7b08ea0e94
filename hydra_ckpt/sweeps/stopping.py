"""How a stopped job ends when others run beside it, and how the other jobs of its sweep are told to stop."""

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
from hydra_ckpt.sweeps.directories import job_directories, job_name
from hydra_ckpt.sweeps.record import FAILED, read_record

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

# One file for all jobs and one for jobs not yet started, so that a job that stops does not weaken an order to all.
_HALTS = {True: ".hydra_ckpt_halt_all.json", False: ".hydra_ckpt_halt.json"}
_MAX_BYTES = 1 << 20


class JobStopped(Exception):  # noqa: N818 - it is not an error
    """A job of a sweep was stopped before its end; the next start of the sweep continues it.

    Raised by `resumable_job` under launchers that run several jobs at once (joblib, submitit). It is an ordinary
    exception, because only then do such launchers let the other jobs finish.

    Pickling turns it into a `SweepStopped`, which arrives in the launcher's process. There the sweeper raises what a
    job ended with: that ends the sweep without starting another job, and no study counts the job as a failed trial.

    Attributes:
        exit_code: The program's exit code.
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
        """The exit code: 1 if another job of this start has failed, because the sweeper will not report that."""
        return 1 if _failed_jobs(self._sweep_dir) else self._exit_code

    @code.setter
    def code(self, value: int) -> None:
        self._exit_code = value

    def __str__(self) -> str:
        return self.message


def arrived(message: str, exit_code: int, sweep_dir: str) -> SweepStopped:
    """Turn a `JobStopped` into its form in the launcher's process, and log it."""
    log.warning("%s", message)
    return SweepStopped(message, exit_code, Path(sweep_dir))


def _failed_jobs(sweep_dir: Path) -> list[str]:
    """The jobs of a sweep that have failed since this process began; logs them."""
    began = psutil.Process().create_time()
    found = []
    for directory in job_directories(sweep_dir):
        record = read_record(directory)
        if record is not None and record.state == FAILED and (record.ended or 0.0) >= began:
            found.append(job_name(sweep_dir, directory))
            log.error("job %s failed: %s", found[-1], printable(str(record.error)))
    return found


@dataclass(frozen=True)
class Halt:
    """An order to the jobs of one launcher: no more jobs start.

    Attributes:
        why: The reason, for people.
        exit_code: The program's exit code.
        running: Whether running jobs also save and stop.
    """

    why: str
    exit_code: int
    running: bool


_launching: int | None = None  # the ID of the process that called `begin_sweep`; forked processes inherit it


def begin_sweep(sweep_dir: Path) -> None:
    """Begin a sweep in this process, whose Hydra callback calls `arrived` for each `JobStopped`.

    Args:
        sweep_dir: The sweep's directory. Orders that an earlier start left there are withdrawn.
    """
    global _launching  # noqa: PLW0603 - Hydra calls the jobs that run in this process
    _launching = os.getpid()
    for name in _HALTS.values():
        try:
            (sweep_dir / name).unlink(missing_ok=True)
        except OSError as error:
            log.debug("%s was not removed: %s", sweep_dir / name, error)  # harmless: it names another process


def ends_in_exception(run: HydraRun) -> bool:
    """Whether a stopped job of a sweep ends with `JobStopped` rather than SystemExit.

    In the launcher's own process this is so only if a sweeper has already requested the jobs after it: these are
    recorded as waiting, so that the next start finds them.
    """
    if run.sweep_dir is None:
        return False
    return run.launcher is not LauncherKind.ONE_BY_ONE or (run.is_judged and _is_launcher())


def halt(run: HydraRun, order: Halt) -> None:
    """Tell the other jobs of this job's launcher that no more jobs start; later starts are not affected.

    Raises:
        OSError: It cannot be written.
    """
    if run.sweep_dir is not None and ends_in_exception(run) and run.launcher is not LauncherKind.QUEUED:
        halt_jobs(run.sweep_dir, _launcher(run), order)


def halt_jobs(sweep_dir: Path, launcher: int, order: Halt) -> None:
    """Tell the jobs of a launcher that no more jobs start.

    Args:
        sweep_dir: The sweep's directory.
        launcher: The launcher's process ID.
        order: The order.

    Raises:
        OSError: It cannot be written.
    """
    data = {**asdict(order), "launcher": process_identity(launcher)}
    write_atomically(Files(), sweep_dir / _HALTS[order.running], (json.dumps(data) + "\n").encode(), names.nonce())


def halted(run: HydraRun) -> Halt | None:
    """The order given to the jobs of this job's launcher, or None."""
    if run.sweep_dir is None or run.launcher is LauncherKind.QUEUED:
        return None
    launcher = process_identity(_launcher(run))
    orders = (_read(run.sweep_dir / name, launcher) for name in _HALTS.values())
    return next((order for order in orders if order is not None), None)


def _read(path: Path, launcher: str) -> Halt | None:
    """The order in a file; None unless it is for the jobs of this launcher."""
    try:
        data = json.loads(read_small_file(path, _MAX_BYTES))
        order = Halt(str(data["why"]), int(data["exit_code"]), data["running"] is True)
        return order if launcher and launcher == data["launcher"] else None
    except (OSError, CorruptCheckpointError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _launcher(run: HydraRun) -> int:
    """The ID of the process that launches the jobs: this one, or its parent."""
    # joblib runs jobs in the launcher's own process if it runs one at a time.
    return os.getpid() if run.launcher is LauncherKind.ONE_BY_ONE or _is_launcher() else os.getppid()


def _is_launcher() -> bool:
    """Whether this process launches a sweep, and replaces its jobs' exceptions: see `begin_sweep`."""
    return _launching == os.getpid()
