"""A save under way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from hydra_ckpt.errors import SaveOutcomeUnknown
from hydra_ckpt.store.catalog import Checkpoint


class PendingSave:
    """A save that goes on in the background; by itself it ends in a published checkpoint or an error.

    Attributes:
        step: The step saved.
        skipped: Whether it was left out because another save was under way.
        when_staged: Called by whoever has waited for the staging, before the state is changed. For the engine.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.skipped = False
        self._staged = threading.Event()
        self._outcome: Future[Checkpoint | None] = Future()
        self._raised = False
        self.when_staged: Callable[[], None] = lambda: None

    @classmethod
    def nothing(cls, step: int, *, skipped: bool = False) -> PendingSave:
        """A save that had nothing to do: checkpointing is disabled, or another save was under way."""
        pending = cls(step)
        pending.skipped = skipped
        pending.finish(None)
        return pending

    def wait_staged(self, timeout_s: float | None = None) -> None:
        """Return when the state may be changed again.

        Raises:
            TimeoutError: It takes longer than `timeout_s` seconds.
        """
        if not self._staged.wait(timeout_s):
            raise TimeoutError(f"the state of step {self.step} was not staged within {timeout_s} s")
        self.when_staged()

    def done(self) -> bool:
        """Whether the checkpoint is published, or the save has failed."""
        return self._outcome.done()

    def result(self, timeout_s: float | None = None) -> Checkpoint | None:
        """The published checkpoint; None where checkpointing is disabled or the save was left out.

        Args:
            timeout_s: How long to wait, in seconds. None waits for the save's own limit.

        Raises:
            SaveFailedError: The save failed on at least one rank.
            SaveOutcomeUnknown: This rank was cut off from the others, and has not met them since.
            TimeoutError: It takes longer than `timeout_s`; the save goes on.
        """
        try:
            return self._outcome.result(timeout_s)
        except FutureTimeoutError:
            if self._outcome.done():
                raise
            raise TimeoutError(f"step {self.step} was not published within {timeout_s} s; the save goes on") from None
        except Exception:
            self._raised = True
            raise

    def wait(self) -> None:
        """Return when the save is over, however it ended."""
        self._outcome.exception()

    @property
    def error(self) -> BaseException | None:
        """The error of a save that has failed, else None."""
        return self._outcome.exception() if self._outcome.done() else None

    @property
    def is_unknown(self) -> bool:
        """Whether this rank was cut off, and does not know how the save has ended."""
        return isinstance(self.error, SaveOutcomeUnknown)

    @property
    def has_failed(self) -> bool:
        """Whether the save has failed for certain."""
        return self.error is not None and not self.is_unknown

    @property
    def unseen_error(self) -> BaseException | None:
        """The error of a save that has failed, unless `result` has raised it already."""
        return None if self._raised else self.error

    def seen(self) -> None:
        """Say that somebody has taken note of the error. For the engine."""
        self._raised = True

    def staged(self) -> None:
        """Say that the state has been copied. For the engine."""
        self._staged.set()

    def finish(self, checkpoint: Checkpoint | None) -> None:
        """Say that the save is published. For the engine."""
        self._staged.set()
        self._outcome.set_result(checkpoint)

    def fail(self, error: BaseException) -> None:
        """Say that the save has failed. For the engine."""
        self._staged.set()
        self._outcome.set_exception(error)

    def settle(self, outcome: Checkpoint | BaseException, *, seen: bool = False) -> None:
        """Say how a save has ended whose outcome was unknown. For the engine, in the thread that trains.

        Args:
            outcome: The checkpoint, or the error.
            seen: Whether the error is not to be raised at a meeting of the ranks.
        """
        self._raised = seen
        settled: Future[Checkpoint | None] = Future()
        if isinstance(outcome, BaseException):
            settled.set_exception(outcome)
        else:
            settled.set_result(outcome)
        self._outcome = settled
