"""DTensors on another mesh than their parameter or the model are restored on that mesh, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hydra_ckpt import AppState, CheckpointingConfig, KeyMismatchError, LoadReport
from hydra_ckpt.testing import run_distributed
from tests.holders import Holder, Module


def save_and_load(root: Path, state: AppState, fresh: AppState, **options: Any) -> LoadReport:
    rank = dist.get_rank()
    with CheckpointingConfig(checkpoint_dir=str(root)).build(rank, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(rank, 0, 0) as checkpointer:
        report = checkpointer.load(fresh, restore_from="latest")
    assert report is not None
    return report


def on(mesh: DeviceMesh, *placements: Any, start: float = 0.0) -> DTensor:
    return distribute_tensor(torch.arange(start, start + 8), mesh, placements or [Shard(0)])


def sharded(mesh: DeviceMesh, model: nn.Module | None = None) -> nn.Module:
    model = nn.Linear(4, 4) if model is None else model
    fully_shard(model, mesh=mesh)
    return model


def replicated() -> nn.Module:
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Linear(4, 4))


def assert_same(found: Any, saved: DTensor) -> None:
    assert isinstance(found, DTensor)
    assert (found.device_mesh, found.placements) == (saved.device_mesh, saved.placements)
    assert torch.equal(found.to_local(), saved.to_local())


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)


def _siblings(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    value, twice = on(mesh["tp"]), on(mesh, Shard(0), Replicate())
    _extras(root, mesh, value, twice)
    model, fresh = sharded(mesh["dp"], Module(value)), sharded(mesh["dp"], Module())
    assert "model" in save_and_load(root / "model", AppState(model), AppState(fresh)).exact
    assert_same(fresh.held, value)
    for place, saved in (("first", value), ("second", twice)):
        _state(root / place, mesh, saved)


def _extras(root: Path, mesh: DeviceMesh, value: DTensor, twice: DTensor) -> None:
    own = on(mesh["dp"])
    saved = {"held": [value, twice, own]}
    fresh, scheduler = Holder(), Holder()
    state = AppState(sharded(mesh["dp"]), None, Holder(value), extras={"box": Holder(saved)})
    again = AppState(sharded(mesh["dp"]), None, scheduler, extras={"box": fresh})
    report = save_and_load(root / "extras", state, again)
    for found, before in zip([*fresh.held["held"], scheduler.held], [value, twice, own, value], strict=True):
        assert_same(found, before)
    assert {"extras.box", "lr_scheduler"} <= set(report.exact)


def _state(root: Path, mesh: DeviceMesh, value: DTensor) -> None:
    model, fresh = sharded(mesh["dp"]), sharded(mesh["dp"])
    optimizer, again = momentum(model), momentum(fresh)
    optimizer.state[model.weight]["momentum_buffer"] = value
    optimizer.param_groups[0]["option"] = value
    report = save_and_load(root, AppState(model, optimizer), AppState(fresh, again))
    assert_same(again.state[fresh.weight]["momentum_buffer"], value)
    assert_same(again.param_groups[0]["option"], value)
    assert "optimizer" in report.exact


def test_a_mesh_that_was_cut_from_the_same_mesh_as_the_models_is_found(tmp_path: Path) -> None:
    run_distributed(_siblings, 2, tmp_path)


def _live(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    value, other = on(mesh), on(mesh, start=9.0)
    fresh = Holder(other)
    state, again = AppState(replicated(), extras={"box": Holder(value)}), AppState(replicated(), extras={"box": fresh})
    assert "extras.box" in save_and_load(root / "extras", state, again).exact
    assert_same(fresh.held, value)
    model, there = replicated(), replicated()
    optimizer, loaded = momentum(model), momentum(there)
    optimizer.state[model.module.weight]["momentum_buffer"] = value
    loaded.state[there.module.weight]["momentum_buffer"] = other
    report = save_and_load(root / "state", AppState(model, optimizer), AppState(there, loaded))
    assert_same(loaded.state[there.module.weight]["momentum_buffer"], value)
    assert "optimizer" in report.exact


def test_the_mesh_of_a_tensor_that_the_object_already_has_is_used(tmp_path: Path) -> None:
    run_distributed(_live, 2, tmp_path)


def _of_nobody(root: Path, kind: str) -> tuple[str, LoadReport, bool]:
    mesh = init_device_mesh("cpu", (2,))

    def state(value: Any) -> tuple[AppState, Callable[[], Any]]:
        torch.manual_seed(0)
        core = Module(value if kind == "model" else None)
        model = DistributedDataParallel(core)
        optimizer, scheduler, extra = momentum(model), Holder(), Holder()
        if kind == "optimizer" and value is not None:
            optimizer.state[core.weight]["momentum_buffer"] = value
        scheduler.held = value if kind == "lr_scheduler" else None
        extra.held = value if kind == "extras" else None
        values: dict[str, Callable[[], Any]] = {
            "model": lambda: core.held,
            "optimizer": lambda: optimizer.state[core.weight].get("momentum_buffer"),
            "lr_scheduler": lambda: scheduler.held,
            "extras": lambda: extra.held,
        }
        return AppState(model, optimizer, scheduler, extras={"box": extra}), values[kind]

    fresh, value = state(None)
    with pytest.raises(KeyMismatchError) as caught:
        save_and_load(root, state(on(mesh))[0], fresh)
    config = CheckpointingConfig(checkpoint_dir=str(root), load_strict=False)
    with config.build(dist.get_rank(), 0, 0) as checkpointer:
        report = checkpointer.load(fresh, restore_from="latest")
    assert report is not None
    return str(caught.value), report, value() is None


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("model", "model._extra_state"),
        ("optimizer", "optimizer.module.weight.momentum_buffer"),
        ("lr_scheduler", "lr_scheduler"),
        ("extras", "extras.box"),
    ],
)
def test_a_mesh_that_is_not_here_is_refused_by_name_or_the_object_left_as_built(
    tmp_path: Path, kind: str, missing: str
) -> None:
    for text, report, is_as_built in run_distributed(_of_nobody, 2, tmp_path, kind):
        assert "it was on a device mesh of shape [2], and no tensor here is on such a mesh" in text
        assert "checkpoint.load_strict=false" in text
        assert is_as_built
        assert missing.replace("module.", "") in report.missing
        assert missing not in report.exact


def _models_mesh(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    rank = dist.get_rank()
    with CheckpointingConfig(checkpoint_dir=str(root)).build(rank, 0, 0) as checkpointer:
        state = AppState(sharded(mesh), extras={"box": Holder(on(mesh))})
        checkpointer.save(state, step=1).result()


def test_what_was_on_the_models_own_mesh_says_no_mesh_and_loads_on_any(tmp_path: Path) -> None:
    run_distributed(_models_mesh, 2, tmp_path)
    [shared] = (tmp_path / "epoch_0_step_1/progress").glob("shared-*.json")
    assert json.loads(shared.read_text())["extras"]["box"]["held"] == {"~": "tensor", "v": "box:held", "p": [0]}
    fresh = Holder()
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.load(AppState(nn.Linear(4, 4), extras={"box": fresh}), restore_from="latest")
    assert torch.equal(fresh.held, torch.arange(8.0))


def _placeholders(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    for number, placeholder in enumerate((torch.zeros(()), torch.zeros(8), torch.zeros(4))):
        value, fresh = on(mesh, start=3.0), Holder(placeholder)
        state = AppState(sharded(mesh), extras={"box": Holder(value)})
        report = save_and_load(root / str(number), state, AppState(sharded(mesh), extras={"box": fresh}))
        assert_same(fresh.held, value)
        assert "extras.box" in report.exact


def test_a_dtensor_replaces_the_plain_placeholder_of_a_fresh_object(tmp_path: Path) -> None:
    run_distributed(_placeholders, 2, tmp_path)


def _saved_place_counts(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    plain = torch.arange(8.0).view(4, 2)

    def placed(placement: Any) -> DTensor:
        return distribute_tensor(plain, mesh, [placement])

    cases = [(plain, placed(Shard(0))), (placed(Shard(0)), placed(Replicate())), (placed(Shard(1)), placed(Shard(0)))]
    for number, (value, other) in enumerate(cases):
        fresh = Holder(other)
        state = AppState(sharded(mesh), extras={"box": Holder(value)})
        report = save_and_load(root / str(number), state, AppState(sharded(mesh), extras={"box": fresh}))
        assert "extras.box" in report.exact
        if isinstance(value, DTensor):
            assert_same(fresh.held, value)
        else:
            assert type(fresh.held) is torch.Tensor
            assert torch.equal(fresh.held, plain)


def test_where_the_ranks_are_the_same_a_tensor_becomes_what_was_saved(tmp_path: Path) -> None:
    run_distributed(_saved_place_counts, 2, tmp_path)


def _strided(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def model(held: Any = None) -> nn.Module:
        torch.manual_seed(0)
        found = nn.ModuleDict({"fc": nn.Linear(8, 8, bias=False), "extra": Module(held)})
        parallelize_module(found, mesh["tp"], {"fc": ColwiseParallel()})
        fully_shard(found["fc"], mesh=mesh["dp"])
        return found

    average = model()["fc"].weight.detach().clone()
    fresh, again = Holder(), model()
    state = AppState(model(average), extras={"average": Holder(average)})
    report = save_and_load(root, state, AppState(again, extras={"average": fresh}))
    assert {"model", "extras.average"} <= set(report.exact)
    assert_same(fresh.held, average)
    assert_same(again["extra"].held, average)


def test_an_average_of_weights_that_fsdp_has_sharded_over_tensor_parallelism_keeps_its_place(tmp_path: Path) -> None:
    run_distributed(_strided, 4, tmp_path)


def _parts(mesh: DeviceMesh, *, two: bool = False) -> nn.Module:
    """A sharded model; with `two`, its layers are on meshes of their own."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "out": nn.Linear(4, 6), "extra": Module(None)})
    fully_shard(model["fc"], mesh=mesh)
    fully_shard(model["out"], mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("x", "y")) if two else mesh)
    return model


def _on_other_dimensions(root: Path) -> None:
    flat = init_device_mesh("cpu", (2,))
    both = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    for number, (mesh, other) in enumerate([(flat, both), (both, flat)]):
        model, again = _parts(mesh), _parts(other)
        average = {key: item.detach().clone() for key, item in model.named_parameters() if isinstance(item, DTensor)}
        shards = [Replicate()] * (mesh.ndim - 1) + [Shard(1)]
        average["other"] = distribute_tensor(torch.arange(24.0).view(3, 8), mesh, shards)
        average["same"] = distribute_tensor(torch.arange(16.0).view(4, 4), mesh, [Replicate()] * mesh.ndim)
        model["extra"].held, fresh = average["fc.weight"], Holder()
        state = AppState(model, extras={"average": Holder(average)})
        report = save_and_load(root / str(number), state, AppState(again, extras={"average": fresh}))
        assert {"model", "extras.average"} <= set(report.exact)
        for key, item in average.items():
            assert torch.equal(fresh.held[key].full_tensor(), item.full_tensor())
        for key, item in (pair for pair in again.named_parameters() if isinstance(pair[1], DTensor)):
            assert (fresh.held[key].device_mesh, fresh.held[key].placements) == (item.device_mesh, item.placements)
            fresh.held[key].lerp_(item.detach(), 0.1)
        assert again["extra"].held.placements == again["fc"].weight.placements
        assert fresh.held["other"].placements[-1] == Shard(1)
        assert fresh.held["same"].placements == (Replicate(),) * other.ndim


def test_what_was_sharded_as_the_model_is_sharded_as_the_model_on_a_mesh_of_other_dimensions(tmp_path: Path) -> None:
    run_distributed(_on_other_dimensions, 2, tmp_path)


def _on_several_meshes(root: Path) -> None:
    three = init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=("a", "b", "c"))
    flat = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weight = nn.Linear(4, 4)
    for name, parameter in list(weight.named_parameters()):
        shards = [Shard(0), Replicate(), Replicate()]
        setattr(weight, name, nn.Parameter(distribute_tensor(parameter.detach(), three, shards)))
    held = [distribute_tensor(torch.arange(24.0).view(3, 8), three, [Shard(1), Replicate(), Replicate()])]
    model, fresh = nn.ModuleDict({"fc": weight, "out": nn.Linear(4, 6), "extra": Module(held)}), Holder()
    for name, parameter in list(model["out"].named_parameters()):
        setattr(model["out"], name, nn.Parameter(distribute_tensor(parameter.detach(), three, [Replicate()] * 3)))
    again = _parts(flat, two=True)
    state = AppState(model, extras={"box": Holder(held)})
    report = save_and_load(root, state, AppState(again, extras={"box": fresh}))
    assert type(fresh.held[0]) is torch.Tensor
    assert torch.equal(fresh.held[0], torch.arange(24.0).view(3, 8))
    assert {"extras.box", "model.extra._extra_state"} <= set(report.rederived)
    assert any("plain whole tensor" in note for note in report.notes)


def test_what_has_no_place_among_several_meshes_is_whole_and_the_report_says_so(tmp_path: Path) -> None:
    run_distributed(_on_several_meshes, 2, tmp_path)
