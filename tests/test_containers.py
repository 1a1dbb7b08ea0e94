"""Optimizers and schedulers in containers, and in a different order than when they were saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from hydra_ckpt import AppState, CheckpointingConfig, LoadReport
from hydra_ckpt.errors import CheckpointError, KeyMismatchError
from hydra_ckpt.state.optimizer_oracle import differing
from hydra_ckpt.testing import run_distributed


class Optimizers(torch.optim.Optimizer):
    """One optimizer for each part of a model, with a count of its own, as training libraries have it."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.optimizers = [torch.optim.AdamW(part.parameters()) for part in parts]
        self.updates = 0
        super().__init__([parameter for part in parts for parameter in part.parameters()], {})

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step(closure)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"inner": [optimizer.state_dict() for optimizer in self.optimizers], "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, inner in zip(self.optimizers, state["inner"], strict=True):
            optimizer.load_state_dict(inner)
        self.updates = state["updates"]


class NamedOptimizers(Optimizers):
    """The same, whose state goes by parameter names through PyTorch's own functions."""

    _flat = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts
        super().__init__(parts)

    def state_dict(self) -> dict[str, Any]:
        pairs = zip(self.parts, self.optimizers, strict=True)
        found = [get_optimizer_state_dict(part, optimizer, options=self._flat) for part, optimizer in pairs]
        return {f"{number}.{key}": value for number, one in enumerate(found) for key, value in one.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, (part, optimizer) in enumerate(zip(self.parts, self.optimizers, strict=True)):
            start = f"{number}."
            mine = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            set_optimizer_state_dict(part, optimizer, mine, options=self._flat)


class Schedules:
    """A scheduler for each optimizer of a container, with a count of its own."""

    def __init__(self, optimizers: Optimizers) -> None:
        self.schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2) for optimizer in optimizers]
        self.plateau = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self.schedulers)

    def step(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()
        self.plateau += 1

    def state_dict(self) -> dict[str, Any]:
        return {"each": [scheduler.state_dict() for scheduler in self.schedulers], "plateau": self.plateau}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for scheduler, inner in zip(self.schedulers, state["each"], strict=True):
            scheduler.load_state_dict(inner)
        self.plateau = state["plateau"]


def built(kind: type[Optimizers], *, sharded: bool = False) -> AppState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if sharded:
        for part in (*model, model):
            fully_shard(part)
    optimizers = kind(list(model))
    return AppState(model, optimizers, Schedules(optimizers))


def train(state: AppState, steps: int) -> None:
    for _ in range(steps):
        state.model(torch.ones(2, 4)).square().mean().backward()  # type: ignore[operator]
        state.optimizer.step()
        state.lr_scheduler.step()
        for optimizer in state.optimizer:
            optimizer.zero_grad()


def values(state: AppState) -> list[Any]:
    inner = [optimizer.state_dict() for optimizer in state.optimizer]
    scheduled = state.lr_scheduler.state_dict()
    return [state.model.state_dict(), inner, scheduled, state.optimizer.updates]  # type: ignore[union-attr]


def resumed(root: str, kind: type[Optimizers], sharded: bool) -> LoadReport:
    state, fresh = built(kind, sharded=sharded), built(kind, sharded=sharded)
    train(state, 3)
    if kind is NamedOptimizers:
        state.optimizer.updates = 0  # it does not save them
    with CheckpointingConfig(checkpoint_dir=root).build(dist.get_rank() if sharded else 0, 0, 0) as checkpointer:
        checkpointer.save(state, step=3).result()
        report = checkpointer.load(fresh, restore_from="latest")
    assert not list(differing(values(state), values(fresh)))
    train(state, 3)
    train(fresh, 3)
    assert not list(differing(values(state), values(fresh)))
    return report


@pytest.mark.parametrize("kind", [Optimizers, NamedOptimizers])
def test_a_container_keeps_its_own_state(tmp_path: Path, kind: type[Optimizers]) -> None:
    report = resumed(str(tmp_path), kind, sharded=False)
    assert {"optimizer", "lr_scheduler"} <= {*report.exact, *report.trusted}


@pytest.mark.parametrize("kind", [Optimizers, NamedOptimizers])
def test_a_container_keeps_its_own_state_under_fsdp2(tmp_path: Path, kind: type[Optimizers]) -> None:
    for report in run_distributed(resumed, 2, str(tmp_path), kind, True):
        assert {"optimizer", "lr_scheduler"} <= {*report.exact, *report.trusted}


def test_an_optimizer_under_its_parameter_is_called_by_its_number() -> None:
    model = nn.Linear(2, 2)
    state = AppState(model, {parameter: torch.optim.SGD([parameter]) for parameter in model.parameters()})
    assert list(state.named_optimizers) == ["optimizer.0", "optimizer.1"]


class Scaled(torch.optim.SGD):
    """It has state of its own."""

    scale = 1.0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scale": self.scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        self.scale = state_dict.pop("scale")
        super().load_state_dict(state_dict)


class Wrapped:
    """It has no groups, only an optimizer inside."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.inner = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        self.scale = 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.scale = state["scale"]


@pytest.mark.parametrize("kind", [Scaled, Wrapped])
def test_optimizers_in_another_order_get_each_its_own_state(tmp_path: Path, kind: Any) -> None:
    rates = {"generator": 0.1, "discriminator": 0.2}

    def build(order: list[str]) -> AppState:
        model = nn.ModuleDict({name: nn.Linear(2, 2) for name in rates})
        return AppState(model, {name: kind(model[name].parameters(), lr=rates[name]) for name in order})

    state, fresh = build(list(rates)), build(list(reversed(rates)))
    state.optimizer["generator"].scale, state.optimizer["discriminator"].scale = 0.25, 8.0
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()
        report = checkpointer.load(fresh, restore_from="latest")
    assert {name: optimizer.scale for name, optimizer in fresh.optimizer.items()} == {
        "generator": 0.25,
        "discriminator": 8.0,
    }
    assert report.trusted == ()
    for name, optimizer in state.optimizer.items():
        assert not list(differing(optimizer.state_dict(), fresh.optimizer[name].state_dict()))


def test_one_state_for_all_parameters_is_refused_where_these_have_another_order(tmp_path: Path) -> None:
    def build(order: list[int]) -> AppState:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        members = list(model.parameters())
        return AppState(model, torch.optim.LBFGS([members[place] for place in order], max_iter=2))

    def closure() -> torch.Tensor:
        state.optimizer.zero_grad()
        loss = state.model(torch.ones(2, 3)).square().mean()  # type: ignore[operator]
        loss.backward()
        return loss

    state = build([0, 1, 2, 3])
    state.optimizer.step(closure)
    same, other = build([0, 1, 2, 3]), build([0, 3, 2, 1])
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()
        assert "optimizer" in checkpointer.load(same, restore_from="latest").exact
        with pytest.raises(KeyMismatchError, match=r"another order than .*0\.weight, 0\.bias, 1\.weight"):
            checkpointer.load(other, restore_from="latest")
    with CheckpointingConfig(checkpoint_dir=str(tmp_path), load_strict=False).build(0, 0, 0) as checkpointer:
        report = checkpointer.load(other, restore_from="latest")
    assert not other.optimizer.state
    assert "optimizer.param_groups.0" in report.missing


def test_a_parameter_of_two_optimizers_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    def build(*, apart: bool) -> AppState:
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("shared", "one", "other")})
        found = {
            name: torch.optim.Adam([*model["shared"].parameters(), *model[name].parameters()])
            for name in ("one", "other")
        }
        return AppState(model, found["one"], extras={"other": found["other"]}) if apart else AppState(model, found)

    def step(state: AppState) -> None:
        for name, optimizer in (("one", state.optimizer), ("other", state.extras["other"])):
            optimizer.zero_grad()
            state.model[name](state.model["shared"](torch.ones(1, 2))).square().sum().backward()  # type: ignore[index, operator]
            optimizer.step()

    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        with pytest.raises(CheckpointError, match=r"shared.weight is in two .* optimizer.other, .*into extras"):
            checkpointer.save(build(apart=False), step=1).result()
        state, fresh = build(apart=True), build(apart=True)
        step(state)
        checkpointer.save(state, step=1).result()
        checkpointer.load(fresh, restore_from="latest")
    step(state)
    step(fresh)
    assert not list(differing(state.model.state_dict(), fresh.model.state_dict()))  # type: ignore[union-attr]
