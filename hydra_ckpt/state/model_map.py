"""Models: every parameter and persistent buffer under its canonical name, tied weights once."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, TopologyError, leave_out, some_of
from hydra_ckpt.layout.aliases import Naming
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.state.adapter import adapter_naming, has_adapter
from hydra_ckpt.state.growing import accepted
from hydra_ckpt.state.local import Localizer, LocalTensor
from hydra_ckpt.state.module_oracle import (
    Told,
    customizes,
    customizes_loading,
    give_back,
    own_entries,
    told_by,
)
from hydra_ckpt.state.slots import Slot, Unit, Walked, persistent
from hydra_ckpt.state.wrappers import canonical, inside, still_inside, unwrap
from hydra_ckpt.storage.dtypes import check_elements_apart, check_storable, safetensors_dtype
from hydra_ckpt.storage.subclasses import addresses

# Above this, buffers are tables rather than statistics, and the same everywhere.
MAX_OWN_BUFFER_BYTES = 16 << 20


def _tied_to(model: nn.Module) -> Mapping[str, str]:
    """Names of tied weights to the names of the weights they are tied to, as transformers 5 declares them."""
    declared = getattr(model, "all_tied_weights_keys", None)  # those in effect; the class only names the possible ones
    if declared is None and getattr(getattr(model, "config", None), "tie_word_embeddings", True):
        declared = getattr(model, "_tied_weights_keys", None)
    return declared if isinstance(declared, Mapping) else {}


def _placed_as(live: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole value as this rank holds it."""
    if not isinstance(live, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(live.device)
    return distribute_tensor(value, live.device_mesh, live.placements, src_data_rank=None)  # every rank has it


@dataclass
class ModelMap:
    """The places of one model's tensors.

    Attributes:
        slots: One place for each stored tensor, in the model's order.
        aliases: Other names of tied tensors, to the name they are stored under.
        units: The modules that FSDP2 shards.
        names: Identity of every parameter to its canonical name, whether it is stored or not.
        extra_states: Modules with state beyond tensors (`get_extra_state`), by canonical name.
        omitted: Names of tensors that are left out, as `checkpoint.allow_unsaved` asks.
    """

    slots: list[Slot]
    aliases: dict[str, str] = field(default_factory=dict)
    extra_states: dict[str, nn.Module] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    omitted: list[str] = field(default_factory=list)
    _unsaved: list[Slot] = field(default_factory=list)
    _adapting: list[tuple[nn.Module, frozenset[str]]] = field(default_factory=list)
    _dropped: list[str] = field(default_factory=list)
    _walked: list[Walked] = field(default_factory=list)
    _adapted_specs: list[TensorSpec] | None = None
    _beside: list[Slot] = field(default_factory=list)
    _cores: list[nn.Module] = field(default_factory=list)
    _everything: list[Slot] = field(default_factory=list)
    _tied_buffers: list[tuple[Slot, Slot]] = field(default_factory=list)
    _ours: tuple[str, ...] | None = None
    _omits: Callable[[str], bool] = lambda _: False

    @classmethod
    def of(cls, modules: Iterable[nn.Module], omits: Callable[[str], bool] = lambda _: False) -> ModelMap:
        """Walk the parts of a model.

        Args:
            modules: The parts.
            omits: Whether a tensor of this name is left out, as `checkpoint.allow_unsaved` asks.

        Raises:
            TopologyError: Two parts hold different tensors under one name.
            CheckpointConfigError: A tensor, or its name, is of a kind that files cannot hold.
        """
        found = cls([], _omits=omits)
        sources: dict[str, str] = {}
        places: dict[str, Slot] = {}
        adapting: list[tuple[nn.Module, set[tuple[int, str]]]] = []
        for module in modules:
            core = unwrap(module)
            found._cores.append(core)
            sources.update(_tied_to(core))
            places_here = set()
            for slot in found._walk(module, ""):
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
            found._adapting.append((core, own))
        found._everything = list(places.values())
        found.names.update({id(slot.tensor): slot.name for slot in found._unsaved if slot.is_parameter})
        return found

    def _walk(self, module: nn.Module, prefix: str) -> Iterator[Slot]:
        while (inner := inside(module)) is not None:
            self._walked.append(Walked.of(prefix, module, is_wrapper=True))
            module = inner
        if isinstance(module, FSDPModule):
            self.units.append(Unit.of(module))  # before its parameters are read, which it may have gathered
        self._walked.append(Walked.of(prefix, module))
        self._dropped += [prefix + key for key in getattr(module, "_tied_weights_keys", None) or ()]
        here: list[tuple[str, torch.Tensor | None, bool]] = [(*item, True) for item in module._parameters.items()]
        here += [(name, module._buffers[name], False) for name in persistent(module)]
        for name, tensor, is_parameter in here:
            if tensor is None:
                continue
            if self._omits(prefix + name):
                self.omitted.append(prefix + name)
                self._unsaved.append(Slot(prefix + name, module, name, is_parameter))
                continue
            check_storable(prefix + name, tensor)
            check_elements_apart("parameter" if is_parameter else "buffer", prefix + name, tensor)
            yield Slot(prefix + name, module, name, is_parameter)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            self.extra_states[prefix + "_extra_state"] = module
        for name, child in module._modules.items():
            if child is not None:
                yield from self._walk(child, f"{prefix}{name}.")

    def _choose_names(self, slots: list[Slot]) -> None:
        """Store a tied tensor under the name that transformers keeps; if it drops none, under its first."""
        drops = re.compile("|".join(f"(?:{pattern})" for pattern in self._dropped) or "(?!)")
        by_tensor: dict[int, list[Slot]] = {}
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

    def _adapts_as_it_did(self) -> bool:
        """Whether adapters would get the same input as before."""
        return self._adapted_specs is None or (
            self._adapted_specs == self.specs() and all(has_adapter(core) for core, _ in self._adapting)
        )

    def told(self, called: str) -> Told:
        """What the model's own state_dict returns beyond what was walked; nothing for most.

        Args:
            called: The model's name, for messages.

        Raises:
            CheckpointConfigError: A state_dict() raises.
        """
        metadata: dict[str, Any] = {
            walked.name.removesuffix("."): {"version": walked.module._version}
            for walked in self._walked
            if not walked.is_wrapper and walked.module._version != 1
        }
        if not self._asks():
            return Told([], metadata)
        entries = []
        for core in self._cores:
            told = told_by(core, called)
            found = own_entries(told, *self._covered())
            self._refuse_unloadable(called, core, found)
            entries.append({name: value for name, value in found.items() if self._is_ours(name)})
            for name, local in getattr(told, "_metadata", {}).items():
                if local != {"version": 1}:
                    metadata[canonical(f"{name}.").removesuffix(".")] = local
        return Told(entries, metadata)

    def _refuse_unloadable(self, called: str, core: nn.Module, entries: Iterable[str]) -> None:
        """Raise if entries of a state_dict() have no module that could load them: PyTorch would not expect them."""
        loading = [walked.name for walked in self._walked if customizes_loading(walked.module)]
        expected = {name for name in entries if canonical(name) in self._covered()[0]}  # a copy, in another type
        lost = [
            name
            for name in entries
            if name not in expected and not self._omits(name) and not any(map(name.startswith, loading))
        ]
        if lost:
            raise CheckpointConfigError(
                f"{called} ({type(core).__qualname__}): its state_dict() adds {some_of(sorted(lost))}, which no "
                "load_state_dict() of its modules accepts. Add a hook that loads them "
                f"(register_load_state_dict_pre_hook), {leave_out(f'{called}.{min(lost)}')}"
            )

    def accepted(self, odd: Mapping[str, torch.Tensor]) -> set[str]:
        """Which tensors that the model lacks, or has in another size, its modules take; see `growing.accepted`."""
        if self._ours is not None or len(self._cores) > 1 or set(odd) & set(self.aliases.values()):
            return set()
        return accepted({walked.name: walked.module for walked in self._walked if not walked.is_wrapper}, odd)

    def give_back(
        self,
        called: str,
        saved: Sequence[Mapping[str, Any]],
        metadata: Mapping[str, Any] | None,
        resized: Mapping[str, torch.Tensor],
        left: Collection[str] = (),
    ) -> list[str]:
        """Give each part its entries, or let it do what else it does when it loads; see `give_back`.

        Args:
            called: The model's name, for messages.
            saved: For each part its entries; or nothing.
            metadata: Metadata of the modules' state, including versions other than 1; None if unknown.
            resized: Buffers of another size than the live ones.
            left: Names of tensors that were not loaded.

        Returns:
            Names of those that the module reports differently afterwards.
        """
        known = {} if metadata is None or self._ours is not None else metadata
        versions = {
            walked.name.removesuffix("."): walked.module._version for walked in self._walked if not walked.is_wrapper
        }
        if metadata is not None and self._ours is None:
            older = {name for name, version in versions.items() if known.get(name, {}).get("version", 1) != version}
        else:
            older = set()
        if not (any(saved) or self.customizes_loading or older or resized):
            return []
        return [
            name
            for core, entries in zip(self._cores, saved or [{} for _ in self._cores], strict=True)
            for name in give_back(
                core, called, Told([dict(entries)], known, resized), *self._covered(), self._is_ours, older, left
            )
        ]

    @property
    def customizes_loading(self) -> bool:
        """Whether any module does more in loading than copying tensors."""
        # PyTorch calls load_state_dict() of the outermost module only.
        return self._ours is None and (
            any(map(customizes_loading, self._inner_modules()))
            or any(type(core).load_state_dict is not nn.Module.load_state_dict for core in self._cores)
        )

    def _inner_modules(self) -> Iterator[nn.Module]:
        return (walked.module for walked in self._walked if not walked.is_wrapper)

    def _asks(self) -> bool:
        """Whether anything in the model customizes what state_dict() returns."""
        return any(map(customizes, self._inner_modules()))

    def _is_ours(self, name: str) -> bool:
        """Whether an entry belongs to what is stored of the model."""
        owner = f"{name.rpartition('.')[0]}."
        return self._ours is None or any(owner.startswith(f"{place}.") for place in self._ours)

    def _covered(self) -> tuple[dict[str, torch.Tensor], list[str]]:
        """The walked tensors by each of their names, and the names of extra states."""
        everything = {slot.name: slot.tensor for slot in [*self._everything, *self._unsaved]}
        everything.update({name: everything[kept] for name, kept in self.aliases.items() if kept in everything})
        return everything, list(self.extra_states)

    def is_current(self) -> bool:
        """Whether the model still has the modules, parameters and places of buffers that were walked."""
        self.reshard()
        return (
            all(walked.is_as_it_was() for walked in self._walked)
            and all(one.tensor is other.tensor for one, other in self._tied_buffers)
            and all(still_inside(walked.module) for walked in self._walked if walked.is_wrapper)
            and self._adapts_as_it_did()
        )

    def keep(self, renamed: Mapping[str, Sequence[str]], *, buffers: bool) -> None:
        """Store only these tensors, under other names.

        Args:
            renamed: A tensor's name to all names that it is stored under.
            buffers: Whether the other state that a forward pass may change is kept as extra state: other buffers, but
                tables, and the modules' own.
        """
        left = [slot for slot in self.slots if slot.name not in renamed and not slot.is_parameter]
        self._beside = [slot for slot in left if buffers and slot.tensor.nbytes <= MAX_OWN_BUFFER_BYTES]
        self.slots = [replace(slot, name=name) for slot in self.slots for name in renamed.get(slot.name, ())]
        self.extra_states = self.extra_states if buffers else {}
        self._adapting = []
        # Other state of the base model's modules does not belong to the adapter.
        self._ours = tuple({name.rpartition(".")[0] for name in renamed}) if buffers else ()

    @cached_property
    def adapted(self) -> Naming | None:
        """What the files hold according to the parts' adapters; None if no part has one.

        Raises:
            TopologyError: An adapter does not fit.
        """
        if not self._adapting:
            return None
        specs = self._adapted_specs = self.specs()
        found = [adapter_naming(core, [spec for spec in specs if spec.name in own]) for core, own in self._adapting]
        dtypes = {name: dtype for naming in found for name, dtype in naming.dtypes.items()}
        shapes = {name: shape for naming in found for name, shape in naming.shapes.items()}
        return Naming.ordered([alias for naming in found for alias in naming.aliases], specs, dtypes, shapes)

    @property
    def parts(self) -> int:
        """How many modules the model consists of."""
        return len(self._cores)

    def specs(self) -> list[TensorSpec]:
        """Every stored tensor's name, element type and global shape."""
        self.reshard()
        return [
            TensorSpec(slot.name, safetensors_dtype(slot.name, slot.tensor.dtype), tuple(slot.tensor.shape))
            for slot in self.slots
        ]

    def reshard(self) -> None:
        """Reshard FSDP parameters that a forward pass left gathered."""
        for unit in self.units:
            unit.reshard()

    def locals(self, localize: Localizer, late: Container[int] = frozenset()) -> list[LocalTensor]:
        """This rank's part of every stored tensor, as it is now.

        Args:
            localize: Finds the positions of tensors.
            late: Identities of parameters that only a hooked optimizer changes.
        """
        self.reshard()
        return [
            localize(
                slot.name,
                slot.tensor,
                divisible=slot.is_parameter,  # buffers differ between data-parallel ranks
                late=slot.is_parameter and slot.tensor.requires_grad and id(slot.tensor) in late,
                lasting=True,
            )
            for slot in self.slots
        ]

    def buffers(self) -> dict[str, torch.Tensor]:
        """Persistent buffers by name, live."""
        return {slot.name: slot.tensor for slot in [*self.slots, *self._beside] if not slot.is_parameter}

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

    @torch.no_grad()
    def set_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the buffers of these names."""
        live = self.buffers()
        for name, value in buffers.items():
            if name in live and live[name].shape == value.shape:
                live[name].copy_(_placed_as(live[name], value))

    def extra_state(self, called: str) -> dict[str, Any]:
        """What is stored besides the tensors: the modules' own extra state, and buffers that `keep` has left out.

        Args:
            called: The model's name, for messages.

        Raises:
            CheckpointConfigError: A get_extra_state() raises.
        """
        own = {name: self._extra_state_of(called, name) for name in self.extra_states}
        return {**own, **{slot.name: slot.tensor for slot in self._beside}}

    def _extra_state_of(self, called: str, name: str) -> Any:
        if self._omits(name):
            return None  # the encoder leaves it out
        module = self.extra_states[name]
        try:
            return module.get_extra_state()
        except Exception as error:
            raise CheckpointConfigError(
                f"{called}.{name} ({type(module).__qualname__}): its get_extra_state() raises {type(error).__name__}: "
                f"{error}. Fix it, {leave_out(f'{called}.{name}')}"
            ) from error

    def set_extra_state(self, called: str, states: Mapping[str, Any]) -> None:
        """Load it into the modules that have it.

        Args:
            called: The model's name, for messages.
            states: Extra states and buffers by name.

        Raises:
            CheckpointError: A set_extra_state() raises.
        """
        self.set_buffers({name: value for name, value in states.items() if isinstance(value, torch.Tensor)})
        for name in states.keys() & self.extra_states.keys():
            module = self.extra_states[name]
            try:
                module.set_extra_state(states[name])
            except Exception as error:
                raise CheckpointError(
                    f"{called}.{name} ({type(module).__qualname__}): its set_extra_state() raises "
                    f"{type(error).__name__}: {error}. Build the model as in the run that saved; or, if this state may "
                    f'be lost, save it without: checkpoint.allow_unsaved=["{called}.{name}"]'
                ) from error
