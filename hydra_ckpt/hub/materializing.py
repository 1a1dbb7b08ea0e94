"""Models on the meta device: allocates their tensors, and initializes those that no file holds.

Other tensors stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError
from hydra_ckpt.hub.conversion import is_transformers_model
from hydra_ckpt.state.model_map import ModelMap
from hydra_ckpt.storage.memory import fresh_like


@dataclass(frozen=True)
class ModuleSlot:
    """The place of a parameter or buffer, persistent or not: a module, and the name in it."""

    module: nn.Module
    name: str
    is_parameter: bool

    @property
    def _there(self) -> dict[str, Any]:
        return self.module._parameters if self.is_parameter else self.module._buffers

    @property
    def tensor(self) -> torch.Tensor:
        """The current tensor at this place."""
        return cast(torch.Tensor, self._there[self.name])

    def put(self, tensor: torch.Tensor) -> None:
        """Replace the tensor at this place."""
        self._there[self.name] = tensor


def materialize(parts: Sequence[nn.Module], mapped: ModelMap, loaded: Collection[str]) -> list[ModuleSlot]:
    """Allocate memory for tensors on the meta device, on the device of the model's mesh or otherwise on the CPU.

    Args:
        parts: The parts of a model.
        mapped: Their tensors.
        loaded: Names of those that will be read.

    Returns:
        The places of the new tensors; their values are arbitrary.

    Raises:
        CheckpointConfigError: A tensor would be neither read nor initialized.
        CheckpointError: The same for a buffer that is in no file.
    """
    fresh = []
    for part in parts:
        waiting = [home for home in _homes(part) if home.tensor.is_meta]
        if not waiting:
            continue
        _check_buffers(part)
        _check_skipped(part, mapped, loaded)
        sharded = next((tensor for tensor in part.parameters() if isinstance(tensor, DTensor)), None)
        device = "cpu" if sharded is None else sharded.device_mesh.device_type
        tied = _tied(waiting)
        cast(Any, part)._apply(partial(_placed, device=device))  # what Module.to_empty does
        for first, other in tied:  # each place has got separate memory
            other.put(first.tensor)
        fresh += waiting
    return fresh


def initialize(
    parts: Sequence[nn.Module], mapped: ModelMap, fresh: Sequence[ModuleSlot], loaded: Collection[str]
) -> None:
    """Let transformers initialize tensors that are new and were not read: heads, and buffers in no file.

    Args:
        parts: The parts of a model.
        mapped: Their tensors.
        fresh: The result of `materialize`.
        loaded: Names of those that were read.
    """
    left = {id(home.tensor) for home in fresh}
    left -= {id(slot.tensor) for slot in mapped.slots if slot.name in loaded}
    tensors = [home.tensor for part in parts for home in _homes(part)]
    for tensor in tensors:
        tensor._is_hf_initialized = id(tensor) not in left  # type: ignore[attr-defined]
    for part in filter(is_transformers_model, parts):
        for module in part.modules():
            module._is_hf_initialized = False  # type: ignore[assignment]
        cast(Any, part).initialize_weights()
    for tensor in tensors:
        tensor.__dict__.pop("_is_hf_initialized", None)


def _homes(part: nn.Module) -> list[ModuleSlot]:
    return [
        ModuleSlot(module, name, is_parameter)
        for module in part.modules()
        for is_parameter, held in ((True, module._parameters), (False, module._buffers))
        for name, tensor in held.items()
        if tensor is not None
    ]


def _tied(homes: Sequence[ModuleSlot]) -> list[tuple[ModuleSlot, ModuleSlot]]:
    """The first place of each tensor, with every other one."""
    first: dict[int, ModuleSlot] = {}
    return [(first[id(home.tensor)], home) for home in homes if first.setdefault(id(home.tensor), home) is not home]


def _placed(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return fresh_like(tensor, device=device) if tensor.is_meta else tensor


def _check_skipped(part: nn.Module, mapped: ModelMap, loaded: Collection[str]) -> None:
    if is_transformers_model(part):
        return
    modules = set(part.modules())
    lost = [
        slot.name for slot in mapped.slots if slot.owner in modules and slot.tensor.is_meta and slot.name not in loaded
    ]
    if lost:
        raise CheckpointConfigError(
            f"the model is on the meta device, and {', '.join(lost)} are not taken from the base model: only a "
            "transformers model knows how to initialize them. Build the model on its device"
        )


def _check_buffers(part: nn.Module) -> None:
    lost = [
        f"{place}.{name}".lstrip(".")
        for place, module in part.named_modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None and module._buffers[name].is_meta
    ]
    if lost and not is_transformers_model(part):
        raise CheckpointError(
            f"the model is on the meta device, and its buffers {', '.join(lost)} are in no file: only a transformers "
            "model knows how to fill them. Build the model on its device"
        )
