"""The ranks that checkpoint together: their store and their reductions.

Example: a process group of ranks 4 to 7 of a training of 8 checkpoints on its own. Inside the `Group` they are ranks 0
to 3: rank 4 of the training is rank 0 here, hosts the store and decides. Through the training's process group, it
sends the others its addresses, its port and a random incarnation, and all four report whether they have reached it.
From then on the process group is not used.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from hydra_ckpt.distributed.channel import Channel, SoloChannel
from hydra_ckpt.distributed.courier import Courier, bounded
from hydra_ckpt.distributed.reaching import (
    LOOPBACK,
    RankAddress,
    Reached,
    UnreachableError,
    network_of_this_process,
    reach,
)
from hydra_ckpt.distributed.store_channel import StoreChannel
from hydra_ckpt.errors import CheckpointError

log = logging.getLogger(__name__)

_LISTED = 3


# Ranks come to `build()` at different times: one of them may still prepare data, or compile.
_START_S = 600.0


def gather_everywhere(process_group: dist.ProcessGroup | None, payload: Any, limit_s: float) -> list[Any]:
    """Collective if a process group is up: the payloads of all ranks, by rank. For use before a `Group` exists.

    Raises:
        CheckpointError: The other ranks did not come within the limit, or `_START_S` if that is longer.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(process_group) == 1:
        return [payload]
    payloads: list[Any] = [None] * dist.get_world_size(process_group)
    _together(process_group, lambda: dist.all_gather_object(payloads, payload, group=process_group), limit_s)
    return payloads


def _together(process_group: dist.ProcessGroup | None, call: Callable[[], object], limit_s: float) -> None:
    """Make a call of the training's own process group, which may wait longer than our limits.

    NCCL's calls are made in this thread, which has chosen the device. Their limit is that of the group's watchdog.
    """
    patience_s = max(limit_s, _START_S)
    try:
        if dist.get_backend(process_group) == "gloo":
            bounded(call, patience_s)
        else:
            call()
    except (RuntimeError, TimeoutError) as error:
        raise CheckpointError(
            f"the ranks did not meet when the Checkpointer was built ({error}). All ranks of the process group must "
            "build it, at the same place in the program; one of them has ended, hangs, or waits for the others in "
            "another collective call"
        ) from error


class Group:
    """The ranks that checkpoint together.

    Args:
        rank: This process's rank.
        world_size: Number of ranks.
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
        self._courier = Courier("hydra_ckpt-group") if store is not None else None
        self._incarnation = incarnation
        self._votes = votes
        self._largest, self._sum = dist.AllreduceOptions(), dist.AllreduceOptions()
        self._largest.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
        self._sum.reduceOp = dist.ReduceOp.SUM  # type: ignore[assignment]

    @classmethod
    def create(cls, process_group: dist.ProcessGroup | None, limit_s: float) -> Group:
        """Collective if a process group is up: create the store and connect every rank to it."""
        if not (dist.is_available() and dist.is_initialized()):
            launched = os.environ.get("WORLD_SIZE", "1")
            if launched != "1":
                log.warning(
                    "WORLD_SIZE is %s, but this process belongs to no process group and checkpoints alone: call "
                    "torch.distributed.init_process_group() (accelerate: Accelerator(cpu=True) on CPUs) first",
                    launched,
                )
            return cls(0, 1, limit_s)
        if dist.get_world_size(process_group) == 1:
            return cls(0, 1, limit_s)
        rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        place, store = _open_store(process_group, rank, limit_s)
        reached = None if store is not None else _try_to_reach(place, limit_s)
        own = _meet(process_group, reached, limit_s)
        if store is None:
            assert isinstance(reached, Reached)  # _meet has raised otherwise
            store = reached.store
        # On our own store: in training's store, another group of the same ranks could get the same name.
        options = _options(own, limit_s)
        found = store
        try:
            votes = bounded(lambda: ProcessGroupGloo(PrefixStore("votes", found), rank, world_size, options), limit_s)
        except (RuntimeError, TimeoutError) as error:
            raise CheckpointError(
                f"the ranks can reach rank 0 but not each other, from {own or 'the address that gloo chose'} "
                f"({error}). If that is the wrong network interface, set GLOO_SOCKET_IFNAME"
            ) from error
        return cls(rank, world_size, limit_s, store, place.incarnation, votes)

    def start_reduction(self, numbers: torch.Tensor, *, adds: bool) -> dist.Work | None:
        """Collective: start replacing each number by its maximum over all ranks, or by its sum.

        Args:
            numbers: Shape (n,), integers on the CPU; in place. The same n at every call: see `Vote`.
            adds: Whether to compute the sum.

        Returns:
            The work to wait for; None if it is already done.
        """
        if self._votes is None:
            return None
        how = self._sum if adds else self._largest
        work: dist.Work = self._votes.allreduce([numbers], how)  # type: ignore[attr-defined]
        return work

    def channel(self, lane: str) -> Channel:
        """A new channel for one thread; `lane` names it, equal on all ranks."""
        store, courier = self._store, self._courier
        if store is None or courier is None:
            return SoloChannel()
        try:
            connection = courier.call(store.clone, self.limit_s)  # type: ignore[attr-defined]
        except (RuntimeError, TimeoutError) as error:
            raise CheckpointError(f"rank 0 can no longer be reached ({error})") from error
        return StoreChannel(connection, f"{self._incarnation}/{lane}", self.rank, self.world_size, self.limit_s)

    def close(self) -> None:
        """Release the gloo group and the store. Idempotent."""
        self._votes = None
        self._store = None
        if self._courier is not None:
            self._courier.close()


def _open_store(
    process_group: dist.ProcessGroup | None, rank: int, limit_s: float
) -> tuple[RankAddress, TCPStore | None]:
    """Collective: rank 0 creates the store; all ranks get its place."""
    store: TCPStore | None = None
    note: list[Any] = [None]
    if rank == 0:
        # Ranks on other hosts must be able to reach it.
        store = TCPStore("0.0.0.0", 0, None, is_master=True, wait_for_workers=False)  # noqa: S104
        place = RankAddress.here(store.port, os.urandom(6).hex())
        store.set(place.incarnation, "1")
        note = [asdict(place)]
    first = dist.get_process_group_ranks(process_group or dist.group.WORLD)[0]
    _together(process_group, lambda: dist.broadcast_object_list(note, src=first, group=process_group), limit_s)
    return RankAddress(**note[0]), store


def _try_to_reach(place: RankAddress, limit_s: float) -> Reached | str:
    """The connection to rank 0, or why there is none, which the other ranks must be told."""
    try:
        return reach(place, limit_s)
    except UnreachableError as error:
        return str(error)


def _meet(process_group: dist.ProcessGroup | None, reached: Reached | str | None, limit_s: float) -> str:
    """Collective: check that every rank has reached rank 0.

    Args:
        process_group: The ranks.
        reached: How this rank has reached rank 0, or why not; None on rank 0.
        limit_s: The longest wait for the other ranks, in seconds.

    Returns:
        The address at which the other ranks reach this one.

    Raises:
        CheckpointError: On all ranks, if any rank has not.
    """
    network = network_of_this_process()
    way = [reached.address, reached.own] if isinstance(reached, Reached) else None
    failure = reached if isinstance(reached, str) else None
    notes = gather_everywhere(process_group, [socket.gethostname(), network, failure, way], limit_s)
    failed = [f"rank {rank} on {note[0]}: {note[2]}" for rank, note in enumerate(notes) if note[2]]
    if failed:
        raise CheckpointError(
            f"{'; '.join(failed[:_LISTED])}. Set MASTER_ADDR to an address of rank 0's host that all hosts can reach, "
            "fix the host names (/etc/hosts), or let the firewall pass connections between the hosts"
        )
    remote = [note[3] for note in notes if note[3] is not None and note[3][0] != LOOPBACK]
    if way is not None and way[0] != LOOPBACK:
        return str(way[1])
    # On rank 0's host: the address at which ranks on other hosts have reached it.
    return str(remote[0][0]) if remote else LOOPBACK


def _options(own: str, limit_s: float) -> Any:
    """How gloo connects: from an address that others can reach, which may not be what the host name resolves to."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001 - no other way to give a device
    options._timeout = timedelta(seconds=limit_s)  # noqa: SLF001
    chosen = bool(os.environ.get("GLOO_SOCKET_IFNAME"))
    device = ProcessGroupGloo.create_default_device() if chosen else ProcessGroupGloo.create_device(hostname=own)
    options._devices = [device]  # noqa: SLF001
    return options
