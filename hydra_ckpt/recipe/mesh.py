"""From numbers of ranks to a device mesh, and from a mesh to a parallel model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaForCausalLM

from hydra_ckpt.errors import TopologyError

if TYPE_CHECKING:
    from peft import PeftModel

    from hydra_ckpt.recipe.settings import MeshSettings, ModelSettings

__all__ = ["Parallelism", "plan_parallelism", "shard_model"]

_FILL = -1
_BUILT = ("dp_replicate", "dp_shard", "tp")
_TP_PLAN = {
    "self_attn.q_proj": ColwiseParallel(),
    "self_attn.k_proj": ColwiseParallel(),
    "self_attn.v_proj": ColwiseParallel(),
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


@dataclass(frozen=True)
class Parallelism:
    """How many ranks do what; their product is the world.

    Attributes:
        dp_replicate: Groups of ranks that each hold the whole model.
        dp_shard: Ranks among which FSDP shards it.
        tp: Ranks among which each matrix is split; they see equal batches.
    """

    dp_replicate: int
    dp_shard: int
    tp: int

    @property
    def data_ranks(self) -> int:
        """Ranks that see different batches."""
        return self.dp_replicate * self.dp_shard

    @property
    def is_ddp(self) -> bool:
        """Whole replicas only: DistributedDataParallel does it."""
        return self.dp_replicate > 1 and self.dp_shard == self.tp == 1

    @property
    def is_sharded(self) -> bool:
        """Parameters are DTensors."""
        return self.dp_shard > 1 or self.tp > 1

    def data_rank(self, rank: int) -> int:
        """Which batches a rank sees. The tensor-parallel dimension is the innermost of the mesh."""
        return rank // self.tp

    def device_mesh(self, device_type: str) -> DeviceMesh | None:
        """Dimensions of more than one rank and always `dp_shard`, by name; None for a single process.

        Collective: every rank of the world.
        """
        sizes = {name: size for name, size in asdict(self).items() if size > 1 or name == "dp_shard"}
        if math.prod(sizes.values()) == 1:
            return None
        return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def plan_parallelism(mesh: MeshSettings, world_size: int, model: ModelSettings) -> Parallelism:
    """Fills in the dimension given as -1 and checks that the mesh fits the world and the model.

    Raises:
        TopologyError: It does not fit; the message names the key.
    """
    sizes = {name: int(size) for name, size in asdict(mesh).items()}
    _refuse_sizes(sizes)
    _refuse_unbuilt(sizes)
    filled = [name for name, size in sizes.items() if size == _FILL]
    given = math.prod(size for size in sizes.values() if size != _FILL)
    shown = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    if filled:
        if world_size % given:
            raise TopologyError(f"{shown}: {world_size} ranks cannot be divided by {given} to fill mesh.{filled[0]}")
        sizes[filled[0]] = world_size // given
    elif given != world_size:
        raise TopologyError(
            f"{shown}: this is a mesh of {given} ranks, but {world_size} run; set one of them to -1 to fill it"
        )
    _refuse_unbuilt(sizes)
    _refuse_uneven_heads(sizes["tp"], model)
    return Parallelism(**{name: sizes[name] for name in _BUILT})


def shard_model(model: LlamaForCausalLM | PeftModel, mesh: DeviceMesh) -> None:
    """Splits matrices over `tp` and shards layer by layer over `dp_shard`, replicated over `dp_replicate`, in place.

    Collective: every rank of the mesh.
    """
    names = mesh.mesh_dim_names or ()
    core: Any = model if isinstance(model, LlamaForCausalLM) else model.get_base_model()
    layers = list(core.model.layers)
    if "tp" in names:
        for layer in layers:
            parallelize_module(layer, mesh["tp"], _TP_PLAN)
    data = mesh["dp_replicate", "dp_shard"] if "dp_replicate" in names else mesh["dp_shard"]
    for layer in layers:
        fully_shard(layer, mesh=data)
    # The root too: after a validation, when no backward follows, its parameters must not stay gathered.
    fully_shard(model, mesh=data, reshard_after_forward=True)


def _refuse_sizes(sizes: dict[str, int]) -> None:
    if sum(size == _FILL for size in sizes.values()) > 1:
        raise TopologyError("only one dimension of mesh may be -1: " + ", ".join(f"{n}={s}" for n, s in sizes.items()))
    for name, size in sizes.items():
        if size < 1 and size != _FILL:
            raise TopologyError(f"mesh.{name}={size}: give a number of ranks, or -1 for whatever is left")


def _refuse_unbuilt(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size > 1 and name not in _BUILT:
            raise TopologyError(f"mesh.{name}={size}: this recipe has no {name} dimension; leave it at 1")


def _refuse_uneven_heads(tp: int, model: ModelSettings) -> None:
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(model, name) % tp:
            raise TopologyError(f"mesh.tp={tp} does not divide model.{name}={getattr(model, name)}")
