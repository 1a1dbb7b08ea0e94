"""State that belongs to another object: a parameter, a view of its memory, or a group of an optimizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hydra_ckpt import AppState, CheckpointingConfig, LoadReport
from hydra_ckpt.testing import run_distributed


def _resumed(root: Path, saved: AppState, fresh: AppState, rank: int = 0, **options: Any) -> LoadReport:
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(rank, 0, 0) as checkpointer:
        checkpointer.save(saved, step=1).result()
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(rank, 0, 0) as checkpointer:
        return checkpointer.load(fresh, restore_from="latest")


class _Views(torch.optim.SGD):
    """Steps on a view of each parameter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                flat = self.state[parameter].setdefault("flat", parameter.detach().view(-1))
                flat.add_(parameter.grad.view(-1), alpha=-group["lr"])


class _InGroups(torch.optim.SGD):
    """Each parameter's state has the group, which the step reads."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                held = self.state[parameter].setdefault("group", group)
                parameter.add_(parameter.grad, alpha=-held["lr"])


class _Flat(torch.optim.SGD):
    """Its own state_dict has a view of a parameter, which its step writes to."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        self.flat = self.param_groups[0]["params"][0].detach().view(-1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.flat.mul_(1 - self.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "flat": [self.flat]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "flat"})
        (self.flat,) = state_dict["flat"]


class _Keeper:
    """Its state_dict() is what it keeps; `adopt` says what it makes of a state that it loads."""

    def __init__(self, kept: Any, change: Callable[[Any], None], adopt: Callable[[Any], Any] = lambda kept: kept):
        self.kept, self.change, self.adopt = kept, change, adopt

    def step(self) -> None:
        self.change(self.kept)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = self.adopt(state["kept"])


def _slower(groups: Any) -> None:
    groups[0]["lr"] *= 0.5


@torch.no_grad()
def _decay(parameters: Any) -> None:
    for parameter in parameters:
        parameter.mul_(0.9)


def _built(kind: str) -> tuple[AppState, Callable[[], None]]:
    model = nn.Linear(3, 2)
    classes = {"views": _Views, "in groups": _InGroups, "flat": _Flat}
    optimizer = classes.get(kind, torch.optim.SGD)(model.parameters(), 0.1)
    scheduler = _Keeper(optimizer.param_groups, _slower) if kind in ("scheduler", "in groups") else None
    kept = {
        "parameters": tuple(model.parameters()),
        "rows": [row.detach() for row in model.weight],
        "twice": [model.weight.data, model.weight.data],
        "copies": list(model.parameters()),
    }
    adopt = (
        (lambda kept: [nn.Parameter(item.detach().clone()) for item in kept])
        if kind == "copies"
        else (lambda kept: kept)
    )
    extra = _Keeper(kept[kind], _decay, adopt) if kind in kept else None

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(3)).square().sum().backward()
        for one in (optimizer, scheduler, extra):
            if one is not None:
                one.step()

    return AppState(model, optimizer, scheduler, extras={"keeper": extra} if extra else {}), step


@pytest.mark.parametrize("kind", ["views", "in groups", "flat", "scheduler", "parameters", "rows", "twice"])
def test_state_follows_what_it_belongs_to(tmp_path: Path, kind: str) -> None:
    (saved, step), (fresh, fresh_step) = _built(kind), _built(kind)
    step()
    report = _resumed(tmp_path, saved, fresh)
    for _ in range(3):
        step()
        fresh_step()
    assert torch.equal(saved.model.weight, fresh.model.weight)
    assert not report.trusted
    assert not report.notes


def test_copies_are_named(tmp_path: Path) -> None:
    (saved, step), (fresh, _) = _built("copies"), _built("copies")
    step()
    report = _resumed(tmp_path, saved, fresh)
    assert report.trusted == ("extras.keeper",)
    assert "extras.keeper.kept.0 (model.weight)" in report.notes[0]


def test_other_values_are_not_joined(tmp_path: Path) -> None:
    (saved, step), (fresh, _) = _built("parameters"), _built("parameters")
    step()
    report = _resumed(tmp_path, saved, fresh, restore_parts=["extras"])
    assert report.trusted == ("extras.keeper",)
    assert torch.equal(fresh.extras["keeper"].kept[0], saved.model.weight)
    assert not torch.equal(fresh.model.weight, saved.model.weight)


class _Fused(nn.Module):
    """Its state_dict has one sharded weight as three."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(4, 12, bias=False)
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._merge)

    @staticmethod
    def _split(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        parts = state.pop(f"{prefix}fused.weight").chunk(3)
        state.update({f"{prefix}{name}": part for name, part in zip("qkv", parts, strict=True)})

    @staticmethod
    def _merge(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if f"{prefix}q" in state:
            whole = torch.cat([state.pop(prefix + name) for name in "qkv"])
            placed = whole.redistribute(placements=module.fused.weight.placements)
            state[f"{prefix}fused.weight"] = placed


def _sharded(root: Path) -> tuple[LoadReport, list[bool], bool]:
    def build() -> nn.Module:
        return fully_shard(nn.Sequential(_Fused(), nn.Linear(12, 2)))

    rank = torch.distributed.get_rank()
    saved, fresh = build(), build()
    keepers = [_Keeper(list(model.parameters()), _decay) for model in (saved, fresh)]
    states = [AppState(m, extras={"keeper": one}) for m, one in zip((saved, fresh), keepers, strict=True)]
    report = _resumed(root, *states, rank=rank)
    one, other = saved.state_dict(), fresh.state_dict()
    equal = [torch.equal(_whole(one[key]), _whole(other[key])) for key in one]
    return report, equal, all(kept is live for kept, live in zip(keepers[1].kept, fresh.parameters(), strict=True))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_shards(tmp_path: Path) -> None:
    """Entries that hooks cut out of shards are compared as they are stored; shards are joined too."""
    for report, equal, is_joined in run_distributed(_sharded, 2, tmp_path):
        assert all(equal)
        assert is_joined
        assert not report.trusted
        assert "model" in report.exact
