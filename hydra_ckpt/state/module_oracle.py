"""What a module's own `state_dict` has beyond parameters, buffers and extra state: hooks and overrides add it.

A model is walked, tensor by tensor. Whether that is everything, only its `state_dict` knows, so it is asked at each
save where anything in the model customizes it. An entry that is the very tensor the walk has found is covered, whatever
its name. All others are stored as they are and go back through `load_state_dict`. Example: a layer whose hook adds
`{"fc.seen": tensor(7)}` to `fc.weight` and `fc.bias` has one entry of its own, `fc.seen`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError
from hydra_ckpt.state.optimizer_oracle import differing, same_tensor
from hydra_ckpt.storage.subclasses import local_part


def customizes(module: nn.Module) -> bool:
    """Whether a module itself, not its children, has a say in what `state_dict` returns."""
    kind = type(module)
    if kind.state_dict is not nn.Module.state_dict or kind._save_to_state_dict is not nn.Module._save_to_state_dict:
        return True
    hooks = (*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values())
    # PyTorch's own only gather, reshard or rename.
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.distributed") for hook in hooks)


def told_by(module: nn.Module, called: str) -> Mapping[str, Any]:
    """What `state_dict` returns, with the live tensors themselves where it passes them through.

    Raises:
        CheckpointConfigError: It raises, or returns something else than a mapping from names.
    """
    try:
        try:
            told: Any = module.state_dict(keep_vars=True)
        except TypeError:
            told = module.state_dict()  # an override that takes no arguments
    except Exception as error:
        raise CheckpointConfigError(
            f"{called} ({type(module).__qualname__}): its state_dict() raises {type(error).__name__}: {error}. Fix it, "
            "or remove the hook that raises"
        ) from error
    if not isinstance(told, Mapping) or not all(isinstance(key, str) for key in told):
        raise CheckpointConfigError(
            f"{called} ({type(module).__qualname__}): its state_dict() returns a {type(told).__qualname__}; it must "
            "return a dict from names to tensors and plain data"
        )
    return told


def own_entries(
    told: Mapping[str, Any], walked: Mapping[str, torch.Tensor], extra_states: Iterable[str]
) -> dict[str, Any]:
    """The entries that the walk does not cover, by name.

    Args:
        told: What `state_dict` returns.
        walked: The tensors found by the walk, by each of their names.
        extra_states: Names of the modules' extra states, which are stored apart.
    """
    known = {_memory(tensor) for tensor in walked.values()}
    apart = set(extra_states)
    found = {}
    for name, value in told.items():
        if _plain(name) in apart or (isinstance(value, torch.Tensor) and _memory(value) in known):
            continue
        here = walked.get(_plain(name))
        if here is not None and isinstance(value, torch.Tensor) and same_tensor(value.detach(), here.detach()):
            continue  # a copy, as of a hook that offloads
        found[name] = value
    return found


# What wrappers add to names.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def _plain(name: str) -> str:
    """A name without what wrappers inside the model have put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for views of the same memory that are the same tensor; of a tensor without memory, itself."""
    local = local_part(tensor)
    if type(local) not in (torch.Tensor, nn.Parameter) or not local.numel():
        return (id(tensor),)
    return (local.data_ptr(), local.dtype, local.shape, local.stride(), local.device)


@torch.no_grad()
def give_back(
    module: nn.Module, called: str, saved: Mapping[str, Any], walked: Mapping[str, torch.Tensor], apart: Iterable[str]
) -> Iterator[str]:
    """Hand a module its own entries through its `load_state_dict`, whose tensors have been loaded already.

    Args:
        module: The module.
        called: Its name, for messages.
        saved: Its entries.
        walked: The tensors found by the walk, by each of their names.
        apart: Names of the modules' extra states.

    Yields:
        Names of the entries that the module reports otherwise afterwards.

    Raises:
        CheckpointError: It refuses them.
    """
    live = told_by(module, called)
    replaced = {id(walked[name]): walked[name] for name in map(_plain, saved) if name in walked}
    kept = [(tensor, tensor.detach().clone()) for tensor in replaced.values()]
    beside = own_entries(live, walked, apart)
    given: OrderedDict[str, Any] = OrderedDict((name, value) for name, value in live.items() if name not in beside)
    for name, value in given.items():
        given[name] = value.detach() if isinstance(value, torch.Tensor) else value
    given.update(saved)
    given._metadata = getattr(live, "_metadata", None)  # type: ignore[attr-defined]
    try:
        module.load_state_dict(given)
    except Exception as error:
        raise CheckpointError(
            f"{called} ({type(module).__qualname__}): its load_state_dict() refuses the entries {sorted(saved)} that "
            f"its state_dict() had when it was saved: {type(error).__name__}: {error}"
        ) from error
    for tensor, value in kept:
        tensor.copy_(value)
    again = own_entries(told_by(module, called), walked, apart)
    yield from (name for name in saved if name not in again or not _alike(saved[name], again[name]))


def _alike(saved: Any, live: Any) -> bool:
    if isinstance(saved, torch.Tensor) and isinstance(live, torch.Tensor):
        return same_tensor(saved, live.detach())
    return not list(differing(saved, live))


def transparent(module: nn.Module) -> nn.Module | None:
    """The child whose state dict a wrapper passes on as its own, as Lightning Fabric's does; None if there is none."""
    if type(module).state_dict is nn.Module.state_dict:
        return None
    told = told_by(module, type(module).__qualname__)
    for child in module._modules.values():
        inner = None if child is None else told_by(child, type(child).__qualname__)
        if inner and inner.keys() == told.keys() and all(value is told[name] for name, value in inner.items()):
            return child
    return None
