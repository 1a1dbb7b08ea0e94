"""transformers' architectures made tiny: default configurations with every size cut down, by the names of the sizes."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MAX_PARAMETERS = 4_000_000

# The first pattern that is found in a setting's name tells the largest value it keeps.
_SIZES: list[tuple[str, int]] = [
    (r"kernel|stride|patch|image|window|chunk|num_channels|in_channels|merge|mel|every|skip|ratio|pool|pad\b", 1 << 30),
    (r"_(id|ids|index|idx|token)$", 99),
    (r"vocab|codebook_size|num_embeddings|n_symbols", 128),
    (r"first_k_dense|dense_layers", 1),
    (r"shared_layers|nextn|mtp|n_group$|topk_group|mamba_n_groups|^n_groups", 1),
    (r"per_tok|top_?k", 2),
    (r"experts$", 4),
    (r"layers?$|depth$|blocks$|^n_layer", 2),
    (r"(kv|key_value)_heads|head_kv|query_groups", 2),
    (r"heads?$|_heads_", 4),
    (r"head_dim|d_kv|kv_channels|head_size|d_head|rank$|state_size|d_state", 8),
    (r"intermediate|ffn|d_ff|mlp_dim|ff_dim|feedforward|n_inner|feed_forward", 48),
    (r"hidden|d_model|n_embd|embed|dim$|width|_size$|channels|d_inner|filters|projection", 32),
    (r"positions?|n_ctx|max_len|max_target|max_source", 64),
]


def tiny_models(start: int = 0, step: int = 1) -> Iterator[tuple[str, type[Any], Any]]:
    """A class of each architecture that can be made tiny so, with its configuration; the ones with a head first.

    Args:
        start: The first in the order of their names.
        step: From one to the next.
    """
    for name in sorted(CONFIG_MAPPING.keys())[start::step]:
        found = _tiny(name)
        if found is not None:
            yield name, *found


def _tiny(name: str) -> tuple[type[Any], Any] | None:
    try:
        config = CONFIG_MAPPING[name]()
        _shrink(config)
        config = type(config).from_dict(config.to_dict())
        classes = _classes(config)
    except Exception:  # noqa: BLE001 - sizes that do not go together, packages that are not there
        return None
    for kind in sorted(classes, key=lambda kind: "For" not in kind.__name__):
        try:
            with torch.device("meta"):
                model = kind(copy.deepcopy(config))
        except Exception:  # noqa: BLE001
            continue
        if sum(parameter.numel() for parameter in model.parameters()) <= MAX_PARAMETERS:
            return kind, config
    return None


def _shrink(config: Any) -> None:
    for key, value in list(vars(config).items()):
        if isinstance(value, hf.PretrainedConfig):
            _shrink(value)
        elif isinstance(value, dict):
            for item in value.values():
                if isinstance(item, hf.PretrainedConfig):
                    _shrink(item)
        elif not key.startswith("_") and key not in ("id2label", "label2id", "transformers_version"):
            setattr(config, key, _smaller(key, value))


def _smaller(key: str, value: Any) -> Any:
    if type(value) is int and value > 0:
        return min(value, next((size for pattern, size in _SIZES if re.search(pattern, key)), value))
    if isinstance(value, list | tuple) and value and all(type(item) is type(value[0]) for item in value):
        if re.search(r"types?$|per_layer|pattern|freq$", key) and isinstance(value[0], str | int | bool):
            return value[:2]
        if type(value[0]) is int and re.search(r"sizes$|dims?$|channels$", key) and max(value) > 32:
            return type(value)(max(item * 8 // min(value), 1) for item in value)
        if type(value[0]) is int and re.search(r"depths$|layers$", key):
            return type(value)(min(item, 1) for item in value)
    return value


def _classes(config: Any) -> list[type[Any]]:
    """The model classes beside a configuration's that take it."""
    package = type(config).__module__.rsplit(".", 1)[0]
    found = []
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if info.name.startswith("modeling_"):
            module = importlib.import_module(f"{package}.{info.name}")
            found += [
                kind
                for name, kind in vars(module).items()
                if inspect.isclass(kind)
                and issubclass(kind, hf.PreTrainedModel)
                and kind.__module__ == module.__name__
                and not name.startswith("_")
                and not name.endswith("PreTrainedModel")
                and kind.config_class is type(config)
            ]
    return found
