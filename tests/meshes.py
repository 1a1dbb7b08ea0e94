"""One model on any device mesh, with values that show where each element belongs.

An element's value is a function of its tensor's name and its index in the whole tensor. A twin of the model that holds
the indices themselves is sharded by PyTorch in the same way, so what a rank must hold is known without our arithmetic.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Muon, Optimizer

from hydra_ckpt import AppState, Checkpointer, CheckpointingConfig

# Name to the shape of the mesh (dp_replicate, dp_shard, tp) and whether DistributedDataParallel wraps the model.
MESHES: dict[str, tuple[tuple[int, int, int], bool]] = {
    "one": ((1, 1, 1), False),
    "ddp2": ((2, 1, 1), True),
    "fsdp2": ((1, 2, 1), False),
    "fsdp4": ((1, 4, 1), False),
    "hsdp2x2": ((2, 2, 1), False),
    "tp2": ((1, 1, 2), False),
    "fsdp2_tp2": ((1, 2, 2), False),
    "fsdp4_tp2": ((1, 4, 2), False),
    "hsdp2x2_tp2": ((2, 2, 2), False),
}


class Net(nn.Module):
    """Sizes that no mesh divides, a tied weight, frozen parts, many element types, parameters without gradients."""

    _tied_weights_keys = ("head.weight",)

    def __init__(self, size: int = 9, *, plain: torch.dtype | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.up = nn.Linear(7, size)  # by columns under tensor parallelism
        self.down = nn.Linear(size, 7)  # by rows: the inner dimension is split
        self.norm = nn.LayerNorm(7)
        self.narrow = nn.Linear(7, 1)  # a dimension smaller than any mesh
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.coarse = nn.Linear(5, 3, dtype=plain or torch.bfloat16)
        self.frozen = nn.Linear(3, 5, dtype=plain or torch.float16).requires_grad_(False)
        self.quantized = nn.Module()
        wide = torch.zeros(5, 3, dtype=plain or torch.float8_e4m3fn)
        self.quantized.weight = nn.Parameter(wide, requires_grad=False)
        self.counts = nn.Module()
        self.counts.table = nn.Parameter(torch.zeros(3, 2, dtype=plain or torch.int64), requires_grad=False)
        self.unused = nn.Parameter(torch.zeros(5))
        self.empty = nn.Parameter(torch.zeros(0, 3), requires_grad=False)
        self.register_buffer("step", torch.zeros((), dtype=plain or torch.int64))
        self.register_buffer("mask", torch.zeros(2, 3, dtype=plain or torch.bool))
        self.register_buffer("scale", torch.zeros(5, dtype=plain or torch.float8_e5m2))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def units(self) -> list[nn.Module]:
        """What FSDP shards on its own; each has parameters of one element type."""
        return [self.up, self.down, self.coarse, self.frozen, self.quantized, self.counts]


def parallelize(model: Net, place: Place, *, reshard_after_forward: bool = True) -> nn.Module:
    """The model on a mesh, as training applications do it."""
    mesh = place.mesh
    if mesh is None:
        return model
    if place.is_ddp:
        # Without the broadcast at the start, for which gloo does not know all of these element types.
        return DistributedDataParallel(model, process_group=place.group, find_unused_parameters=True, init_sync=False)
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    data = tuple(name for name in names if name != "tp")
    if data:
        for unit in model.units():
            fully_shard(unit, mesh=mesh[data], reshard_after_forward=reshard_after_forward)
        fully_shard(model, mesh=mesh[data], reshard_after_forward=reshard_after_forward)
    return model


@dataclass
class Place:
    """This process's place in one of the meshes.

    Attributes:
        name: Of the mesh.
        members: Its global ranks.
        mesh: The device mesh; None for a single process.
        group: The members' process group; None where this process is not one of them.
    """

    name: str
    members: list[int]
    mesh: DeviceMesh | None
    group: dist.ProcessGroup | None

    @property
    def is_ddp(self) -> bool:
        """Whether DistributedDataParallel does it."""
        return MESHES[self.name][1]

    @property
    def ranks(self) -> tuple[int, int, int]:
        """Data-parallel, tensor-parallel and pipeline rank."""
        tp = MESHES[self.name][0][2]
        rank = dist.get_rank(self.group) if self.group is not None else 0
        return rank // tp, rank % tp, 0

    def build(self, directory: Any, **options: Any) -> Checkpointer:
        """The engine of the mesh's ranks."""
        config = CheckpointingConfig(checkpoint_dir=str(directory), **options)
        return config.build(*self.ranks, process_group=self.group)


def place(name: str) -> Place:
    """Collective, all processes: make a mesh of the last ones; the others are not in it."""
    replicate, shard, tp = MESHES[name][0]
    world, count = dist.get_world_size(), replicate * shard * tp
    members = list(range(world - count, world))
    group = dist.new_group(members)
    sizes = {"dp_replicate": replicate, "dp_shard": shard, "tp": tp}
    sizes = {key: size for key, size in sizes.items() if size > 1}
    mesh = None
    if sizes:
        mesh = DeviceMesh("cpu", torch.tensor(members).view(*sizes.values()), mesh_dim_names=tuple(sizes))
    return Place(name, members, mesh, group if dist.get_rank() in members else None)


class Average:
    """A moving average that keeps tensors like the parameters."""

    def __init__(self, model: nn.Module) -> None:
        trained = {canonical(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in trained.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "decay": 0.9}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = dict(state["shadow"])


def values(key: str, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What belongs at these indices of the tensor of this name; exact in every element type."""
    whole = (index.to(torch.int64) * 2654435761 + zlib.crc32(key.encode())) % 251
    if dtype == torch.bool:
        return whole % 2 == 0
    if dtype.itemsize == 1 and dtype.is_floating_point:
        whole = whole % 16
    return (whole - 7).to(torch.float32).to(dtype)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def canonical(name: str) -> str:
    """A parameter's name without wrappers."""
    return name.replace("module.", "").replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


@dataclass
class Run:
    """A model on a mesh with optimizers and a moving average, everything filled with known values.

    Args:
        place: Where.
        size: A dimension of the model's.
        trained: Whether the optimizers have a state already.
    """

    place: Place
    size: int = 9
    trained: bool = True
    reshard_after_forward: bool = True
    model: nn.Module = field(init=False)
    optimizers: list[Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        shard = {"reshard_after_forward": self.reshard_after_forward}
        self.model = parallelize(Net(self.size), self.place, **shard)
        self.indices = self._indices()
        parameters = {canonical(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        muon = [p for name, p in parameters.items() if name in ("up.weight", "down.weight")]
        decayed = [p for name, p in parameters.items() if name in ("embed.weight", "narrow.weight", "coarse.weight")]
        rest = [p for p in parameters.values() if not any(p is other for other in [*muon, *decayed])]
        groups = [{"params": decayed, "weight_decay": 0.1, "lr": 0.5}, {"params": rest, "betas": (0.5, 0.75)}]
        self.optimizers = [Muon(muon, lr=0.25), AdamW(groups, lr=0.125)]
        self.average = Average(self.model)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizers[1], 3)
        self.state = AppState(self.model, list(self.optimizers), self.schedule, extras={"ema": self.average})
        self.parameters = parameters
        if self.trained:
            self.train()
        self.fill()

    def train(self) -> None:
        """Make the optimizers have a state, but for what never gets a gradient."""
        for name, parameter in self.parameters.items():
            if name == "unused":
                continue
            if any(parameter is other for other in self.optimizers[0].param_groups[0]["params"]):
                self.optimizers[0].state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            else:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizers[1].step()
        self.optimizers[1].zero_grad()
        self.schedule.step()

    def _indices(self) -> dict[str, torch.Tensor]:
        """For each tensor of the model the indices of the elements that lie here, as PyTorch has distributed them."""
        twin = Net(self.size, plain=torch.float64).double()
        with torch.no_grad():
            for tensor in [*twin.parameters(), *twin.buffers()]:
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
        if not self.place.is_ddp:
            parallelize(twin, self.place)
        return {name: local(tensor) for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]}

    def _tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Key, name of the tensor with the same placement, and the tensor."""
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if "scratch" not in name:
                yield canonical(name), canonical(name), tensor
        names = {id(p): name for name, p in self.parameters.items()}
        for optimizer in self.optimizers:
            for parameter, held in optimizer.state.items():
                name = names[id(parameter)]
                yield from ((f"{name}:{key}", name if tensor.dim() else "step", tensor) for key, tensor in held.items())
        for name, tensor in self.average.shadow.items():
            yield f"ema:{name}", name, tensor

    @torch.no_grad()
    def fill(self, salt: str = "") -> None:
        """Give every element its value."""
        for key, name, tensor in self._tensors():
            local(tensor).copy_(values(key + salt, self.indices[name], tensor.dtype))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.25 if salt else 0.0625

    def wrong(self) -> list[str]:
        """Keys of tensors that do not hold, to the last bit, what they should, and what else is not as saved."""
        found = []
        seen = set()
        for key, name, tensor in self._tensors():
            expected = values(key, self.indices[name], tensor.dtype)
            here = local(tensor)
            if here.shape != expected.shape or not torch.equal(_bits(here), _bits(expected)):
                found.append(key)
            seen.add(key)
        found += sorted(KEYS ^ seen)
        found += [f"lr {group['lr']}" for o in self.optimizers for group in o.param_groups if group["lr"] != 0.0625]
        if self.optimizers[1].param_groups[1]["betas"] != (0.5, 0.75) or self.schedule.last_epoch != 1:
            found.append("options")
        core = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        if core.head.weight is not core.embed.weight:
            found.append("the tie")
        return found

    def local_nbytes(self) -> int:
        """Bytes of all tensors as this rank holds them."""
        return sum(local(tensor).nbytes for _, _, tensor in self._tensors())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


_TRAINED = {"up.bias", "down.bias", "norm.weight", "norm.bias", "narrow.weight", "narrow.bias", "embed.weight"}
_TRAINED |= {"coarse.weight", "coarse.bias"}
_MUON = {"up.weight", "down.weight"}
_OTHERS = {"empty", "frozen.weight", "frozen.bias", "quantized.weight", "counts.table", "step", "mask", "scale"}

# Everything a checkpoint of a trained run holds.
KEYS = _TRAINED | _MUON | _OTHERS | {"unused"}
KEYS |= {f"ema:{name}" for name in _TRAINED | _MUON | {"unused"}}
KEYS |= {f"{name}:{key}" for name in _TRAINED for key in ("step", "exp_avg", "exp_avg_sq")}
KEYS |= {f"{name}:momentum_buffer" for name in _MUON}
