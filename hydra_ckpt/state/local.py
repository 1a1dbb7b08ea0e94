"""Tensors as one rank holds them: a local part with its place in the whole."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from hydra_ckpt.errors import TopologyError
from hydra_ckpt.layout.boxes import Box, Sharding
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.dtypes import safetensors_dtype


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


def localize(name: str, tensor: torch.Tensor, *, divisible: bool = True, late: bool = False) -> LocalTensor:
    """A live tensor or DTensor as a `LocalTensor`.

    Raises:
        TopologyError: A placement that has no whole value yet (partial sums), or a local shape other than the
            placements imply.
    """
    dtype = safetensors_dtype(name, tensor.dtype)
    spec = TensorSpec(name, dtype, tuple(tensor.shape))
    if not isinstance(tensor, DTensor):
        return LocalTensor(spec, Box.whole(spec.shape), tensor.detach(), divisible=divisible, late=late)
    local = tensor.to_local().detach()
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        box = Box((0,) * tensor.dim(), (0,) * tensor.dim())
        return LocalTensor(spec, box, local, divisible=divisible, late=late)
    sharding = _sharding(name, tensor, tuple(coordinate))
    box = sharding.box(spec.shape)
    if box.sizes != tuple(local.shape) and not (box.numel == 0 and local.numel() == 0):
        raise TopologyError(
            f"{name}: this rank holds a part of shape {list(local.shape)}, but shape {list(spec.shape)} with "
            f"{tensor.placements} on a mesh of {sharding.mesh_shape} gives {list(box.sizes)}"
        )
    mesh = tuple(tensor.device_mesh.mesh.flatten().tolist())
    group = (mesh, tuple(position for position, dim in enumerate(sharding.dims) if dim is None))
    return LocalTensor(spec, box, local, mesh, sharding.replica, group, divisible, late)


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
