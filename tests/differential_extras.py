"""Extras for the differential test: nested plain data, tensors of all kinds, and objects of one's own."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from enum import Enum, IntFlag
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Choose = Callable[[Sequence[Any]], Any]


class Mode(Enum):
    FAST = "fast"
    SLOW = "slow"


class Flags(IntFlag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: int
    y: Any


class Scaled(torch.Tensor):
    """A tensor that wraps two others, as quantized ones do."""

    q: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, q: torch.Tensor, scale: torch.Tensor, size: Any = None) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, q.shape if size is None else size, dtype=torch.float32)

    def __init__(self, q: torch.Tensor, scale: torch.Tensor, size: Any = None) -> None:
        self.q, self.scale = q, scale

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["q", "scale"], {"bits": 8}

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Scaled:
        return cls(inner["q"], inner["scale"], size)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].q), func(args[0].scale))
        raise NotImplementedError(f"{func}")

    def __deepcopy__(self, memo: Any) -> Scaled:
        return Scaled(self.q.clone(), self.scale.clone())


LEAVES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "number": lambda: 7,
    "large": lambda: 1 << 80,
    "true": lambda: True,
    "float": lambda: 0.1,
    "nan": lambda: float("nan"),
    "infinite": lambda: float("-inf"),
    "text": lambda: "~ \u00e4\n",
    "bytes": lambda: b"\x00\xff",
    "dtype": lambda: torch.bfloat16,
    "device": lambda: torch.device("cpu"),
    "size": lambda: torch.Size([2, 3]),
    "set": lambda: {1, 2, "a"},
    "counter": lambda: Counter("hello"),
    "ordered": lambda: OrderedDict(b=1, a=torch.ones(2)),
    "array": lambda: np.arange(6.0).reshape(2, 3),
    "fortran": lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "array scalar": lambda: np.float32(1.5),
    "vector": lambda: torch.randn(5),
    "scalar": lambda: torch.tensor(3),
    "no elements": lambda: torch.zeros(0, 3),
    "transposed": lambda: torch.randn(3, 2).T,
    "column": lambda: torch.randn(3, 1).T,
    "gaps": lambda: torch.randn(4, 6)[:, ::2],
    "offset": lambda: torch.randn(10)[3:7],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "channels last": lambda: torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "half": lambda: torch.randn(3).half(),
    "float8": lambda: torch.randn(4).to(torch.float8_e4m3fn),
    "bools": lambda: torch.tensor([True, False]),
    "complex tensor": lambda: torch.randn(2, dtype=torch.complex64),
    "conjugate": lambda: torch.randn(2, dtype=torch.complex64).conj(),
    "unsigned": lambda: torch.tensor([1, 2], dtype=torch.uint16),
    "parameter": lambda: nn.Parameter(torch.randn(3)),
    "transposed parameter": lambda: nn.Parameter(torch.randn(3, 2).T, requires_grad=False),
    "buffer": lambda: nn.Buffer(torch.randn(3)),
    "gradient": lambda: torch.randn(3, requires_grad=True),
    "wrapped": lambda: Scaled(torch.arange(4).to(torch.int8), torch.tensor(0.5)),
}
# Drawn seldom: what may be refused.
RARE: dict[str, Callable[[], Any]] = {
    "complex": lambda: 1.5 - 2j,
    "frozen set": lambda: frozenset({1, 2}),
    "range": lambda: range(2, 9, 3),
    "slice": lambda: slice(1, None, 2),
    "deque": lambda: deque([1, torch.ones(2)], maxlen=4),
    "enumeration": lambda: Mode.SLOW,
    "flags": lambda: Flags.A | Flags.B,
    "named tuple": lambda: Point(1, torch.ones(2)),
    "default dict": lambda: defaultdict(list, a=[1], b=[torch.ones(2)]),
    "function": lambda: len,
    "texts": lambda: np.array(["a", "bc"]),
    "sparse": lambda: torch.eye(2).to_sparse(),
}
KEYS: list[Any] = ["a", "b.c", "0", "", "~", "v", 0, 1.5, (1, "a"), None, True]


def draw(choose: Choose) -> Any:
    """A kind of extra."""
    kind = choose(["tree", "tree", "ema", "averaged", "module", "scaler", "sharded"])
    return (kind, _tree(choose, 3)) if kind == "tree" else (kind,)


def _tree(choose: Choose, depth: int) -> Any:
    kind = choose(["leaf", "leaf", "list", "tuple", "dict"]) if depth else "leaf"
    if kind == "leaf":
        return ("leaf", choose(list(RARE if choose(range(40)) == 23 else LEAVES)))
    size = choose([0, 1, 2, 3])
    if kind == "dict":
        return ("dict", tuple((choose(KEYS), _tree(choose, depth - 1)) for _ in range(size)))
    return (kind, tuple(_tree(choose, depth - 1) for _ in range(size)))


def _grown(tree: Any) -> Any:
    kind, content = tree
    if kind == "leaf":
        return (LEAVES | RARE)[content]()
    if kind == "dict":
        return {key: _grown(item) for key, item in content}
    return {"list": list, "tuple": tuple}[kind](_grown(item) for item in content)


class Box:
    """Holds a value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


class Ema:
    """A moving average of a model's parameters, which copies what it loads."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: item.detach().clone() for name, item in model.named_parameters()}
        self.updates = 0

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        self.updates += 1
        for name, item in model.named_parameters():
            self.shadow[name].lerp_(item.detach(), 0.25)

    def state_dict(self) -> Any:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: Any) -> None:
        self.updates = state["updates"]
        for name, item in state["shadow"].items():
            self.shadow[name].copy_(item)


class Averaged(AveragedModel):
    """PyTorch's own average of a model, kept as a module."""

    def after_step(self, model: nn.Module) -> None:
        self.update_parameters(self.source)


def make(what: Any, model: nn.Module, seed: int) -> Any:
    """An extra.

    Args:
        what: As `draw` gives it.
        model: The model beside it.
        seed: Of its values.
    """
    torch.manual_seed(seed)
    kind = what[0]
    if kind == "tree":
        return Box(_grown(what[1]) if seed % 2 else None)
    if kind == "ema":
        return Ema(model)
    if kind == "averaged":
        torch.manual_seed(0)
        source = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        found = Averaged(source, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        object.__setattr__(found, "source", source)
        return found
    if kind == "module":
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    if kind == "scaler":
        return torch.amp.GradScaler("cpu", init_scale=2.0**seed)
    sharded = next((item for item in model.parameters() if isinstance(item, DTensor)), None)
    if not seed % 2:
        return Box(None)
    return Box(torch.randn(3, 2) if sharded is None else [sharded.detach().clone(), {"x": sharded.detach() * 2}])
