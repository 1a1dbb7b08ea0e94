"""Optimizers and schedulers for the differential test: where they keep state, and how they report it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer, lr_scheduler

LR = 0.02
Parameters = list[Any]


def step(optimizer: Any, closure: Callable[[], torch.Tensor]) -> None:
    """One step of any optimizer."""
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
        return
    closure()
    optimizer.step()


def _all(optimizer: Any) -> list[nn.Parameter]:
    return [item for group in optimizer.param_groups for item in group["params"]]


class Counting(torch.optim.SGD):
    """An override tells a number, on which the steps depend."""

    n = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.n += 1
        for item in _all(self):
            if item.grad is not None:
                item.grad.mul_(1 + self.n / 8)
        super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state.pop("n")
        super().load_state_dict(state)


def _hooked(params: Parameters) -> Optimizer:
    optimizer = torch.optim.SGD(params, lr=LR, momentum=0.9)
    optimizer.steps = 0  # type: ignore[attr-defined]

    def told(item: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "steps": item.steps}

    def taken(item: Any, state: dict[str, Any]) -> dict[str, Any]:
        item.steps = state["steps"]
        return {key: value for key, value in state.items() if key != "steps"}

    def counts(item: Any, *_: Any) -> None:
        item.steps += 1
        for parameter in _all(item):
            if parameter.grad is not None:
                parameter.grad.mul_(1 + item.steps / 8)

    optimizer.register_state_dict_post_hook(told)
    optimizer.register_load_state_dict_pre_hook(taken)
    optimizer.register_step_pre_hook(counts)
    return optimizer


class Stepping(Optimizer):
    """What the following have in common: one parameter after another, with its state."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, {"lr": LR, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.begin()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self.update(parameter, self.state[parameter], group)
                    parameter.add_(update.to(parameter.dtype), alpha=-float(group["lr"]))

    def begin(self) -> None:
        """Before each step."""

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        raise NotImplementedError


class Stray(Stepping):
    """Keeps state under keys that are no parameters."""

    def begin(self) -> None:
        kept = self.state.setdefault("seen", {"n": 0, "sum": torch.zeros(2)})  # type: ignore[call-overload]
        kept["n"] += 1
        kept["sum"] += 0.5

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        return parameter.grad * float(self.state["seen"]["sum"][0])  # type: ignore[index]


class Strides(Stepping):
    """Keeps state that does not lie row by row."""

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        if "m" not in state and parameter.dim() == 2:
            state["m"] = torch.zeros_like(parameter.T.contiguous()).T
            state["row"] = torch.zeros(3, 1).T
        if "m" in state:
            state["m"].lerp_(parameter.grad, 0.5)
            state["row"] += 1
        return state.get("m", parameter.grad)


class Containers(Stepping):
    """Keeps lists, dicts, tuples, numbers and texts."""

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        if not state:
            state["history"] = [torch.zeros_like(parameter), torch.zeros_like(parameter)]
            state["named"] = {"a": {"b": torch.zeros(2)}, 3: (1.5, None, "text")}
            state["step"] = 0
            state["best"] = float("inf")
        state["step"] += 1
        state["best"] = min(state["best"], 3.0 / state["step"])
        state["history"] = [*state["history"][1:], parameter.grad.clone()]
        state["named"]["a"]["b"] += 1
        return sum(state["history"]) * (1 + state["best"])


class Empty(Stepping):
    """Has an empty state for each parameter, and another step for those that have none at all."""

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        return parameter.grad


class Lazy(Stepping):
    """State appears in the third step, goes in the sixth, and so on."""

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        if state["step"] % 3 == 0:
            state["slow"] = parameter.grad.clone()
        if state["step"] % 6 == 5:
            del state["slow"]
        return parameter.grad + state.get("slow", 0)


class Joint(Stepping):
    """Counts the steps of all parameters in one tensor, and keeps one state under two names."""

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        if not state:
            states = [held for held in self.state.values() if held]
            state["step"] = states[0]["step"] if states else torch.tensor(0.0)
            state["m"] = torch.zeros_like(parameter)
            state["again"], state["view"] = state["m"], state["m"].detach()
        state["step"] += 0.125
        state["m"].lerp_(parameter.grad, 0.5)
        state["again"] *= 0.75
        state["view"] *= 0.75
        return state["m"] * (1 + state["step"].item())


class Plain(Stepping):
    """Keeps plain tensors, of sharded parameters too."""

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        if not state:
            state["single"], state["book"], state["none"] = torch.zeros(1), torch.arange(3.0), torch.zeros(0)
            state["square"] = torch.zeros(2, 2)
        state["single"] += 1
        state["book"] *= 0.75
        return parameter.grad * (state["single"][0].item() + state["book"][1].item())


class Precise(Stepping):
    """Keeps fp32 and integer state whatever the parameters are."""

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        if not state:
            state["m"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["signs"] = torch.zeros_like(parameter, dtype=torch.int8)
        state["m"].lerp_(parameter.grad.float(), 0.3)
        state["signs"] = (state["m"] > 0).to(torch.int8)
        return state["m"] * (1 + state["signs"].float())


class Whole(Stepping):
    """Keeps state of sharded parameters that is whole on every rank, as a DTensor."""

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        if not state:
            state["m"] = torch.zeros_like(parameter)
            if isinstance(parameter, DTensor):
                state["m"] = state["m"].redistribute(placements=[Replicate()] * parameter.device_mesh.ndim)
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.redistribute(placements=state["m"].placements)
        state["m"].lerp_(gradient, 0.5)
        moved = state["m"]
        return moved.redistribute(placements=parameter.placements) if isinstance(parameter, DTensor) else moved


class Options(Stepping):
    """Keeps tensors, lists and types among its options, and changes them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, betas=(0.9, 0.99), dtype=torch.float16, rows=[1, 2], k=0)
        for group in self.param_groups:
            group["d"] = torch.tensor(0.5)
            group["matrix"] = torch.ones(2, 3).T

    def begin(self) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["d"] = group["d"] * 0.9
            group["matrix"] += 1

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        return parameter.grad * (1 + float(group["d"]) + float(group["matrix"][0, 0]) / 8)


class Buffered(Stepping):
    """Keeps tensors in a list of its own, told by an override that numbers them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.kept: dict[int, torch.Tensor] = {}

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        number = next(number for number, item in enumerate(_all(self)) if item is parameter)
        self.kept[number] = self.kept.get(number, torch.zeros_like(parameter)) * 0.5 + parameter.grad
        return self.kept[number]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kept": dict(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = {number: item.clone() for number, item in state["kept"].items()}
        super().load_state_dict({key: state[key] for key in ("state", "param_groups")})


class Converting(Stepping):
    """Tells its state in another form than it has it: a NumPy array and a text."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.trace = [0.0]

    def begin(self) -> None:
        self.trace.append(self.trace[-1] + 0.25)

    def update(self, parameter: Any, state: dict[str, Any], group: dict[str, Any]) -> Any:
        return parameter.grad * (1 + self.trace[-1])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "trace": torch.tensor(self.trace, dtype=torch.float64).numpy(), "v": "2"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trace = state["trace"].tolist()
        super().load_state_dict({key: state[key] for key in ("state", "param_groups")})


# -- wrappers ------------------------------------------------------------------------------------------------------


class Delegating(Optimizer):
    """An inner optimizer does the work, and is all that is saved."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)
        self.param_groups = self.inner.param_groups


class Lookahead(Optimizer):
    """Slow weights, which join the fast ones in every third step; it makes no use of Optimizer.__init__."""

    def __init__(self, inner: Optimizer) -> None:
        self.base, self.slow, self.k = inner, list[torch.Tensor](), 0
        self.defaults = inner.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step(closure)
        self.k += 1
        if self.k % 3 == 0:
            self.slow = self.slow or [item.detach().clone() for item in _all(self)]
            for slow, fast in zip(self.slow, _all(self), strict=True):
                slow.lerp_(fast.detach(), 0.5)
                fast.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base.state_dict(), "slow": self.slow, "k": self.k}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state["base"])
        self.slow, self.k = [item.clone() for item in state["slow"]], state["k"]


class StatefulLookahead(Lookahead):
    """The same with the slow weights in a state by parameter."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner)
        self.extra: dict[Any, dict[str, Any]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step(closure)
        self.k += 1
        for item in _all(self) if self.k % 3 == 0 else ():
            kept = self.extra.setdefault(item, {"slow": item.detach().clone()})
            kept["slow"].lerp_(item.detach(), 0.5)
            item.copy_(kept["slow"])

    def state_dict(self) -> dict[str, Any]:
        numbers = {id(item): number for number, item in enumerate(_all(self))}
        slow = {numbers[id(item)]: kept for item, kept in self.extra.items()}
        return {"base": self.base.state_dict(), "slow": slow, "k": self.k}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state["base"])
        everyone = _all(self)
        self.extra = {everyone[number]: {"slow": kept["slow"].clone()} for number, kept in state["slow"].items()}
        self.k = state["k"]


class NoOptimizer:
    """As schedulefree's wrappers: no torch.optim.Optimizer."""

    def __init__(self, inner: Optimizer) -> None:
        self.base, self.weight_sum = inner, 0.0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    def step(self) -> None:
        self.weight_sum += 0.125
        for item in _all(self):
            if item.grad is not None:
                item.grad.mul_(1 + self.weight_sum)
        self.base.step()

    def zero_grad(self) -> None:
        self.base.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"weight_sum": self.weight_sum, "base": self.base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight_sum = state["weight_sum"]
        self.base.load_state_dict(state["base"])


class Closed(NoOptimizer):
    """The same without groups, in an attribute that nobody knows."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner)
        self.base = (inner,)  # type: ignore[assignment]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base[0].param_groups  # type: ignore[index,no-any-return]

    def step(self) -> None:
        self.base[0].step()  # type: ignore[index]

    def zero_grad(self) -> None:
        self.base[0].zero_grad()  # type: ignore[index]

    def state_dict(self) -> dict[str, Any]:
        return self.base[0].state_dict()  # type: ignore[index,no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base[0].load_state_dict(state)  # type: ignore[index]


class Two(Optimizer):
    """Two optimizers of different kinds in a list; each has some of the parameters."""

    def __init__(self, inner: Optimizer) -> None:
        groups = inner.param_groups
        everyone = [item for group in groups for item in group["params"]]
        self.optimizers = [
            torch.optim.AdamW(everyone[::2], lr=LR),
            torch.optim.SGD(everyone[1::2], lr=LR, momentum=0.9),
        ]
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for item in self.optimizers for group in item.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override]
        return {key: value for item in self.optimizers for key, value in item.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for item in self.optimizers:
            item.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for item in self.optimizers:
            item.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [item.state_dict() for item in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for item, one in zip(self.optimizers, state["optimizers"], strict=True):
            item.load_state_dict(one)


KINDS: dict[str, Callable[[Parameters], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR),
    "momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=LR, amsgrad=True, foreach=False),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(LR), foreach=False),
    "capturable": lambda p: torch.optim.NAdam(p, lr=LR),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=LR),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=LR, centered=True, momentum=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=LR),
    "asgd": lambda p: torch.optim.ASGD(p, lr=LR),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=LR),
    "lbfgs": lambda p: torch.optim.LBFGS([q for q in p if q.requires_grad], lr=LR, max_iter=2, history_size=3),
    "counting": lambda p: Counting(p, lr=LR, momentum=0.9),
    "hooked": _hooked,
    "stray": Stray,
    "strides": Strides,
    "containers": Containers,
    "empty": Empty,
    "lazy": Lazy,
    "joint": Joint,
    "plain": Plain,
    "precise": Precise,
    "whole": Whole,
    "options": Options,
    "buffered": Buffered,
    "converting": Converting,
}
# They take one group only, or need a closure.
ALONE = {"lbfgs"}
# What does not step on DTensors.
NOT_SHARDED = {"lbfgs", "strides", "adafactor", "rprop"}
AROUND: dict[str, Callable[[Any], Any]] = {
    "delegating": Delegating,
    "lookahead": Lookahead,
    "stateful lookahead": StatefulLookahead,
    "no optimizer": NoOptimizer,
    "closed": Closed,
    "two": Two,
    "nested": lambda inner: Lookahead(Delegating(inner)),
}
GROUPS = ["two", "empty", "named", "three"]
SCHEDULERS = ["step", "cosine", "one cycle", "lambda", "sequence", "warm restarts"]


def make(kind: str, around: str, groups: str, parameters: list[nn.Parameter]) -> Any:
    """An optimizer.

    Args:
        kind: The one that does the work.
        around: What wraps it.
        groups: How the parameters are grouped.
        parameters: All that the model has.
    """
    half = len(parameters) // 2
    given: dict[str, Parameters] = {
        "one": list(parameters),
        "two": [{"params": parameters[:half]}, {"params": parameters[half:], "lr": LR / 2}],
        "empty": [{"params": parameters}, {"params": [], "lr": LR / 3}],
        "named": [{"params": parameters[half:], "name": "tail"}, {"params": parameters[:half], "name": "head"}],
        "three": [{"params": [], "lr": LR / 3}, {"params": parameters[1::2]}, {"params": parameters[::2]}],
    }
    optimizer = KINDS[kind](given[groups])
    return optimizer if around == "none" else AROUND[around](optimizer)


class Halving:
    """A callable with state, which LambdaLR keeps."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 1 / (1 + self.calls / 4)


class Tables:
    """A scheduler of one's own, with tensors."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.values, self.n = optimizer, torch.linspace(1, 0.5, 30).flip(0)[::2], 0

    def step(self) -> None:
        self.n += 1
        self.values = self.values * 0.99
        for group in self.optimizer.param_groups:
            group["lr"] = LR * float(self.values[self.n % 15])

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values, self.n = state["values"], state["n"]


def schedule(kind: str, optimizer: Any) -> Any:
    """A scheduler; PyTorch's own only where it takes the optimizer."""
    if kind == "none":
        return None
    if not isinstance(optimizer, Optimizer) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return Tables(optimizer)
    made: dict[str, Callable[[], Any]] = {
        "step": lambda: lr_scheduler.StepLR(optimizer, 3, 0.5),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, 10),
        "one cycle": lambda: lr_scheduler.OneCycleLR(optimizer, LR, total_steps=40, cycle_momentum=False),
        "lambda": lambda: lr_scheduler.LambdaLR(optimizer, Halving()),
        "sequence": lambda: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.ConstantLR(optimizer, 0.5, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)],
            milestones=[4],
        ),
        "warm restarts": lambda: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4),
    }
    return made[kind]()
