"""Running a function on several real processes that form a process group."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

PATIENCE = float(os.environ.get("HYDRA_CKPT_PATIENCE", "1"))
"""All time limits of tests are multiplied by this: more than one for a slow or a busy machine."""

PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "hydra_ckpt.callback"]
"""What the server of `forkserver()` imports. A test suite may add modules before the first process starts."""


class RankFailedError(AssertionError):
    """A rank raised, died, or did not finish in time.

    Attributes:
        failures: Rank to what happened.
    """

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(failures.items())))


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0, backend: str = "gloo"
) -> list[Any]:
    """Call `function(*args)` on `world_size` fresh processes with `torch.distributed` up and equal random seeds.

    Args:
        function: A module's top-level function; what it returns must be picklable.
        world_size: Number of processes.
        *args: Passed to every process.
        timeout_s: After so many seconds, times the environment variable HYDRA_CKPT_PATIENCE if it is set, all
            processes are killed.
        backend: Of the process group.

    Returns:
        The results by rank.

    Raises:
        RankFailedError: A process raised, died or was killed.
    """
    context = forkserver()
    timeout_s *= PATIENCE
    with tempfile.TemporaryDirectory() as scratch:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            job = (function, args, rank, world_size, f"{scratch}/rendezvous", backend, timeout_s, theirs)
            process = context.Process(target=_main, args=job, daemon=False)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        outcomes = _collect(pipes, processes, time.monotonic() + timeout_s)
    failures = {rank: text for rank, (good, text) in enumerate(outcomes) if not good}
    if failures:
        raise RankFailedError(failures)
    return [value for _, value in outcomes]


def forkserver() -> ForkServerContext:
    """The context to start processes from: they fork from a server that has imported torch once.

    Python keeps one such server for each process, and what it imports is settled by whoever starts it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "hydra_ckpt.testing.frozen"])
    return context


def _collect(pipes: list[Connection], processes: list[Any], deadline: float) -> list[tuple[bool, Any]]:
    outcomes = []
    for pipe, process in zip(pipes, processes, strict=True):
        try:
            if not pipe.poll(max(deadline - time.monotonic(), 0.0)):
                outcomes.append((False, "did not finish in time and was killed"))
                continue
            outcomes.append(pickle.loads(pipe.recv_bytes()))  # noqa: S301 - our own child has written it
        except EOFError:
            process.join(1.0)
            outcomes.append((False, f"died with exit code {process.exitcode}"))
    for process in processes:
        process.join(max(deadline - time.monotonic(), 1.0))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            rank = processes.index(process)
            if outcomes[rank][0]:
                outcomes[rank] = (False, "finished its work but did not exit, and was killed")
    return outcomes


def _main(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    rendezvous: str,
    backend: str,
    timeout_s: float,
    pipe: Connection,
) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.enable()  # a crash below Python says where
    # torch looks up the names of its peers' sockets; a name server that loses a request must not cost five seconds.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    # The child has inherited the start method; data loaders' workers would start servers of their own.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)  # every rank builds the same model
    dist.init_process_group(
        backend,
        init_method=Path(rendezvous).as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        # Plain pickle: the pipe's own would hand over torch's tensors as shared memory, which ends with this process.
        good, outcome = True, pickle.dumps((True, function(*args)))
    except BaseException:
        good, outcome = False, pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(outcome)
    pipe.close()
    # A failed rank must not wait for the others.
    if good and dist.is_initialized():
        dist.destroy_process_group()
