"""PEFT: the adapters of a `PeftModel`, under the names in which peft itself saves them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from torch import nn

from hydra_ckpt.errors import CheckpointConfigError, some_of
from hydra_ckpt.state.model import ModelMap, unwrap

# Directories that a model's part has for other things.
_RESERVED = {"consolidated", "assets"}


def is_peft_model(model: nn.Module) -> bool:
    """Whether peft wraps this model; importing peft is left to whoever did the wrapping."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(unwrap(model), peft.PeftModel)


def check_kind(model: nn.Module, wanted: bool) -> None:
    """Compare a model with `checkpoint.is_peft`.

    Raises:
        CheckpointConfigError: One is PEFT and the other is not, or an adapter's name cannot name a directory.
    """
    found = is_peft_model(model)
    if found and not wanted:
        raise CheckpointConfigError(
            "checkpoint.is_peft=false, but the model is a PeftModel: set checkpoint.is_peft=true to save its adapter, "
            "or pass the merged model (model.merge_and_unload())"
        )
    if wanted and not found:
        raise CheckpointConfigError(
            f"checkpoint.is_peft=true, but the model is a {type(unwrap(model)).__name__}, not a PeftModel: "
            "wrap it with peft.get_peft_model, or set checkpoint.is_peft=false"
        )
    for adapter in _core(model).peft_config if found else ():
        if not adapter.isidentifier() or adapter in _RESERVED:
            raise CheckpointConfigError(f"the adapter's name {adapter!r} cannot name a directory; choose an identifier")


def adapters(name: str, model: nn.Module) -> dict[str, str]:
    """The adapters of a model: the name under which a checkpoint holds each, to peft's name of it.

    The one called `default`, or else the first, has the model's own name; others have theirs behind it.
    """
    held = list(_core(model).peft_config)
    first = "default" if "default" in held else held[0]
    prefix = f"{name}/" if name else ""
    return {name if adapter == first else prefix + adapter: adapter for adapter in [first, *held]}


def keep_adapter(mapped: ModelMap, modules: Sequence[nn.Module], adapter: str) -> None:
    """Reduce the map of a model's parts to what belongs to an adapter, modules_to_save included, in peft's names."""
    names: dict[int, str] = {}
    for module in modules:
        names.update(_adapter_names(mapped, module, adapter))
    mapped.keep({slot.name: names[id(slot.tensor)] for slot in mapped.slots if id(slot.tensor) in names})


def _adapter_names(mapped: ModelMap, model: nn.Module, adapter: str) -> dict[int, str]:
    """Identity of an adapter's tensors to the name that peft gives them."""
    from peft import get_peft_model_state_dict

    live = {slot.name: slot.tensor for slot in mapped.slots}
    # peft looks for tied and shared tensors under any of their names.
    live.update({alias: live[name] for alias, name in mapped.aliases.items() if name in live})
    # peft only filters and renames, so that the tensors tell which name became which.
    select = partial(get_peft_model_state_dict, _core(model), state_dict=live, adapter_name=adapter)
    try:
        names = {id(tensor): name for name, tensor in select(save_embedding_layers=False).items()}
        if _own_embeddings(model, adapter) - names.keys():
            names = {id(tensor): name for name, tensor in select(save_embedding_layers=True).items()} | names
    except (KeyError, ValueError) as error:
        raise CheckpointConfigError(
            f"peft cannot tell what belongs to the adapter {adapter!r} "
            f"({_core(model).peft_config[adapter].peft_type}): {type(error).__name__}: {error}"
        ) from error
    return names


def refuse_lost(mapped: Collection[ModelMap], trained: Collection[int]) -> None:
    """Refuse parameters that are trained and stand in no adapter's files.

    Args:
        mapped: The adapters' maps, reduced.
        trained: Identities of the parameters that optimizers change.

    Raises:
        CheckpointConfigError: There are some.
    """
    stored = {id(slot.tensor) for item in mapped for slot in item.slots}
    names = {identity: name for item in mapped for identity, name in item.names.items()}
    lost = [name for identity, name in names.items() if identity in trained and identity not in stored]
    if lost:
        raise CheckpointConfigError(
            f"{some_of(lost)}: trained, but in no adapter's "
            "files, so that a checkpoint would lose them. Freeze them, or name their modules in peft's "
            "modules_to_save. Adapters that learn prompts (prompt tuning, prefix tuning, p-tuning) cannot be saved: "
            "what peft stores of them is computed from their parameters"
        )


def _own_embeddings(model: nn.Module, adapter: str) -> set[int]:
    """Identities of the embeddings that the base model's files do not have so: trained themselves, or resized."""
    base = _core(model).get_base_model()
    found = [getattr(base, getter, lambda: None)() for getter in ("get_input_embeddings", "get_output_embeddings")]
    weights = [getattr(module, "weight", None) for module in found]
    resized = _is_resized(base, _core(model).peft_config[adapter].base_model_name_or_path)
    return {id(weight) for weight in weights if isinstance(weight, nn.Parameter) and (resized or weight.requires_grad)}


def _is_resized(base: Any, name: str | None) -> bool:
    """Whether a model's vocabulary has another size than in its files; peft, too, looks at the configurations.

    Args:
        base: The base model.
        name: A directory, or a hub id of which the cache may have the configuration; nothing is downloaded.
    """
    config: Any = getattr(base, "config", None)
    if not name or not hasattr(config, "get_text_config"):
        return False
    try:
        stored = type(config).from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return False  # not on this machine: what it was cannot be told
    sizes = [getattr(each.get_text_config(), "vocab_size", None) for each in (stored, config)]
    return sizes[0] != sizes[1]


def adapter_config(model: nn.Module, adapter: str) -> Any:
    """An adapter's configuration as peft saves it: ready for inference, naming its base model."""
    core = _core(model)
    config = copy.copy(core.peft_config[adapter])
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(core.get_base_model(), "name_or_path", None) or None
    return config


def _core(model: nn.Module) -> Any:
    return unwrap(model)
