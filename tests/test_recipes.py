"""Every recipe of the training application as a real run: all ranks are killed, and it resumes to the same end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hydra_ckpt.testing.processes import PATIENCE
from tests.programs import Program, ranks

REPOSITORY = Path(__file__).resolve().parents[1]
RANKS = {"pretrain": 1, "finetune": 2, "lora": 2, "moe": 2, "tp_fsdp": 4, "pipeline": 2}
FAST = ("pipeline",)
SMALL = (
    *(
        "model.hidden_size=48",
        "model.intermediate_size=64",
        "model.num_attention_heads=4",
        "model.num_key_value_heads=2",
    ),
    *("data.max_bytes=100000", "data.seq_len=32", "trainer.batch_size=4", "trainer.grad_accumulation=2"),
    *("trainer.log_every=10", "trainer.validate_every=10", "trainer.validate_batches=1", "trainer.max_steps=40"),
    "callbacks.checkpoint.every_n_steps=4",
)


def start(recipe: str, directory: Path, run_name: str, *overrides: str) -> list[Program]:
    """All ranks of a run; tests/test_launch.py starts some with torchrun."""
    arguments = [f"experiment=hydra_ckpt_{recipe}", f"run_name={run_name}", *SMALL, *overrides]
    return ranks(
        [sys.executable, "-m", "hydra_ckpt.recipe", *arguments],
        RANKS[recipe],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(programs: list[Program]) -> str:
    """What rank 0 has printed."""
    outputs = [program.communicate(timeout=240)[0] for program in programs]
    assert [program.returncode for program in programs] == [0] * len(programs), "\n".join(outputs)
    return outputs[0]


def kill_once_saved(programs: list[Program], checkpoints: Path) -> None:
    """SIGKILL to all ranks, as soon as two checkpoints are there."""
    deadline = time.monotonic() + 120 * PATIENCE
    while len(list(checkpoints.glob("epoch_*"))) < 2:
        assert all(program.poll() is None for program in programs), programs[0].communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    for program in programs:
        program.kill()
    for program in programs:
        program.communicate(timeout=60)


def last(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's last checkpoint: model, optimizer, and everything else in safetensors files."""
    checkpoint = (directory / "checkpoints" / "LATEST").resolve()
    assert checkpoint.name.endswith("_step_40")
    found = {}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        found |= {f"{file.relative_to(checkpoint)}:{name}": tensor for name, tensor in load_file(file).items()}
    return found


@pytest.mark.parametrize(
    "recipe", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RANKS]
)
def test_a_recipe_that_is_killed_continues_to_the_same_bits(tmp_path: Path, recipe: str) -> None:
    runs = tmp_path / "outputs" / "hydra_ckpt"
    overrides: tuple[str, ...] = ()
    if recipe in ("finetune", "lora"):
        finished(start("pretrain", tmp_path, "base", "trainer.max_steps=4"))
        overrides = (f"model.pretrained={runs}/base/checkpoints/LATEST/model/consolidated",)
    finished(start(recipe, tmp_path, "whole", *overrides))
    kill_once_saved(start(recipe, tmp_path, "killed", *overrides), runs / "killed" / "checkpoints")
    assert "loaded " in finished(start(recipe, tmp_path, "killed", *overrides))
    whole, killed = last(runs / "whole"), last(runs / "killed")
    assert whole.keys() == killed.keys()
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, killed[name])] == []
    opens_in_transformers(recipe, runs / "killed" / "checkpoints" / "LATEST" / "model" / "consolidated")


def opens_in_transformers(recipe: str, export: Path) -> None:
    if recipe == "lora":
        assert (export / "adapter_model.safetensors").is_file()
        return
    model: Any = AutoModelForCausalLM.from_pretrained(export)
    assert type(model).__name__ == ("MixtralForCausalLM" if recipe == "moe" else "LlamaForCausalLM")


def test_a_model_to_start_from_has_to_be_given(tmp_path: Path) -> None:
    programs = start("finetune", tmp_path, "none", "mesh.dp_shard=1")
    output, _ = programs[0].communicate(timeout=120)
    for program in programs:
        program.communicate(timeout=120)
        assert program.returncode == 1
    assert "model.pretrained must be set: a directory" in output
