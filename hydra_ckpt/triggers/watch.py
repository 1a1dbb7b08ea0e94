"""What ranks exchange at every step: whether one of them wants to save or stop, and which step they are at."""

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
# The first steps vote one by one. Later, if steps are shorter than _BETWEEN_VOTES_S, there is one vote per
# _BETWEEN_VOTES_S: below 50 us per step, while a vote costs some 200 us as soon as ranks wait for each other.
_STEPS_ONE_BY_ONE = 100
_BETWEEN_VOTES_S = 0.05
# A step is assumed to take as long as the longest of this many before it: validation counts, and the compilation at the
# start does not count forever.
_STEPS_SEEN = 128


class _Said(IntEnum):
    """Indices of the numbers in the vote; the result of each is its maximum over all ranks."""

    STOP = 0
    YIELD = 1
    DUE = 2
    FAILED = 3
    REFUSED = 4
    LAST_STEP = 5
    FIRST_STEP = 6  # negated
    BEST = 7  # rank 0's, as the bits of a float
    STEP_US = 8  # microseconds per step


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks do; equal on all of them.

    Attributes:
        stop: A file asks the run to stop for good.
        yields: A signal or the time limit asks the run to stop and be continued.
        due: The clock or a file asks for a save.
        failed: A save has failed on some rank.
        refused: Rank 0 has refused its metrics.
        best: Rank 0's best metric so far, or None.
    """

    stop: bool = False
    yields: bool = False
    due: bool = False
    failed: bool = False
    refused: bool = False
    best: float | None = None


class Watch:
    """Collects requests to save or stop on this rank, and lets the ranks agree at every step.

    A single rank acts at the same step. Several ranks hear at each step what any of them said at the previous one: the
    messages travel while the step is computed. After the first hundred steps, ranks whose steps take less than 50 ms
    vote only every 50 ms.

    Args:
        schedule: The cadences; those by time are rank 0's.
        signals: Signals watched on every rank.

    Attributes:
        reason: Why this rank has asked to stop and be continued; None if it has not.
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
        """Collective: start when training begins.

        Args:
            group: The ranks.
            schedule: Rank 0's cadences.
            files: The request files.
            step: The last completed step.
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
        """Handle a signal from before training as if it came now."""
        self._signals.received = number

    def end(self) -> None:
        """Release the group. Idempotent."""
        self._vote = self._group = None

    def let_signals_through(self, *, obeyed: bool) -> None:
        """Restore the signal handlers. Idempotent.

        Args:
            obeyed: Whether the run has stopped for the signal. If not, it takes its usual effect now.
        """
        self._signals.remove(obeyed=obeyed)

    def requeue(self, *, stopped: bool) -> Callable[[], object] | None:
        """What puts the job back into its launcher's queue; see `SignalWatch.requeue`."""
        return self._signals.requeue(stopped=stopped)

    def ask(self, step: int, best: BestMetric, *, failed: bool, save_s: float) -> Verdict | None:
        """Collective: send this rank's requests at a step, and receive the verdict for all ranks.

        Args:
            step: The step just completed.
            best: The best metric this rank knows.
            failed: Whether a save of this rank has failed.
            save_s: The longest save so far, in seconds.

        Returns:
            What all ranks do; None if nothing was said at the previous step.

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
                f"for step {said[_Said.LAST_STEP]}. Every rank must call it for every step"
            )

    def _votes_apart(self, step_us: int) -> int:
        """Steps between votes; equal on all ranks, because all have heard the same."""
        if self._steps < _STEPS_ONE_BY_ONE:
            return 1
        return max(1, int(_BETWEEN_VOTES_S * 1e6) // max(step_us, 1))

    def _ballot(self, group: Group, step: int, best: BestMetric, *, failed: bool, save_s: float) -> list[int]:
        now = time.monotonic()
        self._steps_s.append((now - self._last_s) / max(self._unsaid, 1))
        self._last_s = now
        stop = due = halted = False
        time_up = ""
        bits = _SMALLEST
        if group.rank == 0:
            asked = self._files.look(now)
            # A vote cast now is heard at the next step, and the save comes after that.
            steps_s = 2 * max(self._steps_s)
            if self._schedule.is_time_up(now, save_s + steps_s):
                time_up = self._schedule.time_up(now, save_s, steps_s)
            stop, due = STOP in asked, self._schedule.calls(now) or SAVE in asked
            halted = HALT in asked
            bits = _bits(best.value)
        yields = self._note_why(time_up=time_up, halted=halted)
        refused = best.refused is not None
        step_us = int(1e6 * self._steps_s[-1])
        return [stop, yields, due, failed, refused, step, -step, bits, step_us]

    def _note_why(self, *, time_up: str, halted: bool) -> bool:
        """Whether this rank asks to stop and be continued; keeps the reason, and logs it once."""
        came = self._signals.received
        if not (time_up or halted or came is not None):
            return False
        if self.reason is None:
            launcher = "the launcher was told to stop" if halted else ""
            self.reason = time_up or (f"{came.name} came" if came is not None else launcher)
            log.info("%s: saving and stopping", self.reason)
        return True


def _verdict(said: list[int]) -> Verdict:
    stop, yields, due, failed, refused = (bool(said[place]) for place in range(_Said.REFUSED + 1))
    return Verdict(stop, yields, due, failed, refused, _number(said[_Said.BEST]))


def _bits(value: float | None) -> int:
    """The bits of a float as an int; None as NaN. Never the smallest int, which would be -0.0."""
    found: int = struct.unpack("<q", struct.pack("<d", float("nan") if value is None else value + 0.0))[0]
    return found


def _number(bits: int) -> float | None:
    value: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return None if value != value else value  # noqa: PLR0124 - only NaN differs from itself
