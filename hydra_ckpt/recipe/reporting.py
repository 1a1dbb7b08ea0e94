"""The output of a run: a progress bar on a terminal, occasional lines in the log, a summary at the end."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hydra_ckpt.errors import counted

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["CheckpointStats", "Report"]

log = logging.getLogger(__name__)


class CheckpointStats(Protocol):
    """What is shown of `checkpointer.stats`."""

    saves: int
    exports_added: int
    blocked_s: float


class Report:
    """Follows a run from step to step. Only the first rank draws the bar; the log level decides who logs lines.

    Args:
        max_steps: Where the run ends.
        is_main: Whether this is the first rank.
    """

    def __init__(self, max_steps: int, *, is_main: bool) -> None:
        self._max_steps = max_steps
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (is_main and console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("training", total=max_steps)
        self._started = self._marked = _Mark(0)

    def __enter__(self) -> Self:
        self._bar.start()
        _send_log_lines_through(sys.stdout, instead_of=sys.__stdout__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _send_log_lines_through(sys.__stdout__, instead_of=sys.stdout)
        self._bar.stop()

    def begin(self, step: int) -> None:
        """Starts the clock at the step the run continues from."""
        self._started = self._marked = _Mark(step)
        self._bar.update(self._task, completed=step)

    def step(self, step: int) -> None:
        """One more optimizer step is done."""
        self._bar.update(self._task, completed=step)

    def losses(self, step: int, loss: float, lr: float) -> float:
        """Logs the training loss since the last such line, and returns the speed since then in steps/s."""
        speed = self._marked.speed(step)
        self._marked = _Mark(step)
        width = len(str(self._max_steps))
        log.info("step %*d/%d  loss %.4f  lr %.2e  %.2f steps/s", width, step, self._max_steps, loss, lr, speed)
        return speed

    def validated(self, step: int, loss: float) -> None:
        """Logs a validation loss."""
        width = len(str(self._max_steps))
        log.info("step %*d/%d  val_loss %.4f", width, step, self._max_steps, loss)

    def summary(self, step: int, checkpoints: CheckpointStats, written_bytes: int) -> None:
        """Logs the cost of the run and, separately, of its checkpoints; `written_bytes` are those of all ranks."""
        done, took_s = step - self._started.step, time.perf_counter() - self._started.at_s
        log.info("%s in %.1f s: %.2f steps/s", counted(done, "step"), took_s, self._started.speed(step))
        added = checkpoints.exports_added
        log.info(
            "%s%s: training was blocked for %.2f s (%.1f %%), %.1f MiB written",
            counted(checkpoints.saves, "save"),
            f" and {counted(added, 'added export')}" if added else "",
            checkpoints.blocked_s,
            100 * checkpoints.blocked_s / took_s if took_s else 0.0,
            written_bytes / 2**20,
        )


class _Mark:
    """A step and the moment it was reached."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.at_s = time.perf_counter()

    def speed(self, step: int) -> float:
        return (step - self.step) / max(time.perf_counter() - self.at_s, 1e-9)


def _send_log_lines_through(stream: object, *, instead_of: object) -> None:
    """While the bar is drawn, lines must go through it; Hydra's handler keeps the plain stream."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is instead_of:
            handler.setStream(stream)
