"""A Llama over byte tokens: small and made from a seed, or a pretrained one; with an adapter or without."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.recipe.tokenizer import EOS_TOKEN, PAD_TOKEN, VOCAB_SIZE

if TYPE_CHECKING:
    from peft import PeftModel

    from hydra_ckpt.config import CheckpointingConfig
    from hydra_ckpt.recipe.settings import LoraSettings, ModelSettings

__all__ = ["add_adapter", "build_model", "load_pretrained"]


def build_model(settings: ModelSettings, seed: int) -> LlamaForCausalLM:
    """The model with its initial weights, equal on every rank; the process's generators stay where they were.

    With `pretrained` it is on the meta device and waits for `load_pretrained`.
    """
    if settings.pretrained is not None:
        return _waiting(settings.pretrained)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        bos_token_id=None,
        eos_token_id=EOS_TOKEN,
        pad_token_id=PAD_TOKEN,
        **{key: value for key, value in asdict(settings).items() if key != "pretrained"},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _waiting(pretrained: str) -> LlamaForCausalLM:
    config = AutoConfig.from_pretrained(pretrained, local_files_only=True)
    if config.model_type != "llama" or config.vocab_size < VOCAB_SIZE:
        raise CheckpointConfigError(
            f"model.pretrained={pretrained} is a {config.model_type} with {config.vocab_size} tokens; this recipe "
            f"trains a llama on bytes, for which it needs {VOCAB_SIZE}"
        )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def load_pretrained(model: LlamaForCausalLM, pretrained: str, checkpoint: CheckpointingConfig) -> None:
    """Fill a model that `build_model` left on the meta device, each rank with its own shards. Collective."""
    with replace(checkpoint, enabled=False, restore_from=None, model_repo_id=pretrained).build(0, 0, 0) as engine:
        engine.load_base_model(model)


def add_adapter(model: LlamaForCausalLM, settings: LoraSettings, seed: int) -> PeftModel:
    """The model with an adapter, which alone is trained; its initial weights are equal on every rank."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast("PeftModel", get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **asdict(settings))))
