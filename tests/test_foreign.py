"""Checkpoints that other tools have written: plain `dcp.save` directories, and accelerate's under FSDP2."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.checkpointing import save_accelerator_state
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hydra_ckpt import AppState, CheckpointError, CheckpointingConfig, CorruptCheckpointError, KeyMismatchError
from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.testing import run_distributed


class Average:
    """An extra with tensors and a number."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}
        self.decay = 0.5

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "decay": self.decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.decay = dict(state["shadow"]), state["decay"]


class Run:
    """A model with a buffer, a tie and a frozen part, two parameter groups, a schedule and an extra."""

    def __init__(self, seed: int, *, tensor_lr: bool = False) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 5), nn.Linear(5, 7))
        self.model[3].weight = self.model[0].weight
        self.model[2].bias.requires_grad_(False)
        if dist.is_initialized():
            fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        groups = [
            {"params": list(self.model[0].parameters()), "lr": torch.tensor(0.03) if tensor_lr else 0.03},
            {"params": [*self.model[1].parameters(), self.model[2].weight, self.model[3].bias], "weight_decay": 0.2},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=False)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.average = Average(self.model)
        self.state = AppState(self.model, self.optimizer, self.scheduler, extras={"average": self.average})
        random.seed(seed)
        np.random.seed(seed)

    def train(self, steps: int) -> None:
        for number in range(steps):
            data = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
            self.model(data).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def everything(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: full(tensor) for name, tensor in self.model.state_dict().items()}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                found.update({f"{name}:{k}": full(v) for k, v in self.optimizer.state.get(parameter, {}).items()})
                found[f"{name}:options"] = {k: float(group[k]) for k in ("lr", "weight_decay", "initial_lr")}
        schedule = self.scheduler.state_dict()
        found["schedule"] = (schedule["last_epoch"], [float(lr) for lr in schedule["_last_lr"]])
        found.update({f"average:{name}": full(tensor) for name, tensor in self.average.shadow.items()})
        return copy.deepcopy(found)


def full(tensor: Any) -> Any:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == wanted[name].dtype, name
            assert torch.equal(value, wanted[name]), name
        else:
            assert value == wanted[name], name


def load(directory: Path, path: Path, run: Run, *, allow: bool = True, parts: list[str] | None = None) -> Any:
    config = CheckpointingConfig(checkpoint_dir=str(directory), allow_legacy_pickle_restore=allow)
    with config.build(dist.get_rank() if dist.is_initialized() else 0, 0, 0) as engine:
        return engine.load(run.state, restore_from=str(path), parts=parts)


# -- plain DCP -----------------------------------------------------------------------------------------------------

FORMS = ["nested", "flattened", "numbered", "app"]


def _save_plainly(path: Path, form: str) -> dict[str, Any]:
    run = Run(1, tensor_lr=form == "flattened")
    run.train(3)
    weights, moments = get_state_dict(
        run.model, run.optimizer, options=StateDictOptions(flatten_optimizer_state_dict=form == "flattened")
    )
    if form == "numbered":  # the objects' own state dicts
        weights, moments = run.model.state_dict(), run.optimizer.state_dict()
    state = {"model": weights, "optim": moments}
    rest = {"lr_scheduler": run.scheduler.state_dict(), "average": run.average.state_dict(), "step": 3, "epoch": 1}
    whole: dict[str, Any] = {"app": {**state, **rest}} if form == "app" else {**state, **rest, "other": {"x": 1}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(whole, checkpoint_id=path)
    return run.everything()


def _load_plainly(directory: Path, path: Path, form: str) -> tuple[dict[str, Any], Any]:
    run = Run(2, tensor_lr=form == "flattened")
    report = load(directory, path, run)
    found = run.everything()
    run.train(1)
    return found, report


@pytest.mark.parametrize(("form", "writers", "readers"), [("nested", 2, 1), ("flattened", 1, 2)])
def test_a_plain_dcp_directory_can_be_resumed_from(tmp_path: Path, form: str, writers: int, readers: int) -> None:
    _check_plain(tmp_path, form, writers, readers)


@pytest.mark.slow
@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("writers", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_any_plain_dcp_directory_can_be_resumed_from(tmp_path: Path, form: str, writers: int, readers: int) -> None:
    _check_plain(tmp_path, form, writers, readers)


def _check_plain(tmp_path: Path, form: str, writers: int, readers: int) -> None:
    path = tmp_path / "theirs"
    wanted = run_distributed(_save_plainly, writers, path, form)[0]
    for found, report in run_distributed(_load_plainly, readers, tmp_path / "ours", path, form):
        assert_same(found, wanted)
        assert (report.step, report.epoch) == (3, 1)
        assert report.loaded == ("model", "optimizer", "lr_scheduler", "extras", "progress")
        assert any("no digests" in note for note in report.notes)
        assert ("other has no place in the AppState and is skipped" in report.notes) == (form != "app")


def test_a_plain_dcp_directory_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": weights, "optim": moments}, checkpoint_id=tmp_path / "plain")
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), allow_legacy_pickle_restore=True)
    with config.build(0, 0, 0) as engine:
        other = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with pytest.raises(KeyMismatchError, match=r"another optimizer in the checkpoint, AdamW in .*nesterov"):
            engine.load(AppState(model, other), restore_from=str(tmp_path / "plain"))
        assert other.param_groups[0]["lr"] == 1e-3
        report = engine.load(AppState(model, optimizer), restore_from=str(tmp_path / "plain"))
    assert report is not None
    assert "optimizer" in report.loaded


def test_a_bare_state_dict_loads_into_the_model_alone(tmp_path: Path) -> None:
    run = Run(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({f"module.{name}": tensor for name, tensor in run.model.state_dict().items()}, checkpoint_id=tmp_path)
    other = Run(2)
    before = copy.deepcopy(other.optimizer.state_dict())
    report = load(tmp_path / "ours", tmp_path, other, parts=["model"])
    assert report.loaded == ("model",)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor), name
    assert other.optimizer.state_dict() == before


# -- accelerate ----------------------------------------------------------------------------------------------------


def _save_as_accelerate(path: Path) -> dict[str, Any]:
    """What `Accelerator.save_state` does under FSDP2 with sharded state dicts, which it refuses on a CPU."""
    run = Run(1)
    run.train(3)
    weights, moments = get_state_dict(run.model, run.optimizer)
    for name, state in (
        (f"{FSDP_MODEL_NAME}_0", {"model": weights}),
        (f"{OPTIMIZER_NAME}_0", {"optimizer": moments}),
    ):
        (path / name).mkdir(parents=True, exist_ok=True)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path / name), planner=dcp.DefaultSavePlanner())
    save_accelerator_state(path, [], [], [run.scheduler], [], dist.get_rank(), 3, save_on_each_node=True)
    drawn = {"drawn": (random.random(), np.random.rand(), torch.rand(1).item())}
    return {**{key: value for key, value in run.everything().items() if not key.startswith("average:")}, **drawn}


def _load_from_accelerate(directory: Path, path: Path) -> tuple[dict[str, Any], Any]:
    run = Run(2)
    report = load(directory, path, run)
    drawn = {"drawn": (random.random(), np.random.rand(), torch.rand(1).item())}
    return {
        **{key: value for key, value in run.everything().items() if not key.startswith("average:")},
        **drawn,
    }, report


@pytest.mark.parametrize("readers", [1, 2])
def test_accelerates_directory_can_be_resumed_from(tmp_path: Path, readers: int) -> None:
    path = tmp_path / "checkpoint_0"
    saved = run_distributed(_save_as_accelerate, 2, path)
    for rank, (found, report) in enumerate(run_distributed(_load_from_accelerate, readers, tmp_path / "ours", path)):
        wanted = dict(saved[rank])
        if readers != 2:  # random numbers are derived again
            assert found.pop("drawn") != wanted.pop("drawn")
            assert any("random numbers are derived from step" in note for note in report.notes)
        assert_same(found, wanted)
        assert report.step == 0
        assert any("does not say after how many steps" in note for note in report.notes)
        assert {"model", "optimizer", "lr_scheduler", "rng"} <= set(report.loaded)


# -- refusals ------------------------------------------------------------------------------------------------------


def _refused(directory: Path, path: Path) -> str:
    run = Run(2)
    before = run.everything()
    with pytest.raises(CheckpointConfigError) as failure:
        load(directory, path, run, allow=False)
    assert_same(run.everything(), before)
    return str(failure.value)


def test_pickles_are_refused_without_permission_and_nothing_is_run(tmp_path: Path) -> None:
    plain, theirs = tmp_path / "plain", tmp_path / "theirs"
    run_distributed(_save_plainly, 2, plain, "nested")
    run_distributed(_save_as_accelerate, 2, theirs)
    for path in (plain, theirs):
        for text in run_distributed(_refused, 2, tmp_path / "ours", path):
            assert str(path) in text
            assert "checkpoint.allow_legacy_pickle_restore=true" in text
    (plain / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(CheckpointConfigError):
        load(tmp_path / "ours", plain, Run(2), allow=False)
    assert not (tmp_path / "ran").exists()


def test_damage_and_differences_are_named(tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    run_distributed(_save_plainly, 1, path, "nested")
    other = Run(2)
    other.model[2] = nn.Linear(7, 6)
    with pytest.raises(KeyMismatchError, match=r"2\.weight: F32 \[5, 7\] in the checkpoint, F32 \[6, 7\] in the model"):
        load(tmp_path / "ours", path, other, parts=["model"])
    file = next(path.glob("*.distcp"))
    data = file.read_bytes()
    file.unlink()
    with pytest.raises(CorruptCheckpointError, match=r"distcp.*missing"):
        load(tmp_path / "ours", path, Run(2))
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="distcp"):
        load(tmp_path / "ours", path, Run(2))
    file.write_bytes(data)
    (path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(CorruptCheckpointError, match=r"\.metadata: cannot be read"):
        load(tmp_path / "ours", path, Run(2))
