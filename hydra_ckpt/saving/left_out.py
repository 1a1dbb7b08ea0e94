"""Reports what `checkpoint.allow_unsaved` leaves out of checkpoints, and which of its patterns match nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

from hydra_ckpt.distributed.channel import Channel

log = logging.getLogger(__name__)


class LeftOut:
    """Warns once per run about each. Training thread only.

    Args:
        patterns: The patterns of `checkpoint.allow_unsaved`.
        channel: To the other ranks.
    """

    def __init__(self, patterns: Sequence[str], channel: Channel) -> None:
        self._patterns, self._channel = patterns, channel
        self._announced = self._checked = not patterns

    def announce(self) -> None:
        """Warn that something is left out."""
        if not self._announced and self._channel.is_coordinator:
            log.warning(
                "checkpoint.allow_unsaved=%s: what these match is not saved, and a resumed run starts without it",
                list(self._patterns),
            )
        self._announced = True

    def check(self, omitted: Sequence[str]) -> None:
        """Collective, at the first save: name the patterns that match nothing on any rank.

        Args:
            omitted: Dotted names this rank left out.
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
                "correct it (names are dotted: optimizer.slow, model.cache.*)",
                ", ".join(map(repr, idle)),
            )


def _by_any(rows: Sequence[Sequence[bool]]) -> list[bool]:
    """Coordinator only: for each pattern, whether it matched on any rank."""
    return [any(answers) for answers in zip(*rows, strict=True)]
