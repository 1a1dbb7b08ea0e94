"""What a run exports is a model: `transformers` opens it as it is, and finds the trained weights."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import hydra_ckpt.saving.outputs
from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig
from hydra_ckpt.saving.write_planning import PartLayout, consolidated_layout
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.testing import run_distributed
from hydra_ckpt.testing.processes import PATIENCE

transformers = pytest.importorskip("transformers")

SMALL_FILES = 40_000


def make_model(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **options,
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 7
    model.generation_config.eos_token_id = 1
    return model


def train(model: Any, steps: int, begin: Any = None) -> AppState:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    state = AppState(model, optimizer, tokenizer=tokenizer)
    for step in range(1, steps + 1):
        if begin is not None and step == 1:
            begin(state)
        ids = tokenizer(["to be or not to be", "that is the question"], padding=True, return_tensors="pt").input_ids
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return state


def whole(model: Any) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors[name] = tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()
    return tensors


def _small_layout(part: str, diffusers: bool, *, max_bytes: int) -> PartLayout:
    return replace(consolidated_layout(part, diffusers), max_bytes=max_bytes)


def _train_and_export(root: Path, name: str, max_bytes: int | None, dtype: torch.dtype, options: Any) -> Any:
    if max_bytes is not None:
        hydra_ckpt.saving.outputs.consolidated_layout = partial(_small_layout, max_bytes=max_bytes)
    model = make_model(**options).to(dtype)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    before = (copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.generation_config.to_dict()))
    config = CheckpointingConfig(checkpoint_dir=str(root / name), save_consolidated="always", is_async=True)
    with CheckpointCallback(config, every_n_steps=2) as callback:
        state = train(model, 3, callback.on_train_begin)
        callback.on_step_end(1)
        callback.on_step_end(2)
        callback.on_train_end()
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    ids = torch.tensor([[5, 7, 9, 11]])
    with torch.no_grad():
        logits = state.model(input_ids=ids).logits
    return whole(model), logits, before


def _open(export: Path) -> Any:
    tensors = transformers.AutoModelForCausalLM.from_pretrained(export, local_files_only=True, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(export, local_files_only=True)
    return tensors.eval(), tokenizer


def _check(export: Path, trained: Any, *, dtype: torch.dtype = torch.float32) -> Any:
    expected, logits, (config, generation) = trained
    model, tokenizer = _open(export)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name
    with torch.no_grad():
        again = model(input_ids=torch.tensor([[5, 7, 9, 11]])).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    text = tokenizer.decode(tokenizer("to be ü").input_ids, skip_special_tokens=True)
    assert text == "to be ü"
    assert model.generation_config.max_new_tokens == 7
    saved = json.loads((export / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert saved["dtype"] == str(dtype).removeprefix("torch.")
    assert {key: saved[key] for key in ("hidden_size", "vocab_size", "tie_word_embeddings")} == {
        key: config[key] for key in ("hidden_size", "vocab_size", "tie_word_embeddings")
    }
    assert json.loads((export / "generation_config.json").read_text())["eos_token_id"] == generation["eos_token_id"]
    return model


def _weight_files(export: Path) -> list[str]:
    return sorted(path.name for path in export.glob("*.safetensors"))


def _three_exports(root: Path) -> Any:
    float32, bfloat16 = torch.float32, torch.bfloat16
    found = {
        "one": _train_and_export(root, "one", None, float32, {}),
        "tied": _train_and_export(root, "tied", SMALL_FILES, float32, {"tie_word_embeddings": True}),
        "several": _train_and_export(root, "several", SMALL_FILES, bfloat16, {}),
    }
    return found if dist.get_rank() == 0 else None


def test_exports_of_sharded_training_open_in_transformers(tmp_path: Path) -> None:
    trained, _ = run_distributed(_three_exports, 2, tmp_path)
    exports = {name: tmp_path / name / "LATEST" / "model" / "consolidated" for name in trained}

    _check(exports["one"], trained["one"])
    assert _weight_files(exports["one"]) == ["model.safetensors"]
    assert not (exports["one"] / "model.safetensors.index.json").exists()

    tied = _check(exports["tied"], trained["tied"])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    several = _check(exports["several"], trained["several"], dtype=torch.bfloat16)
    assert several.lm_head.weight is not several.model.embed_tokens.weight
    for name in ("tied", "several"):
        files = _weight_files(exports[name])
        count = len(files)
        assert count > 1
        assert files == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        index = json.loads((exports[name] / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files)
        stored = {key for key in trained[name][0] if name != "tied" or key != "lm_head.weight"}
        assert set(index["weight_map"]) == stored
        itemsize = 2 if name == "several" else 4
        assert index["metadata"]["total_size"] == itemsize * sum(trained[name][0][key].numel() for key in stored)


PROGRAM = """
import sys, socket
def refuse(*_, **__): raise RuntimeError("no network here")
socket.getaddrinfo = refuse
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
out = model.generate(**tokenizer("to be", return_tensors="pt", add_special_tokens=False), do_sample=False)
assert out.shape[1] <= 5 + 7
assert "hydra_ckpt" not in sys.modules
print(tokenizer.decode(out[0]))
"""


def test_an_export_needs_neither_us_nor_a_network(tmp_path: Path) -> None:
    """Made by one process, after the last step was saved; opened by a program that knows nothing of this package."""
    model = make_model()
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path))
    with CheckpointCallback(config, every_n_steps=1) as callback:
        train(model, 2, callback.on_train_begin)
        callback.on_step_end(1)
        assert not Checkpoint.open(tmp_path / "LATEST").manifest.exports
        callback.on_train_end()
    checkpoint = Checkpoint.open(tmp_path / "LATEST")
    assert checkpoint.manifest.exports == {"model": "model/consolidated"}
    export = tmp_path / "LATEST" / "model" / "consolidated"
    # Small files are listed, and so verified, like the weights.
    listed = {Path(name).name for name in checkpoint.manifest.files if name.startswith("model/consolidated/")}
    assert listed == {path.name for path in export.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"} <= listed
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(export)],
        capture_output=True,
        text=True,
        timeout=100 * PATIENCE,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("to be")


def test_models_of_other_makers_are_exported_without_a_config(tmp_path: Path) -> None:
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), save_consolidated="always")
    with config.build(0, 0, 0) as engine:
        state = AppState({"gen": torch.nn.Linear(2, 2), "llama": make_model(tie_word_embeddings=True)})
        checkpoint = engine.save(state, step=1).result()
    assert checkpoint.manifest.exports == {
        "model/gen": "model/gen/consolidated",
        "model/llama": "model/llama/consolidated",
    }
    assert [path.name for path in (checkpoint.path / "model/gen/consolidated").iterdir()] == ["model.safetensors"]
    opened, expected = (
        transformers.LlamaForCausalLM.from_pretrained(checkpoint.path / "model/llama/consolidated"),
        state.models["llama"][0],
    )
    for name, tensor in expected.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor)
