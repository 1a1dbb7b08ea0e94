"""The walk over a model's modules: every parameter and persistent buffer under its canonical name, tied ones once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hydra_ckpt.errors import TopologyError
from hydra_ckpt.state.adapter import has_adapter
from hydra_ckpt.state.slots import TensorSlot, Unit, Walked, persistent
from hydra_ckpt.state.wrappers import core_of, inside, still_inside, unwrap
from hydra_ckpt.storage.dtypes import check_elements_apart, check_storable

__all__ = ["Walk"]


@dataclass
class Walk:
    """What was found in the parts of one model. Not changed once `of` has returned it.

    Attributes:
        slots: One place for each stored tensor, in the model's order.
        aliases: Other names of tied tensors, to the name they are stored under.
        names: Identity of every parameter to its canonical name, whether it is stored or not.
        extra_states: Modules with state beyond tensors (`get_extra_state`), by canonical name.
        units: The modules that FSDP2 shards.
        modules: Every module, and every wrapper around one.
        cores: The modules that are asked for the state of each part; see `core_of`.
        everything: All places of stored tensors, those of tied ones included.
        unsaved: Places of tensors that are left out, as `checkpoint.allow_unsaved` asks.
        adapting: Parts with a state-dict adapter, and the names of their tensors.
    """

    slots: list[TensorSlot] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    extra_states: dict[str, nn.Module] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    modules: list[Walked] = field(default_factory=list)
    cores: list[nn.Module] = field(default_factory=list)
    everything: list[TensorSlot] = field(default_factory=list)
    unsaved: list[TensorSlot] = field(default_factory=list)
    adapting: list[tuple[nn.Module, frozenset[str]]] = field(default_factory=list)
    _tied_buffers: list[tuple[TensorSlot, TensorSlot]] = field(default_factory=list)
    _dropped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, modules: Iterable[nn.Module], omits: Callable[[str], bool] = lambda _: False) -> Walk:
        """Walk the parts of a model.

        Args:
            modules: The parts.
            omits: Whether a tensor of this name is left out, as `checkpoint.allow_unsaved` asks.

        Raises:
            TopologyError: Two parts hold different tensors under one name.
            CheckpointConfigError: A tensor, or its name, is of a kind that files cannot hold.
        """
        found = cls()
        sources: dict[str, str] = {}
        places: dict[str, TensorSlot] = {}
        adapting: list[tuple[nn.Module, set[tuple[int, str]]]] = []
        for module in modules:
            core = unwrap(module)
            found.cores.append(core_of(module))
            sources.update(_tied_to(core))
            places_here = set()
            for slot in found._find(module, "", omits):
                if slot.name in places and places[slot.name].tensor is not slot.tensor:
                    raise TopologyError(f"two parts of the model hold different tensors named {slot.name}")
                places[slot.name] = slot
                places_here.add((id(slot.owner), slot.attribute))
            if has_adapter(core):
                adapting.append((core, places_here))
        found._choose_names(list(places.values()))
        found._name_after_other_stages(sources)
        for core, held in adapting:
            own = frozenset(slot.name for slot in found.slots if (id(slot.owner), slot.attribute) in held)
            found.adapting.append((core, own))
        found.everything = list(places.values())
        found.names.update({id(slot.tensor): slot.name for slot in found.unsaved if slot.is_parameter})
        return found

    @cached_property
    def inner_modules(self) -> dict[str, nn.Module]:
        """The modules by what the names of their tensors begin with, without wrappers."""
        return {walked.name: walked.module for walked in self.modules if not walked.is_wrapper}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The live tensors by each of their names, those that are left out included."""
        found = {slot.name: slot.tensor for slot in [*self.everything, *self.unsaved]}
        found.update({name: found[kept] for name, kept in self.aliases.items() if kept in found})
        return found

    def is_current(self) -> bool:
        """Whether the model still has the modules, parameters and places of buffers that were found."""
        self.reshard()
        return (
            all(walked.is_as_it_was() for walked in self.modules)
            and all(one.tensor is other.tensor for one, other in self._tied_buffers)
            and all(still_inside(walked.module) for walked in self.modules if walked.is_wrapper)
        )

    def reshard(self) -> None:
        """Reshard FSDP parameters that a forward pass left gathered."""
        for unit in self.units:
            unit.reshard()

    def _choose_names(self, slots: list[TensorSlot]) -> None:
        """Store a tied tensor under the name that transformers keeps; if it drops none, under its first."""
        drops = re.compile("|".join(f"(?:{pattern})" for pattern in self._dropped) or "(?!)")
        by_tensor: dict[int, list[TensorSlot]] = {}
        for slot in slots:
            by_tensor.setdefault(id(slot.tensor), []).append(slot)
        for names in by_tensor.values():
            # If all names are to be dropped, transformers keeps the last in alphabetical order.
            dropped = [slot for slot in names if drops.search(slot.name)]
            last = max(dropped, key=lambda slot: slot.name, default=names[0])
            chosen = next((slot for slot in names if slot not in dropped), last)
            self.slots.append(chosen)
            if chosen.is_parameter:
                self.names[id(chosen.tensor)] = chosen.name
            self.aliases.update({slot.name: chosen.name for slot in names if slot is not chosen})
            self._tied_buffers += [(slot, chosen) for slot in names if slot is not chosen and not slot.is_parameter]

    def _name_after_other_stages(self, sources: Mapping[str, str]) -> None:
        """Give a weight that is tied to one of another pipeline stage the other's name: it is stored once."""
        here = {slot.name for slot in self.slots} | self.aliases.keys()
        moved = {name: source for name, source in sources.items() if name in here and source not in here}
        self.aliases.update(moved)
        self.slots = [replace(slot, name=moved[slot.name]) if slot.name in moved else slot for slot in self.slots]
        self.names = {identity: moved.get(name, name) for identity, name in self.names.items()}

    def _find(self, module: nn.Module, prefix: str, omits: Callable[[str], bool]) -> Iterator[TensorSlot]:
        """The places of the stored tensors below a module; everything else found is added here."""
        while (inner := inside(module)) is not None:
            self.modules.append(Walked.of(prefix, module, is_wrapper=True))
            module = inner
        if isinstance(module, FSDPModule):
            self.units.append(Unit.of(module))  # before its parameters are read, which it may have gathered
        self.modules.append(Walked.of(prefix, module))
        self._dropped += [prefix + key for key in getattr(module, "_tied_weights_keys", None) or ()]
        here: list[tuple[str, torch.Tensor | None, bool]] = [(*item, True) for item in module._parameters.items()]
        here += [(name, module._buffers[name], False) for name in persistent(module)]
        for name, tensor, is_parameter in here:
            if tensor is None:
                continue
            slot = TensorSlot(prefix + name, module, name, is_parameter)
            if omits(slot.name):
                self.unsaved.append(slot)
                continue
            check_storable(slot.name, tensor)
            check_elements_apart("parameter" if is_parameter else "buffer", slot.name, tensor)
            yield slot
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            self.extra_states[prefix + "_extra_state"] = module
        for name, child in module._modules.items():
            if child is not None:
                yield from self._find(child, f"{prefix}{name}.", omits)


def _tied_to(model: nn.Module) -> Mapping[str, str]:
    """Names of tied weights to the names of the weights they are tied to, as transformers 5 declares them."""
    declared = getattr(model, "all_tied_weights_keys", None)  # those in effect; the class only names the possible ones
    if declared is None and getattr(getattr(model, "config", None), "tie_word_embeddings", True):
        declared = getattr(model, "_tied_weights_keys", None)
    return declared if isinstance(declared, Mapping) else {}
