"""Exports that diffusers opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.hub.offline import export_checkpoint
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.testing import run_distributed

diffusers = pytest.importorskip("diffusers")


def tiny_unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).eval()


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8), 3).sample


def save(root: Path, model: Any) -> Checkpoint:
    options = {"save_consolidated": "always", "diffusers_compatible": True}
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(0, 0, 0) as engine:
        return engine.save(AppState(model), step=1).result()


def check(directory: Path, model: Any) -> None:
    opened = diffusers.UNet2DModel.from_pretrained(directory, local_files_only=True).eval()
    tiny_unet().save_pretrained(directory.parent / "reference")
    ours, theirs = (
        json.loads((place / "config.json").read_text()) for place in (directory, directory.parent / "reference")
    )
    assert ours == theirs
    live = model.state_dict()
    assert all(torch.equal(tensor, live[name]) for name, tensor in opened.state_dict().items())
    assert torch.equal(answer(opened), answer(model))


def test_diffusers_opens_an_export_of_one_file_and_of_several(tmp_path: Path) -> None:
    model = tiny_unet()
    checkpoint = save(tmp_path / "run", model)
    check(checkpoint.path / "model" / "consolidated", model)
    several = export_checkpoint(checkpoint, tmp_path / "several", max_file_bytes=100_000)
    assert len(several.files) > 1
    assert (several.path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    check(several.path, model)


def _sharded(root: Path) -> None:
    model = tiny_unet()  # fully_shard makes it an FSDPUNet2DModel
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [*model.down_blocks, *model.up_blocks]:
        fully_shard(block, mesh=mesh)
    export = save(root / "run", fully_shard(model, mesh=mesh)).path / "model" / "consolidated"
    with torch.device("meta"):
        fresh = tiny_unet()
    fully_shard(fresh, mesh=mesh)
    with CheckpointingConfig(enabled=False, model_repo_id=str(export)).build(0, 0, 0) as engine:
        assert not engine.load_base_model(fresh).unexpected
    live = dict(model.named_parameters())
    assert all(torch.equal(item.to_local(), live[name].to_local()) for name, item in fresh.named_parameters())


def test_a_sharded_model_is_exported_under_its_own_class_and_loaded_again(tmp_path: Path) -> None:
    run_distributed(_sharded, 2, tmp_path)
    check(tmp_path / "run" / "LATEST" / "model" / "consolidated", tiny_unet())
