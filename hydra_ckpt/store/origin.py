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

__all__ = ["FRESH", "LAUNCHES", "ORIGIN", "Origin", "launches", "launches_in", "token_of"]

ORIGIN = "begun_from"
"""In a manifest's `details`: the `Origin`."""
LAUNCHES = "launched_by"
"""In a manifest's `details`: identities of what started the run, to recognize a restart by the same launcher."""
FRESH = "none"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run began from.

    Attributes:
        selector: `restore_from` as it was configured; FRESH if that asks for a fresh start.
        path: The checkpoint it led to, absolute, without links; empty for a fresh start.
        token: Tells that checkpoint from others; equal in a copy. Empty for a fresh start, or if it is gone.
    """

    selector: str
    path: str = ""
    token: str = ""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Origin | None:
        """What the run that wrote a checkpoint began from; None if that is not recorded."""
        data = checkpoint.manifest.details.get(ORIGIN)
        if not isinstance(data, dict):
            return None
        texts = {item.name: data.get(item.name) for item in fields(cls)}
        return cls(**texts) if all(isinstance(text, str) for text in texts.values()) else None  # type: ignore[arg-type]

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
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else ()
