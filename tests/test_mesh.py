"""Checkpoints of any device mesh load on any other, exactly, each rank reading only what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.testing import run_distributed
from tests.meshes import MESHES, Place, Run, place, values

FOUR = ("one", "ddp2", "fsdp2", "fsdp4", "hsdp2x2", "tp2", "fsdp2_tp2")


def _matrix(root: Path, names: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Save on every mesh, then load every checkpoint on every mesh; what was found, by (saved, loaded)."""
    found: dict[str, Any] = {}
    places = {name: place(name) for name in names}
    for name, here in places.items():
        if here.group is not None:
            run = Run(here)
            with here.build(root / name, **options) as engine:
                engine.save(run.state, step=3).result()
                found[f"{name} writes"] = engine.stats.written_bytes
        dist.barrier()
    for name, here in places.items():
        if here.group is not None:
            found.update(_load_all(root, here, names, options))
        dist.barrier()
    return found


def _load_all(root: Path, here: Place, names: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    found = {}
    run = Run(here)
    fresh = Run(here, trained=False)
    for saved in names:
        for run_ in (run, fresh):
            run_.fill("wrong")
            with here.build(root / f"to-{here.name}", restore_from=str(root / saved / "LATEST"), **options) as engine:
                report = engine.load(run_.state)
            assert report is not None
            found[f"{saved} on {here.name}{'' if run_ is run else ', fresh'}"] = {
                "wrong": run_.wrong(),
                "read": report.read_bytes,
                "needed": run_.local_nbytes(),
            }
    return found


@pytest.mark.parametrize("options", [{}], ids=["safetensors"])
def test_any_mesh_loads_on_any_other(tmp_path: Path, options: dict[str, Any]) -> None:
    results = run_distributed(_matrix, 4, tmp_path, FOUR, options)
    checked = 0
    for found in results:
        for what, result in found.items():
            if "writes" not in what:
                assert result["wrong"] == [], what
                checked += 1
    print(checked, results[3]["one on fsdp2"])
