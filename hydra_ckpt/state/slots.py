"""Places in modules where tensors live, and modules as they were when they were walked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """A place in a module where a tensor lives.

    Attributes:
        name: Canonical name.
        owner: The module.
        attribute: The tensor's name in it.
        is_parameter: Else a persistent buffer.
    """

    name: str
    owner: nn.Module
    attribute: str
    is_parameter: bool

    @property
    def tensor(self) -> torch.Tensor:
        """What lives there now; frameworks may exchange the object between steps."""
        home = self.owner._parameters if self.is_parameter else self.owner._buffers
        tensor = home[self.attribute]
        assert tensor is not None  # slots are made of places that hold something
        return tensor


@dataclass(frozen=True)
class Unit:
    """A module that FSDP2 shards, with its parameters as they are while it is not gathered.

    Attributes:
        module: The module.
        sharded: Its parameters' places, and what is there.
    """

    module: FSDPModule
    sharded: list[tuple[TensorSlot, torch.Tensor]]

    @classmethod
    def of(cls, module: FSDPModule) -> Unit:
        """The unit of a module, which is resharded first."""
        module.reshard()
        assert isinstance(module, nn.Module)  # FSDPModule is mixed into the module's own class
        return cls(module, [(slot, slot.tensor) for slot in _parameters(module)])

    def reshard(self) -> None:
        """Bring parameters that a forward pass left gathered back to their shards."""
        # FSDP puts other objects in place while it gathers. Asking it costs more than all the rest of a walk.
        if any(slot.tensor is not tensor for slot, tensor in self.sharded):
            self.module.reshard()


def _parameters(module: nn.Module) -> Iterator[TensorSlot]:
    """The parameters of a module that belong to no FSDP module further in."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield TensorSlot(name, module, name, is_parameter=True)
    for child in module._modules.values():
        if child is not None and not isinstance(child, FSDPModule):
            yield from _parameters(child)


@dataclass(frozen=True, slots=True)
class Walked:
    """A module as it was when it was walked: what it holds may be exchanged, taken away or added to later.

    Attributes:
        name: What the names of its tensors begin with.
        module: The module.
        kind: Its class; `fully_shard`, for example, gives it another one.
        children: Its modules by name.
        parameters: Name to identity.
        buffers: Names of those that are saved.
        is_wrapper: Whether it only passes on what is inside it.
    """

    name: str
    module: nn.Module
    kind: type[nn.Module]
    children: list[tuple[str, nn.Module | None]]
    parameters: dict[str, int]
    buffers: list[str]
    is_wrapper: bool

    @classmethod
    def of(cls, name: str, module: nn.Module, *, is_wrapper: bool = False) -> Walked:
        """A module as it is now.

        Args:
            name: What the names of its tensors begin with.
            module: The module.
            is_wrapper: Whether it only passes on what is inside it.
        """
        children = list(module._modules.items())
        return cls(name, module, type(module), children, _identities(module), persistent(module), is_wrapper)

    def is_as_it_was(self) -> bool:
        """Whether it still has the same class, modules, parameters and places of buffers."""
        return (
            type(self.module) is self.kind
            and _are_the_same(list(self.module._modules.items()), self.children)
            and _identities(self.module) == self.parameters
            and persistent(self.module) == self.buffers
        )


def _are_the_same(now: Sequence[tuple[str, nn.Module | None]], before: Sequence[tuple[str, nn.Module | None]]) -> bool:
    """Whether the same modules have the same names; a module may overload `==`."""
    return len(now) == len(before) and all(
        name == known and child is held for (name, child), (known, held) in zip(now, before, strict=True)
    )


def _identities(module: nn.Module) -> dict[str, int]:
    """Which parameters a module has. They identify the owner of an optimizer's state."""
    return {name: id(parameter) for name, parameter in module._parameters.items() if parameter is not None}


def persistent(module: nn.Module) -> list[str]:
    """Which buffers of a module are saved. Others may take their places at every step."""
    hidden = module._non_persistent_buffers_set
    return [name for name, buffer in module._buffers.items() if buffer is not None and name not in hidden]
