"""This process's place in the training's device mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Ranks:
    """Ranks along the kinds of parallelism.

    Attributes:
        dp: Data-parallel rank, over replicas and shards together.
        tp: Tensor-parallel rank.
        pp: Pipeline-parallel rank: the stage.
    """

    dp: int = 0
    tp: int = 0
    pp: int = 0

    @classmethod
    def of(cls, mesh: DeviceMesh | None) -> Ranks:
        """From the named dimensions of a mesh; without one, or without names, every rank is a data-parallel one."""
        if mesh is None or not mesh.mesh_dim_names:
            return cls(dp=dist.get_rank() if dist.is_available() and dist.is_initialized() else 0)
        position = mesh.get_coordinate() or [0] * mesh.ndim
        named = dict(zip(mesh.mesh_dim_names, position, strict=True))
        dp = 0
        for name, size in zip(mesh.mesh_dim_names, mesh.shape, strict=True):
            if name not in ("tp", "pp"):
                dp = dp * size + named[name]
        return cls(dp, named.get("tp", 0), named.get("pp", 0))
