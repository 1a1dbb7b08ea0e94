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


WRITES: dict[str, tuple[Write, str]] = {
    "copy": (lambda model, _: model[0].weight.zero_(), "0.weight"),
    "data": (lambda model, _: model[0].weight.data.zero_(), "0.weight"),
    "numpy": (lambda model, _: model[0].weight.numpy().fill(0), "0.weight"),
    "one row": (_write_a_row, "0.weight"),
    "small": (lambda model, _: model[0].bias.data.zero_(), "0.bias"),
    "buffer": (lambda model, _: model[1].running_mean.add_(1), "1.running_mean"),
    "memory": (_replace_memory, ""),
    "state": (lambda model, found: found.state[model[0].weight]["momentum_buffer"].zero_(), "0.weight:momentum_buffer"),
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
    said = "extras.meddler" if place == "extra" else "lr_scheduler"
    expected = f"{said} wrote to {WRITES[kind][1]} ("
    assert kind == "memory" or any(expected in note for note in report.notes)


def _extras(place: str, meddler: Meddler) -> dict[str, Any]:
    return {"meddler": meddler} if place == "extra" else {}


def test_an_optimizer_that_writes_to_the_weights_while_it_loads_does_not_change_them(tmp_path: Path) -> None:
    (model, optimizer), (fresh, again) = trained(Averaging), trained(Averaging)
    report = resume(tmp_path, AppState(model, optimizer), AppState(fresh, again))
    assert {"model", "optimizer"} <= set(report.exact)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    assert any("optimizer wrote to 0.weight" in note for note in report.notes)


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
