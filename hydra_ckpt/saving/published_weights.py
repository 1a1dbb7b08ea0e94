"""What the weights of published checkpoints were, by digests: are those in memory still the same?"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.saving.contents import Contents
from hydra_ckpt.saving.live_shares import model_sources
from hydra_ckpt.state.capture import Captured
from hydra_ckpt.storage.digests import Digested
from hydra_ckpt.storage.staging import borrow
from hydra_ckpt.storage.write import digests_below
from hydra_ckpt.store import names

log = logging.getLogger(__name__)


class PublishedWeights:
    """Digests of the models' bytes that this rank has written, by checkpoint.

    Args:
        contents: Computes what this rank would write.
        channel: To the other ranks.
    """

    def __init__(self, contents: Contents, channel: Channel) -> None:
        self._contents, self._channel = contents, channel
        self._digests: dict[str, frozenset[Digested]] = {}

    def record(self, name: str, digests: Iterable[Digested]) -> None:
        """Remember the weights of the checkpoint of this name; those of earlier ones are forgotten."""
        self._digests = {name: frozenset(digests)}

    def is_as_saved(self, name: str, captured: Captured, *, consolidated: bool) -> bool:
        """Whether this rank's weights are certainly those of a checkpoint; local."""
        live = self._now(captured, consolidated=consolidated)
        return live is not None and live == self._digests.get(name)

    def have_changed(self, name: str, step: int, captured: Captured | None) -> bool:
        """Collective: whether the weights differ, or may differ, from those published for a step.

        Averages swapped in, or batch statistics measured again, belong to no step; exporting them beside that step's
        shards would put another model under the same name.
        """
        saved = self._digests.get(name)
        live = None if captured is None or saved is None else self._now(captured, consolidated=False)
        answers = [live is None, live is not None and live != saved]
        unknown, changed = self._channel.agree("comparing weights", answers, _any)
        if changed and self._channel.is_coordinator:
            log.warning(
                "the weights have changed since step %d was saved; the export holds the saved ones. To export the "
                "weights in memory, save them under another step",
                step,
            )
        return bool(unknown or changed)

    def _now(self, captured: Captured, *, consolidated: bool) -> frozenset[Digested] | None:
        """Digests of the models' bytes that this rank would write; None if they cannot be computed."""
        try:
            content, sources = self._contents.make(captured, consolidated=consolidated, export_only=False)
            live = borrow(model_sources(sources, content.plan).tensors)
            return frozenset(digests_below(content.plan, live.sources, f"{names.MODEL}/"))
        except Exception:
            log.debug("the weights cannot be compared", exc_info=True)
            return None  # the save that follows reports why, on all ranks


def _any(rows: Sequence[Sequence[bool]]) -> list[bool]:
    """Coordinator only: for each question, whether any rank says yes."""
    return [any(answers) for answers in zip(*rows, strict=True)]
