"""Merging an adapter into its base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hydra_ckpt.errors import CheckpointConfigError, CheckpointExistsError, CheckpointNotFoundError
from hydra_ckpt.hub.assets import reference_assets
from hydra_ckpt.hub.reference import at
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
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointExistsError(f"{out} is there already; name a directory that does not exist, or an empty one")
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise CheckpointNotFoundError(f"{adapter} holds no adapter_config.json: there is no adapter to merge")
    base = base or json.loads(path.read_text()).get("base_model_name_or_path")
    if not base:
        raise CheckpointConfigError(f"{path} names no base model (base_model_name_or_path), so name it with --base")
    try:
        import peft
        import transformers
    except ImportError as error:
        raise CheckpointConfigError(
            f"merging needs {error.name}: pip install 'hydra-ckpt[transformers,peft]'"
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        model: Any = kind.from_pretrained(
            base, local_files_only=True, dtype="auto" if dtype is None else getattr(torch, dtype)
        )
    except OSError as error:
        why = "" if Path(base).is_absolute() and not Path(base).exists() else f" ({error})"
        raise CheckpointNotFoundError(
            f"the base model {base} is not on this machine; name its directory, or a hub id in the cache, with "
            f"--base{why}"
        ) from None
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
