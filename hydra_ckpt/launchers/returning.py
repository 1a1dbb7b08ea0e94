"""What a stopped job hands to the sweeper."""

from __future__ import annotations

from typing import Any

from hydra.core.utils import JobReturn

__all__ = ["StoppedReturn"]


class StoppedReturn(JobReturn):
    """The return of a job that was stopped.

    Hydra's own writes an error message to stderr before it raises what the job ended with. If nobody reads stderr any
    more, because the signal that stopped the sweep also ended `tee`, that write raises an ordinary exception instead,
    and the trial would count as failed.
    """

    @property
    def return_value(self) -> Any:
        """Raises what the job ended with, and writes nothing."""
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value
