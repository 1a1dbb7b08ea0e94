"""Merging an adapter into its base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hydra_ckpt.errors import CheckpointConfigError, CheckpointNotFoundError
from hydra_ckpt.hub.assets import reference_assets
from hydra_ckpt.hub.reference import at
from hydra_ckpt.hub.skeletons import configured
from hydra_ckpt.hub.writing import refuse_occupied
from hydra_ckpt.storage.header import read_header


def merge_adapter(adapter: Path, out: Path, *, base: str | None, dtype: str | None, max_file_bytes: int) -> None:
    """Write the full model that an adapter and its base model make; all of it is held in memory.

    Args:
        adapter: A directory as peft writes it.
        out: The directory to make; it must not exist, or be empty.
        base: The base model, a hub id or a directory; None for the one that the adapter names.
        dtype: Element type; None for the base model's.
        max_file_bytes: Size at which a new file begins.

    Raises:
        CheckpointNotFoundError: The adapter, or its base model, is not there.
        CheckpointExistsError: There is something at `out`.
        CheckpointConfigError: The adapter names no base model, or a package is missing.
    """
    refuse_occupied(out)
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise CheckpointNotFoundError(f"{adapter} holds no adapter_config.json: there is no adapter to merge")
    base = base or json.loads(path.read_text()).get("base_model_name_or_path")
    if not base:
        raise CheckpointConfigError(f"{path} names no base model (base_model_name_or_path), so name it with --base")
    kind, _ = configured(base, "--base")
    try:
        import peft
    except ImportError:
        raise CheckpointConfigError("merging needs peft: pip install 'hydra-ckpt[transformers,peft]'") from None
    try:
        model: Any = kind.from_pretrained(
            base, local_files_only=True, dtype="auto" if dtype is None else getattr(torch, dtype)
        )
    except OSError as error:
        raise CheckpointNotFoundError(f"the base model {base} cannot be opened: {error}") from None
    rows = _vocabulary(model, adapter)
    if rows is not None:
        model.resize_token_embeddings(rows)
    merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(out, max_shard_size=max_file_bytes)
    for weights in out.glob("*.safetensors"):  # safetensors keeps them from everybody else
        weights.chmod((out / "config.json").stat().st_mode)
    for name, data in reference_assets(at(adapter), with_tokenizer=True).items():
        (out / name).write_bytes(data)


def _vocabulary(model: Any, adapter: Path) -> int | None:
    """Rows of the embedding that an adapter brings along, its vocabulary having been resized; None if it has none."""
    embedding = model.get_input_embeddings()
    place = next((name for name, module in model.named_modules() if module is embedding), None)
    weights = adapter / "adapter_model.safetensors"
    if place is None or not weights.is_file():
        return None
    stored = {item.spec.name: item.spec for item in read_header(adapter, weights.name)[0]}
    found = stored.get(f"base_model.model.{place}.weight")
    return None if found is None else found.shape[0]
