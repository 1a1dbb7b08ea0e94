"""Modules that get the sizes and the parts of what they load only while they load it.

Buffers of observers change their size, others are None until they are loaded, and hooks add whole modules. Only the
module itself knows, so it is tried on a copy. Example: a module whose hook makes as many heads as there are to load has
none as built, and accepts `heads.0.weight` and `heads.1.weight` together.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from hydra_ckpt.state.module_oracle import customizes_loading

# Larger modules are not copied to try what they do.
_MOST_TRIED_BYTES = 64 << 20


def accepted(modules: Mapping[str, nn.Module], odd: Mapping[str, torch.Tensor]) -> set[str]:
    """Which tensors that a model lacks, or has in another size, its modules take when they are loaded.

    Args:
        modules: The model's modules, by what the names of their tensors begin with.
        odd: These tensors by name, of the saved size and element type, on the meta device.
    """
    loading = {place: module for place, module in modules.items() if odd and customizes_loading(module)}
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, value in odd.items():
        place = max((place for place in loading if name.startswith(place)), key=len, default=None)
        if place is not None:
            found[place][name] = value
    return {name for place, values in found.items() if _accepts(loading[place], place, values) for name in values}


def _accepts(module: nn.Module, prefix: str, values: Mapping[str, torch.Tensor]) -> bool:
    """Whether a module has these tensors after they were loaded into a copy of it."""
    held = sum(item.nbytes for item in (*module.parameters(), *module.buffers(), *values.values()))
    if held > _MOST_TRIED_BYTES:
        return False
    given = {name.removeprefix(prefix): torch.zeros_like(value, device="cpu") for name, value in values.items()}
    try:
        tried = copy.deepcopy(module)
        tried.load_state_dict({**tried.state_dict(), **given})
        after = tried.state_dict()
        return all(name in after and after[name].shape == value.shape for name, value in given.items())
    except Exception:  # noqa: BLE001 - a foreign module's own loading
        return False
