"""Request files for a run: `SAVE` saves once, `STOP` saves and stops. Only rank 0 looks for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from hydra_ckpt.jobs.run import HydraRun
from hydra_ckpt.sweeps.stopping import halted

log = logging.getLogger(__name__)

SAVE, STOP = "SAVE", "STOP"
HALT = "HALT"  # not a file name: the launcher has told its jobs to save and stop
# On a remote file system one look takes milliseconds.
INTERVAL_S = 1.0


class RequestFiles:
    """The places where request files may appear.

    Args:
        places: Directories of this run; a file found there is removed, because it is meant for this run alone.
        shared: The sweep's directory: `STOP` there is meant for all its jobs, and is kept.
        halted: Whether the launcher has told its jobs to save and stop.
    """

    def __init__(
        self,
        places: Iterable[Path] = (),
        shared: Path | None = None,
        halted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._places = list(dict.fromkeys(places))
        self._shared = shared
        self._halted = halted
        self._refused: set[Path] = set()
        self._next_s = 0.0

    @classmethod
    def of(cls, root: Path) -> RequestFiles:
        """The request files of the run with this checkpoint directory."""
        run = HydraRun.current()
        if run is None:
            return cls([root])

        def is_halted() -> bool:
            order = halted(run)
            return order is not None and order.running

        return cls([run.output_dir, root], run.sweep_dir, is_halted)

    def look(self, now: float) -> set[str]:
        """The current requests; looks at most once a second, and is empty in between.

        Args:
            now: Time in seconds, always from the same clock.
        """
        if now < self._next_s:
            return set()
        self._next_s = now + INTERVAL_S
        found = {name for place in self._places for name in (SAVE, STOP) if self._take(place / name)}
        if self._shared is not None and (self._shared / STOP).exists():
            found.add(STOP)
        if self._halted():
            found.add(HALT)
        return found

    def _take(self, path: Path) -> bool:
        """Whether the file exists; removes it, so that it is obeyed once."""
        if path in self._refused or not path.is_file():
            return False
        log.info("%s found: obeying and removing it", path)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._refused.add(path)
            log.warning("%s cannot be removed (%s); this run will not obey it again", path, error)
        return True
