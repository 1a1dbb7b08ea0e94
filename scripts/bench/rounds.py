"""Alternating measurements: every contestant once a round, and ratios taken within rounds.

These machines are noisy; what slows one contestant slows its neighbours in the same round too, so only the ratios of
one round are compared. Printed are medians and the middle half of the paired ratios.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

Measure = Callable[[int], float]

# A file system mounted with `discard` trims deleted blocks in the background for about so long a gigabyte.
_TRIMMED_S = 0.3


@dataclass
class Table:
    """Seconds by contestant, one number a round: the slowest rank's.

    Attributes:
        touched: Memory that a contestant may need beyond what is in use, in bytes a rank.
    """

    touched: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, contestants: dict[str, Measure], rounds: int) -> None:
        """Let every contestant measure itself once a round; each returns its seconds."""
        for number in range(rounds):
            for name, measure in contestants.items():
                settle(self.touched)
                together()
                slowest = torch.tensor(measure(number))
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                self.seconds.setdefault(name, []).append(slowest.item())

    def ratio(self, name: str, base: str) -> str:
        """The median of the paired ratios and their middle half."""
        ratios = sorted(a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True))
        # Quartiles of two or three numbers would lie outside of them.
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 3 else (ratios[0], None, ratios[-1])
        return f"{statistics.median(ratios):6.2f} [{low:.2f}, {high:.2f}]"

    def show(self, title: str, bases: list[str]) -> None:
        """Print the table on rank 0."""
        if dist.get_rank():
            return
        print(f"\n{title}")
        print(f"{'':42s} {'median s':>9s}  " + "  ".join(f"{'x ' + base:>24s}" for base in bases))
        for name, found in self.seconds.items():
            cells = "  ".join(f"{self.ratio(name, base):>24s}" for base in bases)
            print(f"{name:42s} {statistics.median(found):9.4f}  {cells}", flush=True)


def settle(nbytes: int) -> None:
    """Give every contestant the same machine: nothing left to write, and `nbytes` of free memory that is really there.

    A virtual machine hands memory that has been free for a while back to its host; whoever is the first to use it
    again pays for that with up to two seconds a gigabyte.
    """
    os.sync()
    time.sleep(_TRIMMED_S)
    np.ones(nbytes, np.uint8)  # NumPy asks for huge pages, which is what files take as well


def together() -> None:
    """Let all ranks start at the same moment."""
    dist.barrier()


def fresh(path: Path) -> Path:
    """Collective: a directory that does not exist; one that was there is removed."""
    together()
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    together()
    return path


def timed(action: Callable[[], object]) -> float:
    """Seconds an action takes."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def arguments_of(description: str) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--adam", action="store_true")
    return parser


class Block(nn.Module):
    """2.6 million parameters in four tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(1024, 1024, dtype=dtype))
        self.down = nn.Parameter(torch.empty(1024, 1024, dtype=dtype))
        self.gate = nn.Parameter(torch.empty(512, 1024, dtype=dtype))
        self.norm = nn.Parameter(torch.empty(1024, dtype=dtype))


def build(blocks: int, dtype: torch.dtype = torch.float32, *, adam: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A sharded model of `blocks` blocks (10.5 MB each in fp32), with AdamW state where asked for."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    model = nn.Sequential(*(Block(dtype) for _ in range(blocks)))
    for block in model:
        fully_shard(block, mesh=mesh)
    for parameter in model.parameters():
        nn.init.normal_(parameter.to_local())
    optimizer = torch.optim.AdamW(model.parameters())
    if adam:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def local_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All memory of this rank that a checkpoint has to save."""
    tensors = [parameter.to_local().detach() for parameter in model.parameters()]
    for held in optimizer.state.values():
        tensors += [value.to_local() if hasattr(value, "to_local") else value for value in held.values()]
    return tensors
