"""Agreement between the ranks' training threads, by reductions.

Example: 3 ranks vote with two numbers, whether a signal has come and how many seconds have passed since the last save.
At step 10 they say (0, 29), (1, 30) and (0, 28). At step 11 all of them hear the maxima (1, 30): a signal has come on
some rank, and all ranks save after the same step. With `adds=True` they would hear the sums (1, 87).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from hydra_ckpt.distributed.group import Group
from hydra_ckpt.errors import CheckpointError

# All votes have the same size: if ranks meet in different votes, gloo would end the process if the sizes differed.
_NUMBERS = 16


class Vote:
    """Each rank says some numbers, and all ranks hear their maximum or sum.

    The reduction runs in the background until a rank hears the result. At a training step that makes agreement free:
    what was said at one step is heard at the next, and every rank acts at the same step.

    Training thread only. Each `say` must be followed by `hear` before the next one; other votes may be under way.

    Args:
        group: The ranks.
        what: The topic, equal on all ranks. Ranks that meet in votes on different topics raise an error.
        size: How many numbers, at most 14.
        adds: Whether ranks hear the sum instead of the maximum.
    """

    def __init__(self, group: Group, what: str, size: int, *, adds: bool = False) -> None:
        self._group, self._what, self._size, self._adds = group, what, size, adds
        topic = zlib.crc32(what.encode())
        self._topic = [topic, -topic]
        self._all_topics = [topic * group.world_size, -topic * group.world_size] if adds else self._topic
        self._said = torch.zeros(_NUMBERS, dtype=torch.int64, device="cpu")
        self._into = self._said.numpy()  # writing through it is the cheapest way into the tensor
        self._is_open = False
        self._work: dist.Work | None = None

    def say(self, numbers: Sequence[int]) -> None:
        """Collective: say `size` numbers (64 bits, signed)."""
        self._into[: self._size] = numbers
        self._into[-2:] = self._topic
        self._is_open = True
        self._work = self._group.start_reduction(self._said, adds=self._adds)

    def hear(self) -> list[int] | None:
        """Collective: the maxima of the numbers said, or their sums; None if nothing was said since the last call.

        Raises:
            CheckpointError: A rank said nothing within the limit, has died, or is in another vote.
        """
        if not self._is_open:
            return None
        self._is_open = False
        work, self._work = self._work, None
        started = time.monotonic()
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise CheckpointError(
                f"{self._what}: a rank has left the training loop, has died, or did not arrive within "
                f"{self._group.limit_s:.0f} s (checkpoint.consolidation_timeout_minutes; waited "
                f"{time.monotonic() - started:.0f} s); every rank must make the same calls, equally often ({error})"
            ) from error
        heard: list[int] = self._into.tolist()
        if heard[-2:] != self._all_topics:
            raise CheckpointError(
                f"{self._what}: another rank is making a different call, such as saving while this one takes a step, "
                "or the reverse; every rank must make the same calls, equally often"
            )
        return heard[: self._size]

    def ask(self, numbers: Sequence[int]) -> list[int]:
        """Collective: say and hear in one call."""
        self.say(numbers)
        return self.hear() or []
