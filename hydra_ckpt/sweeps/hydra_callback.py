"""`hydra/callbacks=hydra_ckpt_summary`: updates the sweep's summary after every job. Imports no torch."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobStatus
from hydra.experimental.callback import Callback
from rich.console import Console

from hydra_ckpt.errors import printable
from hydra_ckpt.store.lease import is_held
from hydra_ckpt.store.owner import read_owner
from hydra_ckpt.sweeps.record import FAILED, JobRecord, read_record
from hydra_ckpt.sweeps.summary import SUMMARY, checkpoints_of, summarize, write_summary
from hydra_ckpt.sweeps.table import summary_table

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

__all__ = ["SummaryCallback"]

log = logging.getLogger(__name__)


class SummaryCallback(Callback):
    """Keeps a sweep's `checkpoints_summary.json` up to date, and prints it when the sweep ends, however it ends.

    Uses what `resumable_job` recorded; without it, states and objectives come from Hydra.
    """

    def __init__(self) -> None:
        self._shown = False

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called when a sweep begins."""
        if _is_first_rank():
            # Hydra does not report the end of a sweep that was interrupted, or in which a job failed.
            atexit.register(self._show, _sweep_dir(config))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Called when a job of a sweep, or a single run, has ended."""
        if not _is_first_rank() or config.hydra.mode is None or config.hydra.mode.name != "MULTIRUN":
            return
        directory = Path(config.hydra.runtime.output_dir)
        record = read_record(directory)
        if (record is None or record.config is None) and not _is_anothers(checkpoints_of(record, directory)):
            _record(config, job_return).write(directory)
        write_summary(_sweep_dir(config), directory)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Called when the sweep has ended."""
        if _is_first_rank():
            self._show(_sweep_dir(config))

    def _show(self, sweep_dir: Path) -> None:
        if self._shown or not sweep_dir.is_dir():
            return
        self._shown = True
        summary = summarize(sweep_dir)
        if summary["jobs"]:
            _print(summary, sweep_dir)


def _print(summary: dict[str, Any], sweep_dir: Path) -> None:
    """Print the summary. Letters that stdout cannot encode become escapes; if nobody reads it, nothing happens."""
    if sys.stdout is None or getattr(sys.stdout, "closed", False):  # as by `>&-`
        return
    # In a log, other programs read the lines, so they must not be wrapped.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    with console.capture() as captured:
        console.print(summary_table(summary))
        console.print(printable(str(sweep_dir / SUMMARY)), markup=False, soft_wrap=True)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        sys.stdout.write(captured.get().encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except (OSError, ValueError) as error:  # a pipe without a reader, a closed stream
        log.debug("the summary could not be printed: %s", error)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _sweep_dir(config: DictConfig) -> Path:
    return Path(config.hydra.runtime.cwd, config.hydra.sweep.dir)


def _is_anothers(root: Path) -> bool:
    """Whether another live process writes to a directory of checkpoints: this job was refused there."""
    found = read_owner(root)
    return found is not None and found[0].pid != os.getpid() and is_held(root)


def _record(config: DictConfig, job_return: JobReturn) -> JobRecord:
    """What Hydra knows about a job, without its configuration, which only `resumable_job` uses."""
    begun = JobRecord.begin(tuple(map(str, config.hydra.overrides.task)), None)
    if job_return.status == JobStatus.COMPLETED:
        return begun.returned(job_return.return_value)
    error = job_return._return_value  # noqa: SLF001 - the public way raises it
    return begun.end(FAILED, error=f"{type(error).__name__}: {error}")
