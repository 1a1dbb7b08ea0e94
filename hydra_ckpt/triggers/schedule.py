"""When a save is due. Decides from the steps, epochs and times passed in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from operator import index
from typing import Any, SupportsIndex

from hydra_ckpt.errors import CheckpointConfigError

log = logging.getLogger(__name__)

DEFAULT_INTERVAL_S = 1800.0
# How much longer than the longest so far the remaining steps and the last save may take, in seconds.
_MARGIN_S = 5.0


@dataclass
class Schedule:
    """The cadences of a callback; any of them makes a save due."""

    every_n_steps: int | None = None
    every_n_seconds: float | None = None
    every_n_epochs: int | None = None
    at_steps: frozenset[int] = frozenset()
    on_improvement: bool = False
    max_run_time_s: float | None = None
    _began: float = field(default=0.0, init=False)
    _last: float = field(default=0.0, init=False)

    @classmethod
    def of(
        cls,
        *,
        every_n_steps: int | None,
        every_n_seconds: float | None,
        every_n_epochs: int | None,
        at_steps: Iterable[int] | None,
        on_improvement: bool,
        max_run_time_s: float | None,
    ) -> Schedule:
        """Check the cadences; without any, saves are due every 30 minutes.

        Raises:
            CheckpointConfigError: A number is not positive, or a setting has the wrong type.
        """
        steps = _steps(at_steps)
        numbers = {
            "every_n_steps": every_n_steps,
            "every_n_seconds": every_n_seconds,
            "every_n_epochs": every_n_epochs,
            "max_run_time_s": max_run_time_s,
        }
        for name, value in numbers.items():
            if value is not None and not _is_positive(value):
                raise CheckpointConfigError(f"callbacks.checkpoint.{name}={value!r}: expected a positive number")
        for name in ("every_n_steps", "every_n_epochs"):
            value = numbers[name]
            if value is not None and not isinstance(value, int):
                raise CheckpointConfigError(f"callbacks.checkpoint.{name}={value!r}: expected a whole number")
        checked_flag("on_improvement", on_improvement)
        if not (every_n_steps or every_n_seconds or every_n_epochs or steps or on_improvement):
            every_n_seconds = DEFAULT_INTERVAL_S
        return cls(every_n_steps, every_n_seconds, every_n_epochs, steps, on_improvement, max_run_time_s)

    def as_data(self) -> dict[str, Any]:
        """The cadences as plain data, to send to other ranks."""
        data = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        return {**data, "at_steps": sorted(self.at_steps)}

    def agreed(self, on_rank_0: Callable[[str, Callable[[], Any]], Any]) -> Schedule:
        """Collective: rank 0's cadences, because every rank must save at the same steps.

        Args:
            on_rank_0: Lets rank 0 decide; see `Checkpointer.on_rank_0`.
        """
        mine = self.as_data()
        decided: dict[str, Any] = on_rank_0("the cadence of saves", lambda: mine)
        unlike = [f"{name}={mine[name]} here, {decided[name]} there" for name in mine if mine[name] != decided[name]]
        if unlike:
            log.warning("callbacks.checkpoint differs from rank 0's, which is used: %s", "; ".join(unlike))
        return Schedule.of(**decided)

    def begin(self, now: float) -> None:
        """Record that training begins; all times are seconds of one clock."""
        self._began = self._last = now

    def saved(self, now: float) -> None:
        """Record that a save has begun."""
        self._last = now

    def is_due_at(self, step: int) -> bool:
        """Whether to save at this step."""
        return step in self.at_steps or (self.every_n_steps is not None and step % self.every_n_steps == 0)

    def is_due_after_epoch(self, epoch: int) -> bool:
        """Whether to save at the end of this epoch (counted from 0)."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0

    def is_due_by_time(self, now: float) -> bool:
        """Whether the interval since the last save is over."""
        return self.every_n_seconds is not None and now - self._last >= self.every_n_seconds

    def calls(self, now: float) -> bool:
        """Whether the interval is over; if so, starts the next interval."""
        due = self.is_due_by_time(now)
        if due:
            self._last = now
        return due

    def is_time_up(self, now: float, needed_s: float) -> bool:
        """Whether the time left is only just enough for `needed_s` seconds of work."""
        return self.max_run_time_s is not None and now - self._began + needed_s + _MARGIN_S >= self.max_run_time_s

    def time_up(self, now: float, save_s: float, steps_s: float) -> str:
        """Why `is_time_up`, for people.

        Args:
            now: The time.
            save_s: The longest save so far, in seconds.
            steps_s: How long the steps until the save may take, in seconds.
        """
        return (
            f"max_run_time_s={self.max_run_time_s:g} is nearly reached: {now - self._began:.1f} s have passed since "
            f"training began, and {save_s + steps_s + _MARGIN_S:.1f} s are reserved (longest save {save_s:.1f} s, two "
            f"steps {steps_s:.1f} s, margin {_MARGIN_S:g} s)"
        )


def _steps(given: object) -> frozenset[int]:
    steps: object = () if given is None else given
    if isinstance(steps, Iterable) and not isinstance(steps, str | Mapping):
        numbers = [
            index(step) if isinstance(step, SupportsIndex) and not isinstance(step, bool) else 0 for step in steps
        ]
        if all(number > 0 for number in numbers):
            return frozenset(numbers)
    raise CheckpointConfigError(
        f"callbacks.checkpoint.at_steps={given!r}: expected a list of whole numbers from 1 up, such as [100, 1000]"
    )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def checked_flag(name: str, value: bool) -> bool:
    """The value of a setting that is true or false.

    Raises:
        CheckpointConfigError: It is something else; a string would count as true.
    """
    if not isinstance(value, bool):
        raise CheckpointConfigError(f"callbacks.checkpoint.{name}={value!r}: expected true or false")
    return value
