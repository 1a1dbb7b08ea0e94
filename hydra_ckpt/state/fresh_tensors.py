"""Fresh tensors to read saved ones into, placed and laid out as the saved ones were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from hydra_ckpt.errors import TopologyError
from hydra_ckpt.layout.boxes import Sharding
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.meshes import find_mesh, meshes_of
from hydra_ckpt.state.wrappers import canonical
from hydra_ckpt.storage.decoding import devices, foreign_meshes, placements, splits, strides
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.memory import strided_like
from hydra_ckpt.storage.stage_names import unqualified

# For each dimension of a mesh the sharded dimension of a tensor and the split factor, each of them or None.
Spread = Sequence[tuple[int | None, int | None]]


@dataclass(frozen=True)
class Lay:
    """How saved tensors were placed and laid out, by name.

    Attributes:
        placed: The sharded dimension of each mesh dimension, of those that were DTensors.
        splits: The split factors of those of them that were sharded strided, as FSDP over tensor parallelism does.
        strides: Strides, of those that were not row-major.
        foreign: The mesh it was on, of DTensors that were on none of the model's.
        devices: The kind of device, of plain tensors that were not in host memory.
    """

    placed: Mapping[str, Sequence[int | None]]
    splits: Mapping[str, Sequence[int | None]]
    strides: Mapping[str, tuple[int, ...]]
    foreign: Mapping[str, Sequence[Any]]
    devices: Mapping[str, str]

    @classmethod
    def of(cls, trees: Any) -> Lay:
        """Read off encoded data."""
        return cls(placements(trees), splits(trees), strides(trees), foreign_meshes(trees), devices(trees))


@dataclass(frozen=True)
class Places:
    """Knows where the tensors of schedulers, extras and extra state belong.

    Args:
        state: The live objects.
        live: The tensors that live extras have now, by name. Where the ranks are arranged differently, they determine
            device and mesh.
        lay: How the saved ones were placed.
        as_saved: Whether a tensor becomes what it was, whatever the live object has; see `fits`.
    """

    state: AppState
    live: Mapping[str, torch.Tensor]
    lay: Lay
    as_saved: bool

    def fits(self) -> bool:
        """Whether every DTensor that was saved has a mesh here."""
        try:
            return all(self._mesh_of(name) is not None for name in self.lay.placed)
        except TopologyError:
            return False

    def homeless(self) -> list[str]:
        """Names of DTensors whose mesh is not here, and whose object does not have them already."""
        live = self._live_meshes()
        return [
            name
            for name, mesh in self.lay.foreign.items()
            if self._becomes_sharded(name) and find_mesh(mesh, live) is None
        ]

    def _becomes_sharded(self, name: str) -> bool:
        """Whether a saved DTensor has to be made on its mesh: the live object shows no other place that counts."""
        return self.as_saved or unqualified(name) not in self.live

    def _live_meshes(self) -> list[DeviceMesh]:
        modules = [module for models in self.state.models.values() for module in models]
        tensors = [item for module in modules for item in (*module.parameters(), *module.buffers())]
        return meshes_of([*tensors, *self.live.values()])

    def fresh(self, name: str, spec: TensorSpec) -> torch.Tensor:
        """An empty tensor for a saved one.

        Args:
            name: Its name in the checkpoint.
            spec: Its global shape and element type.

        Raises:
            TopologyError: It was a DTensor, and there are several meshes here that it may have been on.
        """
        here, dtype, lies = self.live.get(unqualified(name)), TORCH_DTYPE[spec.dtype], self.lay.strides.get(name)
        if isinstance(here, DTensor) and here.shape == spec.shape and not self.as_saved:
            like = torch.empty_like(here, dtype=dtype, requires_grad=False)
            assert isinstance(like, DTensor)  # as `here` is
            return like if lies is None else strided_like(like, lies)
        if name in self.lay.placed and self._becomes_sharded(name):
            sharded = self._sharded(name, spec, dtype)
            if sharded is not None:
                return sharded if lies is None else strided_like(sharded, lies)
        device = self._device(name, here)
        if lies is not None:
            return torch.empty_strided(spec.shape, lies, dtype=dtype, device=device)
        return torch.empty(spec.shape, dtype=dtype, device=device)

    def _device(self, name: str, here: torch.Tensor | None) -> torch.device:
        if here is not None and not self.as_saved:
            return here.device
        kind = self.lay.devices.get(name, "cpu")
        is_here = kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())  # untested on GPU
        return torch.device(kind if is_here else "cpu")

    def _sharded(self, name: str, spec: TensorSpec, dtype: torch.dtype) -> DTensor | None:
        """A DTensor on the model's mesh; None if the model is on none."""
        mesh = self._mesh_of(name)
        if mesh is not None:
            dims = self.lay.placed[name]
            factors = self.lay.splits.get(name, [None] * len(dims))
            return _empty(spec, dtype, mesh, list(zip(dims, factors, strict=True)))
        found = None if name in self.lay.foreign else self._counterpart(name, spec)
        return None if found is None else _empty(spec, dtype, *found)

    def _counterpart(self, name: str, spec: TensorSpec) -> tuple[DeviceMesh, Spread] | None:
        """Where a DTensor belongs if the model's mesh has other dimensions here.

        It is placed as the parameter of its shape and name, or as all parameters of its shape are. If there is none, it
        is sharded along the dimension that it was sharded along; what was not sharded stays so.
        """
        parameters = self._sharded_parameters()
        dim = next((dim for dim in self.lay.placed[name] if dim is not None), None)
        alike = {} if dim is None else {key: item for key, item in parameters.items() if item.shape == spec.shape}
        ending = f".{unqualified(name).replace(':', '.')}"
        named = [item for key, item in alike.items() if ending.endswith(f".{key}")]
        for items in (named, list(alike.values())):
            places = {(item.device_mesh, item.placements) for item in items}
            if len(places) == 1:
                mesh, placements = places.pop()
                return mesh, [_as_numbers(placement) for placement in placements]
        meshes = meshes_of(parameters.values())
        if len(meshes) != 1:
            return None
        sharding = {number for item in parameters.values() for number, _ in _shards(item)}
        return meshes[0], [
            (dim if number == min(sharding, default=None) else None, None) for number in range(meshes[0].ndim)
        ]

    def _sharded_parameters(self) -> dict[str, DTensor]:
        return {
            canonical(key): item
            for modules in self.state.models.values()
            for module in modules
            for key, item in module.named_parameters()
            if isinstance(item, DTensor)
        }

    def gathered(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of those that were DTensors and are plain here, though the model is sharded.

        Args:
            tensors: What `fresh` has made, by name.
        """
        if not self._sharded_parameters():
            return []
        return [
            name
            for name, tensor in tensors.items()
            if name in self.lay.placed and self._becomes_sharded(name) and not isinstance(tensor, DTensor)
        ]

    def _mesh_of(self, name: str) -> DeviceMesh | None:
        if name in self.lay.foreign:
            return find_mesh(self.lay.foreign[name], self._live_meshes())
        meshes, dims = meshes_of(self._sharded_parameters().values()), self.lay.placed[name]
        fitting = [mesh for mesh in meshes if mesh.ndim == len(dims)]
        if len(fitting) > 1:
            raise TopologyError(
                f"{name} was sharded over one of {len(fitting)} meshes that parameters have here, and it is not "
                "recorded which one; let the object's state_dict() return a DTensor before the load, too"
            )
        return fitting[0] if fitting else None


def _as_numbers(placement: Placement) -> tuple[int | None, int | None]:
    return getattr(placement, "dim", None), getattr(placement, "split_factor", None)


def _shards(tensor: DTensor) -> list[tuple[int, Placement]]:
    """The mesh dimensions along which a tensor is sharded, and how."""
    return [pair for pair in enumerate(tensor.placements) if not isinstance(pair[1], Replicate)]


def _empty(spec: TensorSpec, dtype: torch.dtype, mesh: DeviceMesh, places: Spread) -> DTensor:
    """An empty DTensor.

    Args:
        spec: The global shape.
        dtype: The element type.
        mesh: The mesh.
        places: How it is spread over the mesh.
    """
    made = [
        Replicate() if dim is None else Shard(dim) if factor is None else _StridedShard(dim, split_factor=factor)
        for dim, factor in places
    ]
    if not any(factor for _, factor in places):
        return torch.distributed.tensor.empty(*spec.shape, dtype=dtype, device_mesh=mesh, placements=made)
    coordinate = tuple(mesh.get_coordinate() or (0,) * mesh.ndim)
    sharding = Sharding(
        tuple(mesh.shape), coordinate, tuple(dim for dim, _ in places), tuple(bool(factor) for _, factor in places)
    )
    local = torch.empty(sharding.box(spec.shape).sizes, dtype=dtype, device=mesh.device_type)
    stride = torch.empty(spec.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, made, run_check=False, shape=torch.Size(spec.shape), stride=stride)
