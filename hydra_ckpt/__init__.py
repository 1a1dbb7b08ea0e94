"""Hydra-configured checkpointing for PyTorch: the checkpoint is the model, written once, in parallel, by every rank.

Public names are resolved when first used: importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from hydra_ckpt.errors import (
    CheckpointConfigError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    KeyMismatchError,
    SaveFailedError,
    SaveOutcomeUnknown,
    TakenOverError,
    TopologyError,
)

if TYPE_CHECKING:
    from hydra_ckpt.callback import CheckpointCallback
    from hydra_ckpt.checkpointer import Checkpointer
    from hydra_ckpt.config import CheckpointingConfig, SaveConsolidatedMode
    from hydra_ckpt.jobs.process_group import init_process_group
    from hydra_ckpt.registry import register
    from hydra_ckpt.report import LoadReport
    from hydra_ckpt.saving.pending import PendingSave
    from hydra_ckpt.state.app_state import AppState
    from hydra_ckpt.state.dataloader import resumable
    from hydra_ckpt.store.catalog import Checkpoint
    from hydra_ckpt.sweeps.job import resumable_job
    from hydra_ckpt.sweeps.stopping import JobStopped

__version__ = "0.1.0"

__all__ = [
    "AppState",
    "Checkpoint",
    "CheckpointCallback",
    "CheckpointConfigError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointFormatError",
    "CheckpointNotFoundError",
    "Checkpointer",
    "CheckpointingConfig",
    "CorruptCheckpointError",
    "JobStopped",
    "KeyMismatchError",
    "LoadReport",
    "PendingSave",
    "SaveConsolidatedMode",
    "SaveFailedError",
    "SaveOutcomeUnknown",
    "TakenOverError",
    "TopologyError",
    "init_process_group",
    "register",
    "resumable",
    "resumable_job",
]

_HOMES = {
    "AppState": "hydra_ckpt.state.app_state",
    "Checkpoint": "hydra_ckpt.store.catalog",
    "CheckpointCallback": "hydra_ckpt.callback",
    "Checkpointer": "hydra_ckpt.checkpointer",
    "CheckpointingConfig": "hydra_ckpt.config",
    "JobStopped": "hydra_ckpt.sweeps.stopping",
    "LoadReport": "hydra_ckpt.report",
    "PendingSave": "hydra_ckpt.saving.pending",
    "SaveConsolidatedMode": "hydra_ckpt.config",
    "init_process_group": "hydra_ckpt.jobs.process_group",
    "register": "hydra_ckpt.registry",
    "resumable": "hydra_ckpt.state.dataloader",
    "resumable_job": "hydra_ckpt.sweeps.job",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
