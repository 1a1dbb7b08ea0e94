"""Foreign objects whose `==` is not a truth value, or says too much: they are told apart by identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hydra_ckpt import AppState, CheckpointingConfig


class NoTruth:
    """What `==` of a tensordict returns."""

    def __bool__(self) -> bool:
        raise RuntimeError("no truth value")


class Comparing(nn.Module):
    """Passes on what is inside it, and compares element by element, as `TensorDictParams` does."""

    __hash__ = nn.Module.__hash__

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __eq__(self, other: object) -> Any:
        return NoTruth()

    def __ne__(self, other: object) -> Any:
        return NoTruth()

    def __bool__(self) -> bool:
        raise RuntimeError("no truth value")

    def forward(self, value: torch.Tensor) -> Any:
        return self.inner(value)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.inner.state_dict(*args, **options)

    def load_state_dict(self, state: Any, *args: Any, **options: Any) -> Any:
        return self.inner.load_state_dict(state, *args, **options)


class Hashless(torch.optim.SGD):
    """Has no hash, and is equal to every other one."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashless)


class Alike(nn.Linear):
    """Is equal to every other one."""

    __hash__ = nn.Linear.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike)


def made() -> AppState:
    model = Comparing(nn.Sequential(Comparing(Comparing(nn.Linear(2, 2))), Comparing(nn.Linear(2, 2))))
    halves = [list(model.parameters())[:2], list(model.parameters())[2:]]
    return AppState(model, [Hashless(half, lr=0.1, momentum=0.9) for half in halves])


def train(state: AppState, steps: int) -> None:
    for _ in range(steps):
        state.model(torch.ones(1, 2)).square().sum().backward()
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_modules_and_optimizers_are_told_apart_by_identity(tmp_path: Path) -> None:
    state, fresh = made(), made()
    train(state, 2)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.save(state, step=1)
        train(state, 1)  # the hooks wait for the copy
        state.model.inner[1] = Comparing(state.model.inner[1].inner)
        checkpointer.save(state, step=2).result()
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        report = checkpointer.load(fresh, restore_from="latest")
    assert report is not None
    assert {"model", "optimizer.0", "optimizer.1"} <= set(report.exact)
    train(state, 2)
    train(fresh, 2)
    assert all(map(torch.equal, state.model.parameters(), fresh.model.parameters()))


def test_a_module_that_takes_the_place_of_an_equal_one_is_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(Alike(2, 2)))
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.save(AppState(model), step=1).result()
        model[0] = nn.Sequential(Alike(2, 2))
        model[0][0] = Alike(2, 2)
        checkpointer.save(AppState(model), step=2).result()
    fresh = nn.Sequential(nn.Sequential(Alike(2, 2)))
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.load(AppState(fresh), restore_from="latest")
    assert torch.equal(fresh[0][0].weight, model[0][0].weight)
