"""Sharded models in the states that training leaves them in, their optimizers, and the wrappers around them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hydra_ckpt import AppState
from hydra_ckpt.testing import run_distributed
from tests.meshes import Place, local, place


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with all its elements; collective for a DTensor."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


# -- FSDP ----------------------------------------------------------------------------------------------------------


def _after_forward(root: Path) -> list[str]:
    """Save and load in the middle of things: parameters gathered by a forward pass that no backward followed."""
    wrong = []
    mesh = init_device_mesh("cpu", (2,))
    for reshard in (True, False, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))
        expected = copy.deepcopy(model.state_dict())
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
        here = Place("fsdp2", [0, 1], mesh, dist.group.WORLD)
        before = model(torch.ones(1, 3)).detach()
        with here.build(root / str(reshard), save_consolidated="always", is_async=True) as engine:
            path = engine.save(AppState(model), step=1).result().path
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            model(torch.ones(1, 3))  # gathers the zeros
            engine.load(AppState(model))
        after = model(torch.ones(1, 3)).detach()
        saved = load_file(path / "model" / "consolidated" / "model.safetensors")
        if not torch.equal(before, after) or any(not torch.equal(saved[key], expected[key]) for key in expected):
            wrong.append(str(reshard))
        model(torch.ones(1, 3)).sum().backward()
    return wrong


def test_parameters_that_a_forward_pass_left_gathered_are_saved_and_loaded(tmp_path: Path) -> None:
    assert run_distributed(_after_forward, 2, tmp_path) == [[], []]


def _meta(root: Path) -> list[str]:
    """A checkpoint of a plain model into one that was never initialized, sharded both ways."""
    logging.getLogger("hydra_ckpt").setLevel(logging.ERROR)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    plain[1].num_batches_tracked.fill_(17)
    one = place("one")
    if one.group is not None:
        with one.build(root) as engine:
            engine.save(AppState(plain), step=1).result()
    dist.barrier()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp_shard"])
    model.to_empty(device="cpu")
    here = Place("fsdp2_tp2", [0, 1, 2, 3], mesh, dist.group.WORLD)
    with here.build(root) as engine:
        engine.load(AppState(model, torch.optim.AdamW(model.parameters())))
    expected = plain.state_dict()
    return [name for name, tensor in model.state_dict().items() if not torch.equal(whole(tensor), expected[name])]


def test_a_model_made_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    assert run_distributed(_meta, 4, tmp_path) == [[]] * 4


# -- optimizers ----------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], list[Optimizer]]] = {
    "sgd": lambda p: [torch.optim.SGD(p, lr=0.1)],
    "sgd momentum": lambda p: [torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)],
    "adamw": lambda p: [torch.optim.AdamW(p, lr=0.1, foreach=False)],
    "adamw foreach amsgrad": lambda p: [torch.optim.AdamW(p, lr=0.1, foreach=True, amsgrad=True)],
    "adamw fused": lambda p: [torch.optim.AdamW(p, lr=0.1, fused=True)],
    "nadam": lambda p: [torch.optim.NAdam(p, lr=0.1)],
    "asgd": lambda p: [torch.optim.ASGD(p, lr=0.1)],
    "adagrad": lambda p: [torch.optim.Adagrad(p, lr=0.1)],
    "adafactor": lambda p: [torch.optim.Adafactor(p, lr=0.1)],
    "muon and adamw": lambda p: [
        torch.optim.Muon([x for x in p if x.dim() == 2], lr=0.1),
        torch.optim.AdamW([x for x in p if x.dim() != 2], lr=0.1),
    ],
    "one for each": lambda p: [torch.optim.AdamW([x], lr=0.1 * (n + 1)) for n, x in enumerate(p)],
}


class Weights(nn.Module):
    """Parameters of 1 and 2 dimensions, and one number."""

    def __init__(self, number: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(4, 5)
        self.down = nn.Linear(5, 4)
        self.number = nn.Parameter(number)

    def grads(self) -> None:
        for parameter in self.parameters():
            parameter.grad = parameter.detach() * 0.5 + 0.25


def _weights(here: Place, kind: str, number: torch.Tensor) -> tuple[AppState, list[Optimizer]]:
    model = Weights(number.clone())
    if here.name == "tp2":
        assert here.mesh is not None
        parallelize_module(model, here.mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        model.number = nn.Parameter(distribute_tensor(model.number.detach(), here.mesh, [Replicate()]))
    elif here.mesh is not None:
        fully_shard(model, mesh=here.mesh)
    optimizers = OPTIMIZERS[kind](list(model.parameters()))
    return AppState(model, optimizers), optimizers


def _state(state: AppState) -> dict[str, torch.Tensor]:
    """Parameters and everything the optimizers hold, whole."""
    found = {}
    for name, parameter in state.model.named_parameters():  # type: ignore[union-attr]
        found[name] = whole(parameter)
        for optimizer in state.optimizers:
            held = optimizer.state.get(parameter, {})
            found.update({f"{name}:{k}": whole(v) for k, v in held.items() if isinstance(v, torch.Tensor)})
    return found


def _differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, exact: bool = True) -> list[str]:
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    if exact:
        return [key for key in one if not torch.equal(one[key].view(-1), other[key].view(-1))]
    # Muon orthogonalizes in bfloat16, where the order of sums shows.
    return [key for key in one if not torch.allclose(one[key].view(-1), other[key].view(-1), atol=1e-2)]


def _step(state: AppState, optimizers: list[Optimizer]) -> None:
    state.model.grads()  # type: ignore[operator, union-attr]
    for optimizer in optimizers:
        optimizer.step()


def _round_trips(root: Path, meshes: tuple[str, ...]) -> list[str]:
    """One process trains; a mesh continues; one process continues from there."""
    logging.getLogger("hydra_ckpt").setLevel(logging.ERROR)
    wrong = []
    places = {name: place(name) for name in ("one", *meshes)}
    for kind in OPTIMIZERS:
        for name in meshes:
            here, directory = places[name], root / name / kind.replace(" ", "-")
            number = torch.tensor(1.5 if name == "tp2" else [1.5])  # FSDP refuses parameters without dimensions
            notes: list[Any] = [None]
            if places["one"].group is not None:
                state, optimizers = _weights(places["one"], kind, number)
                for _ in range(2):
                    _step(state, optimizers)
                with places["one"].build(directory / "one") as engine:
                    engine.save(state, step=2).result()
                saved = _state(state)
                _step(state, optimizers)
                notes = [(saved, _state(state))]
            dist.broadcast_object_list(notes, src=places["one"].members[0])
            saved, stepped = notes[0]
            state, optimizers = _weights(here, kind, number)
            source = str(directory / "one" / "LATEST")
            with here.build(directory / "mesh", restore_from=source) as engine:
                engine.load(state)
                wrong += [f"{kind} on {name}: {key}" for key in _differ(_state(state), saved)]
                engine.save(state, step=3).result()
                if kind != "adafactor":  # PyTorch's own step does not work on DTensors; its state travels all the same
                    _step(state, optimizers)
                    after = _differ(_state(state), stepped, exact=False)
                    wrong += [f"{kind} on {name}, a step on: {key}" for key in after]
            dist.barrier()
            if places["one"].group is not None:
                state, optimizers = _weights(places["one"], kind, number)
                source = str(directory / "mesh" / "LATEST")
                with places["one"].build(directory / "back", restore_from=source) as engine:
                    engine.load(state)
                wrong += [f"{kind} back from {name}: {key}" for key in _differ(_state(state), saved)]
    return wrong


def test_every_optimizer_continues_on_another_mesh_and_back(tmp_path: Path) -> None:
    assert run_distributed(_round_trips, 2, tmp_path, ("fsdp2", "tp2")) == [[], []]


# -- wrappers ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Layers, a tied head as transformers declares it, and buffers of both kinds."""

    _tied_weights_keys = ("head.weight",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank() + 1)
        self.head = nn.Linear(4, 7, bias=False)  # before the embedding, so that the order alone would choose it
        self.embed = nn.Embedding(7, 4)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


NAMES = ["embed.weight", *(f"layers.{n}.0.{k}" for n in range(2) for k in ("bias", "weight")), "scale"]


def _checkpointed(model: Tied) -> Tied:
    for number, layer in enumerate(model.layers):
        model.layers[number] = checkpoint_wrapper(layer)
    return model


def _sharded(model: Tied) -> Tied:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _compiled_layers(model: Tied) -> Tied:
    for layer in model.layers:
        layer.compile(backend="eager")
    return model


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "ddp": lambda: DistributedDataParallel(Tied()),
    "compiled ddp": lambda: torch.compile(DistributedDataParallel(_checkpointed(Tied())), backend="eager"),
    "ddp of compiled": lambda: DistributedDataParallel(torch.compile(Tied(), backend="eager")),
    "fsdp": lambda: _sharded(Tied()),
    "fsdp of checkpointed": lambda: _sharded(_checkpointed(Tied())),
    "compiled fsdp": lambda: torch.compile(_sharded(_checkpointed(Tied())), backend="eager"),
    "fsdp of compiled layers": lambda: _compiled_layers(_sharded(Tied())),
}


def _wrapped(root: Path) -> list[str]:
    """Save under each wrapper, load under each."""
    wrong = []
    here = Place("ddp2", [0, 1], None, dist.group.WORLD)
    made = {name: make() for name, make in WRAPPED.items()}
    expected = {}
    states = {}
    for name, model in made.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model(torch.arange(7)).square().mean().backward()
        optimizer.step()
        states[name] = AppState(model, optimizer)
        expected[name] = [local(p).clone() for p in model.parameters()]
        with here.build(root / name, save_consolidated="always") as engine:
            path = engine.save(states[name], step=1).result().path
        found = load_file(path / "model" / "consolidated" / "model.safetensors")
        if sorted(found) != NAMES:
            wrong.append(f"{name}: {sorted(found)}")
        optim = load_file(path / "optim" / "optim.safetensors")
        if {key.split(":")[0] for key in optim} != set(NAMES) - {"scale"}:
            wrong.append(f"{name}: {sorted(optim)}")
    for name, source in made.items():
        full = [whole(p) for p in source.parameters()]
        for other, model in made.items():
            kept = [local(p).clone() for p in model.parameters()]
            with here.build(root / f"{name} on {other}", restore_from=str(root / name / "LATEST")) as engine:
                engine.load(states[other])
            same = all(torch.equal(whole(p), q) for p, q in zip(model.parameters(), full, strict=True))
            core = next(m for m in model.modules() if isinstance(m, Tied))
            if not same or core.head.weight is not core.embed.weight:
                wrong.append(f"{name} on {other}")
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), kept, strict=True):
                    local(parameter).copy_(value)
    return wrong


def test_wrappers_of_sharded_models_leave_no_trace_and_ties_stay(tmp_path: Path) -> None:
    assert run_distributed(_wrapped, 2, tmp_path) == [[], []]
