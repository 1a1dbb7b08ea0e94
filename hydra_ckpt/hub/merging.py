"""Merges an adapter into its base model."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError

from hydra_ckpt.errors import (
    CheckpointConfigError,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    KeyMismatchError,
)
from hydra_ckpt.files import Files
from hydra_ckpt.hub.assets import reference_assets
from hydra_ckpt.hub.model_export import FLOATS
from hydra_ckpt.hub.offline import find_model, models_of
from hydra_ckpt.hub.reference import at
from hydra_ckpt.hub.skeletons import configured, skeleton
from hydra_ckpt.hub.writing import drafted, refuse_occupied
from hydra_ckpt.layout.file_layout import DEFAULT_FILE_BYTES
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.state.peft import embeddings_of
from hydra_ckpt.storage.header import read_header
from hydra_ckpt.storage.verification import checks, findings
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.small_files import read_small_file

# What peft puts before the names of the base model's own tensors.
_PREFIX = "base_model.model."
_MAX_SETTINGS_BYTES = 16 << 20
# Task to the class its adapter was trained on, if the base model's files may hold another class: these tasks use their
# own heads. The same mapping as in peft's Auto classes.
_MAPPINGS = {
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}


def merge_adapter(
    checkpoint: Checkpoint,
    out: Path,
    *,
    part: str = names.MODEL,
    base: str | None = None,
    dtype: str | None = None,
    max_file_bytes: int | None = None,
    verify: bool = True,
) -> list[str]:
    """Write the full model that results from an adapter and its base model; holds all of it in memory.

    Args:
        checkpoint: A checkpoint with an adapter.
        out: The directory to create; it must not exist, or must be empty. A failure leaves nothing in its place.
        part: `model`, or the name of one of several adapters.
        base: The base model, a hub id in the cache or a directory; None for the one that the adapter names.
        dtype: Dtype to convert the merged model to; None for the base model's.
        max_file_bytes: Size at which a new file begins; None for 5 GB.
        verify: Whether to compare the adapter's bytes with their digests.

    Returns:
        The names of the weight files.

    Raises:
        CheckpointNotFoundError: The adapter, or its base model, does not exist.
        CheckpointExistsError: `out` exists and is not empty.
        CheckpointConfigError: The adapter names no base model, one that cannot be opened, or one of another shape; or a
            package is missing.
        KeyMismatchError: The adapter does not belong to this base model.
        CorruptCheckpointError: The adapter's files are damaged.
    """
    refuse_occupied(out)
    if dtype is not None and dtype not in FLOATS:
        raise CheckpointConfigError(f"dtype={dtype} is not one of: {', '.join(FLOATS)}")
    adapter = _located(checkpoint, part, verify=verify)
    settings = _settings(adapter)
    revision = settings.get("revision") if base is None else None
    base = base or settings.get("base_model_name_or_path")
    if not base:
        raise CheckpointConfigError(
            f"{adapter / 'adapter_config.json'} names no base model (base_model_name_or_path), so name it with --base"
        )
    stored = {item.spec.name: item.spec for item in read_header(adapter, f"{names.ADAPTER}.safetensors")[0]}
    model = _opened(base, revision, settings, stored)
    rows = _vocabulary(model, stored)
    if rows is not None:
        model.resize_token_embeddings(rows)
    merged = _merged(_adapted(model, adapter, base, stored), adapter)
    if dtype is not None:
        merged = merged.to(getattr(torch, dtype))
    return _write(merged, out, max_file_bytes or DEFAULT_FILE_BYTES, _beside(adapter, base, revision))


def _write(merged: Any, out: Path, max_file_bytes: int, beside: Mapping[str, bytes]) -> list[str]:
    """Write a model as transformers does, plus the other files, unless transformers has written one of that name."""
    files = Files()
    with drafted(out, files) as draft:
        try:
            merged.save_pretrained(draft, max_shard_size=max_file_bytes)
        except (RuntimeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"the merged model cannot be written to {out}: {error}") from error
        weights = sorted(path.name for path in draft.glob("*.safetensors"))
        for name in weights:  # safetensors makes them readable only by their owner
            (draft / name).chmod((draft / "config.json").stat().st_mode)
        for name, data in beside.items():
            if not (draft / name).exists():
                files.make_dir((draft / name).parent)
                files.write_new(draft / name, data)
    return weights


def _located(checkpoint: Checkpoint, part: str, *, verify: bool) -> Path:
    """The directory of an adapter; also verifies its bytes."""
    models = models_of(checkpoint)
    model = find_model(models, part)
    if model is None:
        raise CheckpointNotFoundError(f"{checkpoint.path} has no part {part!r}; it has {', '.join(models)}")
    place = f"{model}/{names.CONSOLIDATED}/"
    manifest = checkpoint.manifest
    if f"{place}adapter_config.json" not in manifest.files:
        raise CheckpointNotFoundError(f"{model} of {checkpoint.path} is not an adapter: export it without --merge")
    if verify:
        found = [check for check in checks(checkpoint.path, manifest.files, manifest.digests) if place in check.file]
        for error in findings(checkpoint.path, found):
            raise error
    return checkpoint.path / place


def _settings(adapter: Path) -> dict[str, Any]:
    """An adapter's configuration, with the keys used here checked."""
    path = adapter / "adapter_config.json"
    kinds = {"base_model_name_or_path": str, "task_type": str, "revision": str, "auto_mapping": dict}
    try:
        found = json.loads(read_small_file(path, _MAX_SETTINGS_BYTES))
        wrong = [key for key, kind in kinds.items() if not isinstance(found.get(key), kind | None)]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"is not an adapter configuration: {error}") from None
    if wrong:
        raise CorruptCheckpointError(path, f"is not an adapter configuration: {wrong[0]} is {found[wrong[0]]!r}")
    return dict(found)


def _merged(adapted: Any, adapter: Path) -> Any:
    """The base model with the adapter merged into its weights."""
    try:
        return adapted.merge_and_unload()
    except Exception as error:
        raise CheckpointConfigError(
            f"peft cannot merge the adapter {adapter}: {type(error).__name__}: {error}. Use it as an adapter"
        ) from error


def _refuse_quantized(base: str, config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointConfigError(
            f"the base model {base} is quantized, so an adapter cannot be merged into its weights: name an "
            "unquantized copy with --base. A training run with model_repo_id makes one: load_base_model, then a save"
        )


def _opened(base: str, revision: str | None, settings: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> Any:
    """The base model, with the class that the adapter was trained on."""
    kind, config = configured(base, "--base", revision)
    _refuse_quantized(base, config)
    mapping, task = settings.get("auto_mapping"), settings.get("task_type")
    if task in _MAPPINGS:
        import transformers

        try:
            kind = getattr(transformers, _MAPPINGS[task])[type(config)]
        except KeyError:
            raise CheckpointConfigError(
                f"{base} is a {config.model_type}, for which transformers has no model for the adapter's task {task}; "
                "name the model it was trained on with --base"
            ) from None
        kind = kind[0] if isinstance(kind, tuple) else kind
    elif task is None and mapping:
        kind = _mapped(mapping, kind)
    try:
        labels = _labels(skeleton(kind, config), config, stored)
        if labels is not None:
            config.num_labels = labels
        model, info = kind.from_pretrained(
            base,
            config=config,
            revision=revision or "main",
            local_files_only=True,
            trust_remote_code=False,
            dtype="auto",
            ignore_mismatched_sizes=labels is not None,
            output_loading_info=True,
        )
    except Exception as error:
        raise CheckpointConfigError(
            f"the base model {base} cannot be opened: {type(error).__name__}: {error}"
        ) from error
    brought = {name.removeprefix(_PREFIX) for name in stored}
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])} - brought
    if missing:
        raise KeyMismatchError(
            base,
            missing=sorted(missing),
            remedy=f"The base model's files lack these for a {kind.__name__}, and so does the adapter: "
            "name the model it was trained on with --base.",
        )
    return model


def _mapped(mapping: Mapping[str, Any], otherwise: type[Any]) -> type[Any]:
    """The class that an adapter without a task names; imports only from transformers."""
    library = str(mapping.get("parent_library"))
    if library.split(".", maxsplit=1)[0] != "transformers":
        raise CheckpointConfigError(
            f"the adapter was trained on {mapping.get('base_model_class')} of {library}, but only transformers models "
            "can be merged here. Merge it in Python: model.merge_and_unload()"
        )
    try:
        found = getattr(importlib.import_module(library), str(mapping.get("base_model_class")), otherwise)
    except ImportError:
        return otherwise
    return found if isinstance(found, type) else otherwise


def _labels(model: Any, config: Any, stored: Mapping[str, TensorSpec]) -> int | None:
    """Rows of a head that an adapter includes, if they are more or fewer than the configuration's labels."""
    for name, parameter in model.named_parameters():
        spec = stored.get(_PREFIX + name)
        if spec is not None and spec.shape != tuple(parameter.shape) and parameter.shape[0] == config.num_labels:
            return spec.shape[0]
    return None


def _vocabulary(model: Any, stored: Mapping[str, TensorSpec]) -> int | None:
    """Rows of the embedding that an adapter includes because its vocabulary was resized; None if it has none."""
    embeddings = embeddings_of(model)
    places = [name for name, module in model.named_modules() if any(module is each for each in embeddings)]
    found = [stored[f"{_PREFIX}{place}.weight"] for place in places if f"{_PREFIX}{place}.weight" in stored]
    return found[0].shape[0] if found and found[0].shape else None


def _adapted(model: Any, adapter: Path, base: str, stored: Mapping[str, TensorSpec]) -> Any:
    """The base model with its adapter; checks that every tensor of the adapter fits."""
    try:
        import peft
    except ImportError:
        raise CheckpointConfigError("merging needs peft: pip install 'hydra-ckpt[transformers,peft]'") from None
    try:
        found = peft.PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:
        raise CheckpointConfigError(
            f"the adapter {adapter} does not fit the base model {base}: {type(error).__name__}: {error}. Name the one "
            "it was trained on with --base"
        ) from error
    wanted = peft.get_peft_model_state_dict(found, save_embedding_layers=False)
    # Embeddings are stored beside the adapter's own tensors, under names from peft or from the model.
    known = {*wanted, *found.state_dict()}
    if embeddings_of(model):
        known |= peft.get_peft_model_state_dict(found, save_embedding_layers=True).keys()
    missing, unexpected = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - known)
    if missing or unexpected:
        raise KeyMismatchError(
            str(adapter),
            missing=missing,
            unexpected=unexpected,
            remedy=f"It was trained on a different model than {base}: name that one with --base.",
        )
    _refuse_tied(model, stored)
    return found


def _refuse_tied(model: Any, stored: Mapping[str, TensorSpec]) -> None:
    """Refuse an adapter of one of two modules that share their weight: merged, it would change both."""
    modules = embeddings_of(model)
    weights = {id(getattr(getattr(module, "base_layer", module), "weight", None)) for module in modules}
    if len(modules) < 2 or len(weights) > 1:
        return
    places = [name for name, module in model.named_modules() if any(module is each for each in modules)]
    changed = [name for name in stored for place in places if name.startswith(f"{_PREFIX}{place}.lora_")]
    if changed:
        raise CheckpointConfigError(
            f"{changed[0]}: the base model ties its input and output embeddings, and merging what one of them has "
            "learned would change both. Use the adapter as it is"
        )


def _beside(adapter: Path, base: str, revision: str | None) -> dict[str, bytes]:
    """The tokenizer's files: the adapter's, otherwise the base model's."""
    found = reference_assets(at(adapter), with_tokenizer=True)
    if found:
        return found
    directory = Path(base)
    if not directory.is_dir():
        config = try_to_load_from_cache(base, "config.json", revision=revision)
        if not isinstance(config, str):
            return {}
        directory = Path(config).parent
    return reference_assets(at(directory), with_tokenizer=True)
