"""What a save costs in planning, from 8 to 16,384 ranks, without the ranks.

PyTorch's fake process group lets one process be any rank of any world. For each world, a (replicate, shard, tensor)
mesh, the state of a 70B-like model with Adam is planned: 1,000 parameters, 4,000 tensors. Printed are two tables in
Markdown; docs/scaling.md explains them. Times are this thread's CPU time, medians of five, after a garbage
collection. Counts are taken over all ranks of a world. Beyond `--whole` ranks, where that would take an hour, the model
has a tenth of its layers for it, and what HSDP writes is counted once more with the whole model over the ranks of one
shard coordinate, of which all others are copies.

    python scripts/bench/scale.py
    python scripts/bench/scale.py --worlds 8 64 --dcp-seconds 20
"""

from __future__ import annotations

import argparse
import gc
import json
import pickle
import statistics
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hydra_ckpt.distributed.channel import SoloChannel
from hydra_ckpt.files import Files
from hydra_ckpt.layout.blocks import BLOCK_SHARDS
from hydra_ckpt.layout.boxes import Box, Sharding
from hydra_ckpt.layout.plan import WriteItem, WritePlan, full_coverage
from hydra_ckpt.layout.replicas import ranks_per_file
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.saving.agreement import Agreement, Parts, agree
from hydra_ckpt.saving.save import Content, DraftWriter
from hydra_ckpt.saving.watching import Watchlist
from hydra_ckpt.saving.write_planning import (
    PartLayout,
    consolidated_layout,
    make_plan,
    signature,
    state_layout,
)
from hydra_ckpt.state.local import Localizer, LocalTensor, ShardPlacement
from hydra_ckpt.storage.staging import Snapshot
from hydra_ckpt.store.draft import Draft
from hydra_ckpt.store.manifest import Manifest, to_bytes

MESHES = {8: (1, 1, 8), 64: (1, 8, 8), 512: (4, 16, 8), 4096: (8, 64, 8), 16384: (16, 128, 8)}
LAYERS = 83
_WRITE_BYTES = 64 << 20  # the largest single write of `hydra_ckpt.files`


@dataclass(frozen=True)
class Weight:
    """A parameter: name, shape, and the dimension that tensor parallelism splits."""

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None


def weights(layers: int) -> list[Weight]:
    """The parameters of a dense model, 12 a layer; 83 layers make 999 of them and 72 billion elements."""
    hidden, heads, inner = 8192, 1024, 28672
    found = [Weight("model.embed_tokens.weight", (128256, hidden), 0)]
    for layer in range(layers):
        shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
            "self_attn.q_proj.weight": ((hidden, hidden), 0),
            "self_attn.q_proj.bias": ((hidden,), 0),
            "self_attn.k_proj.weight": ((heads, hidden), 0),
            "self_attn.k_proj.bias": ((heads,), 0),
            "self_attn.v_proj.weight": ((heads, hidden), 0),
            "self_attn.v_proj.bias": ((heads,), 0),
            "self_attn.o_proj.weight": ((hidden, hidden), 1),
            "mlp.gate_proj.weight": ((inner, hidden), 0),
            "mlp.up_proj.weight": ((inner, hidden), 0),
            "mlp.down_proj.weight": ((hidden, inner), 1),
            "input_layernorm.weight": ((hidden,), None),
            "post_attention_layernorm.weight": ((hidden,), None),
        }
        found += [Weight(f"model.layers.{layer}.{name}", *shape) for name, shape in shapes.items()]
    return [*found, Weight("model.norm.weight", (hidden,), None), Weight("lm_head.weight", (128256, hidden), 0)]


def state_of(layers: int) -> Iterator[tuple[str, str, Weight, torch.dtype]]:
    """Part, name, parameter and element type of every tensor: bf16 parameters, Adam's moments in fp32."""
    for weight in weights(layers):
        yield "model", weight.name, weight, torch.bfloat16
        for key in ("exp_avg", "exp_avg_sq"):
            yield "optim", f"{weight.name}:{key}", weight, torch.float32
        yield "optim", f"{weight.name}:step", Weight(weight.name, (), None), torch.float32


@dataclass
class World:
    """One rank's view of a simulated world."""

    shape: tuple[int, int, int]
    layers: int
    localize: Localizer = field(default_factory=Localizer)

    @property
    def size(self) -> int:
        """Its ranks."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def live(self, mesh: DeviceMesh) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors as FSDP2 over tensor parallelism holds them; on the meta device, without memory."""
        found: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optim": {}}
        here = tuple(mesh.get_coordinate() or ())
        for part, name, weight, dtype in state_of(self.layers):
            if not weight.shape:
                found[part][name] = torch.empty((), dtype=dtype, device="meta")
                continue
            stride = (weight.shape[1], 1) if len(weight.shape) == 2 else (1,)
            meta = TensorMeta(torch.Size(weight.shape), stride, dtype)
            sizes = sharding(self.shape, here, weight.tp_dim).box(weight.shape).sizes
            local = torch.empty(sizes, dtype=dtype, device="meta")
            spec = DTensorSpec(mesh, placements(self.shape, weight.tp_dim), meta)
            found[part][name] = DTensor(local, spec, requires_grad=False)
        return found

    def extract(self, live: dict[str, dict[str, torch.Tensor]]) -> Parts:
        """The tensors' places, as a save finds them."""
        with torch.no_grad():
            return {part: [self.localize(name, item) for name, item in held.items()] for part, held in live.items()}

    def parts_of(self, rank: int, *, plain: bool) -> Parts:
        """What any rank holds, by arithmetic alone; `plain` for DDP, where each rank holds everything."""
        coordinate = coordinate_of(rank, self.shape)
        nothing = torch.empty(0)
        found: dict[str, list[LocalTensor]] = {"model": [], "optim": []}
        for part, name, weight, dtype in cached_state(self.layers):
            spec = spec_of(name, weight.shape, dtype)
            if plain or not weight.shape:
                place = ShardPlacement(spec, whole(weight.shape))
            else:
                box, spread, group = geometry(self.shape, coordinate, weight.shape, weight.tp_dim)
                place = ShardPlacement(
                    spec, box, "mesh", spread.replica, group, ranks_per_file=ranks_per_file(spread), sharding=spread
                )
            found[part].append(LocalTensor(place, nothing))
        return found


@cache
def cached_state(layers: int) -> tuple[tuple[str, str, Weight, torch.dtype], ...]:
    """`state_of`, made once."""
    return tuple(state_of(layers))


@cache
def spec_of(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorSpec:
    """The whole tensor."""
    return TensorSpec(name, "BF16" if dtype == torch.bfloat16 else "F32", shape)


@cache
def whole(shape: tuple[int, ...]) -> Box:
    """All of a tensor."""
    return Box.whole(shape)


def sharding(mesh: tuple[int, ...], coordinate: tuple[int, ...], tp_dim: int | None) -> Sharding:
    """Replicated, then FSDP's rows of tensor parallelism's part."""
    return Sharding(mesh, coordinate, (None, 0, tp_dim), (False, tp_dim == 0, False))


@cache
def geometry(
    mesh: tuple[int, ...], coordinate: tuple[int, ...], shape: tuple[int, ...], tp_dim: int | None
) -> tuple[Box, Sharding, object]:
    """A rank's box of a tensor, how it is spread, and the group that divides it."""
    found = sharding(mesh, coordinate, tp_dim)
    return found.box(shape), found, tuple(dim is None for dim in found.dims)


@cache
def placements(mesh: tuple[int, ...], tp_dim: int | None) -> tuple[Placement, ...]:
    """What PyTorch says of such a tensor."""
    rows = _StridedShard(0, split_factor=mesh[2]) if tp_dim == 0 else Shard(0)
    return Replicate(), rows, Replicate() if tp_dim is None else Shard(tp_dim)


def coordinate_of(rank: int, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """A rank's place in the mesh, row-major."""
    return rank // (shape[1] * shape[2]), rank // shape[2] % shape[1], rank % shape[2]


class OneOfMany(SoloChannel):
    """This rank among others that all send the same; the coordinator's work is done for all of them, or not at all."""

    def __init__(self, rank: int, world_size: int, *, coordinator: bool) -> None:
        self.rank, self.world_size = rank, world_size
        self._notes = world_size if coordinator else 1

    def gather(self, what: str, payload: Any) -> list[Any]:
        """As many payloads as there are ranks."""
        return [payload] * self._notes

    def scatter(self, what: str, payloads: Any) -> Any:
        """What this rank hears."""
        return payloads[0]


def layouts_of(agreement: Agreement, world_size: int) -> list[PartLayout]:
    """A consolidated model and optimizer state in shared files, as `save_consolidated=always` writes them."""
    nbytes = sum(spec.nbytes for spec in agreement.specs["optim"])
    return [consolidated_layout("model", diffusers=False), state_layout("optim", nbytes, world_size)]


def cpu_ms(action: Callable[[], Any], repeats: int = 5) -> tuple[float, Any]:
    """Median CPU time of this thread in milliseconds, and the last result."""
    found, result = [], None
    for _ in range(repeats):
        gc.collect()
        begun = time.thread_time()
        result = action()
        found.append((time.thread_time() - begun) * 1e3)
    return statistics.median(found), result


@dataclass
class Counts:
    """What all ranks of a world write together."""

    world: int
    covered: int = 0
    nbytes: list[int] = field(default_factory=list)
    opens: int = 0
    calls: int = 0
    piece_bytes: list[float] = field(default_factory=list)
    whole_writers: Counter[str] = field(default_factory=Counter)
    block_writers: Counter[str] = field(default_factory=Counter)

    def add(self, plan: WritePlan) -> None:
        """Count one rank's plan."""
        self.covered = (self.covered + plan.coverage) % (1 << 64)
        self.nbytes.append(plan.nbytes)
        files = {piece.file for piece in plan.pieces}
        self.whole_writers.update(plan.files[index].path for index in files if index < len(plan.files))
        self.block_writers.update(plan.all_files[index].path for index in files if index >= len(plan.files))
        self.opens = max(self.opens, len(files))
        per_tensor = Counter[int]()
        for piece in plan.pieces:
            per_tensor[piece.share] += system_calls(piece)
        self.calls = max(self.calls, *per_tensor.values(), 0)
        if plan.pieces:
            self.piece_bytes.append(plan.nbytes / len(plan.pieces))

    @property
    def imbalance(self) -> float:
        """The most loaded writer's bytes over the mean of all writers'."""
        busy = [nbytes for nbytes in self.nbytes if nbytes]
        return max(busy) / statistics.mean(busy)


def system_calls(piece: WriteItem) -> int:
    """Writes, or mapping and unmapping, of one piece."""
    return 2 if piece.region.count > 1 else -(-piece.region.nbytes // _WRITE_BYTES)


def count(world: World, *, plain: bool, one_shard: bool = False) -> tuple[Counts, bool, int]:
    """Plan every rank, or those at shard coordinate 0 for all; whether each byte is written once; number of files."""
    counts = Counts(world.size)
    agreement = agree(world.parts_of(0, plain=plain), OneOfMany(0, world.size, coordinator=False), 0, None)
    layouts = layouts_of(agreement, world.size)
    plan = None
    for rank in range(world.size):
        if one_shard and coordinate_of(rank, world.shape)[1]:
            continue
        copies = {"mesh": (0, 1), "": (rank, world.size)}
        parts = world.parts_of(rank, plain=plain)
        plan = make_plan(parts, replace(agreement, copies=copies), layouts, rank, world.size)
        counts.add(plan)
    assert plan is not None  # a world has ranks
    in_blocks = len(counts.block_writers)
    if one_shard:
        shards = world.shape[1]
        blocks = -(-shards // BLOCK_SHARDS)
        in_blocks *= blocks
        counts.whole_writers = Counter({file: number * shards for file, number in counts.whole_writers.items()})
        counts.block_writers = Counter(
            {file: number * -(-shards // blocks) for file, number in counts.block_writers.items()}
        )
    return counts, counts.covered == full_coverage(plan.files), len(plan.files) + in_blocks


def receipts_cost(plan: WritePlan, layouts: list[PartLayout], world_size: int) -> tuple[float, float, float]:
    """Coordinator: from the ranks' receipts as they came to the manifest's text; ms, peak MB, manifest MB."""
    total = full_coverage(plan.files)
    texts = [
        json.dumps(
            {
                "token": "0123456789abcdef",
                "plan": plan.fingerprint,
                "coverage": total if rank == 0 else 0,
                "bytes": plan.nbytes,
                "files": {
                    f"digests/rank-{rank:05d}.bin": [7000, "0123456789abcdef"],
                    f"progress/rank-{rank:05d}.safetensors": [8000, "0123456789abcdef"],
                },
                "rows": None,
            }
        )
        for rank in range(world_size)
    ]
    content = Content(tuple(layouts), plan, None, None, {}, {}, 0)
    writer = DraftWriter(Files(), 0, world_size, content, Snapshot)
    draft = Draft(Path("draft"), "epoch_0_step_1", "0123456789abcdef")

    def work() -> bytes:
        receipts = [json.loads(text) for text in texts]
        found = writer.collect(draft, receipts)
        digests = tuple(sorted(path for path in found if path.startswith("digests/")))
        return to_bytes(Manifest(1, 0, 0.0, world_size, writer.parts(found), found, digests, plan=plan.fingerprint))

    milliseconds, manifest = cpu_ms(work, repeats=3)
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return milliseconds, peak / 1e6, len(manifest) / 1e6


def dcp_cost(world: World, live: dict[str, dict[str, torch.Tensor]], limit_s: float) -> tuple[float, float, float]:
    """DCP's default planner: ms for a rank's plan, s for the coordinator's, MB of plans it gathers (as pickles)."""
    planner = DefaultSavePlanner()
    flat = {f"{part}.{name}": tensor for part, held in live.items() for name, tensor in held.items()}
    planner.set_up_planner(flat, is_coordinator=True)
    local_ms, plan = cpu_ms(planner.create_local_plan, repeats=3)
    gathered_mb = len(pickle.dumps(plan)) * world.size / 1e6
    if world.size * len(plan.items) * 6e-5 > limit_s:  # about 60 microseconds an item on the machine of the table
        return local_ms, float("nan"), gathered_mb
    shapes = {f"{part}.{name}": weight for part, name, weight, _ in state_of(world.layers)}
    plans = []
    for rank in range(world.size):
        here = coordinate_of(rank, world.shape)
        items = []
        for item in plan.items:
            weight, data = shapes[item.index.fqn], item.tensor_data
            box = sharding(world.shape, here, weight.tp_dim).box(weight.shape) if weight.shape else Box((), ())
            chunk = replace(data.chunk, offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))
            index = replace(item.index, offset=chunk.offsets)
            items.append(replace(item, index=index, tensor_data=replace(data, chunk=chunk)))
        plans.append(replace(plan, items=items))
    coordinator_ms, _ = cpu_ms(lambda: planner.create_global_plan(plans), repeats=1)
    return local_ms, coordinator_ms / 1e3, gathered_mb


@dataclass(frozen=True)
class Planned:
    """What a rank keeps from its first save."""

    agreement: Agreement
    layouts: list[PartLayout]
    plan: WritePlan
    watchlist: Watchlist


def first_plan(world: World, live: dict[str, dict[str, torch.Tensor]]) -> Planned:
    """All that a rank computes before its first save."""
    world.localize = Localizer()
    parts = world.extract(live)
    agreement = agree(parts, OneOfMany(0, world.size, coordinator=False), 0, None)
    agreement = replace(agreement, copies={**agreement.copies, "": (0, world.size)})
    layouts = layouts_of(agreement, world.size)
    plan = make_plan(parts, agreement, layouts, 0, world.size)
    return Planned(agreement, layouts, plan, Watchlist(parts, agreement, (), ()))


def measure(size: int, dcp_seconds: float) -> str:
    """One world's row of the table of times."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    shape = MESHES[size]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("rep", "shard", "tp"))
    world = World(shape, LAYERS)
    live = world.live(mesh)
    first_ms, planned = cpu_ms(lambda: first_plan(world, live))
    extract_ms, parts = cpu_ms(lambda: world.extract(live))
    plans = {signature(parts): planned}
    cached_ms, _ = cpu_ms(lambda: plans[signature(parts)])
    agree_ms, _ = cpu_ms(lambda: agree(parts, OneOfMany(0, size, coordinator=True), 0, None), repeats=3)
    receipts_ms, peak_mb, manifest_mb = receipts_cost(planned.plan, planned.layouts, size)
    dcp = dcp_cost(world, live, dcp_seconds)
    dist.destroy_process_group()
    costs = [f"{size:,}", "x".join(map(str, shape)), f"{first_ms:.0f}", f"{cached_ms:.2f}", f"{extract_ms:.0f}"]
    costs += [f"{agree_ms:.0f}", f"{receipts_ms:.0f}", f"{peak_mb:.0f}", f"{manifest_mb:.1f}"]
    costs += [f"{dcp[0]:.0f}", "-" if dcp[1] != dcp[1] else f"{dcp[1]:.1f}", f"{dcp[2]:,.0f}"]
    return " | ".join(costs)


def measure_writing(size: int, whole_up_to: int) -> list[str]:
    """One world's rows of the table of counts."""
    shape = MESHES[size]
    counted: list[str] = []
    thinned = World(shape, LAYERS if size <= whole_up_to else LAYERS // 10)
    for kind in ("HSDP x TP", "DDP"):
        counts, once, files = count(thinned, plain=kind == "DDP")
        if thinned.layers != LAYERS and kind != "DDP":
            counts, _, files = count(World(shape, LAYERS), plain=False, one_shard=True)
        row = [f"{size:,}", kind, "yes" if once else "NO", f"{counts.imbalance:.3f}", f"{files}", f"{counts.opens}"]
        row += [
            f"{counts.calls}",
            f"{max(counts.whole_writers.values())}",
            f"{max(counts.block_writers.values(), default=0) or '-'}",
            f"{statistics.mean(counts.piece_bytes) / 2**20:.2f}",
        ]
        counted.append(" | ".join(row))
    return counted


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=list(MESHES), choices=list(MESHES))
    parser.add_argument("--whole", type=int, default=64, help="count the whole model up to so many ranks")
    parser.add_argument("--dcp-seconds", type=float, default=60.0, help="skip DCP's global plan beyond about this")
    parser.add_argument("--only", choices=["times", "counts"], help="print one of the tables")
    arguments = parser.parse_args()
    if arguments.only != "counts":
        titles = ["ranks", "mesh", "first plan ms", "cached plan ms", "extract ms", "coordinator agrees ms"]
        titles += ["receipts ms", "receipts MB", "manifest MB", "DCP plan ms", "DCP coordinator s", "DCP gathers MB"]
        table(titles, [measure(size, arguments.dcp_seconds) for size in arguments.worlds])
    if arguments.only != "times":
        titles = ["ranks", "layout", "each byte once", "most / mean", "files", "opens per rank", "calls per tensor"]
        titles += ["writers per whole file", "writers per block file", "MiB per piece"]
        table(titles, [row for size in arguments.worlds for row in measure_writing(size, arguments.whole)])


def table(titles: list[str], rows: list[str]) -> None:
    """Print a table in Markdown."""
    print("\n| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for row in rows:
        print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
