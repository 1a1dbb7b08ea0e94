"""What ranks agree on from step to step."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from hydra_ckpt.distributed.group import Group
from hydra_ckpt.errors import CheckpointError


class StepVote:
    """Numbers that ranks say at a step, and of which all ranks hear the largest at the next one.

    The reduction runs beside the training step and is found finished at its end: agreement costs no round trip of its
    own, and every rank acts at the same step.
    """

    def __init__(self, group: Group, size: int) -> None:
        self._group = group
        self._said = torch.zeros(size, dtype=torch.int64)
        self._into = self._said.numpy()  # writing through it is the cheapest way into the tensor
        self._work: dist.Work | None = None

    def say(self, numbers: Sequence[int]) -> None:
        """Collective: say numbers (64 bits, signed); what was said before must have been heard."""
        self._into[:] = numbers
        self._work = self._group.start_largest(self._said)

    def hear(self) -> list[int] | None:
        """The largest of the numbers said; None if nothing was said since the last time.

        Raises:
            CheckpointError: A rank did not say anything within the limit, or has died.
        """
        if self._work is None:
            return None
        started = time.monotonic()
        try:
            self._work.wait()
        except RuntimeError as error:
            waited = time.monotonic() - started
            raise CheckpointError(
                f"a rank left the training loop (waited {waited:.0f} s): {error}. Every rank must do as many steps"
            ) from error
        self._work = None
        heard: list[int] = self._into.tolist()
        return heard
