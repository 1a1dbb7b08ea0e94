"""A tokenizer that needs no download: ByT5's, with one token per byte; `AutoTokenizer` can open it."""

from __future__ import annotations

from transformers import ByT5Tokenizer

__all__ = ["BYTE_OFFSET", "EOS_TOKEN", "PAD_TOKEN", "VOCAB_SIZE", "byte_tokenizer"]

PAD_TOKEN, EOS_TOKEN = 0, 1
BYTE_OFFSET = 3
"""Byte b is token b + 3: padding, end of text and unknown come first."""
VOCAB_SIZE = BYTE_OFFSET + 256


def byte_tokenizer() -> ByT5Tokenizer:
    """ByT5's byte tokenizer without its sentinel tokens."""
    return ByT5Tokenizer(extra_ids=0)
