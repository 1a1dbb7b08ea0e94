"""Hugging Face in and out: what a directory needs beside weights so that `from_pretrained` opens it."""
