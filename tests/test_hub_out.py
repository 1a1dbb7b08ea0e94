"""Exports are what `save_pretrained` writes: the same names, values and answers, from whole and from sharded models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.testing import run_distributed
from tests.hub_models import MODELS, logits, make

transformers = pytest.importorskip("transformers")


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def values(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in model.state_dict().items():
        found[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    return found


def shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    for name in outer:
        for layer in model.get_submodule(name):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model: Any) -> AppState:
    """A step, so that there is an optimizer's state too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return AppState(model, optimizer)


def disturb(state: AppState) -> None:
    with torch.no_grad():
        for parameter in state.models[""][0].parameters():
            parameter.zero_()


def export_and_resume(root: Path, name: str) -> dict[str, torch.Tensor]:
    """Save with an export, load it back into a model without weights; returns what was trained."""
    model = make(name)
    if dist.is_initialized():
        model = shard(model)
    state = trained(model)
    config = CheckpointingConfig(checkpoint_dir=str(root / name), save_consolidated="always", is_async=True)
    with config.build(0, 0, 0) as engine:
        engine.save(state, step=1).result()
        before = values(model)
        disturb(state)
        assert engine.load(state).step == 1
        after = values(model)
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor), key
        return before


def check(root: Path, name: str, expected: dict[str, torch.Tensor]) -> None:
    model = make(name)
    model.load_state_dict(expected)
    answer = logits(name, model)
    reference = root / f"{name}-reference"
    model.save_pretrained(reference)
    checkpoint = Checkpoint.open(root / name / "LATEST")
    export = checkpoint.path / "model" / "consolidated"
    found, saved = tensors_in(export), tensors_in(reference)
    assert found.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(found[key], tensor), key
        assert found[key].dtype == tensor.dtype
    # The export is the only copy of the weights.
    assert all(file.startswith("model/consolidated/") for file in checkpoint.manifest.parts["model"].files)
    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (export, reference))
    assert ours == theirs
    opened = type(model).from_pretrained(export, local_files_only=True).eval()
    again = opened.state_dict()
    for key, tensor in expected.items():
        assert torch.equal(again[key], tensor), key
    assert torch.equal(logits(name, opened), answer)


@pytest.mark.parametrize("name", list(MODELS))
def test_an_export_of_one_process_is_what_save_pretrained_writes(tmp_path: Path, name: str) -> None:
    check(tmp_path, name, export_and_resume(tmp_path, name))


def _all_models(root: Path) -> Any:
    found = {name: export_and_resume(root, name) for name in MODELS}
    return found if dist.get_rank() == 0 else None


def test_exports_of_sharded_models_are_what_save_pretrained_writes(tmp_path: Path) -> None:
    everything, _ = run_distributed(_all_models, 2, tmp_path)
    for name, expected in everything.items():
        check(tmp_path, name, expected)
