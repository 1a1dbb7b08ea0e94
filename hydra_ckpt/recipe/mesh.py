"""From numbers of ranks to a device mesh, and from a mesh to a parallel model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from hydra_ckpt.errors import TopologyError, counted
from hydra_ckpt.recipe.experts import LocalExperts

if TYPE_CHECKING:
    from peft import PeftModel

    from hydra_ckpt.recipe.settings import MeshSettings, ModelSettings

__all__ = ["Parallelism", "plan_parallelism", "shard_model"]

_FILL = -1
# From the outermost to the innermost dimension: dimensions that communicate most have adjacent ranks.
_DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "ep", "tp")
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
        pp: Stages of a pipeline, each with some of the layers.
        dp_replicate: Groups of ranks that each hold the whole model, or stage.
        dp_shard: Ranks among which FSDP shards it.
        ep: Ranks among which each layer's experts are spread; they see equal batches.
        tp: Ranks among which each matrix is split; they see equal batches.
    """

    pp: int
    dp_replicate: int
    dp_shard: int
    ep: int
    tp: int

    @property
    def data_ranks(self) -> int:
        """Ranks that see different batches."""
        return self.dp_replicate * self.dp_shard

    @property
    def is_sharded(self) -> bool:
        """Parameters are DTensors."""
        return self.dp_shard > 1 or self.tp > 1 or self.ep > 1

    def data_rank(self, rank: int) -> int:
        """Which batches a rank sees."""
        return rank // (self.ep * self.tp) % self.data_ranks

    def place(self, rank: int) -> tuple[int, int, int]:
        """For `CheckpointingConfig.build`: a rank's batches, its number among those that see the same, its stage.

        Peers that see equal batches must draw equal random numbers, also if these are newly derived.
        """
        alike = self.ep * self.tp
        return self.data_rank(rank), rank % alike, rank // (alike * self.data_ranks)

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
    filled = [name for name, size in sizes.items() if size == _FILL]
    given = math.prod(size for size in sizes.values() if size != _FILL)
    shown = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    if filled:
        if world_size % given:
            ranks = counted(world_size, "rank")
            raise TopologyError(f"{shown}: {ranks} cannot be divided by {given} to fill mesh.{filled[0]}")
        sizes[filled[0]] = world_size // given
    elif given != world_size:
        raise TopologyError(
            f"{shown}: this is a mesh of {counted(given, 'rank')}, but {world_size} run; set one of them to -1 to fill "
            "it"
        )
    _refuse_architecture(sizes, model.architecture)
    _refuse_uneven(sizes, model)
    if sizes["pp"] > 1 and sizes["dp_replicate"] * sizes["tp"] > 1:
        raise TopologyError(f"{shown}: this recipe combines mesh.pp with mesh.dp_shard only")
    return Parallelism(**{name: sizes[name] for name in _DIMENSIONS})


def shard_model(model: PreTrainedModel | PeftModel, mesh: DeviceMesh) -> None:
    """Spreads it over `ep` or `tp` and shards layer by layer over `dp_shard`, replicated over `dp_replicate`, in place.

    Collective: every rank of the mesh.
    """
    names = mesh.mesh_dim_names or ()
    core: Any = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    layers = [layer for layer in core.model.layers if next(layer.parameters(), None) is not None]
    for layer in layers:
        if "tp" in names:
            parallelize_module(layer, mesh["tp"], _TP_PLAN)
        if "ep" in names:
            layer.mlp.experts = LocalExperts(layer.mlp.experts, mesh["ep"])
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


def _refuse_architecture(sizes: dict[str, int], architecture: str) -> None:
    splits = {"llama": ("tp", "pp"), "mixtral": ("ep",)}
    for dimension in ("tp", "pp", "ep"):
        if sizes[dimension] > 1 and dimension not in splits[architecture]:
            raise TopologyError(
                f"mesh.{dimension}={sizes[dimension]}: model.architecture={architecture} has mesh."
                f"{' and mesh.'.join(splits[architecture])} here; leave mesh.{dimension} at 1"
            )


def _refuse_uneven(sizes: dict[str, int], model: ModelSettings) -> None:
    divided = {
        "tp": ("num_attention_heads", "num_key_value_heads", "intermediate_size"),
        "ep": ("num_local_experts",),
    }
    for dimension, names in divided.items():
        for name in names if sizes[dimension] > 1 else ():
            if (getattr(model, name) or 1) % sizes[dimension]:
                raise TopologyError(
                    f"mesh.{dimension}={sizes[dimension]} does not divide model.{name}={getattr(model, name)}"
                )
