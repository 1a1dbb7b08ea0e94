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

from hydra_ckpt.state.module_oracle import customizes_loading, has_loading_hooks

# Larger modules are not copied to try what they do.
_MOST_TRIED_BYTES = 64 << 20
# Bytes of tensors that a copy has to overwrite.
_MARK = 0x71


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


def renamed(
    modules: Mapping[str, nn.Module], odd: Mapping[str, torch.Tensor], missing: Collection[str]
) -> tuple[set[str], set[str]]:
    """Tensors of other names from which the hooks of modules make those that the model needs.

    Example: PyTorch's parametrized `weight_norm` takes the `weight_g` and `weight_v` of the older one.

    Args:
        modules: The model's modules, by what the names of their tensors begin with.
        odd: Saved tensors that the model lacks, by name, on the meta device.
        missing: Names of the model's tensors that were not saved.

    Returns:
        The names of those that are taken, and of those that are made from them.
    """
    taken: set[str] = set()
    made: set[str] = set()
    places = [place for place, module in modules.items() if odd and missing and has_loading_hooks(module)]
    for place in sorted(places, key=len, reverse=True):  # inner modules first
        given = {name: value for name, value in odd.items() if name.startswith(place) and name not in taken}
        lost = {name for name in missing if name.startswith(place) and name not in made}
        if given and lost and _makes(modules[place], place, given, lost):
            taken.update(given)
            made.update(lost)
    return taken, made


@torch.no_grad()
def _makes(module: nn.Module, prefix: str, values: Mapping[str, torch.Tensor], missing: Collection[str]) -> bool:
    """Whether a copy of a module loads these tensors without the missing ones, and all of the missing ones change."""
    if _held(module, values) > _MOST_TRIED_BYTES:
        return False
    given = {name.removeprefix(prefix): torch.zeros_like(value, device="cpu") for name, value in values.items()}
    names = {name.removeprefix(prefix) for name in missing}
    try:
        tried = copy.deepcopy(module)
        state = tried.state_dict()
        marked = {name: state[name].reshape(-1).view(torch.uint8).fill_(_MARK) for name in names}
        state.update(given)
        for name in names:
            del state[name]
        tried.load_state_dict(state)
        return not any(bool((item == _MARK).all()) for item in marked.values())
    except Exception:  # noqa: BLE001 - a foreign module's own loading
        return False


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
    if _held(module, values) > _MOST_TRIED_BYTES:
        return False
    given = {name.removeprefix(prefix): torch.zeros_like(value, device="cpu") for name, value in values.items()}
    try:
        tried = copy.deepcopy(module)
        tried.load_state_dict({**tried.state_dict(), **given})
        after = tried.state_dict()
        return all(name in after and after[name].shape == value.shape for name, value in given.items())
    except Exception:  # noqa: BLE001 - a foreign module's own loading
        return False


def _held(module: nn.Module, values: Mapping[str, torch.Tensor]) -> int:
    """Bytes of a module and of what it is to load."""
    return sum(item.nbytes for item in (*module.parameters(), *module.buffers(), *values.values()))
