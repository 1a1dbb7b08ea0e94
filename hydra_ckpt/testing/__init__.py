"""For tests, ours and yours: real processes with a process group, and file layers that record or fail."""

from __future__ import annotations

from hydra_ckpt.testing.files import FaultyFiles, Operation, RecordingFiles, replay
from hydra_ckpt.testing.processes import RankFailedError, run_distributed

__all__ = ["FaultyFiles", "Operation", "RankFailedError", "RecordingFiles", "replay", "run_distributed"]
