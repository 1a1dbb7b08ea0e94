"""PEFT: the adapters of a `PeftModel`, under the names in which peft itself saves them."""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from hydra_ckpt.errors import CheckpointConfigError, some_of
from hydra_ckpt.state.model_map import ModelMap
from hydra_ckpt.state.module_oracle import customizes, told_by
from hydra_ckpt.state.slots import persistent
from hydra_ckpt.state.wrappers import canonical, unwrap

log = logging.getLogger(__name__)

# Directories that a model's part has for other things.
_RESERVED = {"consolidated", "assets"}
# Settings that say nothing of what trained weights mean.
_OF_NO_CONSEQUENCE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_version",
    "revision",
    "task_type",
}
_DIRECTORY = re.compile(r"\w[\w-]*", re.ASCII)


def is_peft_model(model: nn.Module) -> bool:
    """Whether peft wraps this model; peft is not imported for this."""
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
        if not _DIRECTORY.fullmatch(adapter) or adapter in _RESERVED:
            raise CheckpointConfigError(
                f"the adapter's name {adapter!r} cannot name a directory; use letters, digits, _ and -"
            )


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters in it that no PeftModel wraps: under its tensors' names nothing opens it.

    Raises:
        CheckpointConfigError: There are some, as of transformers' own `add_adapter`.
    """
    peft = sys.modules.get("peft")
    if peft is None or is_peft_model(model):
        return
    layer = peft.tuners.tuners_utils.BaseTunerLayer
    if any(isinstance(module, layer) for module in model.modules()):
        raise CheckpointConfigError(
            "the model has adapters that no PeftModel holds (add_adapter(), load_adapter(), "
            "inject_adapter_in_model(), a PeftMixedModel), and an export would hold the base model's weights under "
            "names that nothing can open. Wrap it with peft.get_peft_model instead and set checkpoint.is_peft=true, "
            "or set checkpoint.save_consolidated=false, which saves and resumes all of it"
        )


def adapters(name: str, model: nn.Module) -> dict[str, str]:
    """The adapters of a model: the name under which a checkpoint holds each, to peft's name of it.

    The one called `default`, or else the first, has the model's own name; others append theirs to it.
    """
    held = list(_core(model).peft_config)
    first = "default" if "default" in held else held[0]
    prefix = f"{name}/" if name else ""
    return {name if adapter == first else prefix + adapter: adapter for adapter in [first, *held]}


def only_adapter(mapped: ModelMap, modules: Sequence[nn.Module], adapter: str, *, buffers: bool) -> ModelMap:
    """The map of what belongs to an adapter, modules_to_save included, in peft's names.

    Args:
        mapped: The map of the whole model.
        modules: The model's parts.
        adapter: peft's name of it.
        buffers: Whether the base model's buffers, which are in no adapter's file, are stored separately.

    Raises:
        CheckpointConfigError: peft stores values for it that are not tensors of the model.
    """
    names: defaultdict[int, list[str]] = defaultdict(list)
    for module in modules:
        for name, tensor in _adapter_tensors(module, adapter).items():
            names[id(tensor)].append(name)
    kept = {slot.name: names[id(slot.tensor)] for slot in mapped.slots if id(slot.tensor) in names}
    return mapped.only(kept, buffers=buffers)


# Stands for entries that hooks of an adapter's modules add. They are not tensors of it; see `module_oracle`.
_NO_TENSOR = torch.empty(0, device="cpu")


def _added_names(core: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The names that an adapter's modules return themselves, each with the tensor that represents none."""
    own = [
        (place, module)
        for place, module in core.named_modules(remove_duplicate=False)
        if place.endswith(f".{adapter}") and any(map(customizes, module.modules()))
    ]
    return {f"{place}.{name}": _NO_TENSOR for place, module in own for name in told_by(module, place)}


def _adapter_tensors(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors, live, by the names that peft gives them; one of several names under each."""
    from peft import get_peft_model_state_dict

    core = _core(model)
    # peft asks modules for their names, and so needs to find tensors under these, whatever wrappers add to them.
    live = _added_names(core, adapter)
    live.update(
        (f"{place}.{name}".lstrip("."), tensor)
        for place, module in core.named_modules(remove_duplicate=False)
        for name, tensor in _held(module)
    )
    # It only filters and renames then, so the tensors show which name became which.
    select = partial(get_peft_model_state_dict, core, state_dict=live, adapter_name=adapter)
    try:
        with _unpruned(core.peft_config[adapter]):
            found = select(save_embedding_layers=False)
            if _own_embeddings(core, adapter) - {id(tensor) for tensor in found.values()}:
                found = {**select(save_embedding_layers=True), **found}
    except (KeyError, ValueError) as error:
        raise CheckpointConfigError(
            f"peft cannot tell what belongs to the adapter {adapter!r} "
            f"({core.peft_config[adapter].peft_type}): {type(error).__name__}: {error}"
        ) from error
    found = {name: tensor for name, tensor in found.items() if tensor is not _NO_TENSOR}
    known = {id(tensor) for tensor in live.values()}
    computed = [name for name, tensor in found.items() if id(tensor) not in known]
    if computed:
        raise CheckpointConfigError(
            f"{some_of(computed)}: peft computes these when it saves the adapter {adapter!r} "
            f"({core.peft_config[adapter].peft_type}), so training could not continue from them. Adapters of this "
            "kind cannot be saved; choose another one, or another way of storing it in its configuration"
        )
    return {canonical(name): tensor for name, tensor in found.items()}


def refuse_lost(mapped: Collection[ModelMap], trained: Collection[int]) -> None:
    """Refuse parameters that are trained but are in no adapter's files.

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
            f"{some_of(lost)}: trained, but in no adapter's files, so a checkpoint would lose them. Freeze them, or "
            "name their modules in peft's modules_to_save"
        )


def _held(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a module itself stores."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for name in persistent(module):
        yield name, module.get_buffer(name)


@contextmanager
def _unpruned(config: Any) -> Iterator[None]:
    """Let peft find whole tensors where it would cut out ranks that AdaLoRA has set to zero: training needs them."""
    pattern = getattr(config, "rank_pattern", None) if _is_adalora(config) else None
    if pattern is None:
        yield
        return
    config.rank_pattern = None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def _is_adalora(config: Any) -> bool:
    return bool(config.peft_type == "ADALORA")  # an enumeration of texts


def _embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """The base model's input and output embeddings: the module in the model, and the base model's own weight in it."""
    for outer in embeddings_of(_core(model).get_base_model()):
        inner: nn.Module | None = outer
        while inner is not None:
            inner = unwrap(inner)
            weight = dict(inner.named_parameters(recurse=False)).get("weight")
            if weight is not None:
                yield outer, weight
            # peft's wrappers answer for the weight of an adapter that is active, or compute one.
            children = dict(inner.named_children())
            inner = children.get("original_module") or children.get("base_layer")


def embeddings_of(base: nn.Module) -> list[nn.Module]:
    """A model's input and output embeddings, as far as it has such."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(NotImplementedError):  # what transformers raises for models without tokens
            found.append(getattr(base, getter, lambda: None)())
    return [module for module in found if isinstance(module, nn.Module)]


def trained_embeddings(model: nn.Module) -> set[int]:
    """Identities of the base model's embeddings that are trained themselves, as after new tokens were added."""
    return {id(weight) for _, weight in _embeddings(model) if weight.requires_grad}


def _own_embeddings(model: nn.Module, adapter: str) -> set[int]:
    """Identities of the embeddings that the base model's files do not have so: trained themselves, or resized."""
    core = _core(model)
    config = core.peft_config[adapter]
    if not _is_resized(core.get_base_model(), config.base_model_name_or_path, config.revision):
        return trained_embeddings(model)
    # Where the adapter has its own copy, nothing of the base model's is used.
    return {id(weight) for outer, weight in _embeddings(model) if adapter not in getattr(outer, "modules_to_save", ())}


# The vocabulary of base models in their files, once it is known.
_BASE_SIZES: MutableMapping[nn.Module, tuple[int | None]] = WeakIdKeyDictionary()


def _is_resized(base: Any, name: str | None, revision: str | None) -> bool:
    """Whether a model's vocabulary has another size than in its files; peft, too, looks at the configurations.

    Args:
        base: The base model.
        name: A directory, or a hub id of which the cache may have the configuration; nothing is downloaded.
        revision: Of the hub id.
    """
    config: Any = getattr(base, "config", None)
    if not name or not hasattr(config, "get_text_config"):
        return False
    size = getattr(config.get_text_config(), "vocab_size", None)
    known = _BASE_SIZES.get(base)
    if known is None:
        try:
            stored = type(config).from_pretrained(name, revision=revision or "main", local_files_only=True)
        except (OSError, ValueError):
            log.warning(
                "the configuration of the base model %s is not on this machine, so it is unknown whether the "
                "vocabulary was resized: if it was, train the embeddings or name them in modules_to_save, or they "
                "are not saved with the adapter",
                name,
            )
            return False
        # Decided once: what a checkpoint holds must not depend on what becomes of the base model's files.
        known = _BASE_SIZES[base] = (getattr(stored.get_text_config(), "vocab_size", None),)
    return known[0] != size


def adapter_config(model: nn.Module, adapter: str) -> Any:
    """An adapter's configuration as peft saves it: ready for inference, naming its base model."""
    core = _core(model)
    config = copy.copy(core.peft_config[adapter])
    config.inference_mode = True
    if _is_adalora(config):
        config.rank_pattern = None  # see `_unpruned`
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(core.get_base_model(), "name_or_path", None) or None
    return config


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def changed_settings(model: nn.Module, adapter: str, saved: Mapping[str, Any]) -> list[str]:
    """How a live adapter would interpret the same weights differently than the saved one, in words.

    Args:
        model: The model.
        adapter: peft's name of the adapter.
        saved: Its `adapter_config.json`.
    """
    live = json.loads(json.dumps(adapter_config(model, adapter).to_dict(), default=_plain))
    keys = [key for key in live if key in saved and key not in _OF_NO_CONSEQUENCE]
    different = [key for key in keys if _ordered(live[key]) != _ordered(saved[key])]
    return [f"{key} was {saved[key]!r} and is {live[key]!r}" for key in different]


def _ordered(value: Any) -> Any:
    """Sets of names are lists in JSON."""
    return sorted(map(str, value)) if isinstance(value, list) else value


def _core(model: nn.Module) -> Any:
    return unwrap(model)
