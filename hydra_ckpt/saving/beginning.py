"""What is compared when a run begins, before anything can have drifted."""

from __future__ import annotations

import torch

from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Extractor


def plain_parameters(extractor: Extractor, state: AppState) -> tuple[str, dict[str, torch.Tensor]]:
    """A text that is equal on ranks holding the same tensors, and the plain parameters (not on meta) by name."""
    found = {}
    for model, mapped in extractor.maps(state).items():
        prefix = f"{model}/" if model else ""
        tensors = {prefix + slot.name: slot.tensor for slot in mapped.slots if slot.is_parameter}
        found.update({name: tensor.detach() for name, tensor in tensors.items() if _is_plain(tensor)})
    return extractor.held(state), found


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta
