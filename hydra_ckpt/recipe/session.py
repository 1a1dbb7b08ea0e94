"""The process-wide state of one training job: process group, accelerate, seeds. All of it is undone at its end.

Hydra runs the jobs of a sweep one after the other in one process, so a job must leave nothing behind for the next one.
"""

from __future__ import annotations

import os
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.jobs.process_group import init_process_group
from hydra_ckpt.state.seeded_batches import derive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hydra_ckpt.recipe.settings import TrainerSettings

__all__ = ["seed_everything", "session", "world_size"]


def world_size() -> int:
    """Processes in this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def seed_everything(seed: int, data_rank: int) -> None:
    """Seeds what training draws from (dropout): equal for peers that share a replica, different between replicas."""
    derived = derive(seed, data_rank, "train")
    torch.manual_seed(derived)
    random.seed(derived)
    np.random.seed(derived % 2**32)


@contextmanager
def session(trainer: TrainerSettings, run_dir: Path) -> Iterator[Accelerator]:
    """Starts what a job needs around its training, and shuts it down whatever happens.

    Collective: every rank of the launch.
    """
    cuda = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        if world_size() > 1:
            _start_process_group(cuda=cuda)
        accelerator = _accelerator(trainer, run_dir, cuda=cuda)
        yield accelerator
        accelerator.end_training()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - accelerate offers no other way
        GradientState._reset_state()  # noqa: SLF001


def _start_process_group(*, cuda: bool) -> None:
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def _accelerator(trainer: TrainerSettings, run_dir: Path, *, cuda: bool) -> Accelerator:
    options: dict[str, Any] = {}
    if trainer.tracker:
        options = {"log_with": trainer.tracker, "project_dir": run_dir}
    try:
        return Accelerator(
            cpu=not cuda,
            mixed_precision=trainer.mixed_precision,
            gradient_accumulation_steps=trainer.grad_accumulation,
            **options,
        )
    except (ImportError, ValueError) as error:
        raise CheckpointConfigError(
            f"accelerate refuses trainer.mixed_precision={trainer.mixed_precision} with "
            f"trainer.tracker={trainer.tracker}: {error}"
        ) from error
