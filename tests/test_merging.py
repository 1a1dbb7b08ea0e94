"""`hydra-ckpt export --merge`: the full model that an adapter and its base model make."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.errors import (
    CheckpointConfigError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    KeyMismatchError,
)
from hydra_ckpt.hub.merging import merge_adapter
from hydra_ckpt.hub.offline import export_checkpoint
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.testing.processes import PATIENCE
from tests.hub_models import MODELS, make
from tests.programs import run
from tests.test_peft import TARGETS, adapted, adapter_config, answer, saved_adapter, saved_base, state_of, train

peft = pytest.importorskip("peft")


HEADS = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


@pytest.mark.parametrize("task", list(HEADS))
def test_an_adapter_over_another_head_than_the_files_is_merged_with_its_own(tmp_path: Path, task: str) -> None:
    base = saved_base(tmp_path)
    labels = {} if task == "FEATURE_EXTRACTION" else {"num_labels": 5}
    model = HEADS[task].from_pretrained(base, pad_token_id=0, **labels)
    adapted_model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, task_type=task))
    checkpoint = saved_adapter(tmp_path, adapted_model)
    ids = torch.tensor([[5, 7, 9]])
    with torch.no_grad():
        expected = adapted_model.eval()(input_ids=ids)[0]
    merge_adapter(checkpoint, tmp_path / "out")
    merged = HEADS[task].from_pretrained(tmp_path / "out")
    assert type(merged) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(input_ids=ids)[0], expected, rtol=0, atol=1e-5)


def test_an_adapter_without_a_task_is_merged_into_the_class_it_names(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    settings = json.loads((base / "config.json").read_text())
    settings.pop("architectures")
    (base / "config.json").write_text(json.dumps(settings))
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    adapted_model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS))
    merge_adapter(saved_adapter(tmp_path, adapted_model), tmp_path / "out", dtype="bfloat16")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    exact = adapted_model.merge_and_unload().lm_head.weight, adapted_model.model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged.lm_head.weight, exact[0].bfloat16())
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, exact[1].bfloat16())  # rounded once, at the end


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_hidden_layers": 4}, KeyMismatchError, r"missing.*layers\.2"),
        ({"num_hidden_layers": 1}, KeyMismatchError, r"layers\.1"),
        ({"hidden_size": 48, "head_dim": 12}, CheckpointConfigError, "does not fit the base model"),
    ],
)
def test_an_adapter_is_merged_into_no_other_base_model(
    tmp_path: Path, change: dict[str, int], error: type[Exception], message: str
) -> None:
    checkpoint = saved_adapter(tmp_path, adapted("lora"))
    with pytest.raises(error, match=message) as failure:
        merge_adapter(checkpoint, tmp_path / "out", base=str(saved_base(tmp_path, **change)))
    assert "--base" in str(failure.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_what_is_damaged_or_cannot_be_opened_is_not_merged(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    checkpoint = saved_adapter(tmp_path, adapted("lora"), base)
    weights = checkpoint.path / "model" / "consolidated" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="adapter_model"):
        merge_adapter(checkpoint, tmp_path / "out")
    merge_adapter(checkpoint, tmp_path / "out", verify=False)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "architectures": ["OwnForCausalLM"]}))
    with pytest.raises(CheckpointConfigError, match=r"OwnForCausalLM, which transformers .* does not have"):
        merge_adapter(checkpoint, tmp_path / "other", verify=False)
    (base / "config.json").write_text(json.dumps(settings))
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointConfigError, match="cannot be opened"):
        merge_adapter(checkpoint, tmp_path / "other", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "run"]


def test_one_of_several_adapters_is_merged_with_the_base_model_s_tokenizer(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(base)
    model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), adapter_config("lora"))
    model.add_adapter("poet-1", adapter_config("rslora"))
    checkpoint = saved_adapter(tmp_path, model)
    with pytest.raises(CheckpointNotFoundError, match=r"no part 'painter'; it has model, model/poet-1"):
        merge_adapter(checkpoint, tmp_path / "out", part="painter")
    merge_adapter(checkpoint, tmp_path / "out", part="poet-1")
    model.set_adapter("poet-1")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(answer(merged), answer(model), rtol=0, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids
    with pytest.raises(CheckpointConfigError, match="is an adapter"):
        export_checkpoint(checkpoint, tmp_path / "split", max_file_bytes=2000)


def test_what_the_base_model_s_files_lack_is_not_made_up(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    checkpoint = saved_adapter(tmp_path, adapted("lora"), base)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KeyMismatchError, match=r"layers\.1\.mlp\.up_proj"):
        merge_adapter(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_of_the_adapter_replace_those_of_the_base_model(tmp_path: Path) -> None:
    make("bert").save_pretrained(tmp_path / "base")  # three labels
    model = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    adapted_model = peft.get_peft_model(model, config)
    merge_adapter(saved_adapter(tmp_path, adapted_model), tmp_path / "out")
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(answer(merged), answer(adapted_model), rtol=0, atol=1e-5)


def test_a_model_without_tokens_is_merged_too(tmp_path: Path) -> None:
    shape = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    transformers.ResNetModel(transformers.ResNetConfig(**shape)).save_pretrained(tmp_path / "base")
    model = transformers.ResNetModel.from_pretrained(tmp_path / "base")
    adapted_model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["convolution"]))
    merge_adapter(saved_adapter(tmp_path, adapted_model), tmp_path / "out")
    merged = transformers.ResNetModel.from_pretrained(tmp_path / "out").eval()
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        found, expected = (each(pixel_values=pixels).pooler_output for each in (merged, adapted_model.eval()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_adapter_of_a_tied_embedding_is_not_merged(tmp_path: Path) -> None:
    base = saved_base(tmp_path, "qwen3")
    model = transformers.Qwen3ForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    with pytest.raises(CheckpointConfigError, match=r"embed_tokens.*ties its input and output"):
        merge_adapter(saved_adapter(tmp_path, peft.get_peft_model(model, config)), tmp_path / "out")


def test_the_revision_of_the_base_model_is_the_adapter_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--org--base"
    for number, revision in enumerate(("main", "v2")):
        torch.manual_seed(number)
        MODELS["llama"]().save_pretrained(repository / "snapshots" / (str(number) * 20))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(str(number) * 20)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.manual_seed(1)
    model = peft.get_peft_model(MODELS["llama"](), adapter_config("lora"))
    model.peft_config["default"].revision = "v2"
    checkpoint = saved_adapter(tmp_path, model, "org/base")
    merge_adapter(checkpoint, tmp_path / "out")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(answer(merged), answer(model), rtol=0, atol=1e-5)


def test_a_quantized_base_model_is_not_merged_into(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    settings = json.loads((base / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (base / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointConfigError, match=r"is quantized.*--base"):
        merge_adapter(saved_adapter(tmp_path, adapted("lora"), base), tmp_path / "out")


def test_code_of_a_base_model_is_not_run_even_where_one_would_say_yes(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    checkpoint = saved_adapter(tmp_path, adapted("lora"), base)
    ran = tmp_path / "ran"
    (base / "evil.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Config: ...\n")
    settings = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}, "architectures": ["Evil"]}
    (base / "config.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "hydra_ckpt.cli", "export", str(checkpoint.path), str(tmp_path / "out"), "--merge"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200 * PATIENCE, check=False, input="y\n" * 9)
    assert done.returncode == 2
    assert "models with their own code" in done.stderr
    assert not ran.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not an adapter configuration"),
        ("[]", "is not an adapter configuration"),
        ('{"base_model_name_or_path": 5}', "base_model_name_or_path is 5"),
        ('{"base_model_name_or_path": "x", "task_type": ["CAUSAL_LM"]}', "task_type"),
        ('{"base_model_name_or_path": "x", "auto_mapping": "os"}', "auto_mapping"),
    ],
)
def test_a_damaged_configuration_of_an_adapter_is_named(tmp_path: Path, text: str, message: str) -> None:
    checkpoint = saved_adapter(tmp_path, adapted("lora"), saved_base(tmp_path))
    (checkpoint.path / "model" / "consolidated" / "adapter_config.json").write_text(text)
    with pytest.raises(CorruptCheckpointError, match=message):
        merge_adapter(checkpoint, tmp_path / "out", verify=False)


def test_exports_are_made_in_their_own_place_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved_adapter(tmp_path, adapted("lora"), saved_base(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "empty")
    for out, error in (
        (tmp_path / "link", CheckpointExistsError),
        (tmp_path / "dangling", CheckpointExistsError),
        (checkpoint.path / "model" / "out", CheckpointExistsError),
        (Path(), CheckpointConfigError),
        (tmp_path / "base" / "config.json" / "out", CheckpointConfigError),
    ):
        with pytest.raises(error):
            export_checkpoint(checkpoint, out)
    export_checkpoint(checkpoint, tmp_path / "new" / "out")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]


def _merge(checkpoints: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hydra_ckpt.cli", "export", str(checkpoints), str(out), "--merge"]
    return run(command)


def test_export_merges_an_adapter_into_its_base_model(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    base = type(MODELS["llama"]()).from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, adapter_config("saved"))
    state = state_of(model)
    train(state, 2)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        checkpoint = engine.save(state, step=2).result()
    config = json.loads((checkpoint.path / "model/consolidated/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(checkpoint.path / "model" / "consolidated")
    torch.testing.assert_close(answer(automatic), answer(state.model), rtol=0, atol=2e-6)
    done = _merge(tmp_path / "run", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    opened = type(base).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(answer(opened), answer(state.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [None, "org/elsewhere"])
def test_an_adapter_without_its_base_model_is_not_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = adapted("lora")
    model.peft_config["default"].base_model_name_or_path = name
    model.get_base_model().name_or_path = ""
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_peft=True).build(0, 0, 0) as engine:
        engine.save(AppState(model), step=1).result()
    message = "name it with --base" if name is None else "org/elsewhere is not on this machine"
    with pytest.raises(CheckpointError, match=message):
        merge_adapter(Checkpoint.open((tmp_path / "run" / "LATEST").resolve()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
