"""Says what `checkpoint.allow_unsaved` leaves out of checkpoints, and which of its patterns leave nothing out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

from hydra_ckpt.distributed.channel import Channel

log = logging.getLogger(__name__)


class LeftOut:
    """Warns once in a run about each. For the training thread.

    Args:
        patterns: Those of `checkpoint.allow_unsaved`.
        channel: To the other ranks.
    """

    def __init__(self, patterns: Sequence[str], channel: Channel) -> None:
        self._patterns, self._channel = patterns, channel
        self._announced = self._checked = not patterns

    def announce(self) -> None:
        """Say that something is left out."""
        if not self._announced and self._channel.is_coordinator:
            log.warning(
                "checkpoint.allow_unsaved=%s: what these names match is not saved, and a resumed run begins without it",
                list(self._patterns),
            )
        self._announced = True

    def check(self, omitted: Sequence[str]) -> None:
        """Collective, at the first save: name the patterns that match nothing on any rank.

        Args:
            omitted: Dotted names of what this rank left out.
        """
        if self._checked:
            return
        self._checked = True
        mine = [any(fnmatchcase(name, pattern) for name in omitted) for pattern in self._patterns]
        matched = self._channel.agree("looking at what is left out", mine, _by_any)
        idle = [pattern for pattern, found in zip(self._patterns, matched, strict=True) if not found]
        if idle and self._channel.is_coordinator:
            log.warning(
                "checkpoint.allow_unsaved: %s matches nothing that the first checkpoint would hold; remove it, or "
                "correct its name (they are dotted: optimizer.slow, model.cache.*)",
                ", ".join(map(repr, idle)),
            )


def _by_any(rows: Sequence[Sequence[bool]]) -> list[bool]:
    """Coordinator only: for each pattern whether it matched on any rank."""
    return [any(answers) for answers in zip(*rows, strict=True)]
