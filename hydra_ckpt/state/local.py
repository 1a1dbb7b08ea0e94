"""Tensors as one rank holds them: a local part with its place in the whole."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from hydra_ckpt.errors import TopologyError
from hydra_ckpt.layout.aliases import Naming
from hydra_ckpt.layout.boxes import Box, Sharding
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.dtypes import safetensors_dtype
from hydra_ckpt.storage.memory import view_as


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """This rank's part of a named tensor.

    Attributes:
        spec: Name, element type and global shape.
        box: The part held here; empty where the rank holds nothing.
        tensor: That part, of the box's sizes, sharing memory with the live object.
        mesh: Global ranks of the device mesh it is spread over; empty for a plain tensor, replicated by convention.
        replica: Index among the ranks of the mesh that hold the same box, and their number.
        group: Equal for tensors of one mesh replicated along the same dimensions.
        divisible: Whether all replicas certainly hold the same values.
        late: Whether nothing but an optimizer step changes it, so that copying it may wait until then.
    """

    spec: TensorSpec
    box: Box
    tensor: torch.Tensor
    mesh: tuple[int, ...] = ()
    replica: tuple[int, int] = (0, 1)
    group: Hashable = ()
    divisible: bool = True
    late: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    """What stays the same about a tensor from save to save."""

    spec: TensorSpec
    box: Box
    mesh: tuple[int, ...] = ()
    replica: tuple[int, int] = (0, 1)
    group: Hashable = ()


class Localizer:
    """Makes `LocalTensor`s and remembers where each lies: asking PyTorch's meshes takes longer than copying."""

    def __init__(self) -> None:
        self._places: dict[Hashable, _Place] = {}

    def __call__(self, name: str, tensor: torch.Tensor, *, divisible: bool = True, late: bool = False) -> LocalTensor:
        """A live tensor or DTensor as a `LocalTensor`.

        Raises:
            TopologyError: A placement that has no whole value yet (partial sums), or a local shape other than the
                placements imply.
        """
        key: Hashable = (name, tensor.dtype, tensor.shape)
        local = tensor
        if isinstance(tensor, DTensor):
            key = (key, tensor.device_mesh, tensor.placements)
            local = tensor.to_local()
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = _place(name, tensor)
        if place.box.sizes != tuple(local.shape) and (place.box.numel or local.numel()):
            raise TopologyError(
                f"{name}: this rank holds a part of shape {list(local.shape)}, but shape {list(tensor.shape)} with its "
                f"placements gives {list(place.box.sizes)}"
            )
        return LocalTensor(
            place.spec, place.box, local.detach(), place.mesh, place.replica, place.group, divisible, late
        )


def _place(name: str, tensor: torch.Tensor) -> _Place:
    spec = TensorSpec(name, safetensors_dtype(name, tensor.dtype), tuple(tensor.shape))
    if not isinstance(tensor, DTensor):
        return _Place(spec, Box.whole(spec.shape))
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return _Place(spec, Box((0,) * tensor.dim(), (0,) * tensor.dim()))
    sharding = _sharding(name, tensor, tuple(coordinate))
    mesh = tuple(tensor.device_mesh.mesh.flatten().tolist())
    group = (mesh, tuple(position for position, dim in enumerate(sharding.dims) if dim is None))
    return _Place(spec, sharding.box(spec.shape), mesh, sharding.replica, group)


def _sharding(name: str, tensor: DTensor, coordinate: tuple[int, ...]) -> Sharding:
    dims, strided = [], []
    for placement in tensor.placements:
        dims.append(_sharded_dim(name, placement, tensor.dim()))
        strided.append(isinstance(placement, _StridedShard))
    return Sharding(tuple(tensor.device_mesh.shape), coordinate, tuple(dims), tuple(strided))


def _sharded_dim(name: str, placement: Placement, ndim: int) -> int | None:
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, Shard | _StridedShard):
        return placement.dim % ndim
    raise TopologyError(f"{name}: the placement {placement} cannot be saved; redistribute it to Shard or Replicate")


def exported(items: Iterable[LocalTensor], naming: Naming) -> list[LocalTensor]:
    """What this rank holds, as the exported tensors it is part of: views of the same memory.

    The `spec` has the exported element type, `tensor` still the live one.
    """
    found = []
    held = {item.spec.name: item for item in items}
    for alias in naming.aliases:
        item = held.get(alias.source)
        part = None if item is None else alias.part(item.box)
        if item is None or part is None:
            continue
        inner, placed = part
        spec = TensorSpec(alias.name, naming.dtypes.get(alias.name, item.spec.dtype), alias.shape)
        found.append(replace(item, spec=spec, box=placed, tensor=view_as(alias, item.tensor, inner.within(item.box))))
    return found
