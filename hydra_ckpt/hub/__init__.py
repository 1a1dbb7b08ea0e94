"""Hugging Face import and export: what a directory needs besides weights so that `from_pretrained` can open it."""
