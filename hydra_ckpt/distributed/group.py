"""The ranks that checkpoint together: where their store is, and their reductions."""

from __future__ import annotations

import logging
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from hydra_ckpt.distributed.channel import Channel, SoloChannel, StoreChannel
from hydra_ckpt.errors import CheckpointError

log = logging.getLogger(__name__)


def gather_everywhere(process_group: dist.ProcessGroup | None, payload: Any) -> list[Any]:
    """Collective, where a process group is up: the payloads of all ranks, by rank. For the time before a `Group`."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(process_group) == 1:
        return [payload]
    payloads: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(payloads, payload, group=process_group)
    return payloads


class Group:
    """The ranks that checkpoint together.

    Args:
        rank: This process among them.
        world_size: Their number.
        limit_s: Longest wait for an answer, in seconds.
        store: The store that carries their messages; None for a single rank.
        incarnation: Random text, the same on all ranks, new at every start.
        votes: A gloo group for reductions; None for a single rank.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        limit_s: float,
        store: TCPStore | None = None,
        incarnation: str = "solo",
        votes: ProcessGroupGloo | None = None,
    ) -> None:
        self.rank, self.world_size, self.limit_s = rank, world_size, limit_s
        self._store = store
        self._incarnation = incarnation
        self._votes = votes
        self._largest, self._sum = dist.AllreduceOptions(), dist.AllreduceOptions()
        self._largest.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
        self._sum.reduceOp = dist.ReduceOp.SUM  # type: ignore[assignment]

    @classmethod
    def create(cls, process_group: dist.ProcessGroup | None, limit_s: float) -> Group:
        """Collective, where a process group is up: make the store and tell everyone where it is."""
        if not (dist.is_available() and dist.is_initialized()):
            launched = os.environ.get("WORLD_SIZE", "1")
            if launched != "1":
                log.warning(
                    "WORLD_SIZE is %s, but this process belongs to no process group and checkpoints alone: call "
                    "torch.distributed.init_process_group() (accelerate: Accelerator(cpu=True) on CPUs) before it",
                    launched,
                )
            return cls(0, 1, limit_s)
        if dist.get_world_size(process_group) == 1:
            return cls(0, 1, limit_s)
        ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        rank = dist.get_rank(process_group)
        note: list[Any] = [None]
        store = None
        if rank == 0:
            # Ranks on other hosts have to reach it.
            store = TCPStore("0.0.0.0", 0, None, is_master=True, wait_for_workers=False)  # noqa: S104
            note[0] = {"host": socket.gethostname(), "port": store.port, "incarnation": os.urandom(6).hex()}
        dist.broadcast_object_list(note, src=ranks[0], group=process_group)
        where = note[0]
        if store is None:
            store = _connect(where["host"], where["port"], limit_s)
        # Straight on our own store: groups that training makes of the same ranks could get the same name in its store.
        votes = ProcessGroupGloo(PrefixStore("votes", store), rank, len(ranks), timedelta(seconds=limit_s))
        return cls(rank, len(ranks), limit_s, store, where["incarnation"], votes)

    def start_reduction(self, numbers: torch.Tensor, *, adds: bool) -> dist.Work | None:
        """Collective: begin to replace each number by the largest that any rank gives, or by the sum of all.

        Args:
            numbers: Shape (n,), integers on the CPU; in place. The same n at every call: see `Vote`.
            adds: Whether the sum is wanted.

        Returns:
            What to wait for; None if it is done already.
        """
        if self._votes is None:
            return None
        how = self._sum if adds else self._largest
        work: dist.Work = self._votes.allreduce([numbers], how)  # type: ignore[attr-defined]
        return work

    def channel(self, lane: str) -> Channel:
        """A channel of its own for one thread; `lane` names it, equal on all ranks."""
        if self._store is None:
            return SoloChannel()
        return StoreChannel(
            self._store.clone(),  # type: ignore[attr-defined]
            f"{self._incarnation}/{lane}",
            self.rank,
            self.world_size,
            self.limit_s,
        )

    def close(self) -> None:
        """Let go of the gloo group and the store. Idempotent."""
        self._votes = None
        self._store = None


def _connect(host: str, port: int, limit_s: float) -> TCPStore:
    """Reach rank 0's store: on this host through the loopback, else by its name or the job's master address."""
    if host == socket.gethostname():
        addresses = ["127.0.0.1"]
    else:
        addresses = [address for address in (os.environ.get("MASTER_ADDR"), host) if address]
    timeout = timedelta(seconds=min(limit_s, 60.0))
    failures = []
    for address in dict.fromkeys(addresses):
        try:
            return TCPStore(address, port, None, is_master=False, timeout=timeout)
        except RuntimeError as error:
            failures.append(f"{address}: {error}")
    raise CheckpointError(f"rank 0's store at port {port} cannot be reached: {'; '.join(failures)}")
