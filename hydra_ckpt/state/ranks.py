"""This process's place in the training's device mesh, and how the places of all ranks are arranged."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.layout.plan import fingerprint

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)


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


def warn_of_unused_mesh(modules: Iterable[nn.Module]) -> None:
    """Warn if parameters are on a mesh with tensor-parallel ranks or stages, but the mesh was not passed."""
    meshes = (item.device_mesh for module in modules for item in module.parameters() if isinstance(item, DTensor))
    names = {name for mesh in meshes for name in mesh.mesh_dim_names or ()}
    if found := sorted(names & {"tp", "pp"}):
        log.warning(
            "parameters are on a mesh with the dimension %s, but on_train_begin() got no mesh: every rank counts as "
            "data parallel, for random numbers and data too. Pass mesh=",
            " and ".join(found),
        )


@dataclass(frozen=True)
class Topology:
    """The places of all ranks of a run.

    Attributes:
        place: This rank's.
        leaders: For each data-parallel rank in order the first rank that has it; equal on all ranks.
        fingerprint: Equal for runs in which each rank has the same place.
    """

    place: Ranks
    leaders: tuple[int, ...]
    fingerprint: str

    @classmethod
    def agree(cls, place: Ranks, channel: Channel) -> Topology:
        """Collective: from the places the ranks were given.

        If two ranks have been given the same place, each counts as a data-parallel rank, and a warning says so.
        """
        found = channel.agree("comparing the ranks' places", astuple(place), _arrange)
        if not found["distinct"]:
            log.warning(
                "several ranks have dp_rank=%d, tp_rank=%d and pp_rank=%d: all ranks are treated as data parallel. "
                "Pass each rank its own place to build(), or the device mesh to on_train_begin()",
                *astuple(place),
            )
            place = Ranks(dp=channel.rank)
        return cls(place, tuple(found["leaders"]), found["fingerprint"])

    def recorded(self) -> dict[str, Any]:
        """As plain data, for the manifest."""
        return {"leaders": list(self.leaders), "fingerprint": self.fingerprint}

    def equals(self, recorded: Mapping[str, Any]) -> bool:
        """Whether each rank has the place it had in the run that recorded this."""
        return recorded.get("fingerprint") == self.fingerprint

    def counterpart(self, recorded: Mapping[str, Any]) -> int | None:
        """The rank of the other run that saw the same part of the data; None if the data was divided differently."""
        leaders = recorded.get("leaders", [])
        return int(leaders[self.place.dp]) if len(leaders) == len(self.leaders) > self.place.dp else None


def _arrange(places: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Coordinator only."""
    given = [tuple(place) for place in places]
    distinct = len(set(given)) == len(given)
    if not distinct:
        given = [(rank, 0, 0) for rank in range(len(given))]
    first: dict[int, int] = {}
    for rank, place in enumerate(given):
        first.setdefault(place[0], rank)
    leaders = [first[dp] for dp in sorted(first)]
    return {"distinct": distinct, "leaders": leaders, "fingerprint": fingerprint(map(str, given))}
