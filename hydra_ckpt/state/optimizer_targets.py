"""The tensors that saved optimizer state is read into: live ones where they fit, and fresh ones of their kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.state.holders import Holder
from hydra_ckpt.state.meshes import find_mesh, meshes_of
from hydra_ckpt.state.optimizer import AS_PARAMETER, SEPARATOR, describe
from hydra_ckpt.state.optimizer_loading import Fit
from hydra_ckpt.storage.decoding import check_meshes, strides, tensor_names
from hydra_ckpt.storage.facts import row_major
from hydra_ckpt.storage.memory import fresh_like, strided_like
from hydra_ckpt.storage.sharing import shared_memory


def targets(
    described: Mapping[str, Any],
    found: Fit,
    tensor_shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    optimizers: Mapping[str, Any],
    names: Mapping[int, str],
    everything: Sequence[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """A tensor to read each saved state tensor into: the live one where it fits, else a fresh one of its kind.

    Args:
        described: The saved description.
        found: What of it fits.
        tensor_shapes: Name to global shape and element type of every saved tensor.
        optimizers: What the live optimizers are called, to these.
        names: Identity of a parameter to its name.
        everything: The models' tensors. State that shares memory with them, or with other state, is not read into.
    """
    live: Mapping[str, torch.Tensor] = {}
    others = shared_memory([*everything, *_places(found.live)])
    with suppress(CheckpointError):  # what cannot be saved may well be loaded into
        live = describe(optimizers, names, asks=False).tensors
    wanted_strides, meshes = strides(found.trees()), live_meshes(found, everything)
    into: dict[str, torch.Tensor] = {}
    for name, parameter, on_device in _wanted(described, found, names):
        if name not in tensor_shapes or name in into:
            continue  # the caller says that it is missing; or several share it
        shape, dtype = tensor_shapes[name]
        lies = wanted_strides.get(name)
        mesh = find_mesh(described["foreign"][name], meshes) if name in described.get("foreign", {}) else None
        if mesh is not None:
            wanted = _wanted_on(mesh, described["placements"][name], shape, dtype, lies)
        else:
            wanted = _wanted_as(described, name, shape, dtype, lies, parameter, on_device)
        held = live.get(name)
        fits = held is not None and wanted.is_like(held) and not others(held)
        into[name] = held if held is not None and fits else wanted.make()
    return into


def live_meshes(found: Fit, everything: Sequence[torch.Tensor]) -> list[DeviceMesh]:
    """The meshes of the models' tensors, and of state that live optimizers already have."""
    return meshes_of([*everything, *_places(found.live)])


def homeless(described: Mapping[str, Any], found: Fit, everything: Sequence[torch.Tensor]) -> dict[str, Sequence[Any]]:
    """The state tensors whose mesh is neither their parameter's nor any that is here, with that mesh.

    Args:
        described: The saved description.
        found: What of it fits.
        everything: The models' tensors.
    """
    foreign, live = described.get("foreign", {}), live_meshes(found, everything)
    check_meshes(foreign)
    wanted = set(tensor_names(found.trees()))
    return {name: mesh for name, mesh in foreign.items() if name in wanted and find_mesh(mesh, live) is None}


def _wanted_on(
    mesh: DeviceMesh,
    dims: Sequence[int | None],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    lies: tuple[int, ...] | None,
) -> _Wanted:
    """A state tensor on a mesh that is not its parameter's."""
    placements: tuple[Placement, ...] = tuple(Replicate() if dim is None else Shard(dim) for dim in dims)
    return _Wanted(shape, dtype, lies, torch.device(mesh.device_type), (mesh, placements))


def _places(live: Sequence[Holder]) -> Iterator[Any]:
    """What optimizers hold, once for each place."""
    for holder in live:
        yield from (value for held in holder.state.values() if isinstance(held, Mapping) for value in held.values())
        yield from (value for group in holder.groups for key, value in group.items() if key != "params")
        yield from (getattr(holder.optimizer, "defaults", None) or {}).values()


def _wanted(
    described: Mapping[str, Any], found: Fit, names: Mapping[int, str]
) -> Iterator[tuple[str, torch.Tensor | None, bool]]:
    """The names of tensors to load, each with its parameter, and whether its counters are on that device."""
    parameters = {names[id(item)]: item for holder in found.live for item in holder.parameters}
    counters: set[str] = set()  # of parameters whose optimizer keeps them on the device
    for holder, options, state in zip(found.live, found.options, found.state, strict=True):
        for group, chosen in zip(holder.groups, options, strict=True):
            first = group["params"][0] if group["params"] else None
            on_device = bool(group.get("capturable") or group.get("fused"))
            yield from ((name, first, False) for name in tensor_names(chosen))
            counters |= {names[id(parameter)] for parameter in group["params"] if on_device}
        for parameter in holder.parameters:
            here = names[id(parameter)]
            for name in tensor_names(state.get(here, {})):
                # What several parameters share is called after one of them.
                owner = name.partition(SEPARATOR)[0]
                owner = owner if owner in parameters else here
                yield name, parameters[owner], owner in counters
    meshes = described.get("meshes", {})
    for tree in found.own.values():
        # What the walk has read off comes from there.
        yield from ((name, parameters.get(meshes.get(name, "")), False) for name in tensor_names(tree) if _is_own(name))


def _is_own(name: str) -> bool:
    return name.startswith("optimizer ") and SEPARATOR in name


@dataclass(frozen=True)
class _Wanted:
    """A state tensor as it has to be in memory.

    Attributes:
        shape: Its global shape.
        dtype: Its element type.
        strides: Its global strides; None if it is row-major.
        device: Where it is.
        placed: The mesh and placements of a DTensor; None for a plain tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None
    device: torch.device
    placed: tuple[Any, tuple[Placement, ...]] | None = None

    def is_like(self, tensor: torch.Tensor) -> bool:
        """Whether a live tensor can take the values as it is."""
        here = (tensor.device_mesh, tuple(tensor.placements)) if isinstance(tensor, DTensor) else None
        lies = None if tensor.stride() == row_major(tensor.shape) else tuple(tensor.stride())
        known = (torch.Tensor, torch.nn.Parameter, DTensor)
        is_bare = not tensor.requires_grad and not tensor.__dict__
        return (
            is_bare
            and type(tensor) in known
            and (tuple(tensor.shape), tensor.dtype, lies, here)
            == (
                self.shape,
                self.dtype,
                self.strides,
                self.placed,
            )
        )

    def make(self) -> torch.Tensor:
        """A fresh one, without values."""
        if self.placed is None:
            if self.strides is not None:
                return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
            return fresh_like(torch.empty(self.shape, dtype=self.dtype, device="meta"), device=self.device)
        mesh, placements = self.placed
        empty = torch.distributed.tensor.empty(
            *self.shape, dtype=self.dtype, device_mesh=mesh, placements=list(placements)
        )
        return empty if self.strides is None else strided_like(empty, self.strides)


def _wanted_as(
    described: Mapping[str, Any],
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    lies: tuple[int, ...] | None,
    parameter: torch.Tensor | None,
    on_device: bool,
) -> _Wanted:
    """A state tensor as the optimizer itself would have it for this parameter."""
    if parameter is None:
        return _Wanted(shape, dtype, lies, torch.device("cpu"))
    saved = described["placements"].get(name)
    # The state of a parameter that is a number looks like a counter; all of PyTorch's call theirs `step`.
    is_alike = shape == tuple(parameter.shape) and not name.endswith(f"{SEPARATOR}step")
    if saved is None and shape == () and not is_alike:
        # A counter: on the parameter's device only if the optimizer's kernels require it there.
        return _Wanted(shape, dtype, lies, parameter.device if on_device else torch.device("cpu"))
    if not isinstance(parameter, DTensor) or (
        saved is None and (name in described.get("plain", ()) or (_is_single(shape) and not is_alike))
    ):
        return _Wanted(shape, dtype, lies, parameter.device)
    mesh = parameter.device_mesh
    placements: tuple[Placement, ...] = (Replicate(),) * mesh.ndim
    is_older = "plain" not in described
    if saved == AS_PARAMETER or (is_alike and (saved is None or is_older or len(saved) != mesh.ndim)):
        placements = tuple(parameter.placements) if len(shape) == parameter.dim() else placements
    elif saved is not None and len(saved) == mesh.ndim:
        placements = tuple(Replicate() if dim is None else Shard(dim) for dim in saved)
    # Written on another mesh, it is whole on every rank: right anywhere, and what PyTorch's own optimizers begin with.
    return _Wanted(shape, dtype, lies, parameter.device, (mesh, placements))


def _is_single(shape: tuple[int, ...]) -> bool:
    """Whether a tensor has one element but dimensions, as counters of many optimizers have."""
    return bool(shape) and all(size == 1 for size in shape)
