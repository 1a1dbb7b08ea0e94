"""Adapters: what peft loads, and what training goes on from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.hub.merging import merge_adapter
from hydra_ckpt.storage.header import read_tensors
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.testing import run_distributed
from tests.hub_models import MODELS, llama, make

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj"]


def _config(kind: str) -> Any:
    if kind == "dora":
        return peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True)
    if kind == "rslora":
        return peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True, task_type="CAUSAL_LM")
    if kind == "ia3":
        return peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    if kind == "saved":
        return peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    if kind == "head":
        return peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    return peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")


KINDS = ["lora", "dora", "rslora", "ia3", "saved", "head"]


def base_name(kind: str) -> str:
    return "bert" if kind == "head" else "llama"


def adapted(kind: str) -> Any:
    model = make(base_name(kind))
    torch.manual_seed(5)
    return peft.get_peft_model(model, _config(kind))


def parallel(model: Any, mode: str) -> Any:
    if mode == "ddp":
        return DistributedDataParallel(model)
    if mode == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        inner = model.get_base_model()
        for layer in inner.bert.encoder.layer if hasattr(inner, "bert") else inner.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def state_of(model: Any) -> AppState:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return AppState(model, torch.optim.AdamW(trained, lr=0.05))


def train(state: AppState, steps: int) -> None:
    model, [optimizer] = state.models[""][0], state.optimizers
    ids = torch.tensor([[5, 7, 9, 11, 3]])
    model.train()
    for _ in range(steps):
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([[5, 7, 9, 11, 3]])).logits


def _run(root: Path, kind: str, mode: str) -> torch.Tensor:
    """Train, save, train on; resume elsewhere, train on to the same answers."""
    options = {"checkpoint_dir": str(root / f"{mode}-{kind}"), "is_peft": True, "is_async": True}
    state = state_of(parallel(adapted(kind), mode))
    train(state, 2)
    with CheckpointingConfig(**options).build(0, 0, 0) as engine:
        engine.save(state, step=2).result()
    saved = answer(state.model)
    train(state, 2)
    resumed = state_of(parallel(adapted(kind), mode))
    train(resumed, 1)
    with CheckpointingConfig(**options).build(0, 0, 0) as engine:
        assert engine.load(resumed).step == 2
    assert torch.equal(answer(resumed.model), saved)
    train(resumed, 2)
    assert torch.equal(answer(resumed.model), answer(state.model))
    return saved


def check(root: Path, kind: str, mode: str, expected: torch.Tensor) -> None:
    checkpoint = Checkpoint.open(root / f"{mode}-{kind}" / "LATEST")
    export = checkpoint.path / "model" / "consolidated"
    assert {path.name for path in export.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    # The same tensors and settings as peft's own.
    reference = root / "reference" / f"{mode}-{kind}"
    adapted(kind).save_pretrained(reference)
    found, theirs = (load_file(place / "adapter_model.safetensors") for place in (export, reference))
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in theirs.items()}
    ours, settings = (json.loads((place / "adapter_config.json").read_text()) for place in (export, reference))
    for listed in ("target_modules", "feedforward_modules"):
        if listed in ours:
            ours[listed], settings[listed] = sorted(ours[listed]), sorted(settings[listed])
    assert ours == settings
    optimized = read_tensors(checkpoint.path, list(checkpoint.manifest.parts["optim"].files))
    assert optimized
    assert not any(".base_layer." in name or "original_module" in name for name in optimized)
    assert sum(tensor.numel() for tensor in found.values()) < sum(p.numel() for p in adapted(kind).parameters()) / 2
    opened = peft.PeftModel.from_pretrained(make(base_name(kind)), export)
    torch.testing.assert_close(answer(opened), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_one_process(tmp_path: Path, kind: str) -> None:
    check(tmp_path, kind, "none", _run(tmp_path, kind, "none"))


def _all_kinds(root: Path, mode: str) -> Any:
    found = {kind: _run(root, kind, mode) for kind in KINDS}
    return found if dist.get_rank() == 0 else None


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_adapters_of_two_ranks(tmp_path: Path, mode: str) -> None:
    found, _ = run_distributed(_all_kinds, 2, tmp_path, mode)
    for kind, expected in found.items():
        check(tmp_path, kind, mode, expected)


def test_an_embedding_trained_beside_the_adapter_is_saved_with_it(tmp_path: Path) -> None:
    model = adapted("lora")
    embedding = model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        embedding.add_(1)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        checkpoint = engine.save(AppState(model), step=1).result()
    opened = peft.PeftModel.from_pretrained(make("llama"), checkpoint.path / "model" / "consolidated")
    assert torch.equal(opened.get_base_model().get_input_embeddings().weight, embedding)
    torch.testing.assert_close(answer(opened), answer(model), rtol=0, atol=2e-6)


def _with_new_tokens(base: Path) -> Any:
    """An adapter over a model of which the vocabulary has grown since it was saved, its embeddings frozen."""
    model = type(MODELS["llama"]()).from_pretrained(base)
    model.resize_token_embeddings(100)
    return peft.get_peft_model(model, _config("lora"))


def test_embeddings_of_a_resized_vocabulary_are_saved_with_the_adapter(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    state = state_of(_with_new_tokens(tmp_path / "base"))
    train(state, 1)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        export = engine.save(state, step=1).result().path / "model" / "consolidated"
        other = state_of(_with_new_tokens(tmp_path / "base"))  # its new rows are others
        assert engine.load(other).step == 1
    assert torch.equal(answer(other.model), answer(state.model))
    state.models[""][0].save_pretrained(tmp_path / "reference")
    found, theirs = (load_file(place / "adapter_model.safetensors") for place in (export, tmp_path / "reference"))
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())
    merge_adapter(export, tmp_path / "merged", base=None, dtype=None, max_file_bytes=1 << 30)
    merged = type(MODELS["llama"]()).from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 100
    torch.testing.assert_close(answer(merged), answer(state.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["norms", "prompts"])
def test_what_is_trained_beside_an_adapter_is_refused(tmp_path: Path, what: str) -> None:
    if what == "norms":
        model = adapted("lora")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    else:
        model = peft.get_peft_model(make("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), is_peft=True)
    with config.build(0, 0, 0) as engine:
        message = "norm" if what == "norms" else "prompt_encoder"
        with pytest.raises(CheckpointConfigError, match=rf"{message}.*: trained, but in no adapter's files"):
            engine.save(state_of(model), step=1)
        engine.save(state_of(adapted("lora")), step=1)


def test_shared_projections_are_saved_once_and_open(tmp_path: Path) -> None:
    def vera() -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(make("llama"), peft.VeraConfig(target_modules=["q_proj", "v_proj"], r=4))

    model = vera()
    state = state_of(model)
    train(state, 2)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path), is_peft=True).build(0, 0, 0) as engine:
        checkpoint = engine.save(state, step=1).result()
        again = vera()
        engine.load(state_of(again))
    opened = peft.PeftModel.from_pretrained(make("llama"), checkpoint.path / "model" / "consolidated")
    assert torch.equal(answer(again), answer(model))
    assert torch.equal(answer(opened), answer(model))


def test_several_adapters_each_have_a_directory_of_their_own(tmp_path: Path) -> None:
    def build() -> Any:
        model = adapted("lora")
        torch.manual_seed(6)
        model.add_adapter("poet", peft.LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
        return model

    def trained(model: Any, value: float) -> AppState:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(value)
        return AppState(model, torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n]))

    state = trained(build(), 0.03)
    options = {"checkpoint_dir": str(tmp_path / "run"), "is_peft": True}
    with CheckpointingConfig(**options).build(0, 0, 0) as engine:
        checkpoint = engine.save(state, step=1).result()
    assert checkpoint.manifest.exports == {"model": "model/consolidated", "model/poet": "model/poet/consolidated"}
    opened = peft.PeftModel.from_pretrained(make("llama"), checkpoint.path / "model" / "consolidated")
    opened.load_adapter(checkpoint.path / "model" / "poet" / "consolidated", adapter_name="poet")
    again = trained(build(), -1.0)
    with CheckpointingConfig(**options).build(0, 0, 0) as engine:
        engine.load(again)
    for name in ("default", "poet"):
        for model in (opened, again.model, state.model):
            model.set_adapter(name)
        assert torch.equal(answer(again.model), answer(state.model))
        torch.testing.assert_close(answer(opened), answer(state.model), rtol=0, atol=2e-6)
    bad = adapted("lora")
    bad.add_adapter("my poet", _config("lora"))
    with CheckpointingConfig(**options).build(0, 0, 0) as engine, pytest.raises(CheckpointConfigError, match="my poet"):
        engine.save(AppState(bad), step=2)


# Pipeline rank to its parts, and each part's layers.
STAGES = [[(0,), (2,)], [(1,), (3,)]]


def _deep() -> Any:
    torch.manual_seed(0)
    model = llama(num_hidden_layers=4)
    torch.manual_seed(5)
    adapter = peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, adapter)


def _part(layers: tuple[int, ...]) -> Any:
    """A model with only some of its layers, the embedding with the first and the head with the last."""
    model = _deep()
    inner = model.get_base_model()
    inner.model.layers = torch.nn.ModuleDict({str(index): inner.model.layers[index] for index in layers})
    if 0 not in layers:
        inner.model.embed_tokens = None
    if 3 not in layers:
        inner.model.norm = inner.lm_head = None
    return model


def _step(parts: list[Any], fill: float) -> AppState:
    """One optimizer step with gradients that depend on a parameter's place only."""
    trained = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    state = AppState(parts, torch.optim.AdamW(trained, lr=0.05))
    _step_again(state, fill)
    return state


def _step_again(state: AppState, fill: float) -> None:
    for group in state.optimizers[0].param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.linspace(-fill, fill, parameter.numel()).reshape(parameter.shape)
    state.optimizers[0].step()


def _trained_values(parts: list[Any]) -> dict[str, torch.Tensor]:
    found = {name: p.detach() for part in parts for name, p in part.named_parameters() if p.requires_grad}
    assert found
    return found


def _staged_adapters(root: Path) -> None:
    rank = dist.get_rank()
    options = {"checkpoint_dir": str(root / "run"), "is_peft": True, "is_async": True}
    state = _step([_part(layers) for layers in STAGES[rank]], 1.0)
    with CheckpointingConfig(**options).build(0, 0, rank) as engine:
        engine.save(state, step=1).result()
        again = _step([_part(layers) for layers in STAGES[rank]], -2.0)
        assert engine.load(again).step == 1
    expected = _trained_values(state.models[""])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _trained_values(again.models[""]).items())


def test_an_adapter_is_gathered_across_pipeline_stages(tmp_path: Path) -> None:
    run_distributed(_staged_adapters, 2, tmp_path)
    whole = _step([_deep()], 1.0)
    export = Checkpoint.open(tmp_path / "run" / "LATEST").path / "model" / "consolidated"
    whole.models[""][0].save_pretrained(tmp_path / "reference")
    found, theirs = (load_file(p / "adapter_model.safetensors") for p in (export, tmp_path / "reference"))
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())
    torch.manual_seed(0)
    opened = peft.PeftModel.from_pretrained(llama(num_hidden_layers=4), export)
    torch.testing.assert_close(answer(opened), answer(whole.models[""][0]), rtol=0, atol=2e-6)
    # One process goes on from what two stages saved, optimizer included.
    again = _step([_deep()], -2.0)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        assert engine.load(again).step == 1
    for state in (whole, again):
        _step_again(state, 0.5)
    assert torch.equal(answer(again.models[""][0]), answer(whole.models[""][0]))


def test_export_merges_an_adapter_into_its_base_model(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    base = type(MODELS["llama"]()).from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, _config("saved"))
    state = state_of(model)
    train(state, 2)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        checkpoint = engine.save(state, step=2).result()
    config = json.loads((checkpoint.path / "model/consolidated/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(checkpoint.path / "model" / "consolidated")
    torch.testing.assert_close(answer(automatic), answer(state.model), rtol=0, atol=2e-6)
    command = [
        sys.executable,
        "-m",
        "hydra_ckpt.cli",
        "export",
        str(tmp_path / "run"),
        str(tmp_path / "out"),
        "--merge",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    opened = type(base).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(answer(opened), answer(state.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [None, "org/elsewhere"])
def test_an_adapter_without_its_base_model_is_not_merged(tmp_path: Path, name: str | None) -> None:
    model = adapted("lora")
    model.peft_config["default"].base_model_name_or_path = name
    model.get_base_model().name_or_path = ""
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        engine.save(AppState(model), step=1).result()
    command = [
        sys.executable,
        "-m",
        "hydra_ckpt.cli",
        "export",
        str(tmp_path / "run"),
        str(tmp_path / "out"),
        "--merge",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2
    assert ("name it with --base" if name is None else "org/elsewhere is not on this machine") in done.stderr
    assert not (tmp_path / "out").exists()
