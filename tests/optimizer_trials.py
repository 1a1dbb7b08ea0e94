"""Saving and loading one real optimizer, compared with PyTorch's own round trip and with an uninterrupted run.

As a program it tries all of them and prints JSON: `python -m tests.optimizer_trials [--world 2] [--library torch]`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hydra_ckpt import AppState, CheckpointError, CheckpointingConfig
from hydra_ckpt.testing import run_distributed
from tests.real_optimizers import LIBRARIES, ROWS, Kind, Net, named, of_library

FURTHER = 12
"""Steps that are compared after the load."""


@dataclass
class Outcome:
    """What came of one optimizer.

    Attributes:
        name: Which.
        steps: How many steps it had made before the save.
        world: Number of ranks.
        cannot: Why it cannot be tried at all: it does not build or step here.
        torch_state: Where the state differs after PyTorch's own round trip; None where that raises.
        torch_goes_on: Whether the run after it ends in the same bits as the one that was not interrupted.
        state: The same after a load; None where save or load is refused.
        goes_on: The same.
        claim: What the report says of it: exact, trusted or nothing.
        refusal: The CheckpointError.
        fault: Any other exception out of save or load.
        finite: Whether the parameters are numbers still; otherwise the trial proves little.
    """

    name: str
    steps: int
    world: int = 1
    cannot: str = ""
    torch_state: list[str] | None = None
    torch_goes_on: bool = False
    state: list[str] | None = None
    goes_on: bool = False
    claim: str = ""
    refusal: str = ""
    fault: str = ""
    finite: bool = True
    torch_error: str = ""

    @property
    def verdict(self) -> str:
        """One word: cannot step, refused, exact, trusted, as torch, or worse."""
        if self.cannot:
            return "cannot step"
        if self.fault:
            return "worse"
        if self.refusal:
            return "refused"
        if not self.state and self.goes_on:
            return self.claim if self.claim == "exact" else "trusted"
        torch_same = self.torch_state is not None and not self.torch_state
        if (torch_same and self.state) or (self.torch_goes_on and not self.goes_on):
            return "worse"
        return "as torch"


def seed() -> None:
    """Give every random source a known state."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)


def build(kind: Kind, mesh: Any, unused: bool) -> tuple[nn.Module, Any]:
    """A fresh model, sharded where there is a mesh, and its optimizer."""
    torch.manual_seed(0)
    model = Net(unused)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model, kind.make(model)


def train(kind: Kind, model: nn.Module, optimizer: Any, steps: range) -> None:
    """Make steps over data that depend on step and rank alone."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * rank + step)
        kind.drive(model, optimizer, torch.randint(ROWS, (8,), generator=generator))


def agree(flag: bool) -> bool:
    """Collective: whether it is so on all ranks."""
    if not dist.is_initialized():
        return flag
    flags: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(flags, flag)
    return all(flags)


def attempt(step: Callable[[], Any]) -> tuple[Any, str]:
    """Collective: do a step; what it gives and why it failed, on any rank."""
    value, why, error = None, "", None
    try:
        value = step()
    except Exception as raised:  # noqa: BLE001 - a foreign optimizer may raise anything
        error = raised
        why = f"{type(raised).__name__}: {raised}".strip().split("\n")[0][:300]
    if not agree(error is None) and error is None:
        why = "failed on another rank"
    if isinstance(error, CheckpointError):
        why = "refused: " + str(error)
    return value, why


def trial(kind: Kind, steps: int, root: Path, mesh: Any = None) -> Outcome:
    """Collective: train, save, load into a fresh pair, compare, train on, compare."""
    found = Outcome(kind.name, steps, dist.get_world_size() if dist.is_initialized() else 1)
    if mesh is not None and not kind.shards:
        found.cannot = "its own collectives do not end on DTensors"
        return found
    pair, unused = _trained(found, kind, steps, mesh)
    if pair is None:
        return found
    model, optimizer = pair
    config = CheckpointingConfig(checkpoint_dir=str(root))
    rank = dist.get_rank() if dist.is_initialized() else 0

    def save() -> None:
        with config.build(rank, 0, 0) as checkpointer:
            checkpointer.save(AppState(model, optimizer), step=1).result()

    def ours() -> tuple[nn.Module, Any]:
        again, restored = build(kind, mesh, unused)
        with config.build(rank, 0, 0) as checkpointer:
            report = checkpointer.load(AppState(again, restored), restore_from="latest")
        claims = dict.fromkeys(getattr(report, "exact", ()), "exact")
        claims.update(dict.fromkeys(getattr(report, "trusted", ()), "trusted"))
        found.claim = claims.get("optimizer", "")
        return again, restored

    def torchs() -> tuple[nn.Module, Any]:
        again, restored = build(kind, mesh, unused)
        again.load_state_dict(copy.deepcopy(model.state_dict()))
        restored.load_state_dict(copied(optimizer.state_dict()))
        return again, restored

    told, _ = attempt(lambda: copied(optimizer.state_dict()))
    theirs, found.torch_error = attempt(torchs)
    _, why = attempt(save)
    mine, why = (None, why) if why else attempt(ours)
    if why.startswith("refused"):
        found.refusal = why
    elif why:
        found.fault = why
    if not found.torch_error:
        found.torch_state, why = attempt(lambda: sorted(set(different(told, theirs[1].state_dict())))[:5])
    if mine is not None and not found.refusal and not found.fault:
        found.state, why = attempt(lambda: sorted(set(different(told, mine[1].state_dict())))[:5])
        found.fault = found.fault or why
    _go_on(found, kind, steps, pair, theirs if not found.torch_error else None, mine)
    return found


def _trained(found: Outcome, kind: Kind, steps: int, mesh: Any) -> tuple[Any, bool]:
    """The pair after its first steps; without the unused parameter if the optimizer cannot stand one."""
    for unused in (True, False):
        seed()

        def run(unused: bool = unused) -> tuple[nn.Module, Any]:
            pair = build(kind, mesh, unused)
            train(kind, *pair, range(steps))
            return pair

        pair, found.cannot = attempt(run)
        if not found.cannot:
            return pair, unused
    return None, True


def _go_on(found: Outcome, kind: Kind, steps: int, original: Any, theirs: Any, mine: Any) -> None:
    ends: list[list[torch.Tensor] | None] = []
    for pair in (original, theirs, mine):
        ends.append(None)
        if agree(pair is not None):
            seed()
            _, why = attempt(lambda pair=pair: train(kind, *pair, range(steps, steps + FURTHER)))
            if pair is original:
                found.cannot = why
            elif pair is mine:
                found.fault = found.fault or why
            ends[-1] = None if why else [_local(item) for item in pair[0].parameters()]
    reference = ends[0] or []
    found.finite = agree(all(bool(item.isfinite().all()) for item in reference))
    found.torch_goes_on, found.goes_on = (
        agree(end is not None and all(map(_same_bits, reference, end))) for end in ends[1:]
    )


def copied(value: Any) -> Any:
    """A deep copy, of the tensor subclasses too that cannot be copied."""
    if isinstance(value, DTensor) and hasattr(value._local_tensor, "__tensor_flatten__"):
        local = copied(value._local_tensor)
        return DTensor.from_local(
            local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    if isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        inner = {name: copied(getattr(value, name)) for name in names}
        return type(value).__tensor_unflatten__(inner, context, value.shape, value.stride())
    if type(value) in (dict, list, tuple):
        return type(value)(
            {key: copied(item) for key, item in value.items()} if type(value) is dict else map(copied, value)
        )
    return copy.deepcopy(value)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(
        *(item.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8) for item in (one, other))
    )


def different(one: Any, other: Any, place: str = "") -> Iterator[str]:  # noqa: C901 - one case after the other
    """Where two states differ in values, types, strides or placements, by place."""
    if type(one) is not type(other):
        yield f"{place}: {type(one).__name__} and {type(other).__name__}"
    elif isinstance(one, torch.Tensor):
        yield from _different_tensors(one, other, place)
    elif isinstance(one, Mapping):
        yield from (f"{place}.{key}: on one side" for key in one.keys() ^ other.keys())
        for key in one.keys() & other.keys():
            yield from different(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple | deque):
        if len(one) != len(other):
            yield f"{place}: {len(one)} and {len(other)} items"
        for number, (left, right) in enumerate(zip(one, other, strict=False)):
            yield from different(left, right, f"{place}.{number}")
    elif isinstance(one, np.ndarray):
        if (one.dtype, one.tolist()) != (other.dtype, other.tolist()):
            yield place
    elif not _equal(one, other):
        yield f"{place}: {one!r:.40} and {other!r:.40}"


def _equal(one: Any, other: Any) -> bool:
    """Objects without a comparison of their own count as equal if they are of one class: functions, generators."""
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other) or type(one).__eq__ is object.__eq__


def _different_tensors(one: torch.Tensor, other: torch.Tensor, place: str) -> Iterator[str]:  # noqa: C901 - the same
    for what in ("dtype", "shape", "requires_grad", "device"):
        if getattr(one, what) != getattr(other, what):
            yield f"{place}: {what} {getattr(one, what)} and {getattr(other, what)}"
            return
    if one.layout == torch.strided and one.numel() > 1 and _lies(one) != _lies(other):
        yield f"{place}: strides {_lies(one)} and {_lies(other)}"
    if isinstance(one, DTensor):
        if (one.device_mesh, one.placements) != (other.device_mesh, other.placements):
            yield f"{place}: placements {one.placements} and {other.placements}"
        elif one._local_tensor.shape != other._local_tensor.shape:
            yield f"{place}: shards of other shapes"
        else:
            yield from different(one._local_tensor, other._local_tensor, place)
    elif hasattr(one, "__tensor_flatten__"):
        names, context = one.__tensor_flatten__()
        if one.__tensor_flatten__() != other.__tensor_flatten__():
            yield f"{place}: {context} and {other.__tensor_flatten__()[1]}"
        for name in names:
            yield from different(getattr(one, name), getattr(other, name), f"{place}.{name}")
    elif one.layout != torch.strided or not _same_bits(one, other):
        yield f"{place}: values"


def _lies(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of the dimensions that have more than one element; the others mean nothing."""
    return tuple(step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def trials(names: Sequence[str], steps: Sequence[int], *, sharded: bool, told: Any = None) -> list[Outcome]:
    """Collective: try several optimizers one after the other in this process group."""
    warnings.simplefilter("ignore")
    torch.compiler.set_stance("force_eager")  # some compile their step, which takes minutes and proves nothing here
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None
    found = []
    for name in names:
        for count in steps:
            shared: list[Any] = [tempfile.mkdtemp(dir=told)]
            if dist.is_initialized():
                dist.broadcast_object_list(shared)
            begun = time.monotonic()
            found.append(trial(named(name), count, Path(shared[0]), mesh))
            spent = time.monotonic() - begun
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(f"{name}, {count} steps: {found[-1].verdict}, {spent:.1f} s", file=sys.stderr, flush=True)
            agree(True)
            if not dist.is_initialized() or dist.get_rank() == 0:
                shutil.rmtree(shared[0], ignore_errors=True)
            if found[-1].cannot:
                break
    return found


@dataclass(frozen=True)
class _Part:
    names: list[str]
    root: str
    sharded: bool
    steps: tuple[int, ...] = field(default=(3, 7))


def _part(part: _Part) -> list[Outcome]:
    return trials(part.names, part.steps, sharded=part.sharded, told=part.root)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--library", nargs="*", default=list(LIBRARIES))
    parser.add_argument("--names", nargs="*")
    options = parser.parse_args()
    names = options.names or [name for library in options.library for name in of_library(library)]
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as root:
        for begin in range(0, len(names), 24):
            part = _Part(names[begin : begin + 24], root, options.world > 1)
            try:
                found += run_distributed(_part, options.world, part, timeout_s=400)[0]
            except AssertionError as error:
                print(f"{part.names}: {str(error)[-1500:]}", file=sys.stderr)
    print(json.dumps([{**asdict(item), "verdict": item.verdict} for item in found], indent=1))


if __name__ == "__main__":
    main()
