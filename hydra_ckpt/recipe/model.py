"""A Llama of a few million parameters over byte tokens, made from a configuration and a seed."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hydra_ckpt.recipe.tokenizer import EOS_TOKEN, PAD_TOKEN, VOCAB_SIZE

if TYPE_CHECKING:
    from hydra_ckpt.recipe.settings import ModelSettings

__all__ = ["build_model"]


def build_model(settings: ModelSettings, seed: int) -> LlamaForCausalLM:
    """The model with its initial weights, equal on every rank; the process's generators stay where they were."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        bos_token_id=None,
        eos_token_id=EOS_TOKEN,
        pad_token_id=PAD_TOKEN,
        **asdict(settings),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
