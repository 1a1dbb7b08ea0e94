"""Files that ask a run for something: `SAVE` saves once, `STOP` saves and stops. Looked for by rank 0 alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

SAVE, STOP = "SAVE", "STOP"
# On a file system far away a look takes milliseconds.
INTERVAL_S = 1.0


class RequestFiles:
    """The places where such files may appear.

    Args:
        places: Directories of this run; a file found there is removed, because it was meant for this run alone.
        shared: The sweep's directory: `STOP` there is meant for all its jobs, and stays.
    """

    def __init__(self, places: Iterable[Path] = (), shared: Path | None = None) -> None:
        self._places = list(dict.fromkeys(places))
        self._shared = shared
        self._refused: set[Path] = set()
        self._next_s = 0.0

    def look(self, now: float) -> set[str]:
        """What is asked for, at most once a second.

        Args:
            now: Seconds of any one clock.
        """
        if now < self._next_s:
            return set()
        self._next_s = now + INTERVAL_S
        found = {name for place in self._places for name in (SAVE, STOP) if self._take(place / name)}
        if self._shared is not None and (self._shared / STOP).exists():
            found.add(STOP)
        return found

    def _take(self, path: Path) -> bool:
        """Whether the file was there; it is removed, so that it is obeyed once."""
        if path in self._refused or not path.is_file():
            return False
        log.info("%s is obeyed, and removed", path)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._refused.add(path)
            log.warning("%s cannot be removed (%s); in this run it is not obeyed again", path, error)
        return True
