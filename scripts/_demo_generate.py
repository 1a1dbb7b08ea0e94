"""Opens an exported model with plain transformers, offline, and lets it write a little Python.

Usage: _demo_generate.py DIRECTORY
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

PROMPTS = ("import ", "def ", "class ")


def main(directory: str) -> None:
    """Prints one continuation of each prompt."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}, {size / 1e6:.1f} million parameters, {type(tokenizer).__name__}")
    torch.manual_seed(0)
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        written = model.generate(**tokens, max_new_tokens=120, do_sample=True, temperature=0.7, top_k=20)
        text = tokenizer.decode(written[0], skip_special_tokens=True)
        print("\n".join(f"   | {printable(line)}" for line in text.splitlines()), end="\n\n")


def printable(line: str) -> str:
    """A young model may write bytes that would upset a terminal."""
    return "".join(character if character.isprintable() else "?" for character in line)


if __name__ == "__main__":
    main(sys.argv[1])
