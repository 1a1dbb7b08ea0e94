"""Optimizers taken apart: state by parameter name, read off without ever stepping or creating state.

Going through the optimizers' own `state_dict` would number the parameters, and PyTorch's helper for names steps a
fresh optimizer to make it have a state. Here absent state is recorded as absent. State that only the optimizer's own
`state_dict` returns is collected separately; see `hydra_ckpt.state.optimizer_oracle`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.state.holders import Holder, holders
from hydra_ckpt.state.local import Localizer, LocalTensor
from hydra_ckpt.state.meshes import described
from hydra_ckpt.state.optimizer_oracle import PARAMETER, is_plain, own_state
from hydra_ckpt.state.optimizer_untold import untold_options
from hydra_ckpt.storage.encoding import OWN, Sink, encode, refuse_shared_names
from hydra_ckpt.storage.facts import is_ordinary
from hydra_ckpt.storage.sharing import NOTHING_SHARED, Apart, Encoded

SEPARATOR = ":"
OPTIONS = "options"
AS_PARAMETER = "parameter"
"""Represents the placements of a state that is placed as its parameter is."""


@dataclass(frozen=True)
class Described:
    """Optimizers taken apart.

    Attributes:
        data: JSON data; it refers to the tensors by name: `<parameter>:<key>`.
        tensors: The state's tensors by name, live.
        unsteady: Names of those that others change besides the optimizer's step.
        alone: Names of those that may differ between ranks that hold the same parameters.
        own: What only this rank can store, by name.
        omitted: Dotted names of what was left out: as `checkpoint.allow_unsaved` asks, or because it cannot be stored
            and the optimizer's own `state_dict` leaves it out too.
        told: What messages call an optimizer, to its own state_dict() if that returns more than was walked.
    """

    data: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    unsteady: set[str] = field(default_factory=set)
    alone: set[str] = field(default_factory=set)
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    omitted: list[str] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)

    def locals(self, localize: Localizer) -> list[LocalTensor]:
        """The state's tensors as this rank holds them."""
        return [
            localize(name, tensor, divisible=name not in self.alone, deferred=name not in self.unsteady, lasting=True)
            for name, tensor in self.tensors.items()
        ]


def describe(
    optimizers: Mapping[str, Any],
    names: Mapping[int, str],
    *,
    unsaved: Sequence[str] = (),
    asks: bool = True,
    apart: Sequence[Apart] = (),
) -> Described:
    """Options and state of all optimizers.

    Args:
        optimizers: What each is called, to the object, in the order of the AppState.
        names: Identity of a parameter to its name.
        unsaved: Patterns of dotted names that are left out.
        asks: Whether the optimizers' own `state_dict` is compared with what was found.
        apart: For each optimizer what it shared at the last save.

    Raises:
        CheckpointError: A parameter belongs to no model of the AppState, or to two optimizers; a value cannot be
            stored; or an optimizer's `state_dict` raises.
    """
    try:
        return _described(optimizers, names, unsaved, apart, asks=asks)
    except RecursionError:
        raise CheckpointError(
            f"{', '.join(optimizers)}: a state holds itself, or is nested too deeply to be stored"
        ) from None


def _described(
    optimizers: Mapping[str, Any],
    names: Mapping[int, str],
    unsaved: Sequence[str],
    apart: Sequence[Apart],
    *,
    asks: bool,
) -> Described:
    found = Described({"optimizers": [], "state": {}, "placements": {}, "plain": [], "empty": []})
    everyone = holders(optimizers, names)
    sinks = [Sink("", called, unsaved=unsaved) for called in optimizers]
    known = [*apart, *(Apart() for _ in sinks[len(apart) :])]
    for number, sink in enumerate(sinks):
        sink.sharing = known[number].sharing(*_held([holder for holder in everyone if holder.number == number]))
    taken: dict[str, set[str]] = {}
    for holder in everyone:
        number = holder.number
        _describe_holder(found, holder, names, sinks[number], taken.setdefault(holder.path, set()), known[number])
    for number, (optimizer, sink) in enumerate(zip(optimizers.values(), sinks, strict=True)):
        if asks:
            _add_own(found, number, optimizer, [item for item in everyone if item.number == number], names, sink)
        refuse_shared_names(sink.called, sink, found.tensors)
        found.tensors.update(sink)
        found.own.update(sink.own)
        found.omitted.extend(sink.omitted)
    return found


def _held(inside: Sequence[Holder]) -> tuple[list[Mapping[Any, Any]], list[dict[str, Any]]]:
    """The states of parameters, and the options of groups, that an optimizer and those inside it hold."""
    states = [held for holder in inside for held in holder.state.values() if isinstance(held, Mapping)]
    groups = [group for holder in inside for group in holder.groups]
    return states, [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _describe_holder(
    found: Described, holder: Holder, names: Mapping[int, str], sink: Sink, taken: set[str], apart: Apart
) -> None:
    section, inside = found.data, SEPARATOR
    if holder.path:
        section = found.data.setdefault("inner", {}).setdefault(
            holder.path, {"optimizers": [], "state": {}, "empty": []}
        )
        inside = f"{SEPARATOR}~{holder.path}{SEPARATOR}"
    groups = []
    for index, group in enumerate(holder.groups):
        members = [name_of(parameter, names, holder, index) for parameter in group["params"]]
        if not taken.isdisjoint(members) or len(set(members)) < len(members):
            name = next(name for number, name in enumerate(members) if name in taken or name in members[:number])
            raise CheckpointError(
                f"the parameter {name} is in two optimizer groups; the second one is {holder.called}, group {index}. "
                f"Keep it in one; or move {holder.called} into extras, whose own state_dict() is stored "
                "as it is"
            )
        taken.update(members)
        # Named after a parameter: optimizers of other pipeline stages have the same numbers.
        place = f"{members[0] if members else f'{holder.number}.{index}'}{inside}{OPTIONS}"
        here = sink.another()
        options = {key: value for key, value in group.items() if key != "params" and not here.omits(f"{place}.{key}")}
        for key in untold_options(holder.optimizer, options, here):
            del options[key]
            here.omitted.append(here.dotted(f"{place}.{key}"))
        here.unsaved = ()  # a part of an option is not left out
        groups.append({"params": members, "options": encode(options, place, here)})
        _take(found, sink, here, group["params"][0] if members else None, from_step=False)
    number = {"number": holder.number} if holder.path else {}
    section["optimizers"].append({"class": type(holder.optimizer).__qualname__, **number, "groups": groups})
    here_too = {id(parameter) for parameter in holder.parameters}
    parameters = [names.get(id(item)) if id(item) in here_too else None for item in holder.state]
    if sink.unsaved or sink.sharing is not NOTHING_SHARED:
        _describe_state(found, holder, parameters, sink, section, inside)
        return
    before = apart.encoded.get(holder.path)
    if before is None or before.parameters != parameters:
        before = _ordinary_state(holder, parameters, inside)
    if before is None:
        _describe_state(found, holder, parameters, sink, section, inside)
        return
    apart.encoded[holder.path] = before
    section["state"].update(before.state)
    sink.update(before.tensors)


def _describe_state(
    found: Described,
    holder: Holder,
    parameters: Sequence[str | None],
    sink: Sink,
    section: dict[str, Any],
    inside: str,
) -> None:
    for known, (parameter, held) in zip(parameters, holder.state.items(), strict=True):
        if known is None or not (type(held) is dict or isinstance(held, Mapping)):
            continue  # its state_dict returns this
        here = sink.another()
        if here.omits(f"{known}{inside}"):
            sink.omitted += here.omitted
            continue
        section["state"][known] = encode(dict(held), f"{known}{inside}", here)
        section["empty"] += [] if held else [known]
        _take(found, sink, here, parameter, from_step=True)


def _ordinary_state(holder: Holder, parameters: Sequence[str | None], inside: str) -> Encoded | None:
    """A state that is ordinary tensors alone, as nearly every state of plain parameters is; None if it is not."""
    found = Encoded(parameters, {}, {})
    for known, (parameter, held) in zip(parameters, holder.state.items(), strict=True):
        if known is None or SEPARATOR in known or isinstance(parameter, DTensor) or type(held) is not dict or not held:
            return None
        tree = {}
        for key, value in held.items():
            if type(key) is not str or not key.isidentifier() or not is_ordinary(value):
                return None
            name = f"{known}{inside}{key}"
            tree[key] = {"~": "tensor", "v": name}
            found.tensors[name] = value
        found.state[known] = tree
    return found


def _take(found: Described, sink: Sink, here: Sink, parameter: torch.Tensor | None, *, from_step: bool) -> None:
    """Note tensors that belong to a parameter (of options: to the first of their group), and how they are placed."""
    is_sharded = isinstance(parameter, DTensor)
    for name, tensor in here.items():
        if isinstance(tensor, DTensor):
            found.data["placements"][name] = _placement(tensor, parameter)
            if not isinstance(parameter, DTensor) or tensor.device_mesh != parameter.device_mesh:
                found.data.setdefault("foreign", {})[name] = described(tensor.device_mesh)
        elif is_sharded or not from_step:
            found.alone.add(name)
            if is_sharded and tensor.dim():
                found.data["plain"].append(name)
        if not from_step:
            found.unsteady.add(name)
    refuse_shared_names(sink.called, here, sink)
    sink.update(here)
    sink.own.update(here.own)
    sink.omitted += here.omitted


def _placement(tensor: DTensor, parameter: torch.Tensor | None) -> str | list[int | None]:
    """How a DTensor is placed, to create such a state where none exists yet."""
    if isinstance(parameter, DTensor) and _mesh_and_placements(tensor) == _mesh_and_placements(parameter):
        return AS_PARAMETER
    return [placement.dim if isinstance(placement, Shard) else None for placement in tensor.placements]


def _mesh_and_placements(tensor: DTensor) -> tuple[Any, ...]:
    return tensor.device_mesh, tensor.placements, tensor.dim()


def _add_own(
    found: Described, number: int, optimizer: Any, inside: Sequence[Holder], names: Mapping[int, str], sink: Sink
) -> None:
    """Add what only the optimizer's own state_dict returns, if there is anything."""
    if is_plain(optimizer):
        return
    parameters = {id(parameter): parameter for holder in inside for parameter in holder.parameters}
    references = {identity: {"~": PARAMETER, "v": names[identity]} for identity in parameters}
    references.update({id(tensor): {"~": "tensor", "v": name} for name, tensor in sink.items()})
    references.update({id(tensor): {"~": OWN, "v": name} for name, tensor in sink.own.items()})
    here = sink.another(references)
    here.sharing = None  # it is told more than what was walked
    here.inside = f"optimizer {number}{SEPARATOR}"
    both = own_state(optimizer, inside, [*sink.values(), *sink.own.values()], here)
    sink.omitted += here.omitted
    if both is None:
        return
    found.told[sink.called], tree = both
    found.data.setdefault("own", {})[str(number)] = tree
    meshes = found.data.setdefault("meshes", {})
    for name, tensor in here.items():
        if not isinstance(tensor, DTensor):
            continue
        like = _like(tensor, parameters.values())
        found.data["placements"][name] = _placement(tensor, like)
        if like is not None:
            meshes[name] = names[id(like)]
        else:
            found.data.setdefault("foreign", {})[name] = described(tensor.device_mesh)
    found.unsteady.update(here)
    found.alone.update(name for name, tensor in here.items() if not isinstance(tensor, DTensor))
    sink.update(here)
    sink.own.update(here.own)


def _like(tensor: DTensor, parameters: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """A parameter on the tensor's mesh, of its shape and placements if there is one."""
    there = [item for item in parameters if isinstance(item, DTensor) and item.device_mesh == tensor.device_mesh]
    exact = (item for item in there if item.shape == tensor.shape and item.placements == tensor.placements)
    return next(exact, next(iter(there), None))


def name_of(parameter: torch.Tensor, names: Mapping[int, str], holder: Holder, index: int) -> str:
    """The name of a parameter in a group.

    Raises:
        CheckpointError: It is in no model.
    """
    try:
        return names[id(parameter)]
    except KeyError:
        raise CheckpointError(
            f"{holder.called}, group {index} holds a parameter of shape {list(parameter.shape)} that is in no model of "
            "the AppState. Build the optimizer after wrapping or sharding the model, and give AppState both; for "
            "tensors that are in no model, put the optimizer and the tensors into extras"
        ) from None
