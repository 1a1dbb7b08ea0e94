"""Which checkpoints a run has made, and how its last save ended on the other ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra_ckpt.distributed.channel import Channel, error_from_data, error_to_data
from hydra_ckpt.distributed.group import Group
from hydra_ckpt.distributed.vote import Vote
from hydra_ckpt.saving.pending import PendingSave
from hydra_ckpt.saving.request import SaveRequest
from hydra_ckpt.store.catalog import Checkpoint

log = logging.getLogger(__name__)


class KnownSaves:
    """The saves of a run as this rank knows them.

    A rank that was cut off gets the outcome from rank 0 at the next meeting. Training thread only, except that the
    saving thread may call `forget` while the training thread waits for it.

    Args:
        group: The ranks.
        channel: To the other ranks, for the training thread.
        root: The checkpoint directory.

    Attributes:
        pending: The last save begun.
    """

    def __init__(self, group: Group, channel: Channel, root: Path) -> None:
        self._vote = Vote(group, "looking at the last save", 1)
        self._channel, self._root = channel, root
        self._published: set[str] = set()
        self._exported: set[str] = set()
        self._request: SaveRequest | None = None
        self.pending: PendingSave | None = None
        self._replaced = ""

    def knows(self, published: Iterable[str], exported: Iterable[str]) -> None:
        """Record which checkpoints exist, and which of them have an export."""
        self._published, self._exported = set(published), set(exported)

    def has(self, name: str) -> bool:
        """Whether a checkpoint of this name is published, or will be unless its save fails."""
        return name in self._published

    def would_add_export(self, request: SaveRequest) -> bool:
        """Whether the step is published and lacks only the export that a final save makes."""
        wanted = request.is_final and request.consolidated
        return wanted and request.name in self._published and request.name not in self._exported

    def begin(self, request: SaveRequest, pending: PendingSave) -> None:
        """Record that a save begins."""
        self._published.add(request.name)
        if request.consolidated:
            self._exported.add(request.name)
        self._request, self.pending = request, pending

    def withdraw(self, name: str, *, is_made_again: bool) -> None:
        """Record that a published checkpoint was set aside, or will be once it has been made again."""
        self._published.discard(name)
        self._exported.discard(name)
        self._replaced = name if is_made_again else ""

    def takes_replaced(self, name: str) -> bool:
        """Whether the save of this name that begins now replaces a published checkpoint; asked once."""
        found, self._replaced = name == self._replaced, ""
        return found

    def forget(self, request: SaveRequest) -> None:
        """Record that a save has failed."""
        if not request.adds_export:
            self._published.discard(request.name)
        self._exported.discard(request.name)

    @property
    def has_trouble(self) -> bool:
        """Whether the last save failed and the error was not raised yet, or its outcome is unknown on this rank."""
        pending = self.pending
        return pending is not None and (pending.unseen_error is not None or pending.is_unknown)

    def is_busy(self) -> bool:
        """Collective: whether rank 0 is still writing the last save."""
        before = self.pending
        if before is None:
            return False
        return bool(self._channel.coordinator_step("looking at the save before", lambda: not before.done()))

    def meet(self) -> None:
        """Collective, with no save under way: settle the last save if any rank has trouble with it."""
        heard = self._vote.ask([int(self.has_trouble)])
        if any(heard):
            self.settle()

    def settle(self) -> None:
        """Collective, with no save under way: get the outcome of the last save from rank 0."""
        told = self._channel.coordinator_step("settling the last save", self._told)
        pending, request = self.pending, self._request
        if pending is None or request is None or not pending.is_unknown:
            return
        if told is None or told["name"] != request.name:
            return  # rank 0 began a different save: the outcome of this one stays unknown
        if told["error"] is None:
            pending.settle(Checkpoint(self._root / request.name, request.step, request.epoch))
        else:
            pending.settle(error_from_data(told["error"]), seen=told["seen"])
            self.forget(request)

    def _told(self) -> dict[str, Any] | None:
        """Coordinator only: the outcome of the last save, as plain data."""
        if self.pending is None or self._request is None or self.pending.is_unknown:
            return None
        error = self.pending.error
        seen = self.pending.unseen_error is None  # then neither this rank nor the others raise it again
        return {"name": self._request.name, "error": None if error is None else error_to_data(error), "seen": seen}

    def report_failure(self, *, raises: bool) -> None:
        """Raise the last save's error, unless already seen, or log it.

        Args:
            raises: Whether to raise it. That of a final save is always raised, unless its outcome is unknown.
        """
        pending, request = self.pending, self._request
        if pending is None or request is None or pending.unseen_error is None:
            return
        if raises or (request.is_final and not pending.is_unknown):
            pending.result()
        is_last = request.compares_fully
        outlook = "training stops without its last checkpoint" if is_last else "training continues"
        log.warning("%s: %s", outlook, pending.unseen_error)
        pending.seen()
