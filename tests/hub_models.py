"""Tiny transformers models from their configurations, one for each way in which names and layouts differ on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

_DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**options: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_DECODER, **options}))


def qwen3() -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, tie_word_embeddings=True))


def gemma() -> Any:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**_DECODER))


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def mixtral() -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_DECODER, **experts))


def bert() -> Any:
    config = hf.BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=3,
    )
    return hf.BertForSequenceClassification(config)


def t5() -> Any:
    config = hf.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)


def llava() -> Any:
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**_DECODER), image_token_index=95, image_seq_length=4
    )
    return hf.LlavaForConditionalGeneration(config)


def nemotron_h(kind: str) -> Any:
    """A hybrid with experts, of which a model without a head has other names in its files than one with a head."""
    config = hf.NemotronHConfig(
        vocab_size=96,
        hidden_size=32,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=1,
        n_routed_experts=12,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        num_experts_per_tok=2,
    )
    return getattr(hf, kind)(config)


def gte(kind: str) -> Any:
    """An encoder whose query, key and value projections its files join."""
    config = hf.GteConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    return getattr(hf, kind)(config)


def clip_vision() -> Any:
    config = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return hf.CLIPVisionModel(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma": gemma,
    "gpt2": gpt2,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "bert": bert,
    "t5": t5,
    "llava": llava,
}


def make(name: str) -> Any:
    """One of them, always with the same weights, and not the trivial ones of a fresh model."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


@torch.no_grad()
def logits(name: str, model: Any) -> torch.Tensor:
    """What the model answers to a fixed input."""
    ids = torch.tensor([[5, 7, 9, 11, 3]])
    if name == "t5":
        return model(input_ids=ids, decoder_input_ids=ids).logits
    if name == "llava":
        ids = torch.tensor([[5, 95, 95, 95, 95, 7]])
        pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
        return model(input_ids=ids, pixel_values=pixels).logits
    return model(input_ids=ids).logits
