"""Changes to the directory that all ranks make together, or not at all."""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from typing import Any, Protocol

from hydra_ckpt.distributed.channel import Channel, RankTimeoutError
from hydra_ckpt.errors import CheckpointError, SaveFailedError, SaveOutcomeUnknown, TakenOverError

log = logging.getLogger(__name__)


class Transaction(Protocol):
    """The steps of a transaction. Notes, receipts and results are plain data."""

    @property
    def step(self) -> int:
        """The training step of the checkpoint."""

    @property
    def name(self) -> str:
        """The checkpoint's name."""

    def begin(self) -> dict[str, Any]:
        """Coordinator only: prepare; the note tells the other ranks where to write."""

    def work(self, note: dict[str, Any]) -> dict[str, Any]:
        """Every rank: do its part, durably; the receipt lists what was written."""

    def finish(self, note: dict[str, Any], receipts: list[dict[str, Any]]) -> dict[str, Any]:
        """Coordinator only: check the receipts and make the result visible."""

    def abort(self, note: dict[str, Any]) -> None:
        """Coordinator only: remove what was prepared."""

    def is_published(self, note: dict[str, Any]) -> bool:
        """A rank that was cut off: whether the result is certainly published. False proves nothing."""


@dataclass(frozen=True)
class FailedSave:
    """The transaction of a save that failed on this rank before it began; tells all other ranks.

    Attributes:
        step: The step to be saved.
        name: The checkpoint's name.
        error: The error on this rank.
    """

    step: int
    name: str
    error: Exception

    def begin(self) -> dict[str, Any]:
        """Coordinator only; see `Transaction`."""
        raise self.error

    def work(self, note: dict[str, Any]) -> dict[str, Any]:
        """Every rank; see `Transaction`."""
        raise self.error

    def finish(self, note: dict[str, Any], receipts: list[dict[str, Any]]) -> dict[str, Any]:
        """Never reached: this rank's receipt is its error."""
        raise self.error

    def abort(self, note: dict[str, Any]) -> None:
        """Nothing was prepared."""

    def is_published(self, note: dict[str, Any]) -> bool:
        """Never: this rank's receipt is its error."""
        return False


def perform(transaction: Transaction, channel: Channel) -> dict[str, Any]:
    """Collective: run a transaction.

    It is never reported as published on one rank and failed on another: a rank that has sent its receipt and gets no
    answer reports the outcome as unknown.

    Returns:
        What `finish` returned, on every rank.

    Raises:
        SaveFailedError: A rank failed, died, or was late; nothing was published.
        SaveOutcomeUnknown: This rank was cut off after it had sent its receipt.
    """
    channel.open()
    step = transaction.step
    try:
        note = channel.receive(
            f"waiting for step {step} to begin", _guard(lambda: _begin(transaction)) if channel.is_coordinator else None
        )
    except CheckpointError as error:
        failure = SaveFailedError(step, {channel.rank: str(error)})
        if not channel.is_coordinator:
            channel.gather("giving up", {"causes": failure.causes})  # rank 0 can no longer publish
        raise failure from error
    _raise_causes(step, note)
    receipt = _guard(lambda: _work(transaction, note))()
    try:
        outcome = _exchange(transaction, channel, note, receipt)
    except CheckpointError as error:
        _raise_causes(step, receipt)  # rank 0 does not publish after such a receipt
        if transaction.is_published(note):
            return {}
        raise SaveOutcomeUnknown(step, str(error)) from error
    _raise_causes(step, outcome)
    return outcome


def _exchange(
    transaction: Transaction, channel: Channel, note: dict[str, Any], receipt: dict[str, Any]
) -> dict[str, Any]:
    """Collective: send the receipts, and get the outcome."""
    receipts = _collect(channel, transaction.step, receipt)
    return dict(
        channel.receive(
            f"waiting for step {transaction.step} to be published",
            _guard(lambda: _conclude(transaction, note, receipts)) if receipts is not None else None,
        )
    )


def _begin(transaction: Transaction) -> dict[str, Any]:
    return {**transaction.begin(), "name": transaction.name}


def _work(transaction: Transaction, note: dict[str, Any]) -> dict[str, Any]:
    if note["name"] != transaction.name:
        # A rank that has given up on a save moves on to the next; its data must not get into the previous one.
        raise CheckpointError(
            f"this rank is saving {transaction.name}, rank 0 is saving {note['name']}; every rank must make the same "
            "saves, with the same step and epoch"
        )
    return transaction.work(note)


def _guard(step: Any) -> Any:
    """Turn a step's error into plain data, for every rank."""

    def attempt() -> dict[str, Any]:
        try:
            return dict(step())
        except SaveFailedError as error:
            return {"causes": error.causes}
        except TakenOverError as error:
            return {"causes": {0: describe(error)}, "remedy": error.remedy}
        except Exception as error:
            log.debug("a step of a save failed", exc_info=True)
            return {"causes": {0: describe(error)}}

    return attempt


_REMEDIES: dict[int | None, str] = {
    errno.ENOSPC: " (free some space, or keep fewer checkpoints: checkpoint.max_recent_checkpoints)",
    errno.EDQUOT: " (the quota is used up; free some space, or choose another checkpoint.checkpoint_dir)",
    errno.EROFS: " (the file system has been made read-only; see its host's log)",
}


def describe(error: BaseException) -> str:
    """An error in one line."""
    kind = type(error).__name__
    remedy = _REMEDIES.get(error.errno, "") if isinstance(error, OSError) else ""
    return f"{kind}: {error}{remedy}"


def _raise_causes(step: int, data: dict[str, Any]) -> None:
    if "causes" in data:
        causes = {int(rank): text for rank, text in data["causes"].items()}
        raise SaveFailedError(step, causes, remedy=str(data.get("remedy", "")))


def _collect(channel: Channel, step: int, receipt: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The receipts, on the coordinator; a rank that did not answer gets one that says so."""
    try:
        return channel.gather(f"waiting for the ranks to write step {step}", receipt)
    except RankTimeoutError as error:
        if not channel.is_coordinator:
            raise
        late = {"causes": {0: str(error)}}
        return [late if rank in error.ranks else {} for rank in range(channel.world_size)]


def _conclude(transaction: Transaction, note: dict[str, Any], receipts: list[dict[str, Any]]) -> dict[str, Any]:
    causes = {rank: receipt["causes"] for rank, receipt in enumerate(receipts) if "causes" in receipt}
    try:
        if causes:
            texts = {rank: next(iter(found.values())) for rank, found in causes.items()}
            raise SaveFailedError(transaction.step, texts)
        return transaction.finish(note, receipts)
    except Exception:
        _abort(transaction, note)
        raise


def _abort(transaction: Transaction, note: dict[str, Any]) -> None:
    try:
        transaction.abort(note)
    except OSError as error:
        log.warning(
            "files left by step %s could not be removed; the next start removes them: %s", transaction.step, error
        )
