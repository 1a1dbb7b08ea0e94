"""Something done to the directory by all ranks together, or not at all."""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from typing import Any, Protocol

from hydra_ckpt.distributed.channel import Channel, RankTimeoutError
from hydra_ckpt.errors import CheckpointError, SaveFailedError, SaveOutcomeUnknown

log = logging.getLogger(__name__)


class Transaction(Protocol):
    """The steps; notes, receipts and results are plain data."""

    @property
    def step(self) -> int:
        """The step it is about."""

    @property
    def name(self) -> str:
        """The checkpoint it is about."""

    def begin(self) -> dict[str, Any]:
        """Coordinator only: prepare; the note tells the others where."""

    def work(self, note: dict[str, Any]) -> dict[str, Any]:
        """Every rank: do its part, durably; the receipt tells what."""

    def finish(self, note: dict[str, Any], receipts: list[dict[str, Any]]) -> dict[str, Any]:
        """Coordinator only: check the receipts and make the result visible."""

    def abort(self, note: dict[str, Any]) -> None:
        """Coordinator only: remove what was prepared."""

    def is_published(self, note: dict[str, Any]) -> bool:
        """A rank that was cut off: whether the result is there for certain. False proves nothing."""


@dataclass(frozen=True)
class FailedSave:
    """The transaction of a save that failed before it began on this rank; tells all the others.

    Attributes:
        step: The step that was to be saved.
        name: The checkpoint it was to become.
        error: What went wrong here.
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
    """Collective: carry a transaction out.

    Never ends as published on one rank and failed on another: a rank that has handed in its receipt and then hears
    nothing neither knows nor guesses.

    Returns:
        What `finish` returned, on every rank.

    Raises:
        SaveFailedError: Any rank failed, died, or was late; nothing was published.
        SaveOutcomeUnknown: This rank was cut off when it had handed in its receipt.
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
            channel.gather("giving up", {"causes": failure.causes})  # rank 0 cannot publish any more
        raise failure from error
    _raise_causes(step, note)
    receipt = _guard(lambda: _work(transaction, note))()
    try:
        outcome = _exchange(transaction, channel, note, receipt)
    except CheckpointError as error:
        _raise_causes(step, receipt)  # with such a receipt rank 0 does not publish
        if transaction.is_published(note):
            return {}
        raise SaveOutcomeUnknown(step, str(error)) from error
    _raise_causes(step, outcome)
    return outcome


def _exchange(
    transaction: Transaction, channel: Channel, note: dict[str, Any], receipt: dict[str, Any]
) -> dict[str, Any]:
    """Collective: hand in the receipts, and hear how it ended."""
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
        # A rank that has given up on a save goes on to the next; its data must not get into the one before.
        raise CheckpointError(
            f"this rank saves {transaction.name}, rank 0 {note['name']}; every rank must make the same saves, with the "
            "same step and epoch"
        )
    return transaction.work(note)


def _guard(step: Any) -> Any:
    """Turn a step's error into data that every rank understands."""

    def attempt() -> dict[str, Any]:
        try:
            return dict(step())
        except SaveFailedError as error:
            return {"causes": error.causes}
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
        raise SaveFailedError(step, {int(rank): text for rank, text in data["causes"].items()})


def _collect(channel: Channel, step: int, receipt: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The receipts at the coordinator; a rank that did not answer has one that says so."""
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
            "what step %s left behind could not be removed and is swept at the next start: %s", transaction.step, error
        )
