"""A small file in each job's directory that records which start of the sweep assigned it, and to which job.

A start gives each directory to one job, because several jobs may have equal values and run side by side.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.files import Files, write_atomically
from hydra_ckpt.store import names
from hydra_ckpt.store.small_files import read_small_file

__all__ = ["Claim", "Start"]

log = logging.getLogger(__name__)

_FILE = ".hydra_ckpt_claim"
_MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class Start:
    """One start of a sweep.

    Attributes:
        name: Random text.
        first: The number of its first new directory.
    """

    name: str
    first: int

    @classmethod
    def new(cls, first: int) -> Start:
        """A start that begins now; its name is no number, also for OmegaConf."""
        return cls(f"start-{names.nonce()}", first)


@dataclass(frozen=True)
class Claim:
    """What a directory was last given to.

    Attributes:
        start: The name of the start.
        number: The job's number in that start; None if the directory is reserved for a job without a number yet.
    """

    start: str
    number: int | None = None

    @classmethod
    def of(cls, directory: Path) -> Claim | None:
        """The claim on a job's directory; None if there is none that can be read."""
        try:
            data = json.loads(read_small_file(directory / _FILE, _MAX_BYTES))
            return cls(**data)
        except (OSError, CorruptCheckpointError, ValueError, TypeError, RecursionError):
            return None

    def write(self, directory: Path) -> bool:
        """Give a job's directory to this job. A claim that cannot be written does not keep a job from running.

        Returns:
            Whether it was written.
        """
        try:
            write_atomically(Files(), directory / _FILE, json.dumps(asdict(self)).encode(), names.nonce())
        except OSError as error:
            log.warning("%s: that it was given to a job cannot be recorded: %s", directory, error)
            return False
        return True
