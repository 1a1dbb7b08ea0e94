"""A run that was killed continues exactly where an uninterrupted one would be."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hydra_ckpt.testing import RankFailedError, run_distributed
from tests.training import Run

MODES = [
    {"is_async": False},
    {"is_async": True},
    {"is_async": True, "save_consolidated": "always"},
    {"is_async": True, "model_save_format": "torch_save"},
]


def _uninterrupted(directory: Path, parallel: str, options: dict[str, Any], until: int) -> dict[str, str]:
    return Run(directory, parallel, options).train(until)


def _killed(directory: Path, parallel: str, options: dict[str, Any]) -> None:
    def die(step: int, callback: Any) -> None:
        # In the middle of an epoch, two steps past the last save, which is published by then.
        if step == 8:
            callback.checkpointer.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    Run(directory, parallel, options).train(20, after_step=die)


@pytest.mark.parametrize("options", MODES, ids=["sync", "async", "async-always", "torch_save"])
@pytest.mark.parametrize(("parallel", "world"), [("none", 1), ("ddp", 2), ("fsdp", 2)], ids=["1", "ddp2", "fsdp2"])
def test_resumes_bitwise_after_sigkill(tmp_path: Path, parallel: str, world: int, options: dict[str, Any]) -> None:
    expected = run_distributed(_uninterrupted, world, tmp_path / "whole", parallel, options, 13)
    with pytest.raises(RankFailedError) as failure:
        run_distributed(_killed, world, tmp_path / "killed", parallel, options)
    assert all("exit code -9" in text for text in failure.value.failures.values())
    assert (tmp_path / "killed" / "LATEST").readlink().name.endswith("_step_6")
    resumed = run_distributed(_uninterrupted, world, tmp_path / "killed", parallel, options, 13)
    assert resumed == expected


SECOND_ROADS = [
    {"single_rank_consolidation": True},
    {"staging_dir": "staging", "save_consolidated": "always", "is_async": True},
    {"shared_writes": False, "save_consolidated": "always"},
]


def _export_and_resume(directory: Path, options: dict[str, Any]) -> tuple[bool, dict[str, str], dict[str, str]]:
    run = Run(directory, "fsdp", options, workers=0)
    before = run.train(7)
    weights = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in run.model.state_dict().items()
    }
    exported = load_file(directory / "LATEST" / "model" / "consolidated" / "model.safetensors")
    same = set(exported) == set(weights)
    if dist.get_rank() == 0:  # buffers differ between ranks; the export has rank 0's
        same = same and all(torch.equal(exported[name], weights[name]) for name in weights)
    again = Run(directory, "fsdp", options, workers=0)
    again.train(7)
    return same, before, again.digests()


@pytest.mark.parametrize("options", SECOND_ROADS, ids=["single-rank", "staging-dir", "no-shared-writes"])
def test_merged_exports_are_the_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    if "staging_dir" in options:
        options = {**options, "staging_dir": str(tmp_path / "staging")}
    for same, before, after in run_distributed(_export_and_resume, 2, tmp_path / "run", options):
        assert same
        assert {key: before[key] for key in ("model", "optimizer", "ema")} == {
            key: after[key] for key in ("model", "optimizer", "ema")
        }
    if "staging_dir" in options:
        assert not list((tmp_path / "staging").iterdir())
