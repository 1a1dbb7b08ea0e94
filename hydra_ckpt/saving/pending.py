"""A save under way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from hydra_ckpt.errors import CheckpointError, SaveOutcomeUnknown
from hydra_ckpt.store.catalog import Checkpoint


class PendingSave:
    """A save that runs in the background, and completes on its own with a published checkpoint or an error.

    Attributes:
        step: The step saved.
        skipped: Whether it was skipped because another save was under way.
        when_staged: Called by the thread that waited for staging, before the state changes. For the engine.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.skipped = False
        self._pid = os.getpid()
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
            TimeoutError: Staging takes longer than `timeout_s` seconds.
        """
        if self._is_forked:
            return  # the parent copies its own memory
        if not self._staged.wait(timeout_s):
            raise TimeoutError(f"the state of step {self.step} was not staged within {timeout_s} s")
        self.when_staged()

    def done(self) -> bool:
        """Whether the checkpoint is published, or the save has failed."""
        return self._outcome.done()

    def result(self, timeout_s: float | None = None) -> Checkpoint | None:
        """The published checkpoint; None if checkpointing is disabled or the save was skipped.

        Args:
            timeout_s: How long to wait, in seconds. None waits for the save's own limit.

        Raises:
            SaveFailedError: The save failed on at least one rank.
            SaveOutcomeUnknown: This rank was cut off from the others, and has not met them since.
            TimeoutError: The save takes longer than `timeout_s`; it continues.
            CheckpointError: This process was forked while the save was under way, and cannot learn how it ends.
        """
        if self._is_forked and not self._outcome.done():
            raise CheckpointError(
                f"step {self.step}: this process was forked from process {self._pid}, which saves; wait for it there"
            )
        try:
            return self._outcome.result(timeout_s)
        except FutureTimeoutError:
            if self._outcome.done():
                raise
            raise TimeoutError(f"step {self.step} was not published within {timeout_s} s; the save continues") from None
        except Exception:
            self._raised = True
            raise

    def wait(self) -> None:
        """Return when the save is over, however it ended; at once in a forked process, whose parent saves."""
        if not self._is_forked:
            self._outcome.exception()

    @property
    def _is_forked(self) -> bool:
        """Whether this is not the process that saves; its threads do not exist here."""
        return os.getpid() != self._pid

    @property
    def error(self) -> BaseException | None:
        """The error of a save that has failed, otherwise None."""
        return self._outcome.exception() if self._outcome.done() else None

    @property
    def is_unknown(self) -> bool:
        """Whether this rank was cut off, and does not know how the save ended."""
        return isinstance(self.error, SaveOutcomeUnknown)

    @property
    def has_failed(self) -> bool:
        """Whether the save has failed for certain."""
        return self.error is not None and not self.is_unknown

    @property
    def unseen_error(self) -> BaseException | None:
        """The error of a save that has failed, unless `result` has already raised it."""
        return None if self._raised else self.error

    def seen(self) -> None:
        """Mark the error as seen. For the engine."""
        self._raised = True

    def staged(self) -> None:
        """Mark the state as copied. For the engine."""
        self._staged.set()

    def finish(self, checkpoint: Checkpoint | None) -> None:
        """Mark the save as published. For the engine."""
        self._staged.set()
        self._outcome.set_result(checkpoint)

    def fail(self, error: BaseException) -> None:
        """Mark the save as failed. For the engine."""
        self._staged.set()
        self._outcome.set_exception(error)

    def settle(self, outcome: Checkpoint | BaseException, *, seen: bool = False) -> None:
        """Set the outcome of a save whose outcome was unknown. For the engine, in the training thread.

        Args:
            outcome: The checkpoint, or the error.
            seen: Whether the error must not be raised at a meeting of the ranks.
        """
        self._raised = seen
        settled: Future[Checkpoint | None] = Future()
        if isinstance(outcome, BaseException):
            settled.set_exception(outcome)
        else:
            settled.set_result(outcome)
        self._outcome = settled
