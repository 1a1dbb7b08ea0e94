"""Modules that get the sizes and the parts of what they load only while they load it.

Buffers of observers change their size, others are None until they are loaded, and hooks add whole modules. Only the
module itself knows, so it is tried on a copy. Example: a module whose hook makes as many heads as there are to load has
none as built, and accepts `heads.0.weight` and `heads.1.weight` together.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Mapping

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
        if (place := _innermost(loading, name)) is not None:
            found[place][name] = value
    return {name for place, values in found.items() if _accepts(loading[place], place, values) for name in values}


def outlasting(modules: Mapping[str, nn.Module], entries: Collection[str]) -> set[str]:
    """Entries that modules report still when they have loaded a state without them: they need a value.

    Others go away: a module may report some only at times. Example: a module that reports `best` once it has one, and
    none any more after it has loaded a state without it.

    Args:
        modules: The model's modules, by what the names of their tensors begin with.
        entries: The names.
    """
    loading = {place: module for place, module in modules.items() if entries and customizes_loading(module)}
    found: dict[str, set[str]] = defaultdict(set)
    for name in entries:
        if (place := _innermost(loading, name)) is not None:
            found[place].add(name)
    return {name for place, names in found.items() for name in _kept(loading[place], place, names)}


def _kept(module: nn.Module, prefix: str, names: Collection[str]) -> set[str]:
    """Which entries a module reports after a state without them was loaded into a copy of it."""
    if sum(item.nbytes for item in (*module.parameters(), *module.buffers())) > _MOST_TRIED_BYTES:
        return set()
    without = {name.removeprefix(prefix) for name in names}
    try:
        tried = copy.deepcopy(module)
        tried.load_state_dict({name: value for name, value in tried.state_dict().items() if name not in without})
        return {prefix + name for name in without & tried.state_dict().keys()}
    except Exception:  # noqa: BLE001 - a foreign module's own loading
        return set()


def _innermost(places: Collection[str], name: str) -> str | None:
    """The longest of the places that a name begins with."""
    return max((place for place in places if name.startswith(place)), key=len, default=None)


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
