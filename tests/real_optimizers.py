"""Every optimizer of torch and of libraries that people use, each with what it needs to be built and to step."""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.apart import allow, folder_of

ROWS, FEATURES, HIDDEN, CLASSES = 16, 64, 128, 4
"""The hidden layer's weight has 8,192 elements: half of them are enough for a state of 8 bits."""


class Net(nn.Module):
    """A small model with an embedding, matrices, biases, and a parameter that is never used."""

    def __init__(self, unused: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, FEATURES)
        self.hidden = nn.Linear(FEATURES, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)
        if unused:
            self.unused = nn.Parameter(torch.ones(6))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(batch))))


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """A loss that is never zero and whose gradients are small."""
    return (model(batch) - batch[:, None] / ROWS).square().mean() + 0.1


# -- how an optimizer is made to step ------------------------------------------------------------------------------

Drive = Callable[[nn.Module, Any, torch.Tensor], None]


def plain(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def curved(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    """For those that differentiate the gradients again."""
    loss_of(model, batch).backward(create_graph=True)
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None  # breaks the circle of references that create_graph makes


def closed(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    """For those that compute the gradients more than once in a step."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    optimizer.zero_grad()


def closed_with_outputs(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    optimizer.set_closure(
        lambda outputs, wanted: (outputs - wanted).square().mean() + 0.1, batch, batch[:, None] / ROWS
    )
    optimizer.step()
    optimizer.zero_grad()


def given_loss(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    """For those that ask for the loss, but not for new gradients."""
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step(loss.item if optimizer.__class__.__name__ == "AliG" else lambda: loss)
    optimizer.zero_grad()


def sparse(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    loss_of(model, batch).backward()
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else parameter.grad.to_sparse()
    optimizer.step()
    optimizer.zero_grad()


def switched(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    """For those with a mode for training."""
    optimizer.train()
    plain(model, optimizer, batch)


def closed_alone(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()


def conflicting(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    loss = loss_of(model, batch)
    optimizer.pc_backward([loss, loss.square()])
    optimizer.step()
    optimizer.zero_grad()


def fused(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    """For those that step within the backward pass."""
    optimizer.fused_backward(loss_of(model, batch), lr=1e-3)


def scaled(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    optimizer.backward(loss_of(model, batch))
    optimizer.step()
    optimizer.zero_grad()


# -- the catalogue -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One optimizer.

    Attributes:
        name: Library and class, and what is special.
        make: Builds it for a model.
        drive: Makes one step.
        shards: Whether it may be tried over shards; a few wait for each other for ever in collectives of their own.
    """

    name: str
    make: Callable[[nn.Module], Any]
    drive: Drive = plain
    shards: bool = True


@lru_cache
def of_library(library: str) -> dict[str, Kind]:
    """A library's kinds by name; imports the library."""
    return {kind.name: kind for kind in LIBRARIES[library]()}


def named(name: str) -> Kind:
    """The kind of this name, which begins with its library's."""
    return of_library(name.split(maxsplit=1)[0])[name]


def _build(cls: Any, options: dict[str, Any]) -> Callable[[nn.Module], Any]:
    """Build a class over all parameters; `lr` is given where the class has no default."""
    known = inspect.signature(cls.__init__).parameters
    if "lr" in known and known["lr"].default in (inspect.Parameter.empty, None):
        options = {"lr": 0.01, **options}
    return lambda model: cls(model.parameters(), **options)


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.dim() == 2]


def _vectors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.dim() != 2]


def _muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": _matrices(model), "use_muon": True}, {"params": _vectors(model), "use_muon": False}]


def _two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": _matrices(model), "weight_decay": 0.1}, {"params": _vectors(model), "lr": 0.002}]


def _of_torch() -> Iterator[Kind]:
    optim = torch.optim
    for name in optim.__all__:
        cls = getattr(optim, name, None)
        if isinstance(cls, type) and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon"):
            yield Kind(f"torch {name}", _build(cls, {}))
            yield Kind(f"torch {name}, two groups", lambda model, cls=cls: cls(_two_groups(model), lr=0.01))
    yield Kind("torch LBFGS", _build(optim.LBFGS, {"max_iter": 3, "history_size": 4}), closed)
    yield Kind("torch SparseAdam", lambda model: optim.SparseAdam(list(model.parameters()), lr=0.01), sparse)
    yield Kind("torch Muon", lambda model: optim.Muon(_matrices(model), lr=0.01))
    yield Kind("torch SGD, momentum", _build(optim.SGD, {"momentum": 0.9}))
    for flag in ("amsgrad", "capturable", "fused", "foreach", "maximize", "differentiable"):
        yield Kind(f"torch AdamW, {flag}", _build(optim.AdamW, {flag: True, "lr": 0.01}))
    yield Kind("torch AdamW, tensor lr", _build(optim.AdamW, {"lr": torch.tensor(0.01)}))
    yield Kind("torch RMSprop, centered", _build(optim.RMSprop, {"centered": True, "momentum": 0.9}))


def _of_pytorch_optimizer() -> Iterator[Kind]:
    import pytorch_optimizer as library

    special = _special_of_pytorch_optimizer(library)
    classes = (library.load_optimizer(name) for name in library.get_supported_optimizers())
    listed = {cls.__name__: cls for cls in classes if cls.__module__.startswith("pytorch_optimizer")}
    for name, cls in sorted(listed.items()):
        if name not in special:
            yield Kind(f"pytorch_optimizer {name}", _build(cls, {}))
    for name, (make, drive) in special.items():
        yield Kind(f"pytorch_optimizer {name}", make, drive, shards=name != "DistributedMuon")


def _special_of_pytorch_optimizer(library: Any) -> dict[str, tuple[Callable[[nn.Module], Any], Drive]]:
    adamw = torch.optim.AdamW
    found: dict[str, tuple[Callable[[nn.Module], Any], Drive]] = {
        "AdamMini": (lambda model: library.AdamMini(model, num_embeds=FEATURES, num_heads=4), plain),
        "LOMO": (library.LOMO, fused),
        "AdaLOMO": (library.AdaLOMO, fused),
        "AliG": (lambda model: library.AliG(model.parameters(), max_lr=0.1, momentum=0.9), given_loss),
        "BSAM": (lambda model: library.BSAM(model.parameters(), num_data=8, lr=0.01), closed),
        "AdaHessian": (_build(library.AdaHessian, {}), curved),
        "SophiaH": (_build(library.SophiaH, {"update_period": 2}), curved),
        "Ranger21": (_build(library.Ranger21, {"num_iterations": 40}), plain),
        "Muon": (lambda model: library.Muon(_muon_groups(model)), plain),
        "LoRARite": (lambda model: library.LoRARite([model.hidden.weight, model.head.weight]), plain),
        "SpectralSphere": (
            lambda model: library.SpectralSphere(
                _matrices(model), power_iteration_steps=2, msign_steps=2, solver_max_iterations=3
            ),
            plain,
        ),
        "PCGrad": (lambda model: library.PCGrad(adamw(model.parameters(), lr=0.01)), conflicting),
        "SafeFP16Optimizer": (
            lambda model: library.SafeFP16Optimizer(adamw(list(model.parameters()), lr=0.01)),
            scaled,
        ),
        "GSAM": (
            lambda model: library.GSAM(
                model.parameters(),
                base_optimizer=(base := adamw(model.parameters(), lr=0.01)),
                model=model,
                rho_scheduler=library.LinearScheduler(base, t_max=40, max_lr=0.01),
            ),
            closed_with_outputs,
        ),
        "WSAM": (lambda model: library.WSAM(model, model.parameters(), adamw, lr=0.01), closed),
    }
    for name in ("MuonClip", "AdaMuon", "AdaGO", "NorMuon", "DistributedMuon"):
        found[name] = (lambda model, name=name: getattr(library, name)(_muon_groups(model)), plain)
    for name in ("ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD"):
        found[name] = (_build(getattr(library, name), {}), switched)
    for name in ("SAM", "FriendlySAM"):
        found[name] = (lambda model, name=name: getattr(library, name)(model.parameters(), adamw, lr=0.01), closed)
    found["LookSAM"] = (lambda model: library.LookSAM(model.parameters(), adamw, k=3, lr=0.01), closed)
    found["ScheduleFreeWrapper"] = (lambda model: library.ScheduleFreeWrapper(_adamw(model)), switched)
    for name in ("Lookahead", "OrthoGrad", "TRAC", "Magma"):
        found[name] = (lambda model, name=name: getattr(library, name)(_adamw(model)), plain)
    found["Lookahead, momentum pulled back"] = (
        lambda model: library.Lookahead(_adamw(model), k=3, pullback_momentum="pullback"),
        plain,
    )
    found["Lookahead over Lion"] = (lambda model: library.Lookahead(library.Lion(model.parameters())), plain)
    found["Lookahead over TRAC"] = (lambda model: library.Lookahead(library.TRAC(_adamw(model))), plain)
    return found


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def _of_timm() -> Iterator[Kind]:
    classes = _timm_classes()
    special: dict[str, tuple[Callable[[nn.Module], Any], Drive]] = {
        "SGDP": (_build(classes["SGDP"], {"lr": 0.01, "momentum": 0.9}), plain),
        "Lars": (_build(classes["Lars"], {"lr": 0.01, "momentum": 0.9}), plain),
        "Adahessian": (_build(classes["Adahessian"], {}), curved),
        "Lookahead": (lambda model: classes["Lookahead"](_adamw(model)), plain),
    }
    for name, cls in sorted(classes.items()):
        make, drive = special.get(name) or (_build(cls, {}), plain)
        yield Kind(f"timm {name}", make, drive)
    yield Kind("timm Lookahead over Lion", lambda model: classes["Lookahead"](classes["Lion"](model.parameters())))
    yield Kind("timm RMSpropTF, momentum", _build(classes["RMSpropTF"], {"momentum": 0.9}))


def _timm_classes() -> dict[str, Any]:
    """The optimizers of timm, whose other modules need torchvision; scripts/setup keeps it apart."""
    spec = importlib.machinery.PathFinder.find_spec("timm", [str(folder_of("timm"))])
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    bare = {"timm": folder, "timm.optim": folder / "optim"}
    for name, place in bare.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(place)]  # type: ignore[attr-defined]
    try:
        found = {}
        for file in sorted((folder / "optim").glob("[a-z]*.py")):
            if file.stem != "optim_factory":
                module = importlib.import_module(f"timm.optim.{file.stem}")
                found.update({name: item for name, item in vars(module).items() if _is_own_optimizer(item, module)})
        return found
    finally:
        for name in bare:
            del sys.modules[name]


def _is_own_optimizer(item: Any, module: Any) -> bool:
    return isinstance(item, type) and issubclass(item, torch.optim.Optimizer) and item.__module__ == module.__name__


def _of_schedulefree() -> Iterator[Kind]:
    import schedulefree as library

    for name in sorted(name for name in vars(library) if "ScheduleFree" in name and "Wrapper" not in name):
        drive = closed_alone if name.endswith("Closure") else switched
        yield Kind(f"schedulefree {name}", _build(getattr(library, name), {}), drive)
    for name in ("ScheduleFreeWrapper", "ScheduleFreeWrapperReference"):
        cls = getattr(library, name)
        yield Kind(
            f"schedulefree {name}", lambda model, cls=cls: cls(torch.optim.SGD(model.parameters(), 0.01)), switched
        )
        yield Kind(
            f"schedulefree {name}, momentum",
            lambda model, cls=cls: cls(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)),
            switched,
        )


def _of_bitsandbytes() -> Iterator[Kind]:
    from bitsandbytes import optim

    others = ("GlobalOptimManager", "PytorchLARS")
    for name, cls in sorted(vars(optim).items()):
        if isinstance(cls, type) and name not in others:
            options = {"momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}
            yield Kind(f"bitsandbytes {name}", _build(cls, options))
    yield Kind("bitsandbytes PytorchLARS", _build(optim.PytorchLARS, {"momentum": 0.9}))


def _of_torchao() -> Iterator[Kind]:
    allow("torchao")
    from torchao import optim

    for name in optim.__all__:
        yield Kind(f"torchao {name}", _build(getattr(optim, name), {}))


def _of_lion() -> Iterator[Kind]:
    from lion_pytorch import Lion

    yield Kind("lion-pytorch Lion", _build(Lion, {}))


def _of_prodigy() -> Iterator[Kind]:
    from prodigyopt import Prodigy

    yield Kind("prodigyopt Prodigy", _build(Prodigy, {}))
    yield Kind("prodigyopt Prodigy, slices", _build(Prodigy, {"slice_p": 4, "safeguard_warmup": True}))


def _of_transformers() -> Iterator[Kind]:
    from transformers.optimization import Adafactor

    yield Kind("transformers Adafactor", lambda model: Adafactor(model.parameters()))
    yield Kind(
        "transformers Adafactor, momentum",
        lambda model: Adafactor(model.parameters(), lr=0.01, relative_step=False, scale_parameter=False, beta1=0.9),
    )


LIBRARIES: dict[str, Callable[[], Iterator[Kind]]] = {
    "torch": _of_torch,
    "pytorch_optimizer": _of_pytorch_optimizer,
    "timm": _of_timm,
    "schedulefree": _of_schedulefree,
    "bitsandbytes": _of_bitsandbytes,
    "torchao": _of_torchao,
    "lion-pytorch": _of_lion,
    "prodigyopt": _of_prodigy,
    "transformers": _of_transformers,
}
