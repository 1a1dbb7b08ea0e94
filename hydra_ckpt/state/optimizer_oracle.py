"""What an optimizer holds beyond the state and options of its parameters: its own `state_dict` is the judge.

Most optimizers keep everything in `.state[parameter]` and `.param_groups`, where it is read off. Some override
`state_dict`, hook it, keep state under other keys, or wrap another optimizer. Their `state_dict` is stored as it is,
except that a tensor that was read off already is only referred to. When it is loaded it goes back through
`load_state_dict`. Example: a Lookahead over an AdamW whose `state[w]["exp_avg"]` is the tensor A returns
`{"base": {"state": {0: {"exp_avg": A}}}, "slow": [S], "k": 3}`. Stored is the same, with references to the tensors
`w:~base:exp_avg`, which the walk has found, and `optimizer 0:slow.0`, which only this tree has.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from omegaconf import ListConfig
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hydra_ckpt.errors import CheckpointConfigError, leave_out
from hydra_ckpt.state.holders import Holder
from hydra_ckpt.storage.configs import is_config
from hydra_ckpt.storage.encoding import Sink, encode
from hydra_ckpt.storage.facts import attributes, narrowed
from hydra_ckpt.storage.kinds import NotExactError, tagged
from hydra_ckpt.storage.sharing import Sharing, memory_pattern
from hydra_ckpt.storage.subclasses import is_wrapper, local_part, take_apart

_SEQUENCES = (list, tuple, deque)
_PLAIN = {bool, float, int, str, type(None)}
PARAMETER = "parameter of"
"""The tag of a reference to a live parameter of the model, by name."""

_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def own_state(
    optimizer: Any, inside: Sequence[Holder], walked: Sequence[torch.Tensor], sink: Sink
) -> tuple[Any, Any] | None:
    """An optimizer's own state_dict, and the same encoded; None if it returns nothing beyond what its holders have.

    Args:
        optimizer: The optimizer of an AppState.
        inside: It and those that it wraps, which have been read off.
        walked: The tensors that were read off.
        sink: Takes the tensors that were not.

    Raises:
        CheckpointConfigError: Its state_dict() raises.
        CheckpointError: Its state_dict() holds something that cannot be stored.
    """
    if is_plain(optimizer):
        return None
    if sink.omits(sink.inside):
        return None
    try:
        told = optimizer.state_dict()
    except Exception as error:
        raise CheckpointConfigError(
            f"{sink.called} ({type(optimizer).__qualname__}): its state_dict() raises {type(error).__name__}: {error}. "
            f"What it holds cannot be saved like this. Gather or finish its state before the save as its documentation "
            f"says, use another optimizer, {leave_out(sink.called)}"
        ) from error
    if not _customizes_loading(optimizer) and any(tells_only(told, holder) for holder in inside):
        return None
    sink.sharing = Sharing.of(told, walked, sink.known.keys() - set(map(id, walked)))
    return told, encode(told, sink.inside, sink)


def is_plain(optimizer: Any) -> bool:
    """Whether an optimizer's state_dict() is PyTorch's own, and so returns nothing beyond state and options."""
    return (
        isinstance(optimizer, Optimizer)
        and is_own_method(optimizer, "state_dict", "torch.optim.")
        and not _customizes_loading(optimizer)
        and not any(getattr(optimizer, hooks, None) for hooks in _HOOKS[:2])
        and hasattr(optimizer, "state")
        and hasattr(optimizer, "param_groups")
        and not _strange_keys(optimizer)
    )


def is_own_method(item: Any, name: str, package: str) -> bool:
    """Whether an object's method is a library's own: overridden neither by its class nor on the object itself."""
    method = getattr(item, name, None)
    function = getattr(method, "__func__", None)
    function = getattr(function, "__wrapped__", function)  # PyTorch wraps its own
    return str(getattr(function, "__module__", "")).startswith(package) and getattr(function, "__name__", "") == name


def loads_plainly(optimizer: Any) -> bool:
    """Whether an optimizer's load_state_dict() is PyTorch's own, which replaces all state."""
    return not _customizes_loading(optimizer)


def _strange_keys(optimizer: Optimizer) -> bool:
    """Whether there is state that belongs to no parameter of a group."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    state = optimizer.state
    return not known.issuperset(map(id, state)) or not all(
        issubclass(kind, Mapping) for kind in set(map(type, state.values()))
    )


def _customizes_loading(optimizer: Any) -> bool:
    """Whether loading does more than set state and options."""
    return (
        not isinstance(optimizer, Optimizer)
        or not all(is_own_method(optimizer, name, "torch.optim.") for name in ("load_state_dict", "__setstate__"))
        or any(getattr(optimizer, hooks, None) for hooks in _HOOKS[2:])
    )


def tells_only(told: Any, holder: Holder) -> bool:
    """Whether a state dict is what PyTorch's own would be for a holder, object by object."""
    if not isinstance(told, Mapping) or told.keys() != {"state", "param_groups"}:
        return False
    numbers = {id(parameter): number for number, parameter in enumerate(holder.parameters)}
    item = holder.optimizer
    everything = getattr(item, "state", {})
    if any(id(key) not in numbers or not isinstance(held, Mapping) for key, held in everything.items()):
        return False  # the holder's walk passes these over
    state = {numbers[id(key)]: held for key, held in everything.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in item.param_groups]
    try:
        told_groups = [
            {key: value for key, value in group.items() if key != "params"} for group in told["param_groups"]
        ]
    except (TypeError, AttributeError):
        return False
    return is_same(told["state"], state) and is_same(told_groups, groups)


def is_same(one: Any, other: Any) -> bool:
    """The same objects in the same places; plain values count by type and value."""
    if one is other:
        return True
    if is_config(one) or is_config(other):
        return type(one) is type(other) and _are_tagged_alike(one, other)
    if isinstance(one, torch.Tensor) or type(one) is not type(other):
        return isinstance(one, Mapping) and isinstance(other, Mapping) and _same_items(one, other)
    if isinstance(one, Mapping):
        return _same_items(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if type(one) in _PLAIN:
        return repr(one) == repr(other)  # 0.0 and -0.0 are equal, NaN and NaN are not
    if isinstance(one, set | frozenset):  # in any order
        return sorted(map(_typed, one)) == sorted(map(_typed, other))
    try:
        return _encode_alike(one, other) if tagged(one) is not None else bool(one == other)
    except Exception:  # noqa: BLE001 - a foreign object's own comparison
        return False


def _are_tagged_alike(one: Any, other: Any) -> bool:
    try:
        return repr(tagged(one)) == repr(tagged(other))
    except NotExactError:
        return False


def _typed(value: Any) -> str:
    return f"{type(value)}{value!r}"


def _encode_alike(one: Any, other: Any) -> bool:
    """Whether two values that compare by identity, such as generators, are stored in the same way."""
    tensors: list[dict[str, torch.Tensor]] = [{}, {}]
    trees = [encode(value, "", found) for value, found in zip((one, other), tensors, strict=True)]
    # Equal by type, too: 1 and 1.0, 0.0 and -0.0 are equal.
    return repr(trees[0]) == repr(trees[1]) and all(
        same_tensor(value, tensors[1][name]) for name, value in tensors[0].items()
    )


def _same_items(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())


def differing(saved: Any, live: Any, place: str = "") -> Iterator[str]:
    """Where a live object's own state is not what was put into it, by dotted names.

    Args:
        saved: What was loaded, decoded.
        live: What state_dict() returns afterwards.
        place: The name of both.
    """
    found = _Comparison()
    yield from found.unlike(saved, live, place)
    before, after = (memory_pattern([pair[side] for pair in found.tensors]) for side in (0, 1))
    for name, one, other in zip(found.names, before, after, strict=True):
        if one != other:
            yield f"{name} (it shares memory with other tensors than it did)"


class _Comparison:
    """Compares values one after the other. Equal tensors are noted, because what they share shows only together.

    Attributes:
        names: Of equal tensors.
        tensors: These tensors, saved and live.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._partners: dict[int, int] = {}

    def unlike(self, saved: Any, live: Any, place: str) -> Iterator[str]:
        """Where two values are not the same."""
        if isinstance(saved, torch.Tensor) and isinstance(live, torch.Tensor):
            yield from self._unlike_tensors(saved, live, place)
        elif is_config(saved) and is_config(live) and id(saved) not in self._partners:
            self._partners[id(saved)] = id(live)
            yield from () if is_same(saved, live) else (place,)
        elif isinstance(saved, Mapping | list | tuple | deque | ListConfig) and id(saved) in self._partners:
            if self._partners[id(saved)] != id(live):  # it is in several places
                yield f"{place} (it is another object than where it was the same)"
        elif isinstance(saved, Mapping) and isinstance(live, Mapping):
            self._partners[id(saved)] = id(live)
            yield from self._unlike_mappings(saved, live, place)
        elif isinstance(saved, _SEQUENCES) and isinstance(live, _SEQUENCES) and len(saved) == len(live):
            self._partners[id(saved)] = id(live)
            yield from self._unlike_sequences(saved, live, place)
        elif not is_same(saved, live):
            yield place

    def _unlike_mappings(self, saved: Mapping[Any, Any], live: Mapping[Any, Any], place: str) -> Iterator[str]:
        if _facts_of_mapping(saved) != _facts_of_mapping(live):
            yield f"{place} (a {type(live).__qualname__} now)"
        yield from (f"{place}.{key}" for key in saved.keys() ^ live.keys())
        for key in saved.keys() & live.keys():
            yield from self.unlike(saved[key], live[key], f"{place}.{key}")
        yield from self._unlike_attributes(saved, live, place)

    def _unlike_sequences(self, saved: Sequence[Any], live: Sequence[Any], place: str) -> Iterator[str]:
        if (type(saved), getattr(saved, "maxlen", None)) != (type(live), getattr(live, "maxlen", None)):
            yield f"{place} (a {type(live).__qualname__} now)"
        for index, pair in () if _are_equal_numbers(saved, live) else enumerate(zip(saved, live, strict=True)):
            yield from self.unlike(*pair, f"{place}.{index}")

    def _unlike_tensors(self, saved: torch.Tensor, live: torch.Tensor, place: str) -> Iterator[str]:
        if same_tensor(saved, live) and _facts(saved) == _facts(live):
            self.names.append(place)
            self.tensors.append((saved, live))
        else:
            yield place
        if type(saved) in (torch.Tensor, torch.nn.Parameter, DTensor):
            yield from self._unlike_attributes(saved, live, place)

    def _unlike_attributes(self, saved: Any, live: Any, place: str) -> Iterator[str]:
        """What Python code has put on the values."""
        one, other = attributes(saved), attributes(live)
        if one or other:
            yield from self.unlike(one, other, f"{place}.<attributes>")


def _are_equal_numbers(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether both hold the same plain values of the same types; NaN is looked at one by one."""
    kinds = list(map(type, one))
    if not (set(kinds) <= _PLAIN and kinds == list(map(type, other)) and list(one) == list(other)):
        return False
    # 0.0 and -0.0 are equal.
    return float not in kinds or 0.0 not in one or list(map(repr, one)) == list(map(repr, other))


def _facts_of_mapping(value: Mapping[Any, Any]) -> tuple[Any, ...]:
    """What a mapping is besides its values. Keys of another type may be equal: `1` and `1.0`."""
    kinds = [] if all(type(key) is str for key in value) else sorted(map(_typed, value))
    order = list(value) if type(value) is OrderedDict else None
    return type(value), getattr(value, "default_factory", None), kinds, order


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one type, shape and the same bits; of DTensors this rank's shards are compared."""
    if one is other:
        return True
    if type(one) is not type(other) or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if is_wrapper(one):
        return not list(differing(take_apart(one), take_apart(other)))
    one, other = (local_part(item.detach()) for item in (one, other))
    if is_wrapper(one):
        return same_tensor(one, other)
    return one.shape == other.shape and torch.equal(_bits(narrowed(one)), _bits(narrowed(other)))


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What belongs to a tensor besides its type, shape and bits."""
    placed = (tensor.device_mesh, tuple(tensor.placements)) if isinstance(tensor, DTensor) else None
    lies = tensor.stride() if tensor.numel() else None
    return lies, placed, tensor.requires_grad and tensor.is_leaf, tensor.is_conj()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # A single element counts as contiguous whatever its stride is, and is no bytes to view() then.
    tensor = tensor.resolve_conj().resolve_neg()
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
