"""Parts of models for the differential test: what modules do to their own state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations

SIZE = 4


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, sharded or not."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


class Counting(nn.Linear):
    """Counts its passes, and lets the count show in what it computes. Its kinds tell the count in their own ways."""

    seen = 0

    def __init__(self) -> None:
        super().__init__(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            self.seen += 1
        return super().forward(x) * (1 + self.seen / 16)


class Hooked(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({prefix + "seen": torch.tensor(module.seen)})
        )
        self.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: setattr(module, "seen", int(state.pop(prefix + "seen")))
        )


class PreHooked(Counting):
    """Writes its count into a buffer only when it is asked for its state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("told", torch.zeros((), dtype=torch.int64))
        self.register_state_dict_pre_hook(lambda module, *_: module.told.fill_(module.seen))
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "seen", int(module.told)))


class PostLoading(nn.Linear):
    """Computes with something that it makes of a frozen weight when that is loaded."""

    def __init__(self) -> None:
        super().__init__(SIZE, SIZE)
        self.table = nn.Parameter(torch.randn(SIZE), requires_grad=False)
        self.look()
        self.register_load_state_dict_post_hook(lambda module, _: module.look())

    def look(self) -> None:
        self.sum = float(torch.arange(float(SIZE)) @ whole(self.table).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.sum + self.table.mean()


class LoadingOverridden(PostLoading):
    """The same by an override."""

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.look()


class Overridden(Counting):
    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> dict[str, Any]:
        found = super().state_dict(*args, prefix=prefix, **options)
        found[prefix + "seen"] = torch.tensor([self.seen, 7])
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.seen = int(state_dict.pop(prefix + "seen")[0])
        super()._load_from_state_dict(state_dict, prefix, *args)


class Saving(Counting):
    """As quantized layers do it, with plain data among the entries."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = {"value": self.seen, "kind": ("a", 1, torch.float16), "rows": [None, 2.5]}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.seen = state_dict.pop(prefix + "scale")["value"]
        super()._load_from_state_dict(state_dict, prefix, *args)


class ExtraState(Counting):
    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "history": [torch.full((2, 3), float(self.seen)).T]}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


class ExtraTensor(Counting):
    def get_extra_state(self) -> Any:
        return torch.tensor(self.seen)

    def set_extra_state(self, state: Any) -> None:
        self.seen = int(state)


class Renaming(nn.Linear):
    def __init__(self) -> None:
        super().__init__(SIZE, SIZE)
        self.register_state_dict_post_hook(
            lambda _, state, prefix, __: state.update({prefix + "w": state.pop(prefix + "weight")})
        )
        self.register_load_state_dict_pre_hook(
            lambda _, state, prefix, *__: state.update({prefix + "weight": state.pop(prefix + "w")})
        )


class Splitting(nn.Linear):
    """Saves its weight as two views, as models with fused projections do."""

    def __init__(self) -> None:
        super().__init__(SIZE, SIZE)
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._join)

    @staticmethod
    def _split(_: Any, state: Any, prefix: str, __: Any) -> None:
        weight = state.pop(prefix + "weight")
        state[prefix + "q"], state[prefix + "k"] = weight[:2], weight[2:]

    @staticmethod
    def _join(_: Any, state: Any, prefix: str, *__: Any) -> None:
        state[prefix + "weight"] = torch.cat([state.pop(prefix + "q"), state.pop(prefix + "k")])


class Replacing(nn.Linear):
    """Saves fp32 masters under the names of its parameters."""

    def __init__(self) -> None:
        super().__init__(SIZE, SIZE)
        self.master = {name: torch.full(item.shape, 1.0) for name, item in self.named_parameters()}
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({prefix + n: item for n, item in module.master.items()})
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for item in self.master.values():
            item.add_(0.125)
        return super().forward(x) * self.master["bias"][0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.master = {name: state_dict[prefix + name].clone() for name in self.master}
        super()._load_from_state_dict(state_dict, prefix, *args)


class Dropping(nn.Linear):
    """Keeps a table out of its state dict."""

    def __init__(self) -> None:
        super().__init__(SIZE, SIZE)
        self.register_buffer("table", torch.ones(SIZE))
        self._register_state_dict_hook(lambda _, state, prefix, __: state.pop(prefix + "table"))
        self.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: state.update({prefix + "table": module.table})
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.table


class Copying(nn.Linear):
    """A hook returns copies, as those that offload do."""

    def __init__(self) -> None:
        super().__init__(SIZE, SIZE)
        self.register_state_dict_post_hook(
            lambda _, state, prefix, __: state.update(
                {name: value.detach().clone() for name, value in state.items() if name.startswith(prefix)}
            )
        )


class Casting(nn.Linear):
    """A hook halves the precision of what it saves."""

    def __init__(self) -> None:
        super().__init__(SIZE, SIZE)
        self.register_state_dict_post_hook(
            lambda _, state, prefix, __: state.update({prefix + "weight": state[prefix + "weight"].detach().half()})
        )


class Buffers(nn.Linear):
    """Persistent and other buffers; some are exchanged in each pass, one is None, one has strides of its own."""

    def __init__(self) -> None:
        super().__init__(SIZE, SIZE)
        self.register_buffer("mean", torch.zeros(SIZE))
        self.register_buffer("hidden", torch.ones(SIZE), persistent=False)
        self.register_buffer("nothing", None)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("table", torch.randn(3, 2).T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        with torch.no_grad():
            self.mean = self.mean.lerp(x.detach().mean(0).to(self.mean.dtype), 0.5)
            self.count += 1
        return (x - self.mean) * self.hidden + self.table.mean()


class Odd(nn.Module):
    """Parameters of no dimension, of no elements, and with strides of their own; one that is never used; one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE).T)
        self.unused = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.randn(SIZE), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight * self.scale + self.frozen + self.none.sum()


class Frozen(nn.Linear):
    """Unused and frozen parameters of shapes that can be sharded."""

    def __init__(self) -> None:
        super().__init__(SIZE, SIZE)
        self.weight.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(5))


class Image(nn.Module):
    """A convolution whose weight lies channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 2, padding="same").to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.reshape(-1, 2, 2, 1)).reshape(-1, SIZE)


class Lora(nn.Module):
    """A frozen base and two small matrices; the state dict tells only these."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(SIZE, SIZE).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, SIZE)), nn.Parameter(torch.randn(SIZE, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


class TiedHooked(Tied):
    """Two layers with one weight, one of which adds to its state."""

    def __init__(self) -> None:
        super().__init__()
        self.two = Hooked()
        self.two.weight = self.one.weight


class Fabric(nn.Module):
    """A wrapper with two ways to the same module, whose state is the inner one's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = module
        self._original_module = module

    def forward(self, *args: Any) -> Any:
        return self._forward_module(*args)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self._original_module.state_dict(*args, **options)

    def load_state_dict(self, state: Any, **options: Any) -> Any:
        return self._original_module.load_state_dict(state, **options)


class Outer(nn.Module):
    """A wrapper that counts, and tells it by an override at the top, on both ways."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner, self.passes = module, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.inner(x) * (1 + self.passes / 32)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {**super().state_dict(*args, **options), "passes": self.passes}

    def load_state_dict(self, state: Any, *args: Any, **options: Any) -> Any:
        state = dict(state)
        self.passes = state.pop("passes")
        return super().load_state_dict(state, *args, **options)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(SIZE, SIZE),
    "norm": lambda: nn.Sequential(nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(SIZE, SIZE)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(SIZE, SIZE)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(SIZE, SIZE)),
    "checkpointed": lambda: checkpoint_wrapper(nn.Linear(SIZE, SIZE)),
    "checkpointed hooked": lambda: checkpoint_wrapper(nn.Sequential(Hooked())),
    "compiled": lambda: nn.Sequential(torch.compile(Saving(), backend="eager")),
    "fabric": lambda: nn.Sequential(Fabric(nn.Linear(SIZE, SIZE))),
    "hooked": Hooked,
    "pre-hooked": PreHooked,
    "post-loading": PostLoading,
    "loading overridden": LoadingOverridden,
    "overridden": Overridden,
    "saving": Saving,
    "extra state": ExtraState,
    "extra tensor": ExtraTensor,
    "renaming": Renaming,
    "splitting": Splitting,
    "replacing": Replacing,
    "dropping": Dropping,
    "copying": Copying,
    "casting": Casting,
    "buffers": Buffers,
    "odd": Odd,
    "frozen": Frozen,
    "image": Image,
    "lora": Lora,
    "tied": Tied,
    "tied hooked": TiedHooked,
}
# What FSDP2 itself cannot shard or compute.
NOT_SHARDED = {"old weight norm", "weight norm", "spectral norm", "odd", "image", "splitting", "replacing"}


class Net(nn.Module):
    """Blocks one after another."""

    def __init__(self, kinds: tuple[str, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BLOCKS[kind]() for kind in kinds)
        self.to(dtype)
        for block in self.blocks:
            if isinstance(block, PostLoading):
                block.look()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x)).to(x.dtype)
        return x


def wrap(model: nn.Module, kind: str) -> nn.Module:
    """What is around a whole model."""
    if kind == "compile":
        return torch.compile(model, backend="eager")
    if kind == "fabric":
        return Fabric(model)
    if kind == "override":
        return Outer(model)
    if kind == "returning":  # what a hook returns counts at the top only
        model._register_state_dict_hook(lambda _, state, *__: type(state)([*state.items(), ("note", "text")]))
        model.register_load_state_dict_pre_hook(lambda _, state, *__: state.pop("note"))
    if kind == "hooked":
        model.register_state_dict_post_hook(lambda _, state, *__: state.update({"version": 3, "note": "text"}))
        model.register_load_state_dict_pre_hook(lambda _, state, *__: [state.pop(key) for key in ("version", "note")])
    return model
