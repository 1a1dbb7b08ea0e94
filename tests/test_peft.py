"""Adapters: what peft loads, and what training resumes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DistributedDataParallel

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.errors import (
    CheckpointConfigError,
)
from hydra_ckpt.hub.merging import merge_adapter
from hydra_ckpt.state.wrappers import unwrap
from hydra_ckpt.storage.header import read_tensors
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.testing import run_distributed
from tests.hub_models import MODELS, llama, make

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj"]


def adapter_config(kind: str) -> Any:
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
    return peft.get_peft_model(model, adapter_config(kind))


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


@pytest.mark.parametrize("mode", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
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
    return peft.get_peft_model(model, adapter_config("lora"))


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
    merge_adapter(Checkpoint.open(tmp_path / "run" / "LATEST"), tmp_path / "merged")
    merged = type(MODELS["llama"]()).from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 100
    torch.testing.assert_close(answer(merged), answer(state.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("norms", "norm.*: trained, but in no adapter's files"),
        ("prompts", "prompt_embeddings: peft computes these when it saves the adapter 'default'"),
    ],
)
def test_what_an_adapter_s_files_cannot_hold_is_refused(tmp_path: Path, what: str, message: str) -> None:
    if what == "norms":
        model = adapted("lora")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    else:
        model = peft.get_peft_model(make("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), is_peft=True)
    with config.build(0, 0, 0) as engine:
        with pytest.raises(CheckpointConfigError, match=message):
            engine.save(state_of(model), step=1)
        engine.save(state_of(adapted("lora")), step=1)


def _saved(state: AppState, root: Path) -> tuple[Path, Path]:
    """The directories of our adapters and of peft's, which hold the same tensors."""
    model = unwrap(state.models[""][0])
    with CheckpointingConfig(checkpoint_dir=str(root / "run"), is_peft=True).build(0, 0, 0) as engine:
        ours = engine.save(state, step=1).result().path / "model"
    model.save_pretrained(root / "reference")
    return ours / "consolidated", root / "reference"


def assert_same_files(ours: Path, theirs: Path) -> None:
    found, wanted = (load_file(place / "adapter_model.safetensors") for place in (ours, theirs))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_tied_modules_to_save_are_written_under_each_name_as_peft_does(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS, modules_to_save=["lm_head"], ensure_weight_tying=True, task_type="CAUSAL_LM"
    )
    state = state_of(peft.get_peft_model(make("qwen3"), config))
    train(state, 2)
    ours, theirs = _saved(state, tmp_path)
    assert_same_files(ours, theirs)
    opened = peft.PeftModel.from_pretrained(make("qwen3"), ours)
    torch.testing.assert_close(answer(opened), answer(state.model), rtol=0, atol=2e-6)
    other = state_of(peft.get_peft_model(make("qwen3"), config))
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        assert engine.load(other).step == 1
    assert torch.equal(answer(other.model), answer(state.model))


@pytest.mark.parametrize("wrapper", ["checkpointed", "compiled"])
def test_layers_in_wrappers_are_saved_under_peft_s_names(tmp_path: Path, wrapper: str) -> None:
    model = adapted("saved")
    layers = model.get_base_model().model.layers
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer) if wrapper == "checkpointed" else torch.compile(layer)
    state = state_of(model)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        export = engine.save(state, step=1).result().path / "model" / "consolidated"
    adapted("saved").save_pretrained(tmp_path / "reference")  # peft itself cannot save a model with wrappers
    assert_same_files(export, tmp_path / "reference")


def test_an_adapter_that_is_not_active_takes_nothing_of_the_active_one_s(tmp_path: Path) -> None:
    model = peft.get_peft_model(make("llama"), adapter_config("saved"), "policy")
    model.add_adapter("reference-1", adapter_config("saved"))
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        export = engine.save(state_of(model), step=1).result().path / "model"
    model.save_pretrained(tmp_path / "theirs")
    for name, place in (("policy", "consolidated"), ("reference-1", "reference-1/consolidated")):
        assert_same_files(export / place, tmp_path / "theirs" / name)


def test_ranks_that_adalora_has_pruned_are_kept_as_zeros(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, total_step=12, tinit=2, tfinal=2, deltaT=1, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    state = state_of(peft.get_peft_model(make("llama"), config))
    model = state.models[""][0]
    options = {"checkpoint_dir": str(tmp_path / "run"), "is_peft": True}
    with CheckpointingConfig(**options).build(0, 0, 0) as engine:
        for step in range(1, 12):
            model(input_ids=torch.tensor([[5, 7, 9, 11, 3]])).logits.square().mean().backward()
            state.optimizers[0].step()
            model.base_model.update_and_allocate(step)
            state.optimizers[0].zero_grad()
            if step in (1, 11):
                checkpoint = engine.save(state, step=step).result()
    assert model.peft_config["default"].rank_pattern
    with torch.no_grad():
        expected = answer(model)
    opened = peft.PeftModel.from_pretrained(make("llama"), checkpoint.path / "model" / "consolidated")
    torch.testing.assert_close(answer(opened), expected, rtol=0, atol=2e-6)
    resumed = state_of(peft.get_peft_model(make("llama"), config))
    with CheckpointingConfig(**options).build(0, 0, 0) as engine:
        assert engine.load(resumed).step == 11
    assert torch.equal(answer(resumed.model), expected)


class Normed(nn.Module):
    """A base model whose buffers change while its adapter is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(data)))


def _normed() -> AppState:
    torch.manual_seed(0)
    return state_of(peft.get_peft_model(Normed(), peft.LoraConfig(r=2, target_modules=["first"])))


def _statistics(root: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Running statistics of each rank, before and after they are resumed."""
    state, rank = _normed(), dist.get_rank()
    state.model(torch.randn(16, 4, generator=torch.Generator().manual_seed(rank)) + rank)
    resumed = _normed()
    with CheckpointingConfig(checkpoint_dir=str(root / "run"), is_peft=True).build(rank, 0, 0) as engine:
        engine.save(state, step=1).result()
        engine.load(resumed)
    found = [dict(each.model.named_buffers()) for each in (state, resumed)]
    return [[each[name] for name in sorted(each) if "running" in name] for each in found]


def test_statistics_of_a_frozen_base_model_are_resumed(tmp_path: Path) -> None:
    everything = run_distributed(_statistics, 2, tmp_path)
    for before, after in everything:
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    alone = _normed()  # on another number of ranks they are rank 0's
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        assert engine.load(alone).step == 1
    buffers = dict(alone.model.named_buffers())
    found = [buffers[name] for name in sorted(buffers) if "running" in name]
    assert all(torch.equal(a, b) for a, b in zip(found, everything[0][0], strict=True))


def _token_rows(root: Path) -> Any:
    """Rows of an embedding that are trained, the embedding being sharded."""
    config = peft.LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[3, 5], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = parallel(peft.get_peft_model(make("llama"), config), "fsdp")
    state = state_of(model)
    train(state, 1)
    with CheckpointingConfig(checkpoint_dir=str(root / "run"), is_peft=True).build(dist.get_rank(), 0, 0) as engine:
        export = engine.save(state, step=1).result().path / "model" / "consolidated"
    return str(export), answer(model)


def test_trained_rows_of_a_sharded_embedding_are_saved(tmp_path: Path) -> None:
    (export, expected), _ = run_distributed(_token_rows, 2, tmp_path)
    opened = peft.PeftModel.from_pretrained(make("llama"), export)
    torch.testing.assert_close(answer(opened), expected, rtol=0, atol=2e-6)


def _distributed_statistics(root: Path) -> None:
    """Buffers of the base model that are DTensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = peft.get_peft_model(Normed(), peft.LoraConfig(r=2, target_modules=["first"]))
        models.append(distribute_module(model, mesh))
    with torch.no_grad():
        models[0].get_base_model().norm.running_mean.add_(3)
    with CheckpointingConfig(checkpoint_dir=str(root), is_peft=True).build(dist.get_rank(), 0, 0) as engine:
        engine.save(AppState(models[0]), step=1).result()
        engine.load(AppState(models[1]))
    found, wanted = (model.get_base_model().norm.running_mean.full_tensor() for model in models[::-1])
    assert torch.equal(found, wanted)


def test_distributed_buffers_of_a_base_model_are_resumed(tmp_path: Path) -> None:
    run_distributed(_distributed_statistics, 2, tmp_path)


def test_what_was_known_of_a_vocabulary_does_not_depend_on_the_files_of_the_base_model(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    state = state_of(_with_new_tokens(tmp_path / "base"))
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        first = engine.save(state, step=1).result()
        (tmp_path / "base").rename(tmp_path / "moved")
        state.models[""][0].add_adapter("other", adapter_config("lora"))
        second = engine.save(state, step=2).result()
    name = "base_model.model.model.embed_tokens.weight"
    for checkpoint in (first, second):
        assert name in load_file(checkpoint.path / "model" / "consolidated" / "adapter_model.safetensors")


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
    bad.add_adapter("my poet", adapter_config("lora"))
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
    # One process resumes from what two stages saved, optimizer included.
    again = _step([_deep()], -2.0)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        assert engine.load(again).step == 1
    for state in (whole, again):
        _step_again(state, 0.5)
    assert torch.equal(answer(again.models[""][0]), answer(whole.models[""][0]))


def saved_adapter(root: Path, model: Any, base: Path | str | None = None) -> Checkpoint:
    """A checkpoint of a trained adapter."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    if base is not None:
        model.peft_config["default"].base_model_name_or_path = str(base)
    with CheckpointingConfig(checkpoint_dir=str(root / "run"), is_peft=True).build(0, 0, 0) as engine:
        return engine.save(AppState(model), step=1).result()


def saved_base(root: Path, name: str = "llama", **options: Any) -> Path:
    torch.manual_seed(0)
    (llama(**options) if options else make(name)).save_pretrained(root / "base")
    return root / "base"


# -- other settings, other ways ------------------------------------------------------------------------------------


def test_settings_that_give_saved_weights_another_meaning_are_told(tmp_path: Path) -> None:
    checkpoint = saved_adapter(tmp_path, adapted("lora"))
    config = peft.LoraConfig(r=4, lora_alpha=64, use_rslora=True, target_modules=TARGETS, task_type="CAUSAL_LM")
    other = peft.get_peft_model(make("llama"), config)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        same = engine.load(AppState(adapted("lora")), restore_from=str(checkpoint.path))
        report = engine.load(AppState(other), restore_from=str(checkpoint.path))
    assert not [note for note in same.notes if "settings" in note]
    told = "\n".join(report.notes)
    assert "lora_alpha was 8 and is 64" in told
    assert "use_rslora was False and is True" in told


def test_adapters_that_no_peft_model_holds_are_not_exported_as_a_model(tmp_path: Path) -> None:
    model = make("llama")
    model.add_adapter(adapter_config("lora"))
    options = {"checkpoint_dir": str(tmp_path / "run")}
    exporting = CheckpointingConfig(**options, save_consolidated="always").build(0, 0, 0)
    with exporting, pytest.raises(CheckpointConfigError, match=r"add_adapter.*get_peft_model"):
        exporting.save(AppState(model), step=1)
    with CheckpointingConfig(**options, save_consolidated=False).build(0, 0, 0) as engine:
        engine.save(AppState(model), step=1).result()
        assert engine.load(AppState(model)).step == 1
    injected = peft.inject_adapter_in_model(adapter_config("lora"), make("llama"))
    exporting = CheckpointingConfig(checkpoint_dir=str(tmp_path / "other"), save_consolidated="always").build(0, 0, 0)
    with exporting, pytest.raises(CheckpointConfigError, match="inject_adapter_in_model"):
        exporting.save(AppState(injected), step=1)


def test_a_base_model_is_loaded_before_it_is_wrapped(tmp_path: Path) -> None:
    config = CheckpointingConfig(enabled=False, model_repo_id=str(saved_base(tmp_path)))
    with config.build(0, 0, 0) as engine, pytest.raises(CheckpointConfigError, match="first, then wrap"):
        engine.load_base_model(adapted("lora"))
