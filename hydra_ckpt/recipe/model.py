"""A Llama or Mixtral over byte tokens: small and made from a seed, or a pretrained one; with an adapter or without."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from hydra_ckpt.errors import CheckpointConfigError, CheckpointNotFoundError
from hydra_ckpt.recipe.tokenizer import EOS_TOKEN, PAD_TOKEN, VOCAB_SIZE

if TYPE_CHECKING:
    from peft import PeftModel

    from hydra_ckpt.config import CheckpointingConfig
    from hydra_ckpt.recipe.settings import LoraSettings, ModelSettings

__all__ = ["add_adapter", "build_model", "load_pretrained"]

_ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
}


def build_model(settings: ModelSettings, seed: int) -> PreTrainedModel:
    """The model with its initial weights, equal on every rank; the state of the process's generators does not change.

    With `pretrained` it is on the meta device and waits for `load_pretrained`.
    """
    make_config, make_model = _ARCHITECTURES[settings.architecture]
    if settings.pretrained is not None:
        with torch.device("meta"):
            return cast(PreTrainedModel, make_model(_pretrained_config(settings.pretrained, settings.architecture)))
    shape = {key: value for key, value in asdict(settings).items() if value is not None and key != "architecture"}
    config = make_config(
        vocab_size=VOCAB_SIZE, bos_token_id=None, eos_token_id=EOS_TOKEN, pad_token_id=PAD_TOKEN, **shape
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast(PreTrainedModel, make_model(config))


def _pretrained_config(pretrained: str, architecture: str) -> Any:
    if Path(pretrained).is_dir():
        # The trained model records this path, and may be opened elsewhere; LATEST will lead to another checkpoint by
        # then.
        pretrained = str(Path(pretrained).resolve())
    try:
        config = AutoConfig.from_pretrained(pretrained, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointNotFoundError(
            f"model.pretrained={pretrained}: no model is found there, nor in the hub cache under that name; give a "
            "directory, such as .../checkpoints/LATEST/model/consolidated of another run"
        ) from error
    if config.model_type != architecture or config.vocab_size < VOCAB_SIZE:
        raise CheckpointConfigError(
            f"model.pretrained={pretrained} is a {config.model_type} with {config.vocab_size} tokens; with "
            f"model.architecture={architecture} this recipe trains a {architecture} on bytes, for which it needs "
            f"{VOCAB_SIZE}"
        )
    return config


def load_pretrained(model: PreTrainedModel, pretrained: str, checkpoint: CheckpointingConfig) -> None:
    """Fill a model that `build_model` left on the meta device, each rank with its own shards. Collective."""
    with replace(checkpoint, enabled=False, restore_from=None, model_repo_id=pretrained).build(0, 0, 0) as engine:
        engine.load_base_model(model)


def add_adapter(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """The model with an adapter, which alone is trained; its initial weights are equal on every rank."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast("PeftModel", get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **asdict(settings))))
