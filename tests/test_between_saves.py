"""What changes between two saves is saved as it is then; what would get the name of something else is refused."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hydra_ckpt import AppState, CheckpointingConfig, LoadReport
from hydra_ckpt.errors import CheckpointConfigError, CheckpointError
from hydra_ckpt.state.optimizer_oracle import differing


class Holder:
    """An object whose state is one value."""

    def __init__(self, held: Any = None) -> None:
        self.held = held

    def state_dict(self) -> Any:
        return self.held

    def load_state_dict(self, state: Any) -> None:
        self.held = state


def carried(root: Path, state: AppState, fresh: AppState, change: Callable[[], Any] | None = None) -> LoadReport:
    """Save a state (twice, where something changes in between), and load it into fresh objects."""
    with CheckpointingConfig(checkpoint_dir=str(root)).build(0, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()
        if change is not None:
            change()
            checkpointer.save(state, step=2).result()
    with CheckpointingConfig(checkpoint_dir=str(root)).build(0, 0, 0) as checkpointer:
        return checkpointer.load(fresh, restore_from="latest")


def sgd(dtype: torch.dtype = torch.float32) -> AppState:
    model = nn.Linear(2, 2, bias=False, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.tensor([[1, 2]], dtype=dtype)).abs().square().sum().backward()
    optimizer.step()
    return AppState(model, optimizer)


def _momentum(state: AppState) -> torch.Tensor:
    found: torch.Tensor = state.optimizer.state[state.model.weight]["momentum_buffer"]  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        (torch.float32, lambda state: setattr(state.model.weight, "data", state.model.weight.data.t())),
        (torch.complex64, lambda state: setattr(state.model.weight, "data", state.model.weight.data.conj())),
        (torch.float32, lambda state: _momentum(state).t_()),
    ],
    ids=["transposed weight", "conjugated weight", "transposed state"],
)
def test_a_tensor_that_is_read_in_another_way_than_before(tmp_path: Path, dtype: torch.dtype, change: Any) -> None:
    state, fresh = sgd(dtype), sgd(dtype)
    report = carried(tmp_path, state, fresh, lambda: change(state))
    assert {"model", "optimizer"} <= set(report.exact)
    assert torch.equal(state.model.weight, fresh.model.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(_momentum(state), _momentum(fresh))
    assert _momentum(state).stride() == _momentum(fresh).stride()


def test_modules_that_change_names(tmp_path: Path) -> None:
    def build() -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(1, 1) for name in ("main", "average")})

    def change() -> None:
        main, average = model.pop("main"), model.pop("average")
        model["average"], model["main"] = main, average

    model, fresh = build(), build()
    carried(tmp_path, AppState(model), AppState(fresh), change)
    assert not list(differing(dict(model.state_dict()), dict(fresh.state_dict())))


def test_models_that_change_names(tmp_path: Path) -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    fresh = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.save(AppState({"a": one, "b": other}), step=1).result()
        checkpointer.save(AppState({"b": one, "a": other}), step=2).result()
        checkpointer.load(AppState(fresh), restore_from="latest")
    assert torch.equal(fresh["b"].weight, one.weight)
    assert torch.equal(fresh["a"].weight, other.weight)


class Smoothed(nn.Module):
    """Two buffers that are one tensor until its first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(2)
        self.register_buffer("mean", zeros)
        self.register_buffer("former", zeros)

    def forward(self, value: float) -> None:
        self.former = self.mean
        self.mean = self.mean / 2 + value


def test_buffers_that_are_one_tensor_only_at_first(tmp_path: Path) -> None:
    model, fresh = Smoothed(), Smoothed()
    fresh(0.0)
    carried(tmp_path, AppState(model), AppState(fresh), lambda: (model(1.0), model(1.0)))
    assert (fresh.mean.tolist(), fresh.former.tolist()) == ([1.5, 1.5], [1.0, 1.0])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


class Remembering(Plain):
    kept: Any = None

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


def test_a_module_that_gets_another_class(tmp_path: Path) -> None:
    model, fresh = Plain(), Remembering()

    def change() -> None:
        model.__class__ = Remembering
        model.kept = 5  # type: ignore[assignment]

    carried(tmp_path, AppState(model), AppState(fresh), change)
    assert fresh.kept == 5


class Passing(nn.Module):
    """It passes on the state of what is inside it, and later something more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.count = torch.zeros(1)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = self.inner.state_dict(*args, **kwargs)
        if self.count.item():
            found["count"] = self.count
        return found

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        state = dict(state_dict)
        self.count = state.pop("count", torch.zeros(1))
        return self.inner.load_state_dict(state, strict)


def test_a_wrapper_that_adds_an_entry_later_is_no_longer_passed_over(tmp_path: Path) -> None:
    model, fresh, counted = Passing(), Passing(), Passing()
    counted.count = torch.ones(1)
    carried(tmp_path, AppState(model), AppState(fresh), lambda: setattr(model, "count", torch.full((1,), 5.0)))
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.load(AppState(counted), restore_from="latest")
    for one in (fresh, counted):
        assert one.count.item() == 5
        assert torch.equal(one.inner.weight, model.inner.weight)


@pytest.mark.parametrize("value", [1, 1.0, None, "1"])
def test_state_of_numbers_alone(tmp_path: Path, value: Any) -> None:
    state, fresh = sgd(), sgd()
    state.optimizer.state[state.model.weight] = {"step": value}  # type: ignore[union-attr]
    carried(tmp_path, state, fresh)
    assert fresh.optimizer.state[fresh.model.weight] == {"step": value}  # type: ignore[union-attr]


def test_state_that_requires_gradients(tmp_path: Path) -> None:
    state, fresh = sgd(), sgd()
    state.optimizer.state[state.model.weight] = {"rate": torch.ones(1, requires_grad=True)}  # type: ignore[union-attr]
    carried(tmp_path, state, fresh)
    assert fresh.optimizer.state[fresh.model.weight]["rate"].requires_grad  # type: ignore[union-attr]


def test_an_extra_whose_state_exists_only_when_it_is_loaded(tmp_path: Path) -> None:
    class Late(Holder):
        def state_dict(self) -> Any:
            return {"held": self.held.clone()}

        def load_state_dict(self, state: Any) -> None:
            self.held = state["held"]

    fresh = Late()
    carried(
        tmp_path,
        AppState(nn.Linear(1, 1), extras={"late": Late(torch.ones(2))}),
        AppState(nn.Linear(1, 1), extras={"late": fresh}),
    )
    assert fresh.held.tolist() == [1.0, 1.0]


class Level(enum.Enum):
    BOTH = frozenset((15, 7))


def test_a_member_whose_value_has_no_order(tmp_path: Path) -> None:
    fresh = Holder()
    carried(
        tmp_path,
        AppState(nn.Linear(1, 1), extras={"level": Holder({"level": Level.BOTH})}),
        AppState(nn.Linear(1, 1), extras={"level": fresh}),
    )
    assert fresh.held == {"level": Level.BOTH}


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_weight_that_wraps_tensors_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    model = nn.Linear(2, 2, bias=False)
    wrapped = TwoTensor(torch.ones(2, 2), torch.zeros(2, 2))
    if kind == "parameter":
        model.weight = nn.Parameter(wrapped)
    else:
        model.register_buffer("weight_scale", wrapped)
    with pytest.raises(CheckpointConfigError, match=r"weight.* is a TwoTensor.*allow_unsaved=\[\"model\.weight"):
        carried(tmp_path, AppState(model), AppState(model))


def _options_like_state() -> AppState:
    state = sgd()
    state.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    state.optimizer.state[state.model.weight]["options.lr"] = torch.tensor(7.0)  # type: ignore[union-attr]
    return state


def _names_with_colons() -> AppState:
    model = nn.ParameterDict({"w": torch.ones(1), "w:x": torch.ones(1)})
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model["w"]]["x:m"], optimizer.state[model["w:x"]]["m"] = torch.ones(1), torch.zeros(1)
    return AppState(model, optimizer)


def _extra_called_as_schedulers() -> AppState:
    scheduler, extra = Holder({"lr": torch.ones(1)}), Holder({"0": {"lr": torch.zeros(1)}})
    return AppState(nn.Linear(1, 1), lr_scheduler=scheduler, extras={"lr_scheduler": extra})


def _extra_called_as_extra_state() -> AppState:
    model = Remembering()
    model.kept = torch.ones(1)
    return AppState(model, extras={"extra_state": Holder({"_extra_state": torch.zeros(1)})})


@pytest.mark.parametrize(
    "build", [_options_like_state, _names_with_colons, _extra_called_as_schedulers, _extra_called_as_extra_state]
)
def test_two_tensors_of_one_name_are_refused(tmp_path: Path, build: Callable[[], AppState]) -> None:
    with pytest.raises(CheckpointError, match="two tensors would have the name"):
        carried(tmp_path, build(), build())


def _swap_keys(state: AppState) -> None:
    held = state.optimizer.state[state.model.weight]  # type: ignore[union-attr]
    held["exp_avg"], held["exp_avg_sq"] = held["exp_avg_sq"], held["exp_avg"]


def _swap_parameters(state: AppState) -> None:
    states = state.optimizer.state
    weight, bias = state.model.parameters()  # type: ignore[union-attr]
    states[weight]["step"], states[bias]["step"] = states[bias]["step"], states[weight]["step"]


def _add_key(state: AppState) -> None:
    state.optimizer.state[state.model.weight]["more"] = torch.ones(2)  # type: ignore[union-attr]


def _clear(state: AppState) -> None:
    del state.optimizer.state[state.model.bias]  # type: ignore[union-attr]


def _share(state: AppState) -> None:
    held = state.optimizer.state
    held[state.model.bias]["step"] = held[state.model.weight]["step"]  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [_swap_keys, _swap_parameters, _add_key, _clear, _share])
def test_state_that_moves_to_other_keys_and_parameters(tmp_path: Path, change: Callable[[AppState], None]) -> None:
    def build() -> AppState:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
        optimizer.state[model.bias]["step"] += 1
        return AppState(model, optimizer)

    state, fresh = build(), build()
    carried(tmp_path, state, fresh, lambda: change(state))
    assert not list(differing(state.optimizer.state_dict(), fresh.optimizer.state_dict()))
