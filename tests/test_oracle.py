"""What only an object's own state_dict knows is saved and restored, or refused by name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hydra_ckpt import (
    AppState,
    CheckpointConfigError,
    CheckpointError,
    CheckpointingConfig,
    KeyMismatchError,
    LoadReport,
)
from hydra_ckpt.testing import run_distributed
from tests.differential_modules import Fabric
from tests.differential_optimizers import Lookahead


def save(root: Path, state: AppState, **options: Any) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(rank, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()


def load(root: Path, state: AppState, **options: Any) -> LoadReport:
    rank = dist.get_rank() if dist.is_initialized() else 0
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(rank, 0, 0) as checkpointer:
        report = checkpointer.load(state, restore_from="latest")
    assert report is not None
    return report


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        model(torch.linspace(-1, 1, 4).expand(2, 4) + 0.1 * step).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> list[torch.Tensor]:
    found = [item.detach() for item in model.parameters()]
    return [item.to_local().clone() if isinstance(item, DTensor) else item.clone() for item in found]


# -- optimizers ----------------------------------------------------------------------------------------------------


class Counting(torch.optim.SGD):
    n = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.n += 1
        super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state.pop("n")
        super().load_state_dict(state)


class Wrapper(torch.optim.Optimizer):
    """An inner optimizer does the work, and is all that is saved."""

    def __init__(self, params: Any) -> None:
        self.inner = torch.optim.AdamW(params, lr=0.1)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


class Stray(torch.optim.SGD):
    """Keeps state under a key that is no parameter."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["seen"] = self.state.get("seen", 0) + 1  # type: ignore[index]
        super().step(closure)


class PlainStray(torch.optim.Optimizer):
    """The same in a class that customizes nothing."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["seen"] = self.state.get("seen", 0) + 1  # type: ignore[index]
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(parameter.grad, alpha=-0.1 * self.state["seen"])  # type: ignore[index]


def _hooked(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.steps = 0  # type: ignore[attr-defined]

    def told(item: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "steps": item.steps}

    def taken(item: Any, state: dict[str, Any]) -> dict[str, Any]:
        item.steps = state["steps"]
        return {key: value for key, value in state.items() if key != "steps"}

    optimizer.register_state_dict_post_hook(told)
    optimizer.register_load_state_dict_pre_hook(taken)
    optimizer.register_step_post_hook(lambda item, *_: setattr(item, "steps", item.steps + 1))
    return optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "override": lambda model: Counting(model.parameters(), lr=0.1, momentum=0.9),
    "wrapper": lambda model: Wrapper(model.parameters()),
    "slow weights": lambda model: Lookahead(torch.optim.AdamW(model.parameters(), lr=0.1)),
    "stray key": lambda model: Stray(model.parameters(), lr=0.1, momentum=0.9),
    "plain stray key": lambda model: PlainStray(model.parameters()),
    "hooks": _hooked,
    "post local SGD": lambda model: PostLocalSGDOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), Averager()
    ),
}


class Averager:
    """What PostLocalSGDOptimizer asks for, on one rank."""

    step = 0

    def average_parameters(self, params: Any) -> None:
        self.step += 1


def own_numbers(optimizer: Any) -> list[Any]:
    averager = getattr(optimizer, "averager", None)
    names = ("n", "k", "steps")
    return [
        *(getattr(optimizer, name, None) for name in names),
        averager and averager.step,
        optimizer.state.get("seen"),
    ]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_optimizers_with_state_of_their_own_go_on_as_if_nothing_had_happened(
    tmp_path: Path, kind: str, steps: int, is_async: bool
) -> None:
    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        return model, OPTIMIZERS[kind](model)

    model, optimizer = make()
    train(model, optimizer, steps)
    save(tmp_path, AppState(model, optimizer), is_async=is_async)
    again, restored = make()
    report = load(tmp_path, AppState(again, restored))
    assert "optimizer" in report.exact
    assert own_numbers(restored) == own_numbers(optimizer)
    train(model, optimizer, 4)
    train(again, restored, 4)
    for one, other in zip(values(model), values(again), strict=True):
        assert torch.equal(one, other)


def test_fp32_state_of_a_bf16_parameter_stays_fp32_where_load_state_dict_would_cast_it(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Counting]:
        model = nn.Linear(4, 2, dtype=torch.bfloat16)
        return model, Counting(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = make()
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.randn(parameter.shape, dtype=torch.float32)
    save(tmp_path, AppState(model, optimizer))
    again, restored = make()
    report = load(tmp_path, AppState(again, restored))
    held = [restored.state[parameter]["momentum_buffer"] for parameter in again.parameters()]
    for value, parameter in zip(held, model.parameters(), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, optimizer.state[parameter]["momentum_buffer"])
    assert "optimizer" in report.exact


def test_a_scheduler_of_a_wrapper_still_reaches_the_inner_optimizer_after_a_load(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    optimizer = Wrapper(model.parameters())
    train(model, optimizer, 1)
    save(tmp_path, AppState(model, optimizer))
    load(tmp_path, AppState(model, optimizer))
    assert optimizer.param_groups is optimizer.inner.param_groups


class Forgetful(Counting):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.optim.SGD.load_state_dict(self, {key: value for key, value in state.items() if key != "n"})


def test_what_an_optimizer_does_not_show_after_a_load_is_trusted_not_exact(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    optimizer = Forgetful(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    save(tmp_path, AppState(model, optimizer))
    report = load(tmp_path, AppState(model, Forgetful(model.parameters(), lr=0.1)))
    assert "optimizer" in report.trusted
    assert "optimizer" not in report.exact
    assert any("optimizer.n" in note for note in report.notes)


class Raising(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("consolidate first")


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_an_optimizer_whose_state_dict_raises_is_refused_by_name(tmp_path: Path, is_async: bool) -> None:
    model = nn.Linear(4, 2)
    state = AppState(model, {"main": Raising(model.parameters(), lr=0.1)})
    with pytest.raises(CheckpointError, match=r"optimizer\.main \(Raising\): .*consolidate first.*allow_unsaved"):
        save(tmp_path, state, is_async=is_async)


class NoOptimizer:
    """As schedulefree's wrappers: no torch.optim.Optimizer."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.weight_sum = base, 0.0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    def step(self) -> None:
        self.base.step()
        self.weight_sum += 0.5

    def zero_grad(self) -> None:
        self.base.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"weight_sum": self.weight_sum, "base": self.base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight_sum = state["weight_sum"]
        self.base.load_state_dict(state["base"])


def test_a_wrapper_that_is_no_optimizer_is_taken_by_its_state_dict(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, NoOptimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        return model, NoOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1))

    model, optimizer = make()
    train(model, optimizer, 3)
    save(tmp_path, AppState(model, optimizer), is_async=True)
    again, restored = make()
    assert "optimizer" in load(tmp_path, AppState(again, restored)).exact
    assert restored.weight_sum == 1.5
    train(model, optimizer, 3)
    train(again, restored, 3)
    assert torch.equal(model.weight, again.weight)


def _wrapped_shards(root: Path, kind: str) -> bool:
    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        return model, OPTIMIZERS[kind](model)

    model, optimizer = make()
    train(model, optimizer, 3)
    save(root, AppState(model, optimizer))
    again, restored = make()
    assert "optimizer" in load(root, AppState(again, restored)).exact
    train(model, optimizer, 4)
    train(again, restored, 4)
    return all(torch.equal(one, other) for one, other in zip(values(model), values(again), strict=True))


@pytest.mark.parametrize("kind", ["override", "wrapper", "slow weights"])
def test_wrapped_optimizers_take_the_sharded_road_under_fsdp2(tmp_path: Path, kind: str) -> None:
    assert run_distributed(_wrapped_shards, 2, tmp_path, kind) == [True, True]


def _zero(root: Path) -> str:
    model = DistributedDataParallel(nn.Linear(4, 2))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    train(model, optimizer, 1)
    try:
        save(root, AppState(model, optimizer))
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_zero_redundancy_optimizer_is_refused_by_name_on_all_ranks(tmp_path: Path) -> None:
    for text in run_distributed(_zero, 2, tmp_path):
        assert "optimizer (ZeroRedundancyOptimizer): its state_dict() raises" in text


# -- modules -------------------------------------------------------------------------------------------------------


class Hooked(nn.Linear):
    seen = 0

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({prefix + "seen": torch.tensor(module.seen)})
        )
        self.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: setattr(module, "seen", int(state.pop(prefix + "seen")))
        )


class Overridden(nn.Linear):
    seen = 0

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> dict[str, Any]:
        return {**super().state_dict(*args, prefix=prefix, **options), prefix + "seen": torch.tensor(self.seen)}

    def load_state_dict(self, state: dict[str, Any], *args: Any, **options: Any) -> Any:
        state = dict(state)
        self.seen = int(state.pop("seen"))
        return super().load_state_dict(state, *args, **options)


class Replacing(nn.Linear):
    """Saves fp32 masters under the names of its bf16 parameters."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, dtype=torch.bfloat16)
        self.master = {name: item.detach().float() + 1e-4 for name, item in self.named_parameters()}
        self.register_state_dict_post_hook(lambda module, state, *_: state.update(module.master))

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:
        self.master = {name: state_dict[name].clone() for name in self.master}
        super()._load_from_state_dict(state_dict, *args)


class Renaming(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_state_dict_post_hook(lambda _, state, *__: state.update({"w": state.pop("weight")}))
        self.register_load_state_dict_pre_hook(lambda _, state, *__: state.update({"weight": state.pop("w")}))


class Saving(nn.Linear):
    """As quantized layers do it."""

    scale = 1.0

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = {"value": self.scale, "kind": ("a", 1)}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.scale = state_dict.pop(prefix + "scale")["value"]
        super()._load_from_state_dict(state_dict, prefix, *args)


@pytest.mark.parametrize("kind", [Hooked, Overridden, Saving])
@pytest.mark.parametrize("mode", ["false", "always"])
def test_entries_that_hooks_and_overrides_add_come_back(tmp_path: Path, kind: type[Any], mode: str) -> None:
    model = kind(4, 2)
    model.seen, model.scale = 7, 2.5
    save(tmp_path, AppState(model), save_consolidated=mode)
    again = kind(4, 2)
    again.scale = 1.0
    report = load(tmp_path, AppState(again))
    assert "model" in report.exact
    assert (again.scale == 2.5) if kind is Saving else (again.seen == 7)
    assert torch.equal(model.weight, again.weight)


def test_entries_under_the_names_of_parameters_come_back_beside_these(tmp_path: Path) -> None:
    model, again = Replacing(4, 2), Replacing(4, 2)
    save(tmp_path, AppState(model))
    load(tmp_path, AppState(again))
    assert all(torch.equal(value, again.master[name]) for name, value in model.master.items())
    assert torch.equal(model.weight, again.weight)


def test_renamed_entries_are_the_same_tensors(tmp_path: Path) -> None:
    model, again = Renaming(4, 2), Renaming(4, 2)
    save(tmp_path, AppState(model))
    assert "model" in load(tmp_path, AppState(again)).exact
    assert torch.equal(model.weight, again.weight)


def test_entries_of_a_module_inside_others_and_of_several_models(tmp_path: Path) -> None:
    def make(seen: int) -> dict[str, nn.Module]:
        models = {"one": nn.Sequential(nn.BatchNorm1d(4), Hooked(4, 2)), "two": nn.Sequential(Overridden(2, 2))}
        models["one"][1].seen = models["two"][0].seen = seen
        return models

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    models = {name: Outer(model) for name, model in make(3).items()}
    del models["two"]  # an override of load_state_dict is not called for a module inside another
    save(tmp_path, AppState(models))
    again = {name: Outer(model) for name, model in make(0).items() if name in models}
    load(tmp_path, AppState(again))
    assert again["one"].inner[1].seen == 3


class Raised(nn.Linear):
    def state_dict(self, *args: Any, **options: Any) -> Any:
        raise ValueError("not now")


def test_a_model_whose_state_dict_raises_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointConfigError, match=r"Raised.*its state_dict\(\) raises ValueError: not now"):
        save(tmp_path, AppState(Raised(2, 2)))


class LookedUp(nn.Linear):
    """Computes with something that it makes of its weight when it is loaded."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.look()
        self.register_load_state_dict_post_hook(lambda module, _: module.look())

    def look(self) -> None:
        self.sum = float(self.weight.detach().sum())


class LookedUpByOverride(LookedUp):
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._load_state_dict_post_hooks.clear()
        self.look()


@pytest.mark.parametrize("kind", [LookedUp, LookedUpByOverride])
def test_what_modules_do_when_they_are_loaded_is_done(tmp_path: Path, kind: type[Any]) -> None:
    model, again = nn.Sequential(kind(4, 2)), nn.Sequential(kind(4, 2))
    save(tmp_path, AppState(model))
    assert "model" in load(tmp_path, AppState(again)).exact
    assert again[0].sum == model[0].sum


class PreHooked(nn.Linear):
    """Writes its count into a buffer when it is asked for its state, and reads it there when it is loaded."""

    seen = 0

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("told", torch.tensor(0))
        self.register_state_dict_pre_hook(lambda module, *_: setattr(module, "told", torch.tensor(module.seen)))
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "seen", int(module.told)))


def test_buffers_that_are_written_when_the_state_is_asked_for_are_saved_and_not_overwritten_by_a_load(
    tmp_path: Path,
) -> None:
    model, again = PreHooked(4, 2), PreHooked(4, 2)
    model.seen = 7
    save(tmp_path, AppState(model))
    load(tmp_path, AppState(again))
    assert (again.seen, int(again.told)) == (7, 7)


class Halving(nn.Linear):
    """Saves its weight in half precision, under a name of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_state_dict_post_hook(
            lambda _, state, prefix, __: state.update({prefix + "w": state.pop(prefix + "weight").detach().half()})
        )
        self.register_load_state_dict_pre_hook(
            lambda _, state, prefix, *__: state.update({prefix + "weight": state.pop(prefix + "w")})
        )


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_hook_that_saves_less_than_there_is_takes_nothing_from_what_was_walked(
    tmp_path: Path, is_wrapped: bool
) -> None:
    model, again = Halving(4, 2), Halving(4, 2)
    wrap = Fabric if is_wrapped else nn.Sequential
    save(tmp_path, AppState(wrap(model)))
    load(tmp_path, AppState(wrap(again)))
    assert torch.equal(model.weight, again.weight)


class Dropping(Hooked):
    """Keeps a table out of its state dict, and does not ask for it; beside it has entries of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("table", torch.rand(3))
        self.register_state_dict_post_hook(lambda _, state, prefix, __: state.__delitem__(prefix + "table"))


def test_a_tensor_that_a_module_keeps_out_of_its_state_dict_comes_back_nevertheless(tmp_path: Path) -> None:
    model, again = Dropping(4, 2), Dropping(4, 2)
    model.seen = 7
    save(tmp_path, AppState(model))
    load(tmp_path, AppState(again))
    assert again.seen == 7
    assert torch.equal(model.table, again.table)


class Unloadable(nn.Linear):
    def _load_from_state_dict(self, *args: Any) -> None:
        raise ValueError("never")


def test_a_module_that_refuses_its_own_state_has_its_tensors_and_is_trusted_only(tmp_path: Path) -> None:
    model, again = Unloadable(4, 2), Unloadable(4, 2)
    save(tmp_path, AppState(model))
    report = load(tmp_path, AppState(again))
    assert torch.equal(model.weight, again.weight)
    assert "model" in report.trusted
    assert any("never" in note for note in report.notes)


def test_a_wrapper_that_passes_its_module_s_state_on_leaves_no_trace_in_names(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    wrapped = Fabric(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    train(wrapped, optimizer, 1)
    save(tmp_path, AppState(wrapped, optimizer), save_consolidated="always")
    bare = nn.Linear(4, 2)
    restored = torch.optim.AdamW(bare.parameters(), lr=0.1)
    report = load(tmp_path, AppState(bare, restored))
    assert {"model", "optimizer"} <= set(report.exact)
    assert torch.equal(bare.weight, model.weight)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_when_the_run_begins(tmp_path: Path, use_orig_params: bool) -> None:
    for text in run_distributed(_fsdp1, 2, tmp_path, use_orig_params):
        assert "FullyShardedDataParallel (FSDP version 1)" in text
        assert "fully_shard" in text


def _fsdp1(root: Path, use_orig_params: bool) -> str:
    from hydra_ckpt import CheckpointCallback

    model = nn.Sequential(
        FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    )
    callback = CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(root)))
    try:
        callback.on_train_begin(AppState(model))
    except CheckpointConfigError as error:
        return str(error)
    finally:
        callback.close()
    return "begun"


# -- state as it was: strides, kinds, emptiness --------------------------------------------------------------------


class Keeping(torch.optim.Optimizer):
    """Keeps whatever the test wants beside its parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: the test fills the state."""


def test_strides_parameters_and_containers_in_state_come_back_as_they_were(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = Keeping(model.parameters())
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    kept = {
        "transposed": torch.randn(4, 3).T,
        "column": torch.randn(3, 1).T,
        "gaps": torch.randn(4, 6)[:, ::2],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "image": image,
        "parameter": nn.Parameter(torch.randn(2), requires_grad=False),
        "list": [torch.randn(2, 3).T, 1, (2.5, None)],
        "numbers": {1: torch.ones(2), "1": "text"},
    }
    optimizer.state[model.weight] = kept
    optimizer.state[model.bias] = {}
    save(tmp_path, AppState(model, optimizer, extras={"box": Box({"m": torch.randn(4, 3).T})}))
    again = nn.Linear(3, 2)
    restored = Keeping(again.parameters())
    box = Box({})
    load(tmp_path, AppState(again, restored, extras={"box": box}))
    assert box.value["m"].stride() == (1, 3)
    held = restored.state[again.weight]
    assert list(held) == list(kept)
    for name, value in kept.items():
        if isinstance(value, torch.Tensor):
            assert held[name].stride() == value.stride(), name
            assert torch.equal(held[name], value)
            assert type(held[name]) is type(value)
    assert held["list"][0].stride() == (1, 3)
    assert held["list"][1:] == [1, (2.5, None)]
    assert torch.equal(held["numbers"].pop(1), torch.ones(2))
    assert held["numbers"] == {"1": "text"}
    assert restored.state[again.bias] == {}
    assert again.bias in restored.state


class Box:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state: Any) -> None:
        self.value = state


def _kinds(root: Path) -> list[str]:
    """Kinds of the state of a sharded parameter before a save and after a load into a new optimizer."""

    def make() -> tuple[nn.Module, Keeping]:
        torch.manual_seed(0)
        model = nn.Linear(4, 6, bias=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        return model, Keeping(model.parameters())

    model, optimizer = make()
    parameter = model.weight
    kept = {
        "single": torch.zeros(1),
        "book": torch.randn(3, generator=torch.Generator().manual_seed(1)),
        "list": [torch.ones_like(parameter) * 2, torch.zeros(2)],
        "moment": torch.ones_like(parameter),
        "transposed": torch.ones_like(parameter).t().contiguous().t(),
        "whole": parameter.detach().redistribute(placements=[torch.distributed.tensor.Replicate()]),
    }
    optimizer.state[parameter] = kept
    optimizer.param_groups[0]["book"] = torch.arange(3.0)
    optimizer.param_groups[0]["like"] = torch.ones_like(parameter)
    save(root, AppState(model, optimizer))
    again, restored = make()
    report = load(root, AppState(again, restored))
    assert "optimizer" in report.exact
    held = restored.state[again.weight]
    pairs = [(kept[name], held[name]) for name in kept if name != "list"]
    pairs += list(zip(kept["list"], held["list"], strict=True))
    pairs += [(optimizer.param_groups[0][name], restored.param_groups[0][name]) for name in ("book", "like")]
    wrong = []
    for one, other in pairs:
        same = type(one) is type(other) and one.shape == other.shape and one.stride() == other.stride()
        if same and isinstance(one, DTensor):
            same = one.placements == other.placements and torch.equal(one.to_local(), other.to_local())
            same = same and one.to_local().stride() == other.to_local().stride()
        elif same:
            same = torch.equal(one, other)
        if not same:
            wrong.append(
                f"{type(one).__name__} {tuple(one.shape)} {one.stride()} -> {type(other).__name__} {other.stride()}"
            )
    return wrong


def test_plain_state_of_sharded_parameters_stays_plain_and_dtensors_anywhere_stay_dtensors(tmp_path: Path) -> None:
    assert run_distributed(_kinds, 2, tmp_path) == [[], []]


def test_tensors_that_need_gradients_do_so_after_a_load(tmp_path: Path) -> None:
    save(tmp_path, AppState(nn.Linear(2, 2), extras={"box": Box({"scale": torch.ones(2, requires_grad=True)})}))
    box = Box({})
    report = load(tmp_path, AppState(nn.Linear(2, 2), extras={"box": box}))
    assert box.value["scale"].requires_grad
    assert "extras.box" in report.exact


class Flattening(Box):
    """Copies what it loads into a tensor that lies otherwise."""

    def load_state_dict(self, state: Any) -> None:
        self.value = {"m": state["m"].contiguous()}


def test_an_object_that_changes_strides_when_it_loads_is_not_exact(tmp_path: Path) -> None:
    save(tmp_path, AppState(nn.Linear(2, 2), extras={"box": Flattening({"m": torch.rand(4, 3).T})}))
    report = load(tmp_path, AppState(nn.Linear(2, 2), extras={"box": Flattening({})}))
    assert "extras.box" in report.trusted


def _sharded_extra(root: Path) -> bool:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return fully_shard(nn.Sequential(Halving(4, 6)), mesh=init_device_mesh("cpu", (2,)))

    model, box = make(), Box(None)
    one = model[0].weight
    whole = one.detach().redistribute(placements=[torch.distributed.tensor.Replicate()])
    save(root, AppState(model, extras={"box": Box([one.detach().clone(), {"whole": whole}, one])}))
    report = load(root, AppState(make(), extras={"box": box}))
    found, whole_again, parameter = box.value[0], box.value[1]["whole"], box.value[2]
    assert {"model", "extras.box"} <= set(report.exact)
    assert isinstance(parameter, nn.Parameter)
    assert (found.placements, whole_again.placements) == (one.placements, whole.placements)
    return torch.equal(found.to_local(), one.to_local()) and torch.equal(parameter.to_local(), one.to_local())


def test_dtensors_of_an_extra_and_of_a_hook_come_back_where_the_live_objects_have_none(tmp_path: Path) -> None:
    assert run_distributed(_sharded_extra, 2, tmp_path) == [True, True]


# -- groups and strictness -----------------------------------------------------------------------------------------


def test_options_of_a_group_without_parameters_are_restored(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.SGD]:
        model = nn.Linear(2, 2)
        return model, torch.optim.SGD([{"params": model.parameters()}, {"params": [], "lr": 0.5}], lr=0.1)

    model, optimizer = make()
    optimizer.param_groups[1]["lr"] = 0.25
    save(tmp_path, AppState(model, optimizer))
    again, restored = make()
    load(tmp_path, AppState(again, restored))
    assert restored.param_groups[1]["lr"] == 0.25


def test_parameters_grouped_otherwise_are_said(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save(tmp_path, AppState(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    split = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}], lr=0.1)
    report = load(tmp_path, AppState(model, split))
    assert any("grouped differently" in note for note in report.notes)


def test_with_load_strict_false_what_fits_is_loaded_and_the_rest_is_listed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    save(tmp_path, AppState(model, optimizer))

    def larger() -> AppState:
        other = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2))
        return AppState(other, torch.optim.AdamW(other.parameters(), lr=0.2))

    with pytest.raises(CheckpointError, match=r"checkpoint\.load_strict=false"):
        load(tmp_path, larger())
    state = larger()
    before = copy.deepcopy(state.model.state_dict())
    report = load(tmp_path, state, load_strict=False)
    assert {"model.1.weight", "model.1.bias", "model.2.weight", "model.2.bias"} <= set(report.missing)
    assert torch.equal(state.model[0].weight, model[0].weight)
    assert torch.equal(state.model[1].weight, before["1.weight"])
    held = state.optimizer.state
    assert torch.equal(held[state.model[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])
    assert state.model[1].weight not in held
    train(state.model, state.optimizer, 1)  # nothing has a shape that does not fit


def test_a_parameter_unfrozen_later_keeps_its_moments(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        return model, torch.optim.AdamW(model[1].parameters(), lr=0.1)

    model, optimizer = make()
    save(tmp_path / "head", AppState(model, optimizer))
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    train(model, optimizer, 2)
    save(tmp_path / "all", AppState(model, optimizer))
    again, restored = make()
    with pytest.raises(CheckpointError, match=r"optimizer: 0\.weight"):  # a group is missing here
        load(tmp_path / "all", AppState(again, restored))
    restored.add_param_group({"params": list(again[0].parameters()), "lr": 0.01})
    load(tmp_path / "all", AppState(again, restored))
    train(model, optimizer, 2)
    train(again, restored, 2)
    assert all(map(torch.equal, values(model), values(again)))
    report = load(tmp_path / "head", AppState(again, restored), load_strict=False)
    assert "optimizer.0.weight" in report.missing


def test_an_optimizer_that_the_checkpoint_does_not_have_is_missing_not_an_error(tmp_path: Path) -> None:
    models = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    first = torch.optim.SGD(models["a"].parameters(), lr=0.5)
    save(tmp_path, AppState(models, {"a": first}))
    second = torch.optim.SGD(models["b"].parameters(), lr=0.5)
    report = load(tmp_path, AppState(models, {"a": torch.optim.SGD(models["a"].parameters(), lr=0.1), "b": second}))
    assert "optimizer.b" in report.missing
    assert "optimizer.a" in report.exact
    only = load(tmp_path, AppState(models, {"b": second}), load_strict=False)
    assert "optimizer" not in only.loaded


# -- a way out -----------------------------------------------------------------------------------------------------


def test_state_may_be_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.cache = nn.Module()
            self.cache.register_buffer("table", torch.eye(3).to_sparse())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    def make() -> tuple[AppState, Counting]:
        model = Net()
        optimizer = Counting(model.parameters(), lr=0.1)
        return AppState(model, optimizer, extras={"box": Box({"good": 1, "bad": len})}), optimizer

    unsaved = ["optimizer.n", "model.cache.*", "extras.box.bad"]
    state, optimizer = make()
    train(state.model, optimizer, 2)
    with pytest.raises(CheckpointError, match=r"cache\.table"):
        save(tmp_path, state)
    with pytest.raises(CheckpointError, match=r'allow_unsaved=\["extras\.box\.bad"\]'):
        save(tmp_path, state, allow_unsaved=["model.cache.table"])
    save(tmp_path, state, allow_unsaved=unsaved)
    again, restored = make()
    again.extras["box"].value = {"good": 0, "bad": max}
    with (
        caplog.at_level(logging.WARNING),
        CheckpointingConfig(checkpoint_dir=str(tmp_path), allow_unsaved=unsaved).build(0, 0, 0) as checkpointer,
    ):
        report = checkpointer.start(again)
    assert set(report.missing) == {"optimizer.n", "model.cache.table", "extras.box.bad"}
    assert "allow_unsaved" in caplog.text
    assert restored.n == 0
    assert again.extras["box"].value == {"good": 1, "bad": max}
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        manifest = checkpointer.pointed("LATEST").manifest
    assert set(manifest.details["unsaved"]) == {"optimizer.n", "model.cache.table", "extras.box.bad"}


# -- what users and breakers have tried ----------------------------------------------------------------------------


def test_methods_replaced_on_the_object_itself_count_as_overrides(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.SGD]:
        model = nn.Sequential(nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.seen = model.seen = 0
        plain, load, module_plain, module_load = (
            optimizer.state_dict,
            optimizer.load_state_dict,
            model.state_dict,
            model.load_state_dict,
        )
        optimizer.state_dict = lambda: {**plain(), "seen": optimizer.seen}
        optimizer.load_state_dict = lambda state: (
            setattr(optimizer, "seen", state["seen"]),
            load({key: value for key, value in state.items() if key != "seen"}),
        )
        model.state_dict = lambda *args, **options: {**module_plain(*args, **options), "seen": model.seen}

        def take(state: dict[str, Any], **options: Any) -> Any:
            model.seen = state["seen"]
            return module_load({key: value for key, value in state.items() if key != "seen"}, **options)

        model.load_state_dict = take
        return model, optimizer

    model, optimizer = make()
    optimizer.seen, model.seen = 3, 4
    save(tmp_path, AppState(model, optimizer))
    again, restored = make()
    load(tmp_path, AppState(again, restored))
    assert (restored.seen, again.seen) == (3, 4)


@pytest.mark.parametrize(
    "pattern", ["optimizer.*", "optimizer.0.weight", "extras.box", "extras.*", "lr_scheduler", "*.bias"]
)
def test_whatever_a_pattern_leaves_out_the_rest_can_be_loaded_and_trains_on(tmp_path: Path, pattern: str) -> None:
    def make() -> AppState:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 2))
        optimizer = Counting(model.parameters(), lr=0.1, momentum=0.9)
        return AppState(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2), extras={"box": Box({"a": 1})})

    state = make()
    train(state.model, state.optimizer, 2)
    save(tmp_path, state, allow_unsaved=[pattern])
    for options in ({}, {"allow_unsaved": [pattern]}):
        again = make()
        again.extras["box"].value = {"a": 5}
        report = load(tmp_path, again, **options)
        assert any(name.startswith(pattern.split("*", maxsplit=1)[0].rstrip(".")) for name in report.missing)
        assert again.extras["box"].value["a"] in (1, 5)
        train(again.model, again.optimizer, 2)
        again.lr_scheduler.step()


class Captured(torch.optim.Optimizer):
    """Took the state of the optimizer inside when it was built."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.state, self.param_groups, self.defaults = inner, inner.state, inner.param_groups, {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def test_a_wrapper_that_captured_the_inner_state_gets_the_moments_back(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Captured]:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        return model, Captured(torch.optim.AdamW(model.parameters(), lr=0.1))

    model, optimizer = make()
    train(model, optimizer, 3)
    save(tmp_path, AppState(model, optimizer))
    again, restored = make()
    load(tmp_path, AppState(again, restored))
    train(model, optimizer, 2)
    train(again, restored, 2)
    assert torch.equal(model.weight, again.weight)


class Bare(torch.optim.Optimizer):
    """Its state of a parameter is a tensor, not a dict."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = torch.ones(2) * 3  # type: ignore[assignment]


def test_state_that_is_no_dict_comes_back(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer, restored = Bare(model.parameters()), Bare(model.parameters())
    optimizer.step()
    save(tmp_path, AppState(model, optimizer))
    load(tmp_path, AppState(model, restored))
    assert torch.equal(restored.state[model.weight], torch.ones(2) * 3)


def test_an_optimizer_of_another_kind_is_really_left_as_built(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, adam, 1)
    save(tmp_path, AppState(model, adam))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    report = load(tmp_path, AppState(model, sgd), load_strict=False)
    assert sgd.param_groups[0]["lr"] == 0.1
    assert "betas" not in sgd.param_groups[0]
    assert not sgd.state
    assert "optimizer" in report.missing
    assert "optimizer" not in report.exact


def test_own_state_of_an_optimizer_does_not_bring_back_shapes_that_were_left_out(tmp_path: Path) -> None:
    def make(width: int) -> tuple[nn.Module, Counting]:
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, width))
        return model, Counting(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = make(1)
    train(model, optimizer, 1)
    save(tmp_path, AppState(model, optimizer))
    again, restored = make(5)
    report = load(tmp_path, AppState(again, restored), load_strict=False)
    assert {"optimizer.1.weight", "optimizer.state_dict()"} <= set(report.missing)
    train(again, restored, 1)


def test_schedulers_that_count_groups_by_position_are_refused_where_these_moved(tmp_path: Path) -> None:
    def make(*, swapped: bool) -> AppState:
        model = nn.Linear(4, 2)
        groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}]
        optimizer = torch.optim.SGD(groups[::-1] if swapped else groups)
        return AppState(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2))

    save(tmp_path, make(swapped=False))
    load(tmp_path, make(swapped=False))
    with pytest.raises(CheckpointError, match="it identifies groups by position"):
        load(tmp_path, make(swapped=True))


def test_an_extra_that_nobody_takes_is_listed(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save(tmp_path, AppState(model, extras={"a": Box(1), "b": Box(2)}))
    report = load(tmp_path, AppState(model, extras={"a": Box(0)}))
    assert report.skipped == ("extras.b",)


@pytest.mark.parametrize("where", ["model", "extra", "optimizer"])
def test_tensors_on_the_meta_device_are_refused_by_name(tmp_path: Path, where: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extras = {"box": Box({"t": torch.empty(1, device="meta") if where == "extra" else 1})}
    if where == "model":
        model.register_buffer("table", torch.empty(2, device="meta"))
    if where == "optimizer":
        optimizer.state[model.weight] = {"m": torch.empty(2, device="meta")}
    with pytest.raises(CheckpointError, match=r"(table|extras\.box\.t|weight:m).*meta device"):
        save(tmp_path, AppState(model, optimizer, extras=extras))


def test_state_that_holds_itself_is_refused_by_name(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match=r"extras\.box\.0: its state holds itself"):
        save(tmp_path, AppState(nn.Linear(2, 2), extras={"box": Box(loop)}))


def _unlike_objects(root: Path, kind: str) -> str:
    rank = dist.get_rank()
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = AppState(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2), extras={"a": Box(1)})
    if rank == 1 and kind == "extra":
        state.extras["b"] = Box(2)
    if rank == 1 and kind == "scheduler":
        state.lr_scheduler = [state.lr_scheduler, torch.optim.lr_scheduler.StepLR(optimizer, 3)]
    try:
        save(root, state)
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(("kind", "named"), [("extra", "extras.b"), ("scheduler", "lr_scheduler.1")])
def test_objects_that_only_some_ranks_have_are_refused_by_name(tmp_path: Path, kind: str, named: str) -> None:
    for text in run_distributed(_unlike_objects, 2, tmp_path, kind):
        assert f"only on rank 1: objects: {named}" in text


# -- what state dicts say of themselves ----------------------------------------------------------------------------


class Scaled(nn.Linear):
    """Version 2 keeps its weight doubled, and converts what version 1 saved."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") == 1:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def _converted(root: Path) -> tuple[list[torch.Tensor], LoadReport]:
    torch.manual_seed(0)
    saved, fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Sequential(Scaled(4, 4), nn.Linear(4, 4))
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for model in (saved, fresh):
            fully_shard(model, mesh=mesh)
    save(root, AppState(saved))
    report = load(root, AppState(fresh))
    whole = [
        item.full_tensor() if isinstance(item, DTensor) else item for item in (*saved.parameters(), *fresh.parameters())
    ]
    return [item.detach() for item in whole], report


def _is_converted(found: list[torch.Tensor], report: LoadReport) -> None:
    assert torch.equal(found[4], found[0] * 2)
    assert all(torch.equal(found[number], found[number + 4]) for number in (1, 2, 3))
    assert report.trusted == ("model",)
    assert any("0 (converted from another version of its class)" in note for note in report.notes)


def test_a_module_converts_what_an_older_version_of_it_has_saved(tmp_path: Path) -> None:
    _is_converted(*_converted(tmp_path))


def test_sharded_modules_convert_what_an_older_version_of_them_has_saved(tmp_path: Path) -> None:
    for found in run_distributed(_converted, 2, tmp_path):
        _is_converted(*found)


def test_a_module_of_the_same_version_converts_nothing(tmp_path: Path) -> None:
    saved, fresh = Scaled(4, 4), Scaled(4, 4)
    save(tmp_path, AppState(saved))
    assert "model" in load(tmp_path, AppState(fresh)).exact
    assert torch.equal(saved.weight, fresh.weight)


class Tagged(nn.Linear):
    """A hook says something of the state, and another one reads it when it is loaded."""

    def __init__(self, tag: str) -> None:
        super().__init__(4, 4)
        self.tag = tag
        self._register_state_dict_hook(Tagged.say)
        self.register_load_state_dict_pre_hook(Tagged.take)

    def say(self, _state: Any, _prefix: str, metadata: dict[str, Any]) -> None:
        metadata["tag"] = self.tag

    def take(self, _state: Any, _prefix: str, metadata: dict[str, Any], *_: Any) -> None:
        self.tag = metadata.get("tag", "")


def test_what_hooks_say_of_a_state_is_said_again(tmp_path: Path) -> None:
    model, fresh = nn.Sequential(Tagged("saved")), nn.Sequential(Tagged("live"))
    save(tmp_path, AppState(model))
    load(tmp_path, AppState(fresh))
    assert fresh[0].tag == "saved"


class Observer(nn.Module):
    """Learns its size from what it sees, and from what it loads."""

    def __init__(self, size: int = 0) -> None:
        super().__init__()
        self.register_buffer("low", torch.arange(float(size)))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.low.resize_(state[f"{prefix}low"].shape)
        super()._load_from_state_dict(state, prefix, *rest)


@pytest.mark.parametrize("size", [0, 2, 9])
def test_a_buffer_takes_its_size_when_it_is_loaded(tmp_path: Path, size: int) -> None:
    model, fresh = nn.Sequential(nn.Linear(2, 2), Observer(5)), nn.Sequential(nn.Linear(2, 2), Observer(size))
    save(tmp_path, AppState(model))
    assert "model" in load(tmp_path, AppState(fresh)).exact
    assert torch.equal(fresh[1].low, torch.arange(5.0))
    assert torch.equal(fresh[0].weight, model[0].weight)


def test_the_observers_of_torch_take_their_size_when_they_are_loaded(tmp_path: Path) -> None:
    observer = torch.ao.quantization.PerChannelMinMaxObserver
    model, fresh = nn.Sequential(observer()), nn.Sequential(observer())
    model(torch.arange(6.0).view(2, 3))
    save(tmp_path, AppState(model))
    assert "model" in load(tmp_path, AppState(fresh)).exact
    assert torch.equal(fresh[0].min_val, model[0].min_val)
    save(tmp_path / "again", AppState(fresh))


# -- what is left out, and what was not there ----------------------------------------------------------------------


def test_a_pattern_that_leaves_nothing_out_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), allow_unsaved=["model.bias", "optimizer.slwo.*"])
    with config.build(0, 0, 0) as engine, caplog.at_level(logging.WARNING):
        for step in (1, 2):
            engine.save(AppState(model), step=step).result()
    said = [record.getMessage() for record in caplog.records if "allow_unsaved" in record.getMessage()]
    assert len(said) == 2
    assert "is not saved" in said[0]
    assert "'optimizer.slwo.*' matches nothing" in said[1]
    assert "model.bias" not in said[1]


def test_an_option_that_the_checkpoint_lacks_is_reported(tmp_path: Path) -> None:
    model, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    save(tmp_path, AppState(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    optimizer = torch.optim.SGD([{"params": list(fresh.parameters()), "scale": 3}], lr=0.5)
    report = load(tmp_path, AppState(fresh, optimizer))
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["scale"] == 3
    assert report.missing == ("optimizer.param_groups.0.scale",)
    assert any("as it was built: optimizer.param_groups.0.scale" in note for note in report.notes)


class Doubled(nn.Module):
    """Version 2 holds twice what version 1 held, and the two the other way round."""

    _version = 2

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version", 1) == 1:
            state[f"{prefix}a"], state[f"{prefix}b"] = state[f"{prefix}b"] * 2, state[f"{prefix}a"] * 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Old(Doubled):
    _version = 1


def test_a_conversion_reads_what_was_saved_not_what_it_has_written(tmp_path: Path) -> None:
    a, b, zero = torch.full((2,), 1.0), torch.full((2,), 5.0), torch.zeros(2)
    model, fresh = Old(a, b), Doubled(zero.clone(), zero.clone())
    save(tmp_path, AppState(model))
    load(tmp_path, AppState(fresh))
    assert (fresh.a.tolist(), fresh.b.tolist()) == ([10, 10], [2, 2])


def test_tied_parameters_are_converted_once(tmp_path: Path) -> None:
    def build(kind: type[Doubled], value: float) -> nn.Module:
        shared = nn.Parameter(torch.full((2,), value))
        first, second = kind(torch.zeros(2), torch.zeros(2)), kind(torch.zeros(2), torch.zeros(2))
        first.a = first.b = second.a = second.b = shared
        return nn.Sequential(first, second)

    fresh: Any = build(Doubled, 0.0)
    save(tmp_path, AppState(build(Old, 3.0)))
    load(tmp_path, AppState(fresh))
    assert fresh[0].a.tolist() == [6, 6]


@pytest.mark.parametrize("options", [{"allow_unsaved": ["model.1.*"]}, {"load_strict": False}])
def test_what_is_not_loaded_is_not_converted(tmp_path: Path, options: dict[str, Any]) -> None:
    one, built = torch.ones(2), torch.full((2,), 4.0)
    model, fresh = nn.Sequential(Old(one, one.clone())), nn.Sequential(Doubled(one.clone(), one.clone()))
    if "allow_unsaved" in options:
        model.append(Old(one.clone(), one.clone()))
    fresh.append(Doubled(built.clone(), built.clone()))
    save(tmp_path, AppState(model), **options)
    report = load(tmp_path, AppState(fresh), **options)
    assert set(report.missing) >= {"model.1.a", "model.1.b"}
    later: Any = fresh
    assert later[1].a.tolist() == built.tolist()
    assert later[0].a.tolist() == [2, 2]


class Strict(Observer):
    """Loads a buffer of its own size only, though it has its own way of loading."""

    def _load_from_state_dict(self, *rest: Any) -> None:
        nn.Module._load_from_state_dict(self, *rest)


def test_a_buffer_that_does_not_take_another_size_is_a_mismatch(tmp_path: Path) -> None:
    save(tmp_path, AppState(nn.Sequential(nn.Linear(2, 2), Strict(5))))
    fresh = nn.Sequential(nn.Linear(2, 2), Strict(3))
    before = [item.clone() for item in values(fresh)]
    with pytest.raises(KeyMismatchError, match=r"1\.low: .*\[5\] in the checkpoint"):
        load(tmp_path, AppState(fresh))
    assert all(map(torch.equal, before, values(fresh)))
    assert load(tmp_path, AppState(fresh), load_strict=False).missing == ("model.1.low",)
    assert fresh[1].low.tolist() == [0, 1, 2]


# -- code without the name of a module --------------------------------------------------------------------------------


def without_module(source: str, name: str) -> Any:
    """A function as `exec` or C code makes it: its `__module__` is None."""
    space: dict[str, Any] = {"torch": torch, "nn": nn, "__name__": None}
    exec(source, space)
    assert space[name].__module__ is None
    return space[name]


class MadeSGD(torch.optim.SGD):
    """Says more than PyTorch's own, by methods of no module."""

    count = 0
    state_dict = without_module(
        "def state_dict(self): return {**torch.optim.Optimizer.state_dict(self), 'count': self.count}", "state_dict"
    )
    load_state_dict = without_module(
        "def load_state_dict(self, state):\n"
        "    self.count = state['count']\n"
        "    torch.optim.Optimizer.load_state_dict(self, {k: state[k] for k in ('state', 'param_groups')})",
        "load_state_dict",
    )


class MadeLinear(nn.Linear):
    """Has an entry more than its tensors, by methods and hooks of no module."""

    count = 0
    _save_to_state_dict = without_module(
        "def _save_to_state_dict(self, into, prefix, keep_vars):\n"
        "    nn.Module._save_to_state_dict(self, into, prefix, keep_vars)\n"
        "    into[prefix + 'count'] = torch.tensor(self.count)",
        "_save_to_state_dict",
    )

    def __init__(self) -> None:
        super().__init__(4, 4)
        take = "def take(self, state, prefix, *_): self.count = int(state.pop(prefix + 'count', 0))"
        self.register_load_state_dict_pre_hook(without_module(take, "take"))


Nameless: Any = type("Nameless", (torch.optim.lr_scheduler.StepLR,), {"__module__": None})


def test_code_without_the_name_of_a_module_is_not_taken_for_pytorch_s(tmp_path: Path) -> None:
    def build(count: int) -> tuple[MadeLinear, MadeSGD, AppState]:
        model = MadeLinear()
        optimizer = MadeSGD(model.parameters(), lr=0.1)
        model.count = optimizer.count = count
        return model, optimizer, AppState(model, optimizer, Nameless(optimizer, 1))

    save(tmp_path, build(3)[2])
    model, optimizer, state = build(0)
    report = load(tmp_path, state)
    assert (model.count, optimizer.count) == (3, 3)
    assert {"model", "optimizer", "lr_scheduler"} <= {*report.exact, *report.trusted}
