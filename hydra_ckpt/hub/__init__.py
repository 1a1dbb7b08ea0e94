"""Hugging Face in and out: what a directory needs besides weights so that `from_pretrained` can open it."""
