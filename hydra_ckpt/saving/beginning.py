"""What is looked at when a run begins, before anything can have drifted."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Extractor


def plain_parameters(extractor: Extractor, state: AppState) -> tuple[str, dict[str, torch.Tensor]]:
    """A text that is equal on ranks that hold the same tensors, and the parameters that are no DTensors, by name."""
    found = {}
    for model, mapped in extractor.maps(state).items():
        prefix = f"{model}/" if model else ""
        slots = [slot for slot in mapped.slots if slot.is_parameter and not isinstance(slot.tensor, DTensor)]
        found.update({prefix + slot.name: slot.tensor.detach() for slot in slots})
    return extractor.held(state), found
