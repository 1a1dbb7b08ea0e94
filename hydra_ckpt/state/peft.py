"""PEFT: the adapter of a `PeftModel`, under the names in which peft itself saves it."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.state.model import ModelMap, unwrap


def is_peft_model(model: nn.Module) -> bool:
    """Whether peft wraps this model; importing peft is left to whoever did the wrapping."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(unwrap(model), peft.PeftModel)


def check_kind(model: nn.Module, wanted: bool) -> None:
    """Compare a model with `checkpoint.is_peft`.

    Raises:
        CheckpointConfigError: One is PEFT and the other is not, or the model has several adapters.
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
    if found and len(_core(model).peft_config) > 1:
        raise CheckpointConfigError(
            f"the PeftModel has several adapters ({', '.join(_core(model).peft_config)}); this version saves models "
            "with one. Delete the others (model.delete_adapter), or save them with their own save_pretrained"
        )


def keep_adapter(mapped: ModelMap, model: nn.Module) -> None:
    """Reduce a model's map to what belongs to the adapter, modules_to_save included, in peft's own names."""
    from peft import get_peft_model_state_dict

    live = {slot.name: slot.tensor for slot in mapped.slots}
    # peft only filters and renames, so that the tensors tell which name became which.
    kept = get_peft_model_state_dict(_core(model), state_dict=live, save_embedding_layers=False)
    names = {id(tensor): name for name, tensor in kept.items()}
    mapped.keep({slot.name: names[id(slot.tensor)] for slot in mapped.slots if id(slot.tensor) in names})


def adapter_config(model: nn.Module) -> Any:
    """The configuration of the only adapter, as peft saves it: ready for inference."""
    [live] = _core(model).peft_config.values()
    config = copy.copy(live)
    config.inference_mode = True
    return config


def _core(model: nn.Module) -> Any:
    return unwrap(model)
