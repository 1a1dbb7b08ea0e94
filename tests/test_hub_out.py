"""Exports are what `save_pretrained` writes: the same names, values and outputs, from whole and sharded models."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.errors import CheckpointConfigError, CheckpointNotFoundError, CorruptCheckpointError
from hydra_ckpt.hub.conversion import Tables
from hydra_ckpt.hub.offline import export_checkpoint
from hydra_ckpt.storage.naming import decode_naming
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.testing import run_distributed
from tests.hub_models import MODELS, clip_vision, logits, make

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


def test_the_models_without_an_entry_in_transformers_tables_are_known() -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping

    entries = {name: get_model_conversion_mapping(make(name), add_legacy=False) for name in MODELS}
    assert not entries["llama"]
    assert entries["mixtral"]
    for name, found in entries.items():
        assert Tables(make(name)).are_empty == (not found), name


def _all_models(root: Path) -> Any:
    found = {name: export_and_resume(root, name) for name in MODELS}
    return found if dist.get_rank() == 0 else None


def test_exports_of_sharded_models_are_what_save_pretrained_writes(tmp_path: Path) -> None:
    everything, _ = run_distributed(_all_models, 2, tmp_path)
    for name, expected in everything.items():
        check(tmp_path, name, expected)


# -- element types, files and small files of choice ----------------------------------------------------------------


def export_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.path / "model" / "consolidated"


def save_once(root: Path, model: Any, **options: Any) -> Checkpoint:
    config = CheckpointingConfig(checkpoint_dir=str(root), save_consolidated="always", **options)
    with config.build(0, 0, 0) as engine:
        return engine.save(AppState(model), step=1).result()


def _cast_twice(root: Path) -> Any:
    found = {}
    for mode in ("fsdp", "ddp"):
        for is_async in (False, True):
            model = make("mixtral")
            if mode == "fsdp":
                model = shard(model)
            state = trained(model)
            options = {"export_dtype": "bfloat16", "save_consolidated": "always", "is_async": is_async}
            where = f"{mode}-{is_async}"
            with CheckpointingConfig(checkpoint_dir=str(root / where), **options).build(0, 0, 0) as engine:
                engine.save(state, step=1)
                engine.save(state, step=2).result()
                before = values(model)
                disturb(state)
                engine.load(state)
                for key, tensor in values(model).items():
                    assert torch.equal(tensor, before[key])
            found[where] = before
    return found if dist.get_rank() == 0 else None


def test_full_precision_training_exports_half_precision_at_every_save(tmp_path: Path) -> None:
    """Both from one snapshot: shards in the training's element type, the export beside them in its own."""
    everything, _ = run_distributed(_cast_twice, 2, tmp_path)
    for where, expected in everything.items():
        reference = make("mixtral")
        reference.load_state_dict(expected)
        reference.to(torch.bfloat16).save_pretrained(tmp_path / "reference")
        for step in (1, 2):
            checkpoint = Checkpoint.open(tmp_path / where / f"epoch_0_step_{step}")
            assert all("/shard-" in file for file in checkpoint.manifest.parts["model"].files)
            found, saved = tensors_in(export_of(checkpoint)), tensors_in(tmp_path / "reference")
            assert found.keys() == saved.keys()
            for key, tensor in saved.items():
                assert found[key].dtype == torch.bfloat16
                assert torch.equal(found[key], tensor)
            assert json.loads((export_of(checkpoint) / "config.json").read_text())["dtype"] == "bfloat16"
        opened = transformers.AutoModelForCausalLM.from_pretrained(export_of(checkpoint))
        assert opened.dtype == torch.bfloat16


class Mixed(torch.nn.Module):
    """Values that are no floating point beside those that are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3))
        self.register_buffer("counts", torch.arange(5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("packed", torch.randn(6).to(torch.float8_e4m3fn))


def test_only_floating_point_changes_its_element_type(tmp_path: Path) -> None:
    model = Mixed()
    found = tensors_in(export_of(save_once(tmp_path, model, export_dtype="float16")))
    assert found["weight"].dtype == torch.float16
    assert torch.equal(found["weight"], model.weight.half())
    for name in ("counts", "mask"):
        assert torch.equal(found[name], model.state_dict()[name])
    assert found["packed"].dtype == torch.float8_e4m3fn


def write_reference(directory: Path) -> dict[str, torch.Tensor]:
    """A model in half precision with one tensor in full precision, in several files, with code and a tokenizer."""
    model = make("llama").to(torch.bfloat16)
    model.model.norm.to(torch.float32)
    model.save_pretrained(directory, max_shard_size="20KB")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    config["quantization_config"] = {"quant_method": "fp8"}
    config["rope_theta"] = 10000.0
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_own.py").write_text("class OwnModel: ...\n")
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (directory / "training_args.bin").write_text("not part of a model")
    (directory / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    return tensors_in(directory)


def test_files_and_element_types_are_the_reference_s(tmp_path: Path) -> None:
    expected = write_reference(tmp_path / "reference")
    model = make("llama")
    before = (model.config.to_dict(), model.generation_config.to_dict())
    checkpoint = save_once(tmp_path / "run", model, model_repo_id=str(tmp_path / "reference"))
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    export = export_of(checkpoint)
    ours, theirs = (
        json.loads((place / "model.safetensors.index.json").read_text())["weight_map"]
        for place in (export, tmp_path / "reference")
    )
    assert ours == theirs
    for name, tensor in tensors_in(export).items():
        assert tensor.dtype == expected[name].dtype, name
    assert tensors_in(export)["model.norm.weight"].dtype == torch.float32
    assert (export / "modeling_own.py").read_text() == "class OwnModel: ...\n"
    assert (export / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (export / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert not (export / "training_args.bin").exists()
    assert (export / "tokenizer_config.json").exists()
    assert "CLIPImageProcessor" in (export / "preprocessor_config.json").read_text()
    assert "quantization_config" not in json.loads((export / "config.json").read_text())


def test_a_reference_with_other_names_is_followed_too(tmp_path: Path) -> None:
    source = clip_vision().bfloat16()
    source.save_pretrained(tmp_path / "reference", max_shard_size="20KB")
    reference = tmp_path / "reference"
    index = json.loads((reference / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(reference / file)
        prefixed = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in tensors.items()}
        assert prefixed.keys() != tensors.keys()
        save_file(prefixed, reference / file, metadata={"format": "pt"})
    index["weight_map"] = {
        f"vision_model.{name.removeprefix('vision_model.')}": file for name, file in index["weight_map"].items()
    }
    (reference / "model.safetensors.index.json").write_text(json.dumps(index))
    options = {"model_repo_id": str(reference), "save_consolidated": "always"}
    model = clip_vision()
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), **options).build(0, 0, 0) as engine:
        assert not engine.load_base_model(model).unexpected
        export = export_of(engine.save(AppState(model), step=1).result())
    assert {tensor.dtype for tensor in tensors_in(export).values()} == {torch.bfloat16}
    assert len(list(export.glob("*.safetensors"))) == len(set(index["weight_map"].values())) > 1


def test_generation_settings_are_the_live_model_s_once_they_are_changed(tmp_path: Path) -> None:
    make("gpt2").save_pretrained(tmp_path / "reference")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "reference")
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    export = export_of(save_once(tmp_path / "run", model))
    model.save_pretrained(tmp_path / "theirs")
    found, wanted = (
        json.loads((place / "generation_config.json").read_text()) for place in (export, tmp_path / "theirs")
    )
    assert found == wanted
    assert found["temperature"] == 0.5


def test_generation_settings_that_transformers_finds_invalid_prevent_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("gpt2")
    model.generation_config.temperature = 0.6  # without do_sample
    export = export_of(save_once(tmp_path / "run", model))
    assert json.loads((export / "generation_config.json").read_text())["temperature"] == 0.6
    assert "finds it invalid" in caplog.text
    opened = transformers.GPT2LMHeadModel.from_pretrained(export, local_files_only=True)
    assert torch.equal(logits("gpt2", opened.eval()), logits("gpt2", model))


def test_only_quantized_references_are_told_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shape = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    model = transformers.ResNetModel(transformers.ResNetConfig(**shape))
    model.save_pretrained(tmp_path / "reference")
    save_once(tmp_path / "run", model, model_repo_id=str(tmp_path / "reference"))
    assert "quantized" not in caplog.text


_OWN = """
from transformers import LlamaConfig, LlamaForCausalLM
from .own_parts import SCALE

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.logits = out.logits * SCALE
        return out
"""


def _own_model(config: Any = None) -> Any:
    module = importlib.import_module("own.modeling_own")
    module.OwnConfig.register_for_auto_class()
    module.OwnForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    return module.OwnForCausalLM(config or module.OwnConfig(**make("llama").config.to_diff_dict()))


def test_a_model_of_a_class_of_its_own_is_exported_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "own"
    package.mkdir()
    for name, text in {"__init__": "", "own_parts": "SCALE = 3.0\n", "modeling_own": _OWN}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = _own_model().eval()
    export = export_of(save_once(tmp_path / "run", model))
    assert "auto_map" not in model.config.to_dict()
    model.save_pretrained(tmp_path / "reference")
    assert {path.name for path in export.iterdir()} == {path.name for path in (tmp_path / "reference").iterdir()}
    assert json.loads((export / "config.json").read_text()) == json.loads(
        (tmp_path / "reference" / "config.json").read_text()
    )
    opened = transformers.AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, local_files_only=True)
    assert type(opened).__name__ == "OwnForCausalLM"
    assert torch.equal(logits("llama", opened.eval()), logits("llama", model))


def test_the_original_configuration_is_exported_for_older_readers(tmp_path: Path) -> None:
    write_reference(tmp_path / "reference")
    checkpoint = save_once(
        tmp_path / "run", make("llama"), v4_compatible=True, original_model_root_dir=str(tmp_path / "reference")
    )
    original = json.loads((export_of(checkpoint) / "config.json").read_text())
    assert original["rope_theta"] == 10000.0
    assert "quantization_config" not in original
    assert json.loads((export_of(checkpoint) / "config.v5.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    with pytest.raises(CheckpointConfigError, match="v4_compatible"):
        save_once(tmp_path / "none", make("llama"), v4_compatible=True)


def test_a_reference_that_is_not_there_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="hf download org/none"):
        save_once(tmp_path, make("llama"), model_repo_id="org/none", model_cache_dir=str(tmp_path / "cache"))
    assert not list(tmp_path.glob("epoch*"))


def test_one_rank_merges_under_the_hub_s_names(tmp_path: Path) -> None:
    model = make("mixtral")
    checkpoint = save_once(tmp_path / "run", model, single_rank_consolidation=True, export_dtype="bfloat16")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "reference")
    found, saved = tensors_in(export_of(checkpoint)), tensors_in(tmp_path / "reference")
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in saved.items())


def test_an_export_added_at_the_end_has_the_hub_s_names(tmp_path: Path) -> None:
    state = trained(make("qwen3_moe"))
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"))
    with config.build(0, 0, 0) as engine:
        engine.save(state, step=1).result()
        checkpoint = engine.save(state, step=1, is_final=True).result()
        before = values(state.model)
        disturb(state)
        engine.load(state)
    state.model.save_pretrained(tmp_path / "reference")
    found, saved = tensors_in(export_of(checkpoint)), tensors_in(tmp_path / "reference")
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in saved.items())
    assert all(torch.equal(values(state.model)[key], tensor) for key, tensor in before.items())


def _rearranged_tables() -> None:
    """Have transformers store a Llama as some models are stored: what moves elements about within tensors."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, Interleave, PermuteForRope, WeightConverter

    tables = conversion_mapping._build_checkpoint_conversion_mapping()
    heads = [f"self_attn.{kind}_proj.weight" for kind in "qkv"]
    permuted = PermuteForRope(permute_layer_names=["q_proj", "k_proj"])
    joined = [Interleave(dim=0), Chunk(dim=0)]
    tables["llama"] = [
        WeightConverter("self_attn.qkv.weight", heads, [Chunk(dim=0), permuted]),
        WeightConverter("mlp.w13.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], joined),
        WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [Interleave(dim=1)]),
    ]
    conversion_mapping._checkpoint_conversion_mapping_cache = tables


@pytest.fixture
def rearranged() -> Iterator[None]:
    from transformers import conversion_mapping

    before = conversion_mapping._checkpoint_conversion_mapping_cache
    _rearranged_tables()
    yield
    conversion_mapping._checkpoint_conversion_mapping_cache = before


def _rearranged_and_sharded(root: Path, config: Any) -> Any:
    _rearranged_tables()
    found = {}
    for mode in ({}, {"single_rank_consolidation": True}):
        model = shard(_multi_head(config))
        state = trained(model)
        where = str(root / f"sharded-{len(mode)}")
        with CheckpointingConfig(checkpoint_dir=where, save_consolidated="always", **mode).build(0, 0, 0) as engine:
            export = export_of(engine.save(state, step=1).result())
            found[str(export)] = values(model)
            disturb(state)
            engine.load(state)
            assert all(torch.equal(tensor, found[str(export)][key]) for key, tensor in values(model).items())
        with torch.device("meta"):
            fresh = transformers.LlamaForCausalLM(config)
        shard(fresh)
        with CheckpointingConfig(enabled=False, model_repo_id=str(export)).build(0, 0, 0) as engine:
            assert not engine.load_base_model(fresh).unexpected
        assert all(torch.equal(tensor, found[str(export)][key]) for key, tensor in values(fresh).items())
    return found


def _multi_head(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def _check_rearranged(export: Path, config: Any, expected: dict[str, torch.Tensor], reference: Path) -> None:
    model = _multi_head(config)
    model.load_state_dict(expected)
    model.save_pretrained(reference)
    found, saved = tensors_in(export), tensors_in(reference)
    assert "model.layers.0.self_attn.qkv.weight" in found
    assert "model.layers.0.mlp.w13.weight" in found
    assert found.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(found[key], tensor), key
    opened = transformers.LlamaForCausalLM.from_pretrained(export, local_files_only=True).state_dict()
    assert all(torch.equal(opened[key], tensor) for key, tensor in expected.items())


def test_conversions_that_move_elements_about_within_tensors_are_done_on_shards(
    tmp_path: Path, rearranged: None
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=24, intermediate_size=18, num_hidden_layers=1, num_attention_heads=3
    )
    whole = _multi_head(config)
    _check_rearranged(export_of(save_once(tmp_path / "whole", whole)), config, values(whole), tmp_path / "reference")
    everything, _ = run_distributed(_rearranged_and_sharded, 2, tmp_path, config)  # shards end within heads of 8 rows
    for number, (export, expected) in enumerate(everything.items()):
        _check_rearranged(Path(export), config, expected, tmp_path / f"reference-{number}")


def test_a_rearranged_export_is_made_later_from_shards_too(tmp_path: Path, rearranged: None) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=24, intermediate_size=18, num_hidden_layers=1, num_attention_heads=3
    )
    model = _multi_head(config)
    later = CheckpointingConfig(checkpoint_dir=str(tmp_path / "shards"), save_consolidated="false")
    with later.build(0, 0, 0) as engine:
        checkpoint = engine.save(AppState(model), step=1).result()
    export_checkpoint(checkpoint, tmp_path / "later")
    _check_rearranged(tmp_path / "later", config, values(model), tmp_path / "reference")


def test_a_conversion_that_computes_values_is_refused_before_training_has_cost_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Doubled(ConversionOps):
        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
            (tensors,) = input_dict.values()
            return {target_patterns[0]: tensors[0] * 2}

        @property
        def reverse_op(self) -> Any:
            return Doubled()

    tables = conversion_mapping._build_checkpoint_conversion_mapping()
    tables["llama"] = [WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", [Doubled()])]
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", tables)
    with pytest.raises(CheckpointConfigError, match=r"layers.0.mlp.up_proj.weight.*save_consolidated=false"):
        save_once(tmp_path / "refused", make("llama"))
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path / "shards"), save_consolidated=False)
    with config.build(0, 0, 0) as engine:
        state = AppState(make("llama"))
        engine.save(state, step=1).result()
        assert engine.load(state).step == 1


@pytest.mark.parametrize("content", ["{", '{"aliases": [["a"]], "dtypes": {}, "files": {}}', "[]"])
def test_a_damaged_table_of_names_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(CorruptCheckpointError, match="does not say how an export names tensors"):
        decode_naming(tmp_path / "names.json", content.encode())
