"""The training states that `scripts/make_fixtures.py` saves and `tests/test_fixtures.py` loads again.

A case builds the same objects each time. The generator changes all of their values, saves them, and writes down what
`describe` says; the test builds the objects again, loads, and compares.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, Adafactor, Adam, AdamW, Muon
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from hydra_ckpt import AppState, resumable

STEP, EPOCH = 3, 1


@dataclass(frozen=True)
class Case:
    """A state and how it is saved.

    Attributes:
        build: Makes the objects, as a run does before it loads.
        options: Settings of the save.
        load_options: Settings of the load.
        world_size: Ranks that save and load it.
        is_pipeline: Whether each rank is a pipeline stage.
        trains: Whether the optimizers make steps before the save.
        metrics: Metrics given to the save.
        later_metrics: Metrics added after it.
        adds_export: Whether the export is added to the published step at the end of training.
    """

    build: Callable[[], AppState]
    options: dict[str, Any] = field(default_factory=dict)
    load_options: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    is_pipeline: bool = False
    trains: bool = True
    metrics: dict[str, float] = field(default_factory=dict)
    later_metrics: dict[str, float] = field(default_factory=dict)
    adds_export: bool = False

    def all_options(self, directory: Path) -> dict[str, Any]:
        """The settings of the save; a reference model is made where one is wanted, a staging directory too."""
        found = dict(self.options)
        if found.get("model_repo_id") == "bf16":
            found["model_repo_id"] = str(reference(directory))
        if "staging_dir" in found:
            found["staging_dir"] = tempfile.mkdtemp(dir=directory.parent)
        return found


# -- models --------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """A layer with a buffer, a buffer that is not saved, a frozen parameter and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 5), 0.5, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        self.note: Any = None

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


class Net(nn.Module):
    """Odd sizes, a matrix, batch statistics, and a parameter that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.last = nn.Linear(7, 3)
        self.unused = nn.Parameter(torch.ones(5))


def llama(**options: Any) -> Any:
    from tests.hub_models import llama as make

    torch.manual_seed(12)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    return make(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=4, **options)


def reference(directory: Path) -> Path:
    """A reference model in bf16, beside the checkpoints."""
    path = directory.parent / "reference"
    llama().to(torch.bfloat16).save_pretrained(path)
    return path


class Average:
    """A moving average of the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.updates = 0

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = dict(state["shadow"]), state["updates"]


class Box:
    """An extra that is what it is given."""

    value: Any = None

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value


PLAIN: dict[str, Any] = {
    "numbers": [0, -1, 2**70, 0.1, float("inf"), True, None],
    "text": "Straße",
    "tuple": (1, (2.5, "a")),
    "map": {1: "one", (2, 3): "pair", "~": "tilde"},
    "set": {1, 2},
    "ordered": OrderedDict(b=1, a=2),
    "counter": Counter("abca"),
    "bytes": b"\x00\xff",
    "size": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.int16(-3),
    "tensors": [torch.arange(3), torch.tensor(2.5, dtype=torch.float16)],
}


# -- states --------------------------------------------------------------------------------------------------------


def with_optimizer(make: Callable[[Any], Any], **options: Any) -> Callable[[], AppState]:
    def build() -> AppState:
        model = Net()
        return AppState(model, make(model.parameters(), **options))

    return build


def _usual() -> AppState:
    model = Net()
    optimizer = AdamW(model.parameters(), lr=0.01)
    return AppState(model, optimizer, schedulers.MultiStepLR(optimizer, [2, 4]))


def _groups() -> AppState:
    model = Net()
    muon = Muon([model.first.weight, model.last.weight], lr=0.02)
    adam = Adam([{"params": [model.first.bias]}, {"params": [model.last.bias], "lr": 0.5, "betas": (0.5, 0.9)}])
    sgd = SGD(model.norm.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    return AppState(model, [muon, adam, sgd], [schedulers.ExponentialLR(adam, 0.9), schedulers.StepLR(sgd, 2)])


def _models() -> AppState:
    torch.manual_seed(13)
    models: dict[str, nn.Module] = {"generator": nn.Linear(3, 4), "critic": nn.Sequential(nn.Linear(4, 2), nn.ReLU())}
    optimizers: dict[str, Any] = {name: Adam(model.parameters(), amsgrad=True) for name, model in models.items()}
    return AppState(models, optimizers)


def _extras() -> AppState:
    model = nn.Sequential(Counted(), Net())
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    warmup, rest = schedulers.LinearLR(optimizer), schedulers.CosineAnnealingLR(optimizer, 9)
    plan = schedulers.SequentialLR(optimizer, [warmup, rest], milestones=[2])
    plateau = schedulers.ReduceLROnPlateau(optimizer, patience=1)
    return AppState(model, optimizer, [plan, plateau], extras={"ema": Average(model), "box": Box()})


def _loader() -> AppState:
    model = Net()
    loader = DataLoader(TensorDataset(torch.arange(20.0)), batch_size=2, shuffle=True)
    return AppState(model, SGD(model.parameters(), lr=0.1), dataloader=resumable(loader, seed=5))


def _transformers(**options: Any) -> Callable[[], AppState]:
    def build() -> AppState:
        model = llama(**options)
        return AppState(model, AdamW(model.parameters(), lr=0.01))

    return build


def _lora(*names: str) -> Callable[[], AppState]:
    def build() -> AppState:
        import peft

        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(llama(), config)
        for name in names:
            torch.manual_seed(14)
            model.add_adapter(name, peft.LoraConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM"))
        trained = [p for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name]
        return AppState(model, AdamW(trained, lr=0.01))

    return build


def _ddp() -> AppState:
    model = DistributedDataParallel(Net(), find_unused_parameters=True)
    optimizer = AdamW(model.parameters(), lr=0.01)
    return AppState(model, optimizer, schedulers.StepLR(optimizer, 2), extras={"ema": Average(model)})


def _fsdp() -> AppState:
    model = Net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    for module in (model.first, model.last, model):
        fully_shard(module, mesh=mesh)
    optimizer = AdamW(model.parameters(), lr=0.01)
    return AppState(model, optimizer, schedulers.StepLR(optimizer, 2), extras={"ema": Average(model)})


def _stage() -> AppState:
    torch.manual_seed(15)
    layers = nn.ModuleDict({str(index): nn.Linear(4, 4) for index in range(4)})
    rank = dist.get_rank()
    for index in (0, 1) if rank else (2, 3):
        del layers[str(index)]
    part = nn.Module()
    part.layers = layers
    optimizer = AdamW(part.parameters(), lr=0.01)
    return AppState([part], [optimizer], [schedulers.ExponentialLR(optimizer, 0.5)])


ALWAYS = {"save_consolidated": "always"}
NEVER = {"save_consolidated": "never"}

CASES: dict[str, Case] = {
    # Layouts.
    "shards": Case(_usual, NEVER),
    "consolidated": Case(_usual, ALWAYS),
    "final_added": Case(_usual, {"save_consolidated": "final"}, adds_export=True),
    "bf16_export": Case(_transformers(), {**ALWAYS, "model_repo_id": "bf16"}),
    "tied": Case(_transformers(tie_word_embeddings=True), ALWAYS),
    "single_rank": Case(_ddp, {**ALWAYS, "single_rank_consolidation": True}, world_size=2),
    "staging_dir": Case(_usual, {**ALWAYS, "staging_dir": ""}),
    "torch_save": Case(_usual, {"model_save_format": "torch_save"}),
    "asynchronous": Case(_usual, {**ALWAYS, "is_async": True}),
    "two_models": Case(_models, ALWAYS),
    # Optimizers.
    "sgd": Case(with_optimizer(SGD, lr=0.1, momentum=0.9), NEVER),
    "adafactor": Case(with_optimizer(Adafactor), NEVER),
    "lbfgs": Case(with_optimizer(LBFGS, lr=0.1, history_size=3), NEVER),
    "optimizers": Case(_groups, NEVER),
    "absent_state": Case(_usual, NEVER, trains=False),
    "tensor_lr": Case(with_optimizer(Adam, lr=torch.tensor(0.01)), NEVER),
    # What lies around them.
    "extras": Case(_extras, NEVER),
    "dataloader": Case(_loader, NEVER),
    "metrics": Case(_usual, NEVER, metrics={"loss": 0.5, "default": 2.0}, later_metrics={"accuracy": 0.25}),
    # PEFT.
    "lora": Case(_lora(), {"is_peft": True}, {"is_peft": True}),
    "two_adapters": Case(_lora("poet"), {"is_peft": True}, {"is_peft": True}),
    # Ranks.
    "ddp": Case(_ddp, ALWAYS, world_size=2),
    "fsdp": Case(_fsdp, ALWAYS, world_size=2),
    "fsdp_shards": Case(_fsdp, NEVER, world_size=2),
    "fsdp_torch_save": Case(_fsdp, {"model_save_format": "torch_save"}, world_size=2),
    "pipeline": Case(_stage, ALWAYS, world_size=2, is_pipeline=True),
}


# -- values --------------------------------------------------------------------------------------------------------


def advance(state: AppState, *, trains: bool) -> None:
    """Change everything there is: weights and buffers, optimizers, schedules, extras, the place in the data."""
    for name, tensor in _model_tensors(state):
        if "base_model." in name and not tensor.requires_grad:
            continue  # a checkpoint of an adapter does not hold the model below it
        here = _local(tensor)
        here.copy_(_values(f"{name}{_rank_of(tensor)}", here))
    for _ in range(3 if trains else 0):
        for number, optimizer in enumerate(state.optimizers):
            _step(state, optimizer, number)
        for scheduler in state.lr_schedulers:
            scheduler.step(*([1.5] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
    for module in [module for modules in state.models.values() for part in modules for module in part.modules()]:
        if isinstance(module, Counted):
            module.note = {"index": 10, "table": torch.arange(4, dtype=torch.int16)}
    for extra in state.extras.values():
        _change(extra)
    batches = iter(state.dataloader or ())
    for _ in range(3 if state.dataloader is not None else 0):
        next(batches)
    rank = dist.get_rank() if dist.is_initialized() else 0
    random.seed(20 + rank)
    np.random.seed(20 + rank)
    torch.manual_seed(20 + rank)


def _step(state: AppState, optimizer: Any, salt: int) -> None:
    names = {id(tensor): name for name, tensor in _model_tensors(state)}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if names[id(parameter)].endswith("unused"):
            continue
        parameter.grad = torch.zeros_like(parameter)
        here = _local(parameter.grad)
        here.copy_(_values(f"{names[id(parameter)]}{salt}{_rank_of(parameter)}", here) * 0.01)
    if isinstance(optimizer, LBFGS):
        optimizer.step(lambda: torch.tensor(1.0))
    else:
        optimizer.step()
    optimizer.zero_grad()


def _change(extra: Any) -> None:
    if isinstance(extra, Box):
        extra.value = PLAIN
    else:
        for name, tensor in extra.shadow.items():
            _local(tensor).copy_(_values(f"ema{name}{_rank_of(tensor)}", _local(tensor)))
        extra.updates = 8


def _rank_of(tensor: torch.Tensor) -> int:
    """Shards and the stages of a pipeline have values of their own; replicas do not."""
    return dist.get_rank() if isinstance(tensor, DTensor) else 0


def _model_tensors(state: AppState) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parts in state.models.items():
        for part in parts:
            for key, tensor in [*part.named_parameters(), *part.named_buffers()]:
                yield f"{name}/{key}", tensor


def _values(key: str, like: torch.Tensor) -> torch.Tensor:
    """Small eighths that depend on the key; exact in every element type that is used."""
    numbers = (torch.arange(like.numel(), dtype=torch.int64) * 2654435761 + zlib.crc32(key.encode())) % 61
    return ((numbers - 30) / 8).to(like.dtype).view(like.shape)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _position(loader: Any) -> Any:
    """What the first version reported of a loader's position."""
    later = ("order", "sampler")
    return loader and {key: value for key, value in loader.state_dict().items() if key not in later}


def describe(state: AppState) -> dict[str, str]:
    """Every value of this rank as text: plain data as it is, tensors by type, shape and digest."""
    whole = {
        "model": {name: part.state_dict() for name, parts in state.models.items() for part in parts},
        "optimizer": [_optimizer(state, optimizer) for optimizer in state.optimizers],
        "lr_scheduler": [scheduler.state_dict() for scheduler in state.lr_schedulers],
        "extras": {name: extra.state_dict() for name, extra in state.extras.items()},
        "dataloader": _position(state.dataloader),
        "rng": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
    }
    return dict(_flat("", whole))


def _optimizer(state: AppState, optimizer: Any) -> dict[str, Any]:
    names = {id(tensor): name for name, tensor in _model_tensors(state)}
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"state": {names[id(key)]: value for key, value in optimizer.state.items()}, "options": options}


def _flat(place: str, value: Any) -> Iterator[tuple[str, str]]:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        spread = f" {value.placements}" if isinstance(value, DTensor) else ""
        here = _local(value).cpu().contiguous()
        yield place, f"{kind.__name__} {_digest(here)} {here.dtype} {list(value.shape)}{spread}"
    elif isinstance(value, np.ndarray):
        yield place, f"ndarray {hashlib.sha256(value.tobytes()).hexdigest()[:16]} {value.dtype} {value.shape}"
    elif isinstance(value, dict):
        yield place, f"{kind.__name__} of {len(value)}"
        for key, item in value.items():
            yield from _flat(f"{place}.{key!r}" if not isinstance(key, str) else f"{place}.{key}".lstrip("."), item)
    elif kind in (list, tuple) and len(value) < 100:
        yield place, f"{kind.__name__} of {len(value)}"
        for index, item in enumerate(value):
            yield from _flat(f"{place}.{index}", item)
    else:
        text = repr(value)
        yield place, text if len(text) < 200 else f"{kind.__name__} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
