"""Random training runs, composed of what modules, optimizers, schedulers and extras may do to their state.

A `Case` is plain data: every rank builds the same objects from it. `check` saves the objects, loads them into others
that were built with other values, and compares both with each other and with what PyTorch's own round trip through
`state_dict` gives.
"""

from __future__ import annotations

import copy
import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hydra_ckpt import AppState, CheckpointError, CheckpointingConfig, LoadReport
from tests import differential_extras as extras_of
from tests import differential_modules as modules_of
from tests import differential_optimizers as optimizers_of

FURTHER_STEPS = 12
# Where True, cases may keep values that differ between ranks.
PER_RANK = False

Choose = Callable[[Sequence[Any]], Any]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Wrappers of torch.compile compile nothing, and warnings of hundreds of runs are not told."""
    torch.compiler.set_stance("force_eager")
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch.compiler.set_stance("default")


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        parallel: none, ddp or fsdp.
        dtype: Of the parameters.
        blocks: Kinds of the model's parts, in order.
        wrapper: What is around the model.
        optimizer: Kind of the optimizer that does the work.
        around: What wraps the optimizer.
        groups: How parameters are grouped.
        scheduler: Kind of the scheduler.
        extras: Kinds of the extras; of a tree its values.
        steps: How many steps are done before the save.
        options: Options of the checkpointer.
        per_rank: Whether some values differ between ranks.
    """

    parallel: str
    dtype: str
    blocks: tuple[str, ...]
    wrapper: str
    optimizer: str
    around: str
    groups: str
    scheduler: str
    extras: tuple[Any, ...]
    steps: int
    options: tuple[tuple[str, Any], ...]
    per_rank: bool = False


def draw(choose: Choose, parallel: str) -> Case:
    """A case.

    Args:
        choose: Chooses one of several things.
        parallel: none, ddp or fsdp.
    """
    blocks = [name for name in modules_of.BLOCKS if parallel != "fsdp" or name not in modules_of.NOT_SHARDED]
    optimizers = [name for name in optimizers_of.KINDS if parallel != "fsdp" or name not in optimizers_of.NOT_SHARDED]
    optimizer = choose(optimizers)
    if optimizer == "adafactor":  # it divides by the number of elements, which may be 0
        blocks = [name for name in blocks if name != "odd"]
    alone = optimizer in optimizers_of.ALONE
    return Case(
        parallel=parallel,
        dtype=choose(["float32", "float32", "bfloat16"]),
        blocks=("linear", *(choose(blocks) for _ in range(choose([1, 2, 3])))),
        wrapper=choose(["none", "none", "compile", "fabric", "hooked", "override", "returning"]),
        optimizer=optimizer,
        around="none" if alone else choose(["none"] * 5 + list(optimizers_of.AROUND)),
        groups="one" if alone else choose(["one", *optimizers_of.GROUPS]),
        scheduler=choose(["none", *optimizers_of.SCHEDULERS]),
        extras=tuple(extras_of.draw(choose) for _ in range(choose([0, 1, 2]))),
        steps=choose([3, 0, 1, 2, 4, 5]),
        options=tuple(
            {
                "is_async": choose([False, True]),
                "save_consolidated": choose(["false", "always"]),
                "model_save_format": choose(["safetensors", "safetensors", "torch_save"]),
            }.items()
        ),
        per_rank=PER_RANK and parallel != "none" and choose([False, True]),
    )


def drawn(seed: int, parallel: str) -> Case:
    """The case of a number; without hypothesis, so that it never changes with its version."""
    return draw(random.Random(seed).choice, parallel)


@dataclass
class Objects:
    """The live objects of a case."""

    case: Case
    model: nn.Module
    optimizer: Any
    scheduler: Any
    extras: dict[str, Any]
    done: int = 0

    @classmethod
    def build(cls, case: Case, seed: int) -> Objects:
        """Build them.

        Args:
            case: What they are.
            seed: Of their values, so that those that are loaded into do not have the right ones by chance.
        """
        torch.manual_seed(seed)
        model: nn.Module = modules_of.Net(case.blocks, getattr(torch, case.dtype))
        if case.parallel == "fsdp":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        model = modules_of.wrap(model, case.wrapper)
        if case.parallel == "ddp":
            model = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
        optimizer = optimizers_of.make(case.optimizer, case.around, case.groups, list(model.parameters()))
        scheduler = optimizers_of.schedule(case.scheduler, optimizer)
        rank = dist.get_rank() if case.per_rank else 0
        extras = {f"extra{number}": extras_of.make(what, model, seed + rank) for number, what in enumerate(case.extras)}
        return cls(case, model, optimizer, scheduler, extras)

    def train(self, steps: int) -> None:
        """Do some steps on data that depend on nothing but the number of the step."""
        for _ in range(steps):
            data = torch.randn(6, 4, generator=torch.Generator().manual_seed(self.done)).to(self.dtype)

            def closure(data: torch.Tensor = data) -> torch.Tensor:
                self.optimizer.zero_grad()
                loss = self.model(data).float().square().mean()
                loss.backward()
                return loss

            optimizers_of.step(self.optimizer, closure)
            if self.scheduler is not None:
                self.scheduler.step()
            for extra in self.extras.values():
                getattr(extra, "after_step", lambda _: None)(self.model)
            self.done += 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return getattr(torch, self.case.dtype)

    @property
    def state(self) -> AppState:
        """As a checkpoint is taken of it."""
        return AppState(self.model, self.optimizer, self.scheduler, extras=self.extras)

    @property
    def parts(self) -> dict[str, Any]:
        """The objects by their names in a report."""
        found = {"model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}
        found.update({f"extras.{name}": extra for name, extra in self.extras.items()})
        return {name: item for name, item in found.items() if item is not None}

    def told(self) -> dict[str, Any]:
        """What each object's own state_dict() returns."""
        return {name: item.state_dict() for name, item in self.parts.items()}

    def values(self) -> dict[str, torch.Tensor]:
        """All parameters and buffers, whether state_dict() tells them or not."""
        hidden = {name for name, _ in self.model.named_buffers()} - self.model.state_dict().keys()
        found = dict(self.model.named_parameters(remove_duplicate=False))
        return {**found, **{name: item for name, item in self.model.named_buffers() if name not in hidden}}


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        refused: The error's text, if it was refused.
        faults: What is wrong.
        torch: Objects that PyTorch's own round trip restores.
    """

    refused: str | None = None
    faults: list[str] = field(default_factory=list)
    torch: set[str] = field(default_factory=set)


def check(case: Case, root: Path) -> Outcome:
    """Save and load a case in a fresh directory; collective where it is distributed."""
    original = Objects.build(case, 1)
    original.train(case.steps)
    before = _kept(original.told())
    outcome = Outcome()
    by_torch = _round_trip(original, Objects.build(case, 3), before)
    outcome.torch = {name for name, how in by_torch.items() if how is None}
    restored = Objects.build(case, 2)
    try:
        _save(root, original, dict(case.options))
        report = _load(root, restored, dict(case.options))
    except CheckpointError as error:
        outcome.refused = str(error)
        if not any(name in outcome.refused for name in ("optimizer", "model", "extras.", "lr_scheduler", "block")):
            outcome.faults.append(f"refused without a name: {outcome.refused}")
        return outcome
    finally:
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(root, ignore_errors=True)
    outcome.faults += unlike(before, original.told(), "changed by the save: ")
    after = restored.told()
    for name, told in before.items():
        wrong = unlike(told, after[name], name)
        outcome.faults += wrong
        if wrong and name in report.exact:
            outcome.faults.append(f"{name}: reported as exact")
        if not {name} & {*report.exact, *report.trusted, *report.missing}:
            outcome.faults.append(f"{name}: nothing is reported of it")
    outcome.faults += unlike(original.values(), restored.values(), "values")
    restored.done = original.done
    original.train(FURTHER_STEPS)
    restored.train(FURTHER_STEPS)
    outcome.faults += unlike(original.values(), restored.values(), "trained values")
    outcome.faults += unlike(original.told(), restored.told(), "trained ")
    return outcome


def _kept(told: Any) -> Any:
    """A copy that later steps do not change; strides stay."""
    return copy.deepcopy(told)


def _round_trip(original: Objects, other: Objects, before: dict[str, Any]) -> dict[str, str | None]:
    """For each object what PyTorch's round trip gets wrong; None for nothing."""
    found: dict[str, str | None] = {}
    for name, item in other.parts.items():
        try:
            item.load_state_dict(_kept(before[name]))
            found[name] = next(iter(unlike(before[name], item.state_dict(), name)), None)
        except Exception as error:  # noqa: BLE001 - a foreign object's
            found[name] = repr(error)
    return found


def _save(root: Path, objects: Objects, options: dict[str, Any]) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(rank, 0, 0) as checkpointer:
        checkpointer.save(objects.state, step=1).result()


def _load(root: Path, objects: Objects, options: dict[str, Any]) -> LoadReport:
    rank = dist.get_rank() if dist.is_initialized() else 0
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(rank, 0, 0) as checkpointer:
        report = checkpointer.load(objects.state, restore_from="latest")
    assert report is not None
    return report


def unlike(one: Any, other: Any, place: str) -> list[str]:
    """Where two values differ in anything: types, strides, placements, bits."""
    if type(one) is not type(other):
        return [f"{place}: {type(one).__name__} became {type(other).__name__}"]
    if isinstance(one, torch.Tensor):
        return _unlike_tensors(one, other, place)
    if isinstance(one, dict):
        found = [f"{place}.{key}: lost or new" for key in one.keys() ^ other.keys()]
        return found + [text for key in one if key in other for text in unlike(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, list | tuple) or type(one).__name__ == "deque":
        if len(one) != len(other):
            return [f"{place}: {len(one)} items became {len(other)}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [text for index, (a, b) in pairs for text in unlike(a, b, f"{place}.{index}")]
    if hasattr(one, "tobytes"):
        same = (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        return [] if same else [f"{place}: {one!r} became {other!r}"]
    if isinstance(one, float):
        one, other = repr(one), repr(other)
    if hasattr(one, "__dict__") and not isinstance(one, type):
        return [] if one == other or vars(one) == vars(other) else [f"{place}: {one!r} became {other!r}"]
    return [] if one == other else [f"{place}: {one!r} became {other!r}"]


def _unlike_tensors(one: torch.Tensor, other: torch.Tensor, place: str) -> list[str]:
    if hasattr(one, "__tensor_flatten__") and not isinstance(one, DTensor):
        names, context = one.__tensor_flatten__()
        found = [] if context == other.__tensor_flatten__()[1] else [f"{place}: another context"]
        pairs = [(name, getattr(one, name), getattr(other, name)) for name in names]
        return found + [text for name, a, b in pairs for text in unlike(a, b, f"{place}.{name}")]
    facts = [
        (item.dtype, tuple(item.shape), item.stride(), str(item.device), item.requires_grad, _placed(item))
        for item in (one, other)
    ]
    if facts[0] != facts[1]:
        return [f"{place}: {facts[0]} became {facts[1]}"]
    one, other = (item.detach() for item in (one, other))
    if isinstance(one, DTensor):
        return unlike(one.to_local(), other.to_local(), place)
    flat = [item.resolve_conj().resolve_neg().contiguous().reshape(-1) for item in (one, other)]
    return [] if one.numel() == 0 or torch.equal(*(item.view(torch.uint8) for item in flat)) else [f"{place}: values"]


def _placed(tensor: torch.Tensor) -> Any:
    return (tensor.device_mesh, tuple(tensor.placements)) if isinstance(tensor, DTensor) else None
