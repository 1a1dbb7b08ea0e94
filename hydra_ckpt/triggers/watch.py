"""What ranks tell each other at every step: whether one of them wants to save or stop, and how far they are."""

from __future__ import annotations

import logging
import signal
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from hydra_ckpt.distributed.group import Group
from hydra_ckpt.distributed.vote import Vote
from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.triggers.best import BestMetric
from hydra_ckpt.triggers.requests import HALT, SAVE, STOP, RequestFiles
from hydra_ckpt.triggers.schedule import Schedule
from hydra_ckpt.triggers.signals import SignalWatch

log = logging.getLogger(__name__)

_SMALLEST = -(1 << 63)
# The first steps agree one by one. Later ones that are shorter than this agree as often as it passes: below 50 us a
# step, where every single vote costs some 200 us as soon as ranks wait for each other.
_STEPS_ONE_BY_ONE = 100
_BETWEEN_VOTES_S = 0.05
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
    STEP_US = 8  # microseconds a step takes


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
    before: the messages travel while the step is computed. Ranks whose steps take less than 50 ms say something only
    every 50 ms, once they have done a hundred of them.

    Args:
        schedule: The cadences; those by time are rank 0's.
        signals: Signals watched on every rank.

    Attributes:
        reason: Why this rank has asked to stop and to be continued; None where it has not.
    """

    def __init__(self, schedule: Schedule, signals: SignalWatch) -> None:
        self._schedule = schedule
        self._signals = signals
        self._files = RequestFiles()
        self._vote: Vote | None = None
        self._group: Group | None = None
        self._steps_s: deque[float] = deque(maxlen=_STEPS_SEEN)
        self._last_s = 0.0
        self.reason: str | None = None
        self._steps = self._unsaid = 0
        self._every = 1

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
            self._vote = Vote(group, "agreeing on a step", len(_Said))
            self._vote.say(self._ballot(group, step, best, failed=False, save_s=0.0))

    def signal_came(self, number: signal.Signals) -> None:
        """A signal came before training began; as if it came now."""
        self._signals.received = number

    def end(self) -> None:
        """Let go of the ranks. Idempotent."""
        self._vote = self._group = None

    def let_signals_through(self, *, obeyed: bool) -> None:
        """Put signal handlers back. Idempotent.

        Args:
            obeyed: Whether the run has stopped for what came. If not, that takes its effect now.
        """
        self._signals.remove(obeyed=obeyed)

    def requeue(self, *, stopped: bool) -> Callable[[], object] | None:
        """What puts the job back into its launcher's queue; see `SignalWatch.requeue`."""
        return self._signals.requeue(stopped=stopped)

    def ask(self, step: int, best: BestMetric, *, failed: bool, save_s: float) -> Verdict | None:
        """Collective: say what this rank has to say at a step, and hear what counts for all.

        Args:
            step: The step done.
            best: The best metric this rank knows.
            failed: Whether a save of this rank has failed.
            save_s: The longest save so far, in seconds.

        Returns:
            What all ranks do; None where nothing was said at the step before.

        Raises:
            CheckpointError: A rank has left the loop, or is at another step.
        """
        if self._group is None:
            return None
        if self._vote is None:
            return _verdict(self._ballot(self._group, step, best, failed=failed, save_s=save_s))
        self._steps += 1
        self._unsaid += 1
        said = self._vote.hear()
        if said is not None:
            self._check_steps(said)
            self._every = self._votes_apart(said[_Said.STEP_US])
        if self._unsaid >= self._every:
            self._vote.say(self._ballot(self._group, step, best, failed=failed, save_s=save_s))
            self._unsaid = 0
        return None if said is None else _verdict(said)

    def _check_steps(self, said: list[int]) -> None:
        if said[_Said.LAST_STEP] != -said[_Said.FIRST_STEP]:
            raise CheckpointError(
                f"ranks are at different steps: one has called on_step_end for step {-said[_Said.FIRST_STEP]}, another "
                f"for step {said[_Said.LAST_STEP]}. Every rank has to call it for every step"
            )

    def _votes_apart(self, step_us: int) -> int:
        """Steps from vote to vote, equal on all ranks because all have heard the same."""
        if self._steps < _STEPS_ONE_BY_ONE:
            return 1
        return max(1, int(_BETWEEN_VOTES_S * 1e6) // max(step_us, 1))

    def _ballot(self, group: Group, step: int, best: BestMetric, *, failed: bool, save_s: float) -> list[int]:
        now = time.monotonic()
        self._steps_s.append((now - self._last_s) / max(self._unsaid, 1))
        self._last_s = now
        stop = due = time_up = halted = False
        bits = _SMALLEST
        if group.rank == 0:
            asked = self._files.look(now)
            # What is said now is heard at the next step, and saved behind it.
            time_up = self._schedule.is_time_up(now, save_s + 2 * max(self._steps_s))
            stop, due = STOP in asked, self._schedule.calls(now) or SAVE in asked
            halted = HALT in asked
            bits = _bits(best.value)
        yields = self._note_why(time_up=time_up, halted=halted)
        refused = best.refused is not None
        step_us = int(1e6 * self._steps_s[-1])
        return [stop, yields, due, failed, refused, step, -step, bits, step_us]

    def _note_why(self, *, time_up: bool, halted: bool) -> bool:
        """Whether this rank asks to stop and to be continued; why is kept, and logged once."""
        came = self._signals.received
        if not (time_up or halted or came is not None):
            return False
        if self.reason is None:
            launcher = "the launcher was told to stop" if halted else ""
            self.reason = "the time is up" if time_up else f"{came.name} came" if came is not None else launcher
            log.info("%s: saving and stopping", self.reason)
        return True


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
