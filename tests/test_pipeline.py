"""Pipeline stages save one model together, and any other number of stages resumes from it."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hydra_ckpt import AppState, CheckpointingConfig, KeyMismatchError, TopologyError
from hydra_ckpt.saving.agreement import agree
from hydra_ckpt.saving.write_planning import PartLayout, make_plan
from hydra_ckpt.state.capture import Extractor
from hydra_ckpt.storage.staging import borrow
from hydra_ckpt.storage.write import create_files, write_plan
from hydra_ckpt.testing import run_distributed

# Pipeline rank to its parts, and each part's layers; `fsdp` ranks share each stage.
LAYOUTS: dict[str, tuple[list[list[tuple[int, ...]]], int]] = {
    "one": ([[(0, 1, 2, 3)]], 1),
    "ddp": ([[(0, 1, 2, 3)]], 2),
    "fsdp": ([[(0, 1, 2, 3)]], 2),
    "pp2": ([[(0, 1)], [(2, 3)]], 1),
    "interleaved": ([[(0,), (2,)], [(1,), (3,)]], 1),
    "pp4": ([[(0,)], [(1,)], [(2,)], [(3,)]], 1),
    "uneven": ([[(0, 1, 2)], [(3,)]], 1),
    "pp2-fsdp2": ([[(0, 1)], [(2, 3)]], 2),
    "tp": ([[(0, 1, 2, 3)]], 2),
    "hsdp": ([[(0, 1, 2, 3)]], 4),
    "tp-fsdp2": ([[(0, 1, 2, 3)]], 4),
    "pp2-tp2": ([[(0, 1)], [(2, 3)]], 2),
}
# The mesh within a stage, where it is not FSDP's alone; `tp` splits projections.
WITHIN: dict[str, dict[str, int]] = {
    "ddp": {},
    "tp": {"tp": 2},
    "hsdp": {"replicate": 2, "shard": 2},
    "tp-fsdp2": {"shard": 2, "tp": 2},
    "pp2-tp2": {"tp": 2},
}
RANKS = {name: len(stages) * width for name, (stages, width) in LAYOUTS.items()}


class Layer(nn.Module):
    """Odd sizes, a buffer, and state of its own."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6), requires_grad=index != 1)
        self.register_buffer("seen", torch.tensor(float(index)))
        self.note = {"index": index, "table": torch.arange(3.0) + index}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.proj(x)) * self.scale

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


class Net(nn.Module):
    """A model whose parts keep their names wherever they run: what is not there is None, or missing in the dict."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed: nn.Embedding | None = nn.Embedding(11, 6)
        self.layers = nn.ModuleDict({str(index): Layer(index) for index in range(4)})
        self.head: nn.Linear | None = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
            self._tied_weights_keys = {"head.weight": "embed.weight"}

    def part(self, layers: tuple[int, ...]) -> Net:
        part = copy.deepcopy(self)
        part.layers = nn.ModuleDict({str(index): part.layers[str(index)] for index in layers})
        part.embed = part.embed if 0 in layers else None
        part.head = part.head if 3 in layers else None
        return part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) if self.embed is not None else x
        for layer in self.layers.values():
            x = layer(x)
        return self.head(x) if self.head is not None else x


class Ema:
    """An average of this rank's parameters, by name; its own count as a tensor."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self.shadow = {name: parameter.detach() * 0.5 for name, parameter in parameters.items()}
        self.updates = torch.tensor(7)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "decay": 0.9, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = dict(state["shadow"]), state["updates"]


class Stages:
    """This rank's parts of a run, with an optimizer and a schedule for each."""

    def __init__(self, layout: str, seed: int, *, tied: bool = False) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        stages, self.width = LAYOUTS[layout]
        self.pp_rank = rank // self.width
        torch.manual_seed(seed)
        whole = Net(tied=tied)
        self.parts = [whole.part(layers) for layers in stages[self.pp_rank]]
        within = WITHIN.get(layout, {"shard": self.width} if self.width > 1 else {})
        if within:
            sizes = {"pp": len(stages), **within}
            mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
            data = tuple(name for name in within if name != "tp")
            for part in self.parts:
                if "tp" in within:
                    # FSDP on top of columns makes strided shards, which PyTorch cannot distribute a gradient to.
                    style = RowwiseParallel() if data else ColwiseParallel()
                    parallelize_module(part, mesh["tp"], {"layers.*.proj": style})
                if data:
                    fully_shard(part, mesh=mesh[data])
        self.tied = tied
        self.optimizers = [
            torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=0.01) for part in self.parts
        ]
        self.schedulers = [torch.optim.lr_scheduler.ExponentialLR(item, 0.5) for item in self.optimizers]
        self.ema = Ema(dict(self.named()))
        self.state = AppState(
            list(self.parts) if len(stages) > 1 else self.parts[0],
            list(self.optimizers),
            list(self.schedulers),
            extras={"ema": self.ema},
        )

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters by the name they are stored under."""
        for part in self.parts:
            for name, parameter in part.named_parameters():
                yield ("embed.weight" if self.tied and name == "head.weight" else name), parameter

    def train(self, steps: int) -> None:
        """Steps whose gradients depend on a parameter's name and value only, not on the layout."""
        for _ in range(steps):
            for name, parameter in self.named():
                if parameter.requires_grad:
                    parameter.grad = gradient(name, parameter)
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.step()
                scheduler.step()
            for name, parameter in self.named():
                self.ema.shadow[name] = self.ema.shadow[name] * 0.5 + parameter.detach() * 0.5
            for part in self.parts:
                for layer in part.layers.values():
                    layer.seen += 0.5
                    layer.note["index"] += 10

    def everything(self) -> dict[str, Any]:
        """All there is to restore, whole, by canonical names."""
        found: dict[str, Any] = {}
        held = {parameter: (name, number) for name, parameter in self.named() for number in [0]}
        for number, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = held[parameter][0]
                    for key, value in optimizer.state[parameter].items():
                        found[f"{name}:{key}"] = full(value)
                    found[f"{name}:lr"] = (group["lr"], self.schedulers[number].last_epoch)
        for name, parameter in self.named():
            found[name] = full(parameter)
        for part in self.parts:
            for index, layer in part.layers.items():
                found[f"layers.{index}.seen"] = layer.seen.clone()
                found[f"layers.{index}.note"] = (layer.note["index"], layer.note["table"].tolist())
        found.update({f"ema:{name}": full(tensor) for name, tensor in self.ema.shadow.items()})
        found["ema:updates"] = self.ema.updates.item()
        return found


def gradient(name: str, parameter: torch.Tensor) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    if isinstance(parameter, DTensor):
        noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
    return parameter.detach() * 0.1 + noise


def full(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def engine_of(directory: Path, stages: Stages, **options: Any) -> Any:
    config = CheckpointingConfig(checkpoint_dir=str(directory), **options)
    return config.build(dist.get_rank() % stages.width if dist.is_initialized() else 0, 0, stages.pp_rank)


def save(
    directory: Path, layout: str, tied: bool, options: dict[str, Any], block_shards: int | None = None
) -> dict[str, Any]:
    stages = Stages(layout, 1, tied=tied)
    stages.train(3)
    with engine_of(directory, stages, **options) as engine:
        engine._saver._contents.outputs.block_shards = block_shards or engine._saver._contents.outputs.block_shards
        engine.save(stages.state, step=3).result()
    return stages.everything()


def load(directory: Path, layouts: list[str], tied: bool) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Load into differently cut runs of this world size, one after the other; each then trains on."""
    found = []
    for layout in layouts:
        stages = Stages(layout, 2, tied=tied)
        with engine_of(directory, stages) as engine:
            report = engine.load(stages.state)
        assert report.step == 3
        assert {"model", "optimizer", "lr_scheduler", "extras"} <= set(report.loaded)
        before = stages.everything()
        stages.train(1)
        found.append(({**before, **{f"next {key}": value for key, value in stages.everything().items()}}, report.notes))
    return found


def expected(tied: bool) -> dict[str, Any]:
    stages = Stages("one", 1, tied=tied)
    stages.train(3)
    before = stages.everything()
    stages.train(1)
    return {**before, **{f"next {key}": value for key, value in stages.everything().items()}}


def assert_holds(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() <= wanted.keys()
    for key, value in found.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == wanted[key].dtype, key
            assert torch.equal(value, wanted[key]), key
        else:
            assert value == wanted[key], key


def check(
    tmp_path: Path,
    source: str,
    targets: dict[int, list[str]],
    tied: bool,
    options: dict[str, Any],
    block_shards: int | None = None,
) -> None:
    wanted = expected(tied)
    saved = run_distributed(save, RANKS[source], tmp_path, source, tied, options, block_shards)
    for part in saved:
        assert_holds(part, wanted)
    if options.get("save_consolidated") == "always":
        on_disk: dict[str, torch.Tensor] = {}
        for file in sorted((tmp_path / "LATEST" / "model" / "consolidated").glob("*.safetensors")):
            on_disk.update(load_file(file))
        model = {key: value for key, value in wanted.items() if ":" not in key and not key.startswith("next ")}
        assert on_disk.keys() == {key for key, value in model.items() if isinstance(value, torch.Tensor)}
        assert_holds(on_disk, wanted)
    for world, layouts in targets.items():
        ranks = run_distributed(load, world, tmp_path, layouts, tied)
        for number, layout in enumerate(layouts):
            union: dict[str, Any] = {}
            for rank in ranks:
                found, notes = rank[number]
                assert_holds(found, wanted)
                assert not [note for note in notes if not note.startswith(("random numbers", "buffers,"))], notes
                union.update(found)
            assert union.keys() == wanted.keys(), layout


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_interleaved_stages_go_on_as_other_stages_and_on_one_process(tmp_path: Path, tied: bool) -> None:
    options = {"save_consolidated": "always"}
    check(tmp_path, "interleaved", {1: ["one"], 2: ["interleaved", "uneven", "fsdp"]}, tied, options)


def test_stages_sharded_by_fsdp_go_on_as_plain_stages(tmp_path: Path) -> None:
    check(tmp_path, "pp2-fsdp2", {2: ["pp2", "ddp"], 4: ["pp4", "pp2-fsdp2"]}, True, {"save_consolidated": "always"})


def test_stages_with_files_for_blocks_of_shards_go_on_on_one_process(tmp_path: Path) -> None:
    check(tmp_path, "pp2-fsdp2", {1: ["one"]}, True, {}, block_shards=1)
    # Each stage's blocks have files of their own, named after the first rank of the stage and the shards.
    names = [path.name for path in (tmp_path / "LATEST" / "optim").iterdir()]
    found = {match.groups() for name in names if (match := re.match(r"optim-(\d)-0-(\d)-\d(-|\.)", name))}
    assert {(stage, shard) for stage, shard, _ in found} == {("0", "0"), ("0", "1"), ("2", "0"), ("2", "1")}


def test_one_process_continues_as_stages(tmp_path: Path) -> None:
    check(tmp_path, "one", {2: ["pp2", "interleaved"]}, True, {"is_async": True})


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"save_consolidated": "always"}, {"model_save_format": "torch_save"}], ids=str)
@pytest.mark.parametrize("source", list(LAYOUTS))
def test_any_stages_go_on_as_any_others(tmp_path: Path, source: str, options: dict[str, Any]) -> None:
    targets: dict[int, list[str]] = {}
    for name, ranks in RANKS.items():
        targets.setdefault(ranks, []).append(name)
    for tied in (False, True):
        check(tmp_path / str(tied), source, targets, tied, options)


class Renaming:
    """An adapter that calls everything otherwise; it is given one stage's part of the model."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {f"hf.{name}": tensor for name, tensor in state_dict.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix("hf."): tensor for name, tensor in hf_state_dict.items()}


def _adapted(directory: Path, layout: str, load: bool, options: dict[str, Any]) -> dict[str, Any]:
    stages = Stages(layout, 2 if load else 1, tied=True)
    for part in stages.parts:
        part.state_dict_adapter = Renaming()
    if not load:
        stages.train(1)
    with engine_of(directory, stages, **options) as engine:
        if load:
            engine.load(stages.state)
        else:
            engine.save(stages.state, step=1).result()
    return stages.everything()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_stages_with_adapters_write_one_export_of_a_tied_model_in_any_element_type(
    tmp_path: Path, dtype: str | None
) -> None:
    options = {"save_consolidated": "always", "export_dtype": dtype}
    saved = run_distributed(_adapted, 2, tmp_path, "interleaved", False, options)
    wanted = {key: value for part in saved for key, value in part.items()}
    on_disk: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "LATEST" / "model" / "consolidated").glob("*.safetensors"):
        on_disk.update(load_file(file))
    tensors = {key: value for key, value in wanted.items() if ":" not in key and isinstance(value, torch.Tensor)}
    assert on_disk.keys() == {f"hf.{name}" for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(on_disk[f"hf.{name}"], tensor.to(on_disk[f"hf.{name}"].dtype)), name
        assert on_disk[f"hf.{name}"].dtype == (torch.bfloat16 if dtype else torch.float32), name
    for found in run_distributed(_adapted, 2, tmp_path, "uneven", True, options):
        assert_holds(found, wanted)


# -- no stage knows the others -------------------------------------------------------------------------------------


def _write_in_small_files(directory: Path, layout: str, max_bytes: int) -> dict[str, Any]:
    stages = Stages(layout, 1, tied=True)
    with engine_of(directory / "unused", stages) as engine:
        parts = Extractor().capture(stages.state).parts
        agreement = agree(parts, engine._channel, stages.pp_rank, None)
        rank, world = dist.get_rank(), dist.get_world_size()
        plan = make_plan(parts, agreement, [PartLayout("model", "model", "model", max_bytes)], rank, world)
        if rank == 0:
            (directory / "model").mkdir(parents=True)
            create_files(engine._directory.files, directory, plan)
        dist.barrier()
        items = parts["model"]
        sources = {
            key: items[key].tensor[share.start : share.stop] if share.box.sizes else items[key].tensor
            for key, share in plan.shares.items()
        }
        write_plan(engine._directory.files, directory, plan, borrow(sources).sources)
        dist.barrier()
    return stages.everything()


@pytest.mark.parametrize("max_bytes", [1, 300, 1000, 1 << 40])
def test_nothing_is_lost_whatever_the_file_sizes(tmp_path: Path, max_bytes: int) -> None:
    run_distributed(_write_in_small_files, 2, tmp_path, "interleaved", max_bytes)
    wanted = Stages("one", 1, tied=True).everything()
    found: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "model").iterdir()):
        tensors = load_file(file)
        assert not tensors.keys() & found.keys()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= max_bytes
        found.update(tensors)
    model = {key for key, value in wanted.items() if ":" not in key and isinstance(value, torch.Tensor)}
    assert found.keys() == model
    assert_holds(found, wanted)


def _save_three_times(directory: Path) -> tuple[list[Any], list[Any]]:
    stages = Stages("pp2", 1)
    stages.train(1)
    with engine_of(directory, stages, save_consolidated="always") as engine:
        numbers, heard = [], []
        for step in (1, 2, 3):
            engine.save(stages.state, step=step).result()
            for channel, found in ((engine._channel, numbers), (engine._saver.background._channel, heard)):
                found.append((channel._exchange, channel._number))
        return numbers, heard


def test_keys_travel_once(tmp_path: Path) -> None:
    for numbers, heard in run_distributed(_save_three_times, 2, tmp_path):
        assert numbers[0] == numbers[1] == numbers[2]  # nothing agreed on again
        assert heard == [(1, 3), (2, 3), (3, 3)]  # in each save: begin, receipt, outcome


# -- a real schedule -----------------------------------------------------------------------------------------------


def _schedule(directory: Path, steps: int, load_first: bool) -> tuple[int, list[float], dict[str, Any]]:
    """Train with 1F1B over two ranks; returns the step begun at, and the losses."""
    stages = Stages("pp2", 1)
    rank = dist.get_rank()
    stage = PipelineStage(stages.parts[0], rank, 2, torch.device("cpu"))
    losses: list[float] = []

    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(out.flatten(0, 1), target.flatten())

    schedule = Schedule1F1B(stage, n_microbatches=2, loss_fn=loss)
    with engine_of(directory, stages, restore_from="auto" if load_first else None) as engine:
        report = engine.start(stages.state)
        begun = report.step if report else 0
        for step in range(begun + 1, steps + 1):
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(0, 11, (4, 3), generator=generator)
            found: list[torch.Tensor] = []
            if rank == 0:
                schedule.step(tokens)
            else:
                schedule.step(target=tokens, losses=found)
                losses.append(sum(item.item() for item in found))
            stages.optimizers[0].step()
            stages.optimizers[0].zero_grad()
            if step == 2:
                engine.save(stages.state, step=step).result()
    return begun, losses, stages.everything()


def test_a_real_schedule_resumes_bitwise(tmp_path: Path) -> None:
    whole = run_distributed(_schedule, 2, tmp_path, 4, False)
    resumed = run_distributed(_schedule, 2, tmp_path, 4, True)
    for (_, losses, state), (begun, again, restored) in zip(whole, resumed, strict=True):
        assert begun == 2
        assert losses[2:] == again
        assert_holds(restored, state)


# -- what does not fit ---------------------------------------------------------------------------------------------


def _stages_that_disagree(directory: Path, way: str) -> str:
    stages = Stages("pp2", 1)
    rank = dist.get_rank()
    if way == "shape" and rank == 1:
        stages.parts[0].embed = nn.Embedding(5, 6)
    config = CheckpointingConfig(checkpoint_dir=str(directory))
    with config.build(0, 0, 0 if way == "stage" else rank) as engine:
        with pytest.raises(TopologyError) as failure:
            engine.save(AppState(stages.parts), step=1)
        return str(failure.value)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("shape", ["embed.weight is F32 [5, 6] on rank 1, elsewhere F32 [11, 6]", "nothing was written"]),
        ("stage", ["only on rank 0: model: embed.weight F32 [11, 6]", "only on rank 1: model: head.weight", "pp_rank"]),
    ],
)
def test_stages_that_disagree_are_refused_on_all_ranks(tmp_path: Path, way: str, words: list[str]) -> None:
    for text in run_distributed(_stages_that_disagree, 2, tmp_path, way):
        for word in words:
            assert word in text
    assert not list(tmp_path.glob("*epoch*"))


def _load_what_does_not_fit(directory: Path) -> tuple[list[str], list[str], dict[str, str], bool]:
    stages = Stages("pp2", 2)
    if dist.get_rank() == 1:
        stages.parts[0].layers["9"] = Layer(9)
        del stages.parts[0].layers["2"]
        state = AppState(stages.parts, torch.optim.AdamW(stages.parts[0].layers["3"].parameters()))
    else:
        state = AppState(stages.parts, list(stages.optimizers))
    before = {name: tensor.clone() for name, tensor in stages.parts[0].state_dict().items() if "extra" not in name}
    with engine_of(directory, stages) as engine, pytest.raises(KeyMismatchError) as failure:
        engine.load(state)
    same = all(torch.equal(stages.parts[0].state_dict()[name], tensor) for name, tensor in before.items())
    return failure.value.missing, failure.value.unexpected, failure.value.mismatched, same


def test_a_stage_that_does_not_fit_stops_the_load_on_all_ranks(tmp_path: Path) -> None:
    run_distributed(save, 2, tmp_path, "pp2", False, {})
    for missing, unexpected, different, same in run_distributed(_load_what_does_not_fit, 2, tmp_path):
        assert missing == [f"layers.9.{name}" for name in ("proj.bias", "proj.weight", "scale", "seen")]
        assert unexpected == [
            *(f"layers.2.{name}" for name in ("proj.bias", "proj.weight", "scale", "seen")),
            *(f"optimizer: {name}" for name in ("head.weight", "layers.2.proj.bias", "layers.2.proj.weight")),
            "optimizer: layers.2.scale",
        ]
        assert different == {}
        assert same
