"""What a module's own `state_dict` has beyond parameters, buffers and extra state: hooks and overrides add it.

A model is walked, tensor by tensor. Only its `state_dict` shows whether that is everything, so it is called at each
save if anything in the model customizes it. An entry that is the same tensor as one found by the walk is covered,
whatever its name. All others are stored as they are and restored through `load_state_dict`. Example: a layer whose hook
adds `{"fc.seen": tensor(7)}` to `fc.weight` and `fc.bias` has one entry beyond its tensors, `fc.seen`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, leave_out
from hydra_ckpt.state.optimizer_oracle import differing, is_own_method, same_tensor
from hydra_ckpt.storage.subclasses import local_part

_MODULE = "torch.nn.modules.module"
_EXTRA_STATE = "_extra_state"


def customizes(module: nn.Module) -> bool:
    """Whether a module itself, not its children, customizes what `state_dict` returns."""
    if not all(is_own_method(module, name, _MODULE) for name in ("state_dict", "_save_to_state_dict")):
        return True
    return _any_foreign((*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values()))


def customizes_loading(module: nn.Module) -> bool:
    """Whether a module itself, not its children, does more in loading than copying tensors."""
    # PyTorch's own modules read older versions.
    if not all(is_own_method(module, name, "torch.nn.") for name in ("load_state_dict", "_load_from_state_dict")):
        return True
    hooks = (*module._load_state_dict_pre_hooks.values(), *module._load_state_dict_post_hooks.values())
    return _any_foreign(hooks)


def has_loading_hooks(module: nn.Module) -> bool:
    """Whether anything runs as a module loads, PyTorch's own hooks included."""
    return customizes_loading(module) or bool(module._load_state_dict_pre_hooks)


# Hooks from here only gather, reshard, rename, or read older versions.
_KNOWN_HOOKS = ("torch.distributed", "torch.nn.utils")


def _any_foreign(hooks: Iterable[Any]) -> bool:
    return any(not str(getattr(hook, "__module__", "")).startswith(_KNOWN_HOOKS) for hook in hooks)


def told_by(module: nn.Module, called: str) -> Mapping[str, Any]:
    """What `state_dict` returns, with the live tensors themselves where it passes them through.

    Raises:
        CheckpointConfigError: It raises, or returns something other than a mapping from names.
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


@dataclass(frozen=True)
class OwnEntries:
    """What a model's own state_dict returns beyond its tensors.

    Attributes:
        entries: For each part of the model the entries that the walk does not cover, by name.
        metadata: Name of a module to the metadata of its state: its version if it is not 1, and what hooks add.
        resized: Buffers that were saved with another size than the live ones have.
    """

    entries: list[dict[str, Any]]
    metadata: Mapping[str, Any]
    resized: Mapping[str, torch.Tensor] = field(default_factory=dict)


def own_entries(
    told: Mapping[str, Any], walked: Mapping[str, torch.Tensor], extra_states: Iterable[str]
) -> dict[str, Any]:
    """The entries that the walk does not cover, by name.

    Args:
        told: What `state_dict` returns.
        walked: The tensors found by the walk, by each of their names.
        extra_states: Names of the modules' extra states, which are stored separately.
    """
    known = {_memory(tensor) for tensor in walked.values()}
    apart = set(extra_states)
    found: dict[str, Any] = {}
    for name, value in told.items():
        if _plain(name) in apart or (isinstance(value, torch.Tensor) and _memory(value) in known):
            continue
        here = walked.get(_plain(name))
        if here is not None and isinstance(value, torch.Tensor) and same_tensor(value.detach(), here.detach()):
            continue  # a copy, for example by a hook that offloads
        found[name] = value
    return found


def repeated(told: Mapping[str, Any], walked: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries that are tensors of the walk once more, under names of their own, by name.

    Example: a hook adds `best`, which is `weight` at this moment. A tensor that is there under another name only has
    been renamed.
    """
    as_themselves = {_memory(walked[here]) for name in told if (here := _plain(name)) in walked}
    tensors = {name: value for name, value in told.items() if isinstance(value, torch.Tensor)}
    return {
        name: value.detach()
        for name, value in tensors.items()
        if _plain(name) not in walked and _memory(value) in as_themselves
    }


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


def give_back(
    module: nn.Module,
    called: str,
    told: OwnEntries,
    walked: Mapping[str, torch.Tensor],
    apart: Collection[str],
    is_ours: Callable[[str], bool],
    older: Collection[str],
    left: Collection[str],
    made: Collection[str] = (),
) -> Iterator[str]:
    """Give a module its own entries through its `load_state_dict`; its tensors have been loaded already.

    Args:
        module: The module.
        called: Its name, for messages.
        told: Its entries (possibly none), and the metadata of the modules' state.
        walked: The tensors found by the walk, by each of their names.
        apart: Names of the modules' extra states.
        is_ours: Whether an entry of this name belongs to what is stored; the others stay as they are.
        older: Modules whose state was saved by another version of them. They convert their tensors themselves.
        left: Names of tensors and entries that were not loaded, and stay as they are.
        made: Names of tensors that its hooks make from entries of other names.

    Yields:
        Names of the entries that the module reports differently afterwards.

    Raises:
        CheckpointError: It refuses them.
    """
    saved = {**told.entries[0], **told.resized}
    put_back = _remember(walked)
    live = told_by(module, called)
    put_back(())  # what hooks write in state_dict() is not what was loaded
    beside = {name for name in own_entries(live, walked, apart) if is_ours(name) and name not in left}
    again = repeated(live, walked)
    given: OrderedDict[str, Any] = OrderedDict()
    for name, value in live.items():
        if name in saved:
            given[name] = saved[name]
        elif name not in beside:
            given[name] = value
        elif _plain(name) in walked:  # it was the tensor itself when it was saved
            given[name] = walked[_plain(name)]
    given.update({name: value for name, value in saved.items() if name not in given})
    changed = {name for name in walked if any(not place or name.startswith(f"{place}.") for place in older)}
    for name in given:
        if _plain(name) in changed and isinstance(given[name], torch.Tensor):
            given[name] = given[name].detach().clone()  # it will be written to while it is read
    changed = changed.difference(left) | told.resized.keys() | set(made)
    given = OrderedDict((name, value) for name, value in given.items() if _plain(name) not in made)
    others = {name: tensor for name, tensor in walked.items() if name not in made}
    unused = {id(walked[name]) for name in made}
    expected = {name: item for name, item in _expected(module, given).items() if id(item) not in unused}
    put_back(())  # to find wrappers, the module was asked again
    refused = _load(
        module,
        called,
        given,
        again.keys() - saved.keys(),
        _metadata(live, told.metadata, older),
        others,
        saved,
        expected,
    )
    put_back(changed)
    if refused is not None:
        yield f"load_state_dict() ({refused})"
    yield from (f"{name} (made from entries of other names)" for name in sorted(made))
    yield from (f"{place or 'the model'} (converted from another version of its class)" for place in sorted(older))
    after = told_by(module, called)
    put_back(changed)
    yield from (name for name in saved if name not in after or not _alike(saved[name], after[name]))


def _metadata(live: Mapping[str, Any], saved: Mapping[str, Any], older: Collection[str]) -> Any:
    """The metadata for `load_state_dict`: as saved, if that differs from what it would be now."""
    found = getattr(live, "_metadata", None)
    if found is None:
        return None
    found = OrderedDict(found)
    for name in found:
        place = _plain(f"{name}.").removesuffix(".")
        if place in saved:
            found[name] = saved[place]
        elif place in older:
            found[name] = {**found[name], "version": 1}
    return found


@torch.no_grad()
def _remember(tensors: Mapping[str, torch.Tensor]) -> Callable[[Collection[str]], None]:
    """Copies of tensors, in host memory; the function that is returned writes them back, but for those named."""
    parts = {name: local_part(tensor.detach()) for name, tensor in tensors.items()}
    copies = {id(tensor): parts[name].to("cpu", copy=True) for name, tensor in tensors.items()}

    @torch.no_grad()
    def put_back(without: Collection[str]) -> None:
        left = {id(tensors[name]) for name in without if name in tensors}
        for name, part in parts.items():
            if id(tensors[name]) not in left:
                part.copy_(copies[id(tensors[name])])

    return put_back


def _load(
    module: nn.Module,
    called: str,
    given: Mapping[str, Any],
    again: Collection[str],
    metadata: Any,
    walked: Mapping[str, torch.Tensor],
    saved: Mapping[str, Any],
    expected: Mapping[str, torch.Tensor],
) -> str | None:
    """Call load_state_dict with what the module returned; if it refuses that, with the names of its tensors' places.

    A module may keep tensors out of its state dict, or rename them, and ask for them nevertheless: see `_expected`.

    Returns:
        Why it refuses everything, if it had no further entries and so has all its tensors; None if it does not refuse.
    """
    absent = {name: item for name, item in walked.items() if name not in set(map(_plain, given))}
    placed = {name: item for name, item in given.items() if name in saved or not isinstance(item, torch.Tensor)}
    placed.update({name: item for name, item in given.items() if _plain(name) in walked})
    further = {
        name: item
        for name, item in given.items()
        if name in saved or not isinstance(item, torch.Tensor) or name.endswith(_EXTRA_STATE)
    }
    errors: list[Exception] = []
    once = {name: item for name, item in given.items() if name not in again}  # they were not there when it was saved
    for state in (once, given, {**given, **absent}, {**placed, **absent}, {**expected, **further}):
        # A copy, because hooks take state dicts apart.
        pairs = ((name, item.detach() if isinstance(item, torch.Tensor) else item) for name, item in state.items())
        copy = OrderedDict(pairs)
        copy._metadata = metadata  # type: ignore[attr-defined]
        try:
            module.load_state_dict(copy)
            return None
        except Exception as error:  # noqa: BLE001 - a foreign object's; told below
            errors.append(error)
    why = f"{type(errors[0]).__name__}: {errors[0]}"
    if not saved:
        return why
    raise CheckpointError(
        f"{called} ({type(module).__qualname__}): its load_state_dict() refuses the entries {sorted(saved)} that its "
        f"state_dict() had when it was saved: {why}. Prepare the model as in the run that saved (quantized in the same "
        f"way, for example), {leave_out(f'{called}.{min(saved)}')}"
    ) from errors[0]


def _expected(module: nn.Module, told: Collection[str]) -> dict[str, torch.Tensor]:
    """A module's tensors under the names that PyTorch's own loading looks for.

    Inside a model, an override of state_dict() is used when it is saved, and no override of load_state_dict() when it
    is loaded: a wrapper that leaves its own name out of its state does not find it again.

    Args:
        module: The module.
        told: The names that its state_dict() returns, which wrappers of PyTorch may have shortened.
    """
    found = {}
    while (child := passed(module).child) is not None:
        module = child  # where the names of the tensors begin
    for place, inner in module.named_modules(remove_duplicate=False):
        kept = {name: item for name, item in inner._buffers.items() if name not in inner._non_persistent_buffers_set}
        for name, item in {**inner._parameters, **kept}.items():
            if item is not None:
                full = f"{place}.{name}" if place else name
                found[_plain(full) if full not in told and _plain(full) in told else full] = item
    return found


def _alike(saved: Any, live: Any) -> bool:
    if isinstance(saved, torch.Tensor) and isinstance(live, torch.Tensor):
        return saved is live or same_tensor(saved.detach(), live.detach())
    return not list(differing(saved, live))


@dataclass(frozen=True, eq=False)
class Passed:
    """What a wrapper's state dict passes on as its own.

    Attributes:
        child: The module whose state dict it is; None if it is no wrapper.
        adds: Whether there is more in it at this moment. Names of tensors must not depend on that.
    """

    child: nn.Module | None = None
    adds: bool = False

    def is_as(self, other: Passed) -> bool:
        """Whether both are the same; a module may overload `==`."""
        return self.child is other.child and self.adds == other.adds


def passed(module: nn.Module) -> Passed:
    """The child whose state dict a wrapper passes on as its own, as Lightning Fabric's does."""
    if is_own_method(module, "state_dict", _MODULE):
        return Passed()
    told = told_by(module, type(module).__qualname__)
    for child in module._modules.values():
        inner = None if child is None else told_by(child, type(child).__qualname__)
        if inner is None or len(inner) == 0 or not inner.keys() <= told.keys():
            continue
        adds = inner.keys() != told.keys()
        if adds and not _holds_all(child, module):
            continue
        if all(_alike(value, told[name]) for name, value in inner.items()):
            return Passed(child, adds)
    return Passed()


def _holds_all(child: nn.Module | None, module: nn.Module) -> bool:
    """Whether a module has no tensors and modules besides those of one child."""
    below = set() if child is None else set(map(id, child.modules()))
    others = [one for one in module.modules() if one is not module and id(one) not in below]
    return not others and not any(
        tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values())
    )
