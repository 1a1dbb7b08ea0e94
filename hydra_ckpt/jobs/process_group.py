"""The process group of a job whose launcher may have started its ranks before, and whose process may run more jobs."""

from __future__ import annotations

import os
from itertools import count
from typing import Any

from hydra_ckpt.jobs.launch import attempt

__all__ = ["init_process_group"]

_jobs = count()


def init_process_group(backend: str | None = None, **options: Any) -> None:
    """`torch.distributed.init_process_group()` by torchrun's variables, which also works the second time.

    torchrun's store outlives a restart, and a sweep's jobs share it, so a plain call may find the addresses of ranks
    that are gone, and fail or hang (pytorch issue 135712, seen with torch 2.13). Here each attempt and each job has its
    own part of the store.
    Without torchrun's variables, or if the group exists already, nothing happens.

    Collective: every rank of the launch.

    Args:
        backend: As `init_process_group` takes it.
        **options: Its other arguments, except those about stores and ranks.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if "RANK" not in os.environ or dist.is_initialized():
        return
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"hydra_ckpt/attempt_{attempt()}/job_{next(_jobs)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, **options)
