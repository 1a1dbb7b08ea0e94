"""Optimizers: state by parameter name, read off and put back without ever stepping or creating state.

Going through the optimizers' own `state_dict` would number the parameters, and PyTorch's helper for names steps a
fresh optimizer to make it have a state. Here absent state is recorded as absent.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.optim import Optimizer

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.state.local import Localizer, LocalTensor
from hydra_ckpt.storage.memory import fresh_like
from hydra_ckpt.storage.tree import encode, tensor_names

SEPARATOR = ":"
_OPTIONS = "options"
GROUPS, STATE = "optimizer.param_groups.", "optimizer.state."
# What PyTorch's schedulers put among the options of any optimizer, and names that users give to groups.
_BESIDE = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "name", "param_names"}


def describe(
    optimizers: Sequence[Optimizer], names: Mapping[int, str]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Options and state of all optimizers.

    Args:
        optimizers: In the order of the AppState.
        names: Identity of a parameter to its name.

    Returns:
        JSON data, and the tensors it refers to by name (`<parameter>:<key>`), live.

    Raises:
        CheckpointError: A parameter belongs to no model of the AppState, or to two optimizers.
    """
    tensors: dict[str, torch.Tensor] = {}
    groups, state = [], {}
    for number, optimizer in enumerate(optimizers):
        described = []
        for index, group in enumerate(optimizer.param_groups):
            members = [_name(parameter, names, number, index) for parameter in group["params"]]
            options = {key: value for key, value in group.items() if key != "params"}
            # Named after a parameter: optimizers of other pipeline stages have the same numbers.
            place = members[0] if members else f"{number}.{index}"
            described.append({"params": members, "options": encode(options, f"{place}{SEPARATOR}{_OPTIONS}", tensors)})
            for name, parameter in zip(members, group["params"], strict=True):
                if name in state:
                    raise CheckpointError(f"the parameter {name} belongs to two optimizers or groups; give it to one")
                held = optimizer.state.get(parameter)
                state[name] = {
                    key: encode(value, f"{name}{SEPARATOR}{key}", tensors) for key, value in (held or {}).items()
                }
        groups.append({"class": type(optimizer).__qualname__, "groups": described})
    return {"optimizers": groups, "state": state, "placements": _placements(tensors)}, tensors


def _name(parameter: torch.Tensor, names: Mapping[int, str], number: int, index: int) -> str:
    try:
        return names[id(parameter)]
    except KeyError:
        raise CheckpointError(
            f"optimizer {number}, group {index} holds a parameter of shape {list(parameter.shape)} that is in no model "
            "of the AppState. Build the optimizer after wrapping or sharding the model, and give AppState both"
        ) from None


def _placements(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int | None]]:
    """For DTensors the sharded dimension on each mesh dimension, to create such a state where none exists yet."""
    return {
        name: [placement.dim if isinstance(placement, Shard) else None for placement in tensor.placements]
        for name, tensor in tensors.items()
        if isinstance(tensor, DTensor)
    }


def locals_of(
    tensors: Mapping[str, torch.Tensor], localize: Localizer, sharded: Container[str] = ()
) -> list[LocalTensor]:
    """The state's tensors, by name, as this rank holds them.

    Only the optimizers' steps change the state of parameters; options (a learning rate that is a tensor) belong to
    schedulers too. Plain tensors among the options, and of a sharded parameter's state, may differ between ranks.

    Args:
        tensors: By name.
        localize: Knows where tensors lie.
        sharded: Names of the parameters that are sharded.
    """
    options = f"{SEPARATOR}{_OPTIONS}"
    found = []
    for name, tensor in tensors.items():
        is_option = options in name
        of_rank = not isinstance(tensor, DTensor) and (is_option or name.partition(SEPARATOR)[0] in sharded)
        found.append(localize(name, tensor, divisible=not of_rank, late=not is_option, lasting=True))
    return found


def plain_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """What a description holds beside tensors, by a dotted label: ranks may have different values of it.

    `optimizer.param_groups.<optimizer>.<group>` is a group's description, `optimizer.state.<parameter>` the state of
    a parameter that has more than tensors.
    """
    found: dict[str, Any] = {
        f"{GROUPS}{number}.{index}": group
        for number, optimizer in enumerate(described["optimizers"])
        for index, group in enumerate(optimizer["groups"])
    }
    for name, state in described["state"].items():
        if any(type(value) is not dict or value.get("~") != "tensor" for value in state.values()):
            found[f"{STATE}{name}"] = state
    return found


def replace_plain(described: dict[str, Any], label: str, value: Any) -> None:
    """Put what `plain_of` gave under a label back into a description, in place."""
    if label.startswith(GROUPS):
        number, index = map(int, label.removeprefix(GROUPS).split("."))
        described["optimizers"][number]["groups"][index] = value
    else:
        described["state"][label.removeprefix(STATE)] = value


@dataclass(frozen=True)
class Fit:
    """A saved description beside live optimizers, parameter by parameter.

    Optimizers may be numbered and grouped otherwise than in the run that saved, as other pipeline stages have them.

    Attributes:
        held: Parameters of the live optimizers.
        options: For each live optimizer and group the saved options, encoded; None for a group that stays as it is.
        missing: Parameters of live optimizers that the description lacks.
        different: Place of an optimizer or group to why no options fit it.
    """

    held: set[str]
    options: list[list[dict[str, Any] | None]]
    missing: list[str]
    different: dict[str, str]


def fit(described: Mapping[str, Any], optimizers: Sequence[Optimizer], names: Mapping[int, str]) -> Fit:
    """Find the saved options of every live group.

    Raises:
        CheckpointError: A live optimizer holds a parameter that belongs to no model of the AppState.
    """
    saved = {
        name: (index, group["options"], optimizer["class"])
        for optimizer in described["optimizers"]
        for index, group in enumerate(optimizer["groups"])
        for name in group["params"]
    }
    found = Fit(set(), [], [], {})
    for number, optimizer in enumerate(optimizers):
        rows: list[dict[str, Any] | None] = []
        for index, group in enumerate(optimizer.param_groups):
            members = [_name(parameter, names, number, index) for parameter in group["params"]]
            found.held.update(members)
            found.missing.extend(name for name in members if name not in saved)
            groups = {id(saved[name][1]): saved[name][1:] for name in members if name in saved}
            for options, kind in groups.values():
                if (why := _incompatible(kind, set(options), optimizer, set(group))) is not None:
                    found.different[f"optimizer {number}"] = why
            kinds = {_kind(*saved[name][:2]): saved[name][1] for name in members if name in saved}
            if len(kinds) > 1:
                first = {_kind(*saved[name][:2]): name for name in reversed(members) if name in saved}
                found.different[f"optimizer {number}, group {index}"] = (
                    f"its parameters had different options in the checkpoint, see {sorted(first.values())}; "
                    "group them as in the run that saved"
                )
            rows.append(next(iter(kinds.values()), None))
        found.options.append(rows)
    return found


def _incompatible(saved: str, options: set[str], live: Optimizer, here: set[str]) -> str | None:
    """Why the options, and so the state, of a saved optimizer are not a live one's; None where they may be.

    Args:
        saved: Its class; empty where nothing says it.
        options: Names of its options.
        live: The live optimizer.
        here: Names of the live group's options.
    """
    name = type(live).__qualname__
    gone, new = options - here - _BESIDE, set(live.defaults) - options
    # A class may gain or lose options from version to version; others may bear its name.
    differ = bool(gone or new) if saved and saved != name else bool(gone and new)
    if not differ:
        return None
    sides = [f"only {where}: {', '.join(sorted(names))}" for where, names in (("there", gone), ("here", new)) if names]
    return (
        f"{saved or 'another optimizer'} in the checkpoint, {name} in the AppState, with other options "
        f"({'; '.join(sides)}). To start with a new optimizer, name the other parts alone: "
        "restore_parts=[model,dataloader,rng,extras,progress]"
    )


def _kind(index: int, options: Mapping[str, Any]) -> tuple[str, int | None]:
    """Equal for groups that may become one. Tensors among the options count as equal in groups of one number."""
    tensors = tensor_names(options)
    text = json.dumps(options, sort_keys=True)
    for name in tensors:
        text = text.replace(json.dumps(name), "0")
    return text, index if tensors else None


def targets(
    described: Mapping[str, Any],
    tensor_shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    optimizers: Sequence[Optimizer],
    names: Mapping[int, str],
) -> dict[str, torch.Tensor]:
    """A tensor to read each saved state tensor into: the live one where it fits, else a fresh one of its kind.

    Args:
        described: The saved description.
        tensor_shapes: Name to global shape and element type of every saved tensor.
        optimizers: The live optimizers.
        names: Identity of a parameter to its name.
    """
    found: dict[str, torch.Tensor] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                held = optimizer.state.get(parameter) or {}
                for key, value in described["state"].get(name, {}).items():
                    full = f"{name}{SEPARATOR}{key}"
                    if not (isinstance(value, dict) and value.get("~") == "tensor") or full not in tensor_shapes:
                        continue
                    shape, dtype = tensor_shapes[full]
                    live = held.get(key)
                    if isinstance(live, torch.Tensor) and tuple(live.shape) == shape and live.dtype == dtype:
                        found[full] = live
                    else:
                        on_device = bool(group.get("capturable") or group.get("fused"))
                        placement = described["placements"].get(full)
                        found[full] = _fresh(full, parameter, shape, dtype, placement, on_device)
    return found


def _fresh(
    name: str,
    parameter: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    dims: list[int | None] | None,
    on_device: bool,
) -> torch.Tensor:
    """A state tensor as the optimizer itself would have created it for this parameter."""
    parameter = parameter.detach()
    # The state of a parameter that is a number looks like a counter; all of PyTorch's call theirs `step`.
    if shape == tuple(parameter.shape) and not name.endswith(f"{SEPARATOR}step"):
        return fresh_like(parameter, dtype=dtype)
    if shape == () and dims is None:
        # A step counter: beside the parameter only where the optimizer's kernels want it there.
        return torch.empty((), dtype=dtype, device=parameter.device if on_device else "cpu")
    if not isinstance(parameter, DTensor):
        return torch.empty(shape, dtype=dtype, device=parameter.device)
    mesh = parameter.device_mesh
    if dims is None or len(dims) != mesh.ndim:
        # Written on another mesh. Whole on every rank is right anywhere, and what PyTorch's own optimizers begin with.
        dims = [None] * mesh.ndim
    placements: list[Placement] = [Replicate() if dim is None else Shard(dim) for dim in dims]
    return torch.distributed.tensor.empty(*shape, dtype=dtype, device_mesh=mesh, placements=placements)


def install(
    decoded_state: Mapping[str, dict[str, Any]],
    decoded_options: Sequence[Sequence[dict[str, Any] | None]],
    optimizers: Sequence[Optimizer],
    names: Mapping[int, str],
) -> None:
    """Put saved state and options into live optimizers; state that was absent becomes absent.

    Args:
        decoded_state: Parameter name to its state, tensors in place.
        decoded_options: For each optimizer and group its options; None for a group that keeps its own.
        optimizers: The live optimizers.
        names: Identity of a parameter to its name.
    """
    for optimizer, options in zip(optimizers, decoded_options, strict=True):
        for group, saved in zip(optimizer.param_groups, options, strict=True):
            group.update(saved or {})
            for parameter in group["params"]:
                state = decoded_state.get(names[id(parameter)])
                if state:
                    optimizer.state[parameter] = dict(state)
                else:
                    optimizer.state.pop(parameter, None)
