"""Objects that write to models and optimizers while they load their own state do not change what was restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hydra_ckpt import AppState, CheckpointingConfig, LoadReport
from hydra_ckpt.testing import run_distributed

Write = Callable[[nn.Module, torch.optim.Optimizer], None]


class Meddler:
    """Writes to a model or an optimizer when it loads."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, write: Write) -> None:
        self.model, self.optimizer, self.write = model, optimizer, write

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.write(self.model, self.optimizer)


class Averaging(torch.optim.SGD):
    """Has state of its own, and puts something else into the weights when it loads it."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mine": 5}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state.items() if key != "mine"})
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.zero_()


def trained(kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def resume(root: Path, saved: AppState, fresh: AppState, rank: int = 0) -> LoadReport:
    with CheckpointingConfig(checkpoint_dir=str(root)).build(rank, 0, 0) as checkpointer:
        checkpointer.save(saved, step=1).result()
    with CheckpointingConfig(checkpoint_dir=str(root)).build(rank, 0, 0) as checkpointer:
        report = checkpointer.load(fresh, restore_from="latest")
    assert report is not None
    return report


def _replace_memory(model: nn.Module, _: torch.optim.Optimizer) -> None:
    model[0].weight.data = torch.zeros(64, 64)


def _write_a_row(model: nn.Module, _: torch.optim.Optimizer) -> None:
    model[0].weight[63].zero_()


def _replace_state(model: nn.Module, found: torch.optim.Optimizer) -> None:
    found.state[model[0].weight] = {"momentum_buffer": torch.zeros(64, 64, dtype=torch.float64), "more": 1}


def fresh_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of an optimizer that has not stepped."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict()


WRITES: dict[str, tuple[Write, str]] = {
    "copy": (lambda model, _: model[0].weight.zero_(), "0.weight"),
    "data": (lambda model, _: model[0].weight.data.zero_(), "0.weight"),
    "numpy": (lambda model, _: model[0].weight.numpy().fill(0), "0.weight"),
    "one row": (_write_a_row, "0.weight"),
    "small": (lambda model, _: model[0].bias.data.zero_(), "0.bias"),
    "buffer": (lambda model, _: model[1].running_mean.add_(1), "1.running_mean"),
    "memory": (_replace_memory, ""),
    "state": (lambda model, found: found.state[model[0].weight]["momentum_buffer"].zero_(), "0.weight:momentum_buffer"),
    "a row by data": (lambda model, _: model[0].weight.data[3].zero_(), "0.weight"),
    "no state": (lambda _, found: found.state.clear(), "the state of 4 parameters"),
    "another state": (_replace_state, "the state of 1 parameter "),
    "a new state": (lambda model, found: found.load_state_dict(fresh_state(model)), "the state of 4 parameters"),
}


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("place", ["extra", "scheduler"])
def test_what_an_object_overwrites_while_it_loads_is_read_again(tmp_path: Path, kind: str, place: str) -> None:
    (model, optimizer), (fresh, again) = trained(), trained()

    def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> AppState:
        meddler = Meddler(model, optimizer, WRITES[kind][0])
        return AppState(model, optimizer, *([meddler] if place == "scheduler" else []), extras=_extras(place, meddler))

    report = resume(tmp_path, state(model, optimizer), state(fresh, again))
    assert {"model", "optimizer"} <= set(report.exact)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["momentum_buffer"], again.state[other]["momentum_buffer"])
    assert kind == "memory" or any(WRITES[kind][1] in note for note in report.notes)


def _extras(place: str, meddler: Meddler) -> dict[str, Any]:
    return {"meddler": meddler} if place == "extra" else {}


def test_an_optimizer_that_writes_to_the_weights_while_it_loads_does_not_change_them(tmp_path: Path) -> None:
    (model, optimizer), (fresh, again) = trained(Averaging), trained(Averaging)
    report = resume(tmp_path, AppState(model, optimizer), AppState(fresh, again))
    assert {"model", "optimizer"} <= set(report.exact)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    assert any("model: 0.weight, 0.bias" in note for note in report.notes)


class Tied(nn.Linear):
    """Has extra state; writes to something when it gets it."""

    def __init__(self, write: Callable[[], Any] = lambda: None) -> None:
        super().__init__(4, 4)
        self.write = write

    def get_extra_state(self) -> Any:
        return 1

    def set_extra_state(self, _: Any) -> None:
        self.write()


class Loader:
    """A data loader that writes to something when it loads."""

    def __init__(self, write: Callable[[], Any] = lambda: None) -> None:
        self.write = write

    def __iter__(self) -> Any:
        return iter(())

    def state_dict(self) -> Any:
        return {"at": 1}

    def load_state_dict(self, _: Any) -> None:
        self.write()


@pytest.mark.parametrize("kind", ["extra state", "hook", "loader", "state_dict"])
def test_other_models_loaders_and_comparisons_change_nothing_either(tmp_path: Path, kind: str) -> None:
    def state(write: Callable[[nn.Module], Any] = lambda _: None) -> tuple[AppState, nn.Module]:
        first = nn.Linear(4, 4)

        def run(*_: Any) -> None:
            write(first)

        second = Tied(run if kind == "extra state" else lambda: None)
        if kind == "hook":
            second.register_load_state_dict_post_hook(run)
        asked = Holder(run if kind == "state_dict" else lambda: None)
        loader = Loader(run if kind == "loader" else lambda: None)
        return AppState({"first": first, "second": second}, dataloader=loader, extras={"asked": asked}), first

    (saved, model), (again, fresh) = state(), state(lambda model: model.weight.data.zero_())
    report = resume(tmp_path, saved, again)
    assert torch.equal(model.weight, fresh.weight)
    assert "model.first" in report.exact


class Holder:
    """Writes to something whenever it is asked for its state; takes its state over, and does something more."""

    def __init__(self, write: Callable[[], Any], held: Any = None, more: Callable[[Any], Any] = lambda _: None) -> None:
        self.write, self.held, self.more = write, held, more

    def state_dict(self) -> Any:
        self.write()
        return {"held": self.held}

    def load_state_dict(self, state: Any) -> None:
        self.held = state["held"]
        self.more(state)


def nothing() -> None:
    """Writes nothing."""


def test_an_object_that_a_later_one_changes_is_not_exact(tmp_path: Path) -> None:
    first = Holder(nothing)
    later = Holder(nothing, more=lambda _: first.held.append(9))
    saved = {"first": Holder(nothing, [1, 2]), "later": Holder(nothing)}
    report = resume(
        tmp_path / "extras",
        AppState(nn.Linear(1, 1), extras=saved),
        AppState(nn.Linear(1, 1), extras={"first": first, "later": later}),
    )
    assert (report.trusted, "extras.later" in report.exact) == (("extras.first",), True)
    (model, optimizer), (fresh, again) = trained(), trained()
    schedule = torch.optim.lr_scheduler.StepLR(again, 3)
    later = Holder(nothing, more=lambda _: setattr(schedule, "last_epoch", 55))
    report = resume(
        tmp_path / "scheduler",
        AppState(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3), extras={"later": Holder(nothing)}),
        AppState(fresh, again, schedule, extras={"later": later}),
    )
    assert "lr_scheduler" in report.trusted


def test_an_object_that_takes_apart_what_it_shares_does_not_harm_the_other(tmp_path: Path) -> None:
    held = {"v": 5}
    fresh = {name: Holder(nothing, more=lambda state: state["held"].pop("v")) for name in ("first", "second")}
    saved = {"first": Holder(nothing, held), "second": Holder(nothing, held)}
    report = resume(tmp_path, AppState(nn.Linear(1, 1), extras=saved), AppState(nn.Linear(1, 1), extras=dict(fresh)))
    assert "extras.second was given a copy of what it shared with other objects" in report.notes


def _sharded(root: Path) -> None:
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))

    def state() -> tuple[nn.Module, AppState]:
        model = nn.Sequential(nn.Linear(64, 64))
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        write: Write = lambda model, _: model[0].weight.data.zero_()  # noqa: E731
        return model, AppState(model, optimizer, extras={"meddler": Meddler(model, optimizer, write)})

    (model, saved), (fresh, again) = state(), state()
    report = resume(root, saved, again, rank)
    assert "model" in report.exact
    assert torch.equal(model[0].weight.to_local(), fresh[0].weight.to_local())


def test_the_same_with_fsdp2(tmp_path: Path) -> None:
    run_distributed(_sharded, 2, tmp_path)
