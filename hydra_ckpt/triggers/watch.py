"""What ranks tell each other at every step: whether one of them wants to save or stop, and how far they are."""

from __future__ import annotations

import logging
import struct
import time
from collections import deque
from dataclasses import dataclass
from enum import IntEnum

from hydra_ckpt.distributed import Group, StepVote
from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.triggers.best import BestMetric
from hydra_ckpt.triggers.requests import SAVE, STOP, RequestFiles
from hydra_ckpt.triggers.schedule import Schedule
from hydra_ckpt.triggers.signals import SignalWatch

log = logging.getLogger(__name__)

_SMALLEST = -(1 << 63)
# A step is as long as the longest of so many before it: validation counts, the compilation at the start not for ever.
_STEPS_SEEN = 128


class _Said(IntEnum):
    """Places in the vote; of each number the largest that any rank says comes back."""

    STOP = 0
    YIELD = 1
    DUE = 2
    FAILED = 3
    REFUSED = 4
    LAST_STEP = 5
    FIRST_STEP = 6  # negated
    BEST = 7  # rank 0's, as the bits of a float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks do, equal on all of them.

    Attributes:
        stop: A file asks to stop for good.
        yields: A signal or the limit of time asks to stop and to be continued.
        due: The clock or a file asks for a save.
        failed: A save has failed on some rank.
        refused: Rank 0 cannot make sense of its metrics.
        best: Rank 0's best metric so far, or None.
    """

    stop: bool = False
    yields: bool = False
    due: bool = False
    failed: bool = False
    refused: bool = False
    best: float | None = None


class Watch:
    """Collects what asks for saves and stops on this rank, and lets the ranks agree at every step.

    On one rank what comes is heard at the same step. Several ranks hear at a step what any of them said at the one
    before: the messages travel while the step is computed.

    Args:
        schedule: The cadences; those by time are rank 0's.
        signals: Signals watched on every rank.
    """

    def __init__(self, schedule: Schedule, signals: SignalWatch) -> None:
        self._schedule = schedule
        self._signals = signals
        self._files = RequestFiles()
        self._vote: StepVote | None = None
        self._group: Group | None = None
        self._steps_s: deque[float] = deque(maxlen=_STEPS_SEEN)
        self._last_s = 0.0
        self._told = False

    def begin(self, group: Group, schedule: Schedule, files: RequestFiles, step: int, best: BestMetric) -> None:
        """Collective: training begins.

        Args:
            group: The ranks.
            schedule: Rank 0's cadences.
            files: Where files may ask for something.
            step: The last step done.
            best: The best metric so far.
        """
        self._schedule, self._files, self._group = schedule, files, group
        self._last_s = time.monotonic()
        self._schedule.begin(self._last_s)
        self._signals.install()
        if group.world_size > 1:
            self._vote = StepVote(group, len(_Said))
            self._vote.exchange(self._ballot(group, step, best, failed=False, save_s=0.0))

    def end(self) -> None:
        """Put signal handlers back. Idempotent."""
        self._signals.remove()
        self._vote = self._group = None

    def ask(self, step: int, best: BestMetric, *, failed: bool, save_s: float) -> Verdict:
        """Collective: say what this rank has to say at a step, and hear what counts for all.

        Args:
            step: The step done.
            best: The best metric this rank knows.
            failed: Whether a save of this rank has failed.
            save_s: The longest save so far, in seconds.

        Raises:
            CheckpointError: A rank has left the loop, or is at another step.
        """
        if self._group is None:
            return Verdict()
        ballot = self._ballot(self._group, step, best, failed=failed, save_s=save_s)
        said = ballot if self._vote is None else self._vote.exchange(ballot)
        if said[_Said.LAST_STEP] != -said[_Said.FIRST_STEP]:
            raise CheckpointError(
                f"ranks are at different steps: one has called on_step_end for step {-said[_Said.FIRST_STEP]}, another "
                f"for step {said[_Said.LAST_STEP]}. Every rank has to call it for every step"
            )
        return _verdict(said)

    def _ballot(self, group: Group, step: int, best: BestMetric, *, failed: bool, save_s: float) -> list[int]:
        now = time.monotonic()
        self._steps_s.append(now - self._last_s)
        self._last_s = now
        stop = due = time_up = False
        bits = _SMALLEST
        if group.rank == 0:
            asked = self._files.look(now)
            # What is said now is heard at the next step, and saved behind it.
            time_up = self._schedule.is_time_up(now, save_s + 2 * max(self._steps_s))
            stop, due = STOP in asked, self._schedule.calls(now) or SAVE in asked
            bits = _bits(best.value)
        self._tell(time_up)
        refused = best.refused is not None
        return [stop, self._signals.received or time_up, due, failed, refused, step, -step, bits]

    def _tell(self, time_up: bool) -> None:
        if self._told or not (time_up or self._signals.received):
            return
        self._told = True
        log.info("%s: saving and stopping", "the time is up" if time_up else f"{self._signals.name} came")


def _verdict(said: list[int]) -> Verdict:
    stop, yields, due, failed, refused = (bool(said[place]) for place in range(_Said.REFUSED + 1))
    return Verdict(stop, yields, due, failed, refused, _number(said[_Said.BEST]))


def _bits(value: float | None) -> int:
    """A float as a whole number; none at all as NaN. Never the smallest number, which is -0.0."""
    found: int = struct.unpack("<q", struct.pack("<d", float("nan") if value is None else value + 0.0))[0]
    return found


def _number(bits: int) -> float | None:
    value: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return None if value != value else value  # noqa: PLR0124 - only NaN differs from itself
