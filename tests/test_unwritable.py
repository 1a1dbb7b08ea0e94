"""Values that cannot be written into the JSON files of a model are refused by object and key."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from hydra_ckpt import AppState, CheckpointConfigError, CheckpointingConfig
from hydra_ckpt.jobs.differences import differences
from hydra_ckpt.jobs.yaml_text import parse_config
from tests.hub_models import llama


class Kind(enum.Enum):
    A = 1


VALUES: dict[str, Any] = {
    "pathlib.PosixPath": Path("a"),
    f"{__name__}.Kind": Kind.A,
    "builtins.set": {1},
    "torch.dtype": torch.float16,
    "builtins.builtin_function_or_method": len,
}


def save(directory: Path, state: AppState, **options: Any) -> None:
    with CheckpointingConfig(checkpoint_dir=str(directory), **options).build(0, 0, 0) as engine:
        engine.save(state, step=1).result()


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_a_value_in_a_configuration_is_named(tmp_path: Path, kind: str, place: str) -> None:
    model = llama()
    getattr(model, place).rules = {"list": [1, VALUES[kind]]}
    with pytest.raises(CheckpointConfigError, match=rf"the model's {place}: rules\.list\[1\] is a {kind} \("):
        save(tmp_path, AppState(model))
    getattr(model, place).rules = {"list": [1, "a"]}
    save(tmp_path, AppState(model), save_consolidated="always")


def test_a_value_in_a_nested_configuration_is_named(tmp_path: Path) -> None:
    import transformers as hf

    model = llama()
    model.config.part = hf.LlamaConfig(rules={"a": Path("b")})
    with pytest.raises(CheckpointConfigError, match=r"the model's config: part\.rules\.a is a pathlib\.PosixPath"):
        save(tmp_path, AppState(model))


def test_a_value_in_an_adapter_s_configuration_is_named(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], revision=Path("main"))
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(CheckpointConfigError, match=r"the config of the adapter 'default': revision is a pathlib"):
        save(tmp_path, AppState(model), is_peft=True)


def test_a_value_in_a_diffusers_configuration_is_named(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    model.register_to_config(rules={"a": Kind.A})
    with pytest.raises(CheckpointConfigError, match=r"the model's config: rules\.a is a .*Kind"):
        save(tmp_path, AppState(model))


def test_a_value_in_a_tokenizer_is_named(tmp_path: Path) -> None:
    import transformers as hf
    from tokenizers import Tokenizer, models

    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    tokenizer.init_kwargs["rules"] = {Kind.A.name: Kind.A}
    with pytest.raises(CheckpointConfigError, match=r"the tokenizer: rules\.A is a .*Kind"):
        save(tmp_path, AppState(llama(), tokenizer=tokenizer))


def test_paths_and_enums_in_a_hydra_configuration_are_compared() -> None:
    texts = [
        OmegaConf.to_yaml(OmegaConf.create({"data": {"root": Path(root)}, "kind": Kind.A, "lr": lr}))
        for root, lr in (("/a/b", 1), ("/a/c", 1), ("/a/b", 2))
    ]
    one, moved, faster = map(parse_config, texts)
    assert one == {"data": {"root": "/a/b"}, "kind": "A", "lr": 1}
    assert [item.key for item in differences(one, moved)] == ["data.root"]
    assert [item.key for item in differences(one, faster)] == ["lr"]
    assert parse_config("a: !!python/object/apply:os.system ['true']") is None
