"""Fresh tensors to read saved ones into, placed and laid out as the saved ones were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from hydra_ckpt.errors import TopologyError
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.meshes import find_mesh, meshes_of
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.memory import strided_like
from hydra_ckpt.storage.stage_names import unqualified


@dataclass(frozen=True)
class Places:
    """Knows where the tensors of schedulers, extras and extra state belong.

    Args:
        state: The live objects.
        live: The tensors that live extras have now, by name; they determine device and mesh.
        placed: Name to the sharded dimension of each mesh dimension, of those that were DTensors.
        strides: Name to strides, for those that were not row-major.
        foreign: Name to the mesh it was on, of DTensors that were on none of the model's.
        same_ranks: Whether the ranks are arranged as in the run that saved. Then a DTensor is one again even if the
            live object has a plain tensor so far; on another mesh, the live object decides.
    """

    state: AppState
    live: Mapping[str, torch.Tensor]
    placed: Mapping[str, Sequence[int | None]]
    strides: Mapping[str, tuple[int, ...]]
    foreign: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    same_ranks: bool = False

    def homeless(self) -> list[str]:
        """Names of DTensors whose mesh is not here, and whose object does not have them already."""
        live = self._live_meshes()
        return [
            name for name, mesh in self.foreign.items() if self._becomes_sharded(name) and find_mesh(mesh, live) is None
        ]

    def _becomes_sharded(self, name: str) -> bool:
        """Whether a saved DTensor has to be made on its mesh, because the live object does not show another place."""
        here = self.live.get(unqualified(name))
        return here is None or (self.same_ranks and not isinstance(here, DTensor))

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
        here = self.live.get(unqualified(name))
        dtype, lies = TORCH_DTYPE[spec.dtype], self.strides.get(name)
        if isinstance(here, DTensor) and here.shape == spec.shape:
            like = torch.empty_like(here, dtype=dtype, requires_grad=False)
            assert isinstance(like, DTensor)  # as `here` is
            return self._laid(like, lies)
        sharded = self._sharded(name, spec, dtype) if name in self.placed and self._becomes_sharded(name) else None
        if sharded is not None:
            return self._laid(sharded, lies)
        device = torch.device("cpu") if here is None else here.device
        if lies is not None:
            return torch.empty_strided(spec.shape, lies, dtype=dtype, device=device)
        return torch.empty(spec.shape, dtype=dtype, device=device)

    def _laid(self, tensor: DTensor, lies: tuple[int, ...] | None) -> DTensor:
        return tensor if lies is None else strided_like(tensor, lies)

    def _sharded(self, name: str, spec: TensorSpec, dtype: torch.dtype) -> DTensor | None:
        """A DTensor on the model's mesh; None if the model is not sharded like this."""
        dims = self.placed[name]
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        if name in self.foreign:
            mesh = find_mesh(self.foreign[name], self._live_meshes())
            return None if mesh is None else _empty(spec, dtype, mesh, placements)
        parameters = (
            item for modules in self.state.models.values() for module in modules for item in module.parameters()
        )
        meshes = {item.device_mesh for item in parameters if isinstance(item, DTensor)}
        fitting = [mesh for mesh in meshes if mesh.ndim == len(dims)]
        if len(fitting) > 1:
            raise TopologyError(
                f"{name} was sharded over one of {len(fitting)} meshes that parameters have here, and it is not "
                "recorded which one; let the object's state_dict() return a DTensor before the load, too"
            )
        if not fitting:
            return None
        return _empty(spec, dtype, fitting[0], placements)


def _empty(spec: TensorSpec, dtype: torch.dtype, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    return torch.distributed.tensor.empty(*spec.shape, dtype=dtype, device_mesh=mesh, placements=list(placements))
