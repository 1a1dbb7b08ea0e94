"""What a run began from, as its checkpoints record it.

A run that began from a given checkpoint and is started again with the same command continues from its own newest
checkpoint. Otherwise a requeued run would begin again each time.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.jobs.restarts import agent_restarts, restarts_of_this_process
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.manifest import MAX_BYTES, TOKEN
from hydra_ckpt.store.owner import process_identity
from hydra_ckpt.store.small_files import read_small_file

__all__ = ["FRESH", "LAUNCHES", "ORIGIN", "Origin", "launches", "launches_in", "token_of", "token_of_foreign"]

ORIGIN = "begun_from"
"""In a manifest's `details`: the `Origin`."""
LAUNCHES = "launched_by"
"""In a manifest's `details`: identities of what started the run, to recognize a restart by the same launcher."""
FRESH = "none"
_MAX_CHARACTERS = 8192  # of a recorded value; paths have at most 4096
_MAX_LAUNCHES = 64


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run began from.

    Attributes:
        selector: `restore_from` as it was configured; FRESH if that asks for a fresh start.
        path: The checkpoint it led to, absolute, without links; empty for a fresh start.
        token: Tells that checkpoint from others; equal in a copy, but not for a checkpoint of another tool. Empty for a
            fresh start, or if it is gone.
    """

    selector: str
    path: str = ""
    token: str = ""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Origin | None:
        """What the run that wrote a checkpoint began from; None if that is not recorded."""
        return cls.recorded_in(checkpoint.manifest.details)

    @classmethod
    def recorded_in(cls, details: Mapping[str, Any]) -> Origin | None:
        """What a manifest's `details` say that the run began from; None if they do not, or not as we write it."""
        data = details.get(ORIGIN)
        if not isinstance(data, dict):
            return None
        texts = {item.name: data.get(item.name) for item in fields(cls)}
        return cls(**texts) if all(map(_is_value, texts.values())) else None  # type: ignore[arg-type]

    def as_data(self) -> dict[str, str]:
        """As plain data."""
        return asdict(self)

    def is_begun_by(self, found: Origin, *, is_restart: bool, sets_aside: bool) -> bool:
        """Whether a run that asks for this is the one that began from `found`, and continues.

        Args:
            found: What the run that wrote the newest checkpoint began from.
            is_restart: Whether a launcher has restarted that run.
            sets_aside: Whether later checkpoints may be set aside. Someone who asks for that by hand wants to begin
                again.
        """
        same = bool(self.token) and self.token == found.token
        alike = self.selector == found.selector or (bool(self.path) and self.path == found.path)
        if is_restart:
            return same or alike
        gone = not self.token and self.selector != FRESH
        return not sets_aside and (same or (alike and gone))


def _is_value(value: Any) -> bool:
    """Whether a value may be one that we recorded; manifests come from anyone."""
    return isinstance(value, str) and len(value) <= _MAX_CHARACTERS


def token_of_foreign(index: Path) -> str:
    """The token of a checkpoint of another tool at its place, which has no identity elsewhere.

    Checkpoints of equal models have equal indices, and equal times as well if an archive or an image has set them.

    Args:
        index: The checkpoint's index, without links.

    Raises:
        OSError: It cannot be read.
    """
    known = index.stat()
    text = f"{known.st_size} {known.st_mtime_ns} {index}"
    return xxhash.xxh3_128_hexdigest(text.encode(errors="surrogateescape"))


def token_of(checkpoint: Path) -> str:
    """The token of the save that wrote a checkpoint, also after an export was added; empty if it cannot be read."""
    try:
        details = Checkpoint.open(checkpoint).manifest.details
        token = details.get(TOKEN)
        return token if isinstance(token, str) else xxhash.xxh3_64_hexdigest(_manifest(checkpoint))
    except (OSError, CheckpointError):
        return ""


def _manifest(checkpoint: Path) -> bytes:
    return read_small_file(checkpoint / names.MANIFEST, MAX_BYTES)


def launches() -> dict[str, bool]:
    """What started this process: an identity, and whether it had started the run before.

    Only launchers that count restarts are here: Slurm and torchrun.
    """
    found = {name: count > 0 for name, count in restarts_of_this_process().items()}
    restarts = agent_restarts()
    agent = process_identity(os.getppid()) if restarts is not None else ""
    return {**found, f"torchrun {agent}": bool(restarts)} if agent else found


def launches_in(details: Mapping[str, Any]) -> Collection[str]:
    """The identities that a checkpoint records."""
    found = details.get(LAUNCHES)
    return [item for item in found[:_MAX_LAUNCHES] if _is_value(item)] if isinstance(found, list) else ()
