"""`torch.set_default_device` and `with torch.device(...)` apply to the user's code, not to this package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, RandomSampler

from hydra_ckpt import AppState, CheckpointingConfig, resumable
from hydra_ckpt.testing import run_distributed
from tests.holders import Holder


@pytest.fixture
def default_meta() -> Iterator[None]:
    """Put the default device back."""
    yield
    torch.set_default_device(None)


HELD = {"t": torch.arange(6.0).view(2, 3).t(), "none": torch.empty(0), "list": [torch.ones(2, dtype=torch.bfloat16)]}


def objects(held: Any) -> tuple[AppState, nn.Module]:
    """Everything that an AppState holds, after one step."""
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    optimizer = torch.optim.AdamW(model.parameters())
    if held is not None:
        model(torch.rand(4, 64)).sum().backward()
        optimizer.step()
    loader = resumable(DataLoader(list(range(40)), batch_size=4, sampler=RandomSampler(range(40))))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return AppState(model, optimizer, scheduler, loader, extras={"kept": Holder(held)}), model


@pytest.mark.parametrize("options", [{}, {"is_async": True}, {"model_save_format": "torch_save"}])
@pytest.mark.usefixtures("default_meta")
def test_a_run_under_another_default_device(tmp_path: Path, options: dict[str, Any]) -> None:
    (state, model), (fresh, other) = objects(HELD), objects(None)
    torch.set_default_device("meta")
    with CheckpointingConfig(checkpoint_dir=str(tmp_path), **options).build(0, 0, 0) as checkpointer:
        for step in (1, 2):
            checkpointer.save(state, step=step).result()
        report = checkpointer.load(fresh, restore_from="latest")
    assert report is not None
    assert {"model", "optimizer", "extras.kept", "dataloader", "rng"} <= set(report.exact)
    given = fresh.extras["kept"].held
    assert torch.equal(given["t"], HELD["t"])
    assert given["t"].stride() == HELD["t"].stride()
    assert given["none"].device.type == "cpu"
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    pairs = zip(state.optimizer.state.values(), fresh.optimizer.state.values(), strict=True)
    assert all(torch.equal(one[key], two[key]) for one, two in pairs for key in one)
    assert all(tensor.device.type == "cpu" for entry in fresh.optimizer.state.values() for tensor in entry.values())


@pytest.mark.usefixtures("default_meta")
def test_a_loader_under_another_default_device() -> None:
    def order() -> list[Any]:
        loader = resumable(DataLoader(list(range(12)), batch_size=None, shuffle=True, collate_fn=lambda one: one))
        return list(loader)

    plain = order()
    torch.set_default_device("meta")
    assert order() == plain


def _on_ranks(root: str) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    state = AppState(model, extras={"kept": Holder({"d": model.weight.detach().clone(), "own": dist.get_rank()})})
    fresh = AppState(model, extras={"kept": Holder()})
    with torch.device("meta"), CheckpointingConfig(checkpoint_dir=root).build(dist.get_rank(), 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()
        report = checkpointer.load(fresh, restore_from="latest")
    held = fresh.extras["kept"].held
    return report.exact, bool((held["d"] == model.weight).full_tensor().all()), held["own"]


def test_ranks_under_another_default_device(tmp_path: Path) -> None:
    for rank, (exact, equal, own) in enumerate(run_distributed(_on_ranks, 2, str(tmp_path), timeout_s=100)):
        assert {"model", "extras.kept", "rng"} <= set(exact)
        assert (equal, own) == (True, rank)
