"""Models: what is stored of them, where it is, and copies into it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.state.adapter import adapter_naming, has_adapter
from hydra_ckpt.state.beyond_tensors import BeyondTensors
from hydra_ckpt.state.local import Localizer, LocalTensor
from hydra_ckpt.state.slots import TensorSlot
from hydra_ckpt.state.walk import Walk
from hydra_ckpt.storage.dtypes import safetensors_dtype
from hydra_ckpt.storage.subclasses import addresses

# Above this, buffers are tables rather than statistics, and the same everywhere.
MAX_OWN_BUFFER_BYTES = 16 << 20


@dataclass
class ModelMap:
    """What is stored of one model.

    Attributes:
        walk: What was found in its modules.
        slots: One place for each stored tensor, in the model's order.
        beyond: What its modules save and load besides tensors.
        names: Identity of every parameter to its canonical name, whether it is stored or not.
    """

    walk: Walk
    slots: list[TensorSlot]
    beyond: BeyondTensors
    names: dict[int, str]
    _beside: list[TensorSlot] = field(default_factory=list)  # buffers that are stored as extra state
    _is_whole: bool = True
    _adapted_specs: list[TensorSpec] | None = None

    @classmethod
    def of(cls, modules: Iterable[nn.Module], omits: Callable[[str], bool] = lambda _: False) -> ModelMap:
        """The map of a whole model. Arguments and errors are those of `Walk.of`."""
        found = Walk.of(modules, omits)
        return cls(found, found.slots, BeyondTensors(found, found.extra_states, omits), found.names)

    def only(self, renamed: Mapping[str, Sequence[str]], *, buffers: bool) -> ModelMap:
        """The map of some of the tensors, under other names.

        Args:
            renamed: A tensor's name to all names that it is stored under.
            buffers: Whether the other state that a forward pass may change is kept as extra state: other buffers, but
                tables, and the modules' own.
        """
        left = [slot for slot in self.slots if slot.name not in renamed and not slot.is_parameter]
        return ModelMap(
            self.walk,
            [replace(slot, name=name) for slot in self.slots for name in renamed.get(slot.name, ())],
            replace(
                self.beyond,
                extra_states=self.walk.extra_states if buffers else {},
                # Other state of the base model's modules does not belong to the adapter.
                ours=tuple({name.rpartition(".")[0] for name in renamed}) if buffers else (),
            ),
            self.names,
            [slot for slot in left if buffers and slot.tensor.nbytes <= MAX_OWN_BUFFER_BYTES],
            _is_whole=False,
        )

    @property
    def aliases(self) -> dict[str, str]:
        """Other names of tied tensors, to the name they are stored under."""
        return self.walk.aliases

    @property
    def omitted(self) -> list[str]:
        """Names of tensors that are left out, as `checkpoint.allow_unsaved` asks."""
        return [slot.name for slot in self.walk.unsaved]

    @property
    def parts(self) -> int:
        """How many modules the model consists of."""
        return len(self.walk.cores)

    def is_current(self) -> bool:
        """Whether the model still has the modules, parameters and places of buffers that were walked."""
        return self.walk.is_current() and self._adapts_as_it_did()

    def _adapts_as_it_did(self) -> bool:
        """Whether adapters would get the same input as before."""
        return self._adapted_specs is None or (
            self._adapted_specs == self.specs() and all(has_adapter(core) for core, _ in self.walk.adapting)
        )

    @cached_property
    def adapted(self) -> TensorMapping | None:
        """What the files hold according to the parts' adapters; None if no part has one.

        Raises:
            TopologyError: An adapter does not fit.
        """
        if not self.walk.adapting or not self._is_whole:
            return None
        specs = self._adapted_specs = self.specs()
        found = [adapter_naming(core, [spec for spec in specs if spec.name in own]) for core, own in self.walk.adapting]
        dtypes = {name: dtype for naming in found for name, dtype in naming.dtypes.items()}
        shapes = {name: shape for naming in found for name, shape in naming.shapes.items()}
        return TensorMapping.ordered([alias for naming in found for alias in naming.aliases], specs, dtypes, shapes)

    def specs(self) -> list[TensorSpec]:
        """Every stored tensor's name, element type and global shape."""
        self.walk.reshard()
        return [
            TensorSpec(slot.name, safetensors_dtype(slot.name, slot.tensor.dtype), tuple(slot.tensor.shape))
            for slot in self.slots
        ]

    def locals(self, localize: Localizer, deferred: Container[int] = frozenset()) -> list[LocalTensor]:
        """This rank's part of every stored tensor, as it is now.

        Args:
            localize: Finds the positions of tensors.
            deferred: Identities of parameters that only a hooked optimizer changes.
        """
        self.walk.reshard()
        return [
            localize(
                slot.name,
                slot.tensor,
                divisible=slot.is_parameter,  # buffers differ between data-parallel ranks
                deferred=slot.is_parameter and slot.tensor.requires_grad and id(slot.tensor) in deferred,
                lasting=True,
            )
            for slot in self.slots
        ]

    def buffers(self) -> dict[str, torch.Tensor]:
        """Persistent buffers by name, live."""
        return {slot.name: slot.tensor for slot in [*self.slots, *self._beside] if not slot.is_parameter}

    @torch.no_grad()
    def set_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the buffers of these names."""
        live = self.buffers()
        for name, value in buffers.items():
            if name in live and live[name].shape == value.shape:
                live[name].copy_(_placed_as(live[name], value))

    @torch.no_grad()
    def memory(self) -> dict[str, torch.Tensor]:
        """The tensors by name, over the memory that they have now, whatever is assigned later."""
        return {slot.name: slot.tensor.detach() for slot in self.slots}

    @torch.no_grad()
    def put_back(self, memory: Mapping[str, torch.Tensor]) -> list[str]:
        """Copy values into the tensors that were replaced, or have other memory, since `memory()` was called.

        Returns:
            Names of those whose replacements do not fit.
        """
        unlike = []
        for slot in self.slots:
            before, now = memory[slot.name], getattr(slot.owner, slot.attribute, None)
            if isinstance(now, torch.Tensor) and addresses(now) == addresses(before):
                continue
            if isinstance(now, torch.Tensor) and (now.shape, now.dtype) == (before.shape, before.dtype):
                now.copy_(before)
            else:
                unlike.append(slot.name)
        return unlike

    def extra_state(self, called: str) -> dict[str, Any]:
        """The modules' own extra state, and the buffers that are stored as such; see `BeyondTensors.extra_state`."""
        return {**self.beyond.extra_state(called), **{slot.name: slot.tensor for slot in self._beside}}

    def set_extra_state(self, called: str, states: Mapping[str, Any]) -> None:
        """Load what `extra_state` returned; see `BeyondTensors.set_extra_state`."""
        self.set_buffers({name: value for name, value in states.items() if isinstance(value, torch.Tensor)})
        self.beyond.set_extra_state(called, states)


def _placed_as(live: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole value as this rank holds it."""
    if not isinstance(live, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(live.device)
    return distribute_tensor(value, live.device_mesh, live.placements, src_data_rank=None)  # every rank has it
