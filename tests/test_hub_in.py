"""Base models: every rank reads its slices of the reference's files, whatever their layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.errors import (
    CheckpointConfigError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    KeyMismatchError,
)
from hydra_ckpt.testing import run_distributed
from tests.hub_models import MODELS, gte, logits, make, nemotron_h
from tests.test_hub_out import shard, values

transformers = pytest.importorskip("transformers")


def load_into(model: Any, repo_id: str | Path, **options: Any) -> Any:
    config = CheckpointingConfig(enabled=False, model_repo_id=str(repo_id), **options)
    with config.build(0, 0, 0) as engine:
        return engine.load_base_model(model)


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return MODELS[name]()


def compare(name: str, model: Any, directory: Path) -> None:
    opened = type(make(name)).from_pretrained(directory, local_files_only=True)
    found = values(model)
    for key, tensor in opened.state_dict().items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_on_the_meta_device_gets_what_from_pretrained_gives(tmp_path: Path, name: str) -> None:
    reference = make(name)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = on_meta(name)
    load_into(model, tmp_path)
    compare(name, model, tmp_path)
    # Buffers that are in no file work too.
    assert torch.equal(logits(name, model.eval()), logits(name, reference))


def _sharded(root: Path) -> Any:
    found = {}
    for name in MODELS:
        model = shard(on_meta(name))
        report = load_into(model, root / name)
        assert report.read_bytes < sum(path.stat().st_size for path in (root / name).glob("*.safetensors"))
        found[name] = (values(model), logits(name, model.eval()))
    return found if dist.get_rank() == 0 else None


def test_sharded_models_read_only_their_slices(tmp_path: Path) -> None:
    for name in MODELS:
        make(name).save_pretrained(tmp_path / name)
    everything, _ = run_distributed(_sharded, 2, tmp_path)
    for name, (found, answer) in everything.items():
        reference = make(name)
        for key, tensor in reference.state_dict().items():
            assert torch.equal(found[key], tensor), (name, key)
        torch.testing.assert_close(answer, logits(name, reference), rtol=0, atol=1e-5)


def test_the_model_keeps_its_element_type_and_a_file_of_other_types_is_converted(tmp_path: Path) -> None:
    reference = make("llama").to(torch.bfloat16)
    reference.save_pretrained(tmp_path)
    model = MODELS["llama"]()
    load_into(model, tmp_path)
    for key, tensor in reference.state_dict().items():
        assert model.state_dict()[key].dtype == torch.float32
        assert torch.equal(model.state_dict()[key], tensor.float())


def test_the_hub_cache_s_main_revision_is_taken_not_just_any(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--tiny"
    for revision, seed in (("aaa", 1), ("bbb", 2)):
        torch.manual_seed(seed)
        made = tmp_path / revision
        MODELS["llama"]().save_pretrained(made)
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir(exist_ok=True)
        for path in made.iterdir():
            blob = repository / "blobs" / f"{revision}-{path.name}"
            path.rename(blob)
            (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("aaa")
    model = MODELS["llama"]()
    load_into(model, "org/tiny", model_cache_dir=str(tmp_path))
    torch.manual_seed(1)
    for key, tensor in MODELS["llama"]().state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)
    # The same snapshot by its path.
    load_into(MODELS["llama"](), repository / "snapshots" / "bbb")
    with pytest.raises(CheckpointNotFoundError, match="hf download org/other"):
        load_into(model, "org/other", model_cache_dir=str(tmp_path))
    with pytest.raises(CheckpointConfigError, match="model_repo_id is not set"):
        CheckpointingConfig(enabled=False).build(0, 0, 0).load_base_model(model)


def test_heads_that_are_named_keep_their_initialization(tmp_path: Path) -> None:
    base = make("bert").bert
    base.save_pretrained(tmp_path)  # without the prefix of the whole model
    model = MODELS["bert"]()
    with pytest.raises(KeyMismatchError) as failure:
        load_into(model, tmp_path)
    assert failure.value.missing == ["classifier.bias", "classifier.weight"]
    head = model.classifier.weight.detach().clone()
    report = load_into(model, tmp_path, skip_task_head_prefixes_for_base_model=["classifier."])
    assert report.skipped == ("classifier.bias", "classifier.weight")
    assert torch.equal(model.classifier.weight, head)
    for key, tensor in base.state_dict().items():
        assert torch.equal(model.bert.state_dict()[key], tensor)
    # The other way round: a whole model's file into the base model, and a head of another size is skipped.
    whole = make("bert")
    whole.save_pretrained(tmp_path / "whole")
    alone = MODELS["bert"]().bert
    assert load_into(alone, tmp_path / "whole").unexpected == ("classifier.bias", "classifier.weight")
    assert torch.equal(alone.embeddings.word_embeddings.weight, whole.bert.embeddings.word_embeddings.weight)
    # On the meta device the head is initialized, not left as memory happened to be.
    fresh = on_meta("bert")
    load_into(fresh, tmp_path, skip_task_head_prefixes_for_base_model=["classifier."])
    assert fresh.classifier.bias.abs().max() == 0
    assert 0.01 < fresh.classifier.weight.std() < 0.04


def _saved(model: Any, directory: Path) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(directory)
    return model


def _renamed(directory: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(directory / "model.safetensors")
    renamed = {change(name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("head", [True, False])
def test_converted_tensors_are_found_in_a_model_with_or_without_a_head(tmp_path: Path, head: bool) -> None:
    kinds = ["NemotronHForCausalLM", "NemotronHModel"]
    source = _saved(nemotron_h(kinds[not head]), tmp_path)
    with torch.device("meta"):
        model = nemotron_h(kinds[head])
    report = load_into(model, tmp_path, skip_task_head_prefixes_for_base_model=["lm_head."])
    assert report.skipped == (() if head else ("lm_head.weight",))
    assert report.unexpected == (("lm_head.weight",) if head else ())
    found, expected = (getattr(each, "model", each).state_dict() for each in (model, source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_converted_tensors_are_found_under_a_prefix_that_only_the_tables_know(tmp_path: Path) -> None:
    source = _saved(gte("GteModel"), tmp_path)
    _renamed(tmp_path, lambda name: f"new.{name.removeprefix('new.')}")
    with torch.device("meta"):
        model = gte("GteModel")
    assert not load_into(model, tmp_path).unexpected
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in source.state_dict().items())


def test_what_the_model_ties_and_the_files_do_not_is_refused(tmp_path: Path) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path)
    tied = MODELS["llama"]().config
    tied.tie_word_embeddings = True
    with pytest.raises(CheckpointConfigError, match=r"lm_head\.weight.* differ.*tie_word_embeddings=False"):
        load_into(transformers.LlamaForCausalLM(tied), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    same = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(same, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other = transformers.LlamaForCausalLM(tied)
    assert not load_into(other, tmp_path).unexpected
    assert torch.equal(other.lm_head.weight, tensors["model.embed_tokens.weight"])


class Tied(nn.Module):
    """A model of no library, its head tied to its embedding, with another head beside."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.extra = nn.Linear(4, 2)
        self.register_buffer("scale", torch.full((2,), 3.0), persistent=False)


def test_ties_of_a_model_of_no_library_outlive_the_meta_device(tmp_path: Path) -> None:
    save_file({"table.weight": torch.arange(28.0).view(7, 4)}, tmp_path / "model.safetensors")
    model = Tied()
    extra = model.extra.weight.clone()
    model.table.to("meta")
    model.head.weight = model.table.weight
    report = load_into(model, tmp_path, skip_task_head_prefixes_for_base_model=["extra."])
    assert model.head.weight is model.table.weight
    assert torch.equal(model.head.weight, torch.arange(28.0).view(7, 4))
    # What was on its device stays as it was.
    assert torch.equal(model.extra.weight, extra)
    assert torch.equal(model.scale, torch.full((2,), 3.0))
    assert report.skipped == ("extra.bias", "extra.weight")
    model.extra.to("meta")
    with pytest.raises(CheckpointConfigError, match=r"extra\.weight.*only a transformers model"):
        load_into(model, tmp_path, skip_task_head_prefixes_for_base_model=["extra."])


def test_what_is_not_on_the_meta_device_is_left_alone(tmp_path: Path) -> None:
    source = _saved(MODELS["bert"](), tmp_path)
    model = MODELS["bert"]()
    head = {name: tensor.clone() for name, tensor in model.classifier.state_dict().items()}
    model.bert.to("meta")
    report = load_into(model, tmp_path, skip_task_head_prefixes_for_base_model=["classifier."])
    assert report.skipped == ("classifier.bias", "classifier.weight")
    assert all(torch.equal(model.classifier.state_dict()[name], tensor) for name, tensor in head.items())
    assert all(torch.equal(a, b) for a, b in zip(model.bert.parameters(), source.bert.parameters(), strict=True))
    assert torch.equal(model.bert.embeddings.position_ids, source.bert.embeddings.position_ids)


def test_stages_of_a_tied_model_are_filled_from_the_meta_device(tmp_path: Path) -> None:
    source = make("qwen3")
    source.save_pretrained(tmp_path)
    first, last = on_meta("qwen3"), on_meta("qwen3")
    first.lm_head = None
    first.model.layers = nn.ModuleDict({"0": first.model.layers[0]})
    first.model.norm = None
    last.model.embed_tokens = None
    last.model.layers = nn.ModuleDict({"1": last.model.layers[1]})
    for stage in (first, last):
        load_into(stage, tmp_path)
    assert torch.equal(first.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert torch.equal(last.lm_head.weight, source.model.embed_tokens.weight)


def test_models_of_other_makers_are_read_by_their_own_names(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    load_into(model, tmp_path)
    assert torch.equal(model[1].weight, source[1].weight)
    with pytest.raises(KeyMismatchError, match=r"\[5, 3\] in the reference, \[4, 3\] in the model"):
        load_into(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), tmp_path)


def test_a_listed_file_that_is_absent_is_named(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointNotFoundError, match=gone.name):
        load_into(MODELS["llama"](), tmp_path)
    for path in tmp_path.glob("model*"):
        path.unlink()
    with pytest.raises(CheckpointNotFoundError, match="holds no model weights"):
        load_into(MODELS["llama"](), tmp_path)


def test_an_index_that_leads_out_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    make("llama").save_pretrained(inner)
    (inner / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(make("llama").state_dict(), "../model.safetensors")}
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpointError, match="leads out of"):
        load_into(MODELS["llama"](), inner)
    (inner / "model.safetensors.index.json").unlink()
    (inner / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match="leads out of"):
        load_into(MODELS["llama"](), inner)


def test_pickled_weights_are_read_only_where_allowed(tmp_path: Path) -> None:
    reference = make("gpt2")
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointConfigError, match="allow_legacy_pickle_restore"):
        load_into(MODELS["gpt2"](), tmp_path)
    model = on_meta("gpt2")
    load_into(model, tmp_path, allow_legacy_pickle_restore=True)
    assert torch.equal(logits("gpt2", model.eval()), logits("gpt2", reference))
    torch.save({"x": nn.Linear(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CorruptCheckpointError, match="tensors alone"):
        load_into(MODELS["gpt2"](), tmp_path, allow_legacy_pickle_restore=True)


# -- quantized ---------------------------------------------------------------------------------------------------


def quantize(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 values, scales, and what they stand for, computed elementwise."""
    rows, columns = weight.shape
    if kind == "block":
        grid = torch.zeros(-(-rows // 128), -(-columns // 128))
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                grid[i, j] = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].abs().max() / 448
        factors = grid.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    elif kind == "channel":
        grid = weight.abs().amax(1, keepdim=True) / 448
        factors = grid.expand_as(weight)
    else:
        grid = weight.abs().max() / 448
        factors = grid.expand_as(weight)
    stored = (weight / factors).to(torch.float8_e4m3fn)
    return stored, grid, stored.float() * factors


class Odd(nn.Module):
    """Sizes that leave edge blocks in both dimensions, and shards that begin within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(300, 261)
        self.last = nn.Linear(261, 37, bias=False)


def write_quantized(directory: Path, kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    directory.mkdir(exist_ok=True)
    source, tensors, expected = Odd(), {}, {}
    end = "_scale_inv" if kind == "block" else "_scale"
    for name, tensor in source.state_dict().items():
        if tensor.dim() < 2:
            tensors[name] = expected[name] = tensor
            continue
        tensors[name], tensors[name + end], expected[name] = quantize(tensor, kind)
    tensors["first.input_scale"] = torch.ones(())
    save_file(tensors, directory / "model.safetensors")
    method: dict[str, Any] = {"quant_method": "fp8"}
    if kind == "block":
        method["weight_block_size"] = [128, 128]
    (directory / "config.json").write_text(json.dumps({"quantization_config": method}))
    return expected


KINDS = ["block", "channel", "tensor"]


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_weights_are_dequantized(tmp_path: Path, kind: str) -> None:
    expected = write_quantized(tmp_path, kind)
    model = Odd()
    assert load_into(model, tmp_path).unexpected == ()
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor)
    with pytest.raises(CheckpointConfigError, match="dequantize_base_checkpoint=false"):
        load_into(model, tmp_path, dequantize_base_checkpoint=False)


def _quantized_on_two_ranks(root: Path) -> Any:
    found = {}
    mesh = init_device_mesh("cpu", (2,))
    for kind in KINDS:
        model = Odd().to(torch.bfloat16)
        for layer in (model.first, model.last):
            fully_shard(layer, mesh=mesh)
        load_into(fully_shard(model, mesh=mesh), root / kind)
        found[kind] = values(model)
    return found if dist.get_rank() == 0 else None


def test_fp8_weights_are_dequantized_shard_by_shard(tmp_path: Path) -> None:
    expected = {kind: write_quantized(tmp_path / kind, kind) for kind in KINDS}
    found, _ = run_distributed(_quantized_on_two_ranks, 2, tmp_path)
    for kind in KINDS:
        for name, tensor in expected[kind].items():
            assert torch.equal(found[kind][name], tensor.to(torch.bfloat16)), (kind, name)


def test_block_scales_mean_what_transformers_means_by_them(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    stored, grid, expected = quantize(torch.randn(256, 384), "block")
    theirs = Fp8Dequantize(None)._dequantize_one(stored, grid, torch.float32)
    torch.testing.assert_close(theirs, expected, rtol=1e-6, atol=0)


def test_experts_are_dequantized_and_exported_as_what_they_are_then(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    make("qwen3_moe").save_pretrained(reference)
    tensors, expected = {}, {}
    for name, tensor in load_file(reference / "model.safetensors").items():
        tensors[name] = expected[name] = tensor
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"], expected[name] = quantize(tensor, "block")
    save_file(tensors, reference / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((reference / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (reference / "config.json").write_text(json.dumps(config))
    transformers.GenerationConfig(temperature=0.6, do_sample=True).save_pretrained(reference)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(reference))
    options = {"checkpoint_dir": str(tmp_path / "run"), "model_repo_id": str(reference), "save_consolidated": "always"}
    with CheckpointingConfig(**options).build(0, 0, 0) as engine:
        assert not engine.load_base_model(model).unexpected
        export = engine.save(AppState(model), step=1).result().path / "model" / "consolidated"
    found = load_file(export / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "quantization_config" not in json.loads((export / "config.json").read_text())
    # A model made of a configuration knows nothing of these; one that was opened there would.
    assert json.loads((export / "generation_config.json").read_text())["temperature"] == 0.6
    assert model.config.quantization_config  # the live configuration is not touched
    opened = transformers.AutoModelForCausalLM.from_pretrained(export, local_files_only=True)
    assert torch.equal(logits("qwen3_moe", opened.eval()), logits("qwen3_moe", model.eval()))


def test_scales_that_do_not_fit_are_found_before_anything_is_read(tmp_path: Path) -> None:
    write_quantized(tmp_path, "block")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["last.weight_scale_inv"] = torch.ones(3, 5)
    save_file(tensors, tmp_path / "model.safetensors")
    model = Odd()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CorruptCheckpointError, match="weight_block_size"):
        load_into(model, tmp_path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_numbers_of_another_kind_are_no_weights(tmp_path: Path) -> None:
    tensors = dict(Odd().state_dict())
    tensors["last.weight"] = tensors["last.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(KeyMismatchError, match=r"last\.weight.*I8 in the reference, F32 in the model"):
        load_into(Odd(), tmp_path)


def test_quantizations_of_other_kinds_are_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path, "block")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointConfigError, match="quantized by gptq"):
        load_into(Odd(), tmp_path)
    (tmp_path / "config.json").unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["first.weight_scale_inv"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"shape \[2, 2\] fits neither"):
        load_into(Odd(), tmp_path)
    del tensors["first.weight_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointConfigError, match=r"first.weight is FP8, but there is no scale"):
        load_into(Odd(), tmp_path)
