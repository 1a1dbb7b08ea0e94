"""Carries out saves in the background, one at a time: finish staging, write, publish, prune."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.errors import CheckpointError, SaveOutcomeUnknown
from hydra_ckpt.report import Stats
from hydra_ckpt.saving.exporting import AddExport
from hydra_ckpt.saving.known import KnownSaves
from hydra_ckpt.saving.pending import PendingSave
from hydra_ckpt.saving.published_weights import PublishedWeights
from hydra_ckpt.saving.request import SaveRequest
from hydra_ckpt.saving.save import Save
from hydra_ckpt.saving.staged import Staged
from hydra_ckpt.saving.transaction import FailedSave, Transaction, perform
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.directory import Directory
from hydra_ckpt.worker import Worker

log = logging.getLogger(__name__)


class Background:
    """The thread that completes saves, and what follows from them.

    Args:
        channel: To the same threads of the other ranks.
        directory: Where checkpoints are stored.
        known: The saves made so far.
        weights: Remembers what the weights of published checkpoints were.
        stats: The cost of saving; kept up to date.
        is_async: Whether training continues meanwhile.

    Attributes:
        longest_save_s: The longest time a save has taken, in seconds.
    """

    def __init__(
        self,
        channel: Channel,
        directory: Directory,
        known: KnownSaves,
        weights: PublishedWeights,
        stats: Stats,
        *,
        is_async: bool,
    ) -> None:
        self._channel, self._directory, self._known = channel, directory, known
        self._weights, self._stats, self._is_async = weights, stats, is_async
        self._worker = Worker("hydra_ckpt-save", channel.drain)
        self.longest_save_s = 0.0

    def submit(self, pending: PendingSave, request: SaveRequest, transaction: Transaction, staged: Staged) -> None:
        """Hand a save to the background.

        Raises:
            CheckpointError: The background has ended; the save has failed.
        """
        try:
            self._worker.submit(lambda: self._carry_out(pending, request, transaction, staged))
        except CheckpointError as failure:
            staged.release()
            self._known.forget(request)
            pending.fail(failure)  # nothing else would, and close() waits for it
            pending.seen()
            raise

    def _carry_out(self, pending: PendingSave, request: SaveRequest, transaction: Transaction, staged: Staged) -> None:
        begun = time.monotonic()
        try:
            staged.finish()
            pending.staged()
            staged.watch()
        except Exception as failure:
            transaction = FailedSave(request.step, request.name, failure)  # the other ranks must be told
        try:
            perform(transaction, self._channel)
        except Exception as error:
            self._tell(request, error)
            staged.release()
            pending.fail(error)
            return
        staged.release()
        if isinstance(transaction, Save | AddExport):
            self._stats.written_bytes += transaction.writer.content.plan.nbytes
        if isinstance(transaction, Save):
            self._weights.record(request.name, transaction.writer.weights)
        self.longest_save_s = max(self.longest_save_s, time.monotonic() - begun)
        pending.finish(Checkpoint(self._directory.root / request.name, request.step, request.epoch))
        if self._channel.is_coordinator:
            self._prune()

    def _tell(self, request: SaveRequest, error: Exception) -> None:
        """Record and log a save that failed, or whose outcome is unknown."""
        unknown = isinstance(error, SaveOutcomeUnknown)
        if self._is_async:
            # Raised at the next hook; logged here too, because the program may end before there is one.
            how = "may have failed; rank 0 knows, and cannot be reached" if unknown else "has failed"
            log.warning("the save of step %d %s (in the background)", request.step, how)
        if not unknown:
            self._known.forget(request)

    def _prune(self) -> None:
        try:
            self._directory.prune()
        except (OSError, CheckpointError) as error:
            log.warning("old checkpoints could not be pruned: %s", error)

    def afterwards(self, step: Callable[[], None]) -> None:
        """Run `step` after the saves begun so far."""
        self._worker.submit(step)

    def drain(self) -> None:
        """Return when everything begun is done."""
        self._worker.drain()

    def close(self) -> None:
        """Finish what is under way, and end the thread."""
        self._worker.close()
        self._channel.close()
