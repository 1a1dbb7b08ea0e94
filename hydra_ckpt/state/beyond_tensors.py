"""What a model's modules save and load beyond the tensors of the walk: entries of their own, and extra state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, leave_out, some_of
from hydra_ckpt.state.growing import accepted, outlasting, renamed
from hydra_ckpt.state.module_oracle import (
    OwnEntries,
    customizes,
    customizes_loading,
    give_back,
    own_entries,
    repeated,
    told_by,
)
from hydra_ckpt.state.walk import Walk
from hydra_ckpt.state.wrappers import adds_entries, canonical, unwrap

__all__ = ["BeyondTensors"]


@dataclass(frozen=True)
class BeyondTensors:
    """The modules' own word about a model.

    Attributes:
        walk: What the walk has found.
        extra_states: Modules with state beyond tensors (`get_extra_state`), by canonical name.
        omits: Whether what has this name is left out, as `checkpoint.allow_unsaved` asks.
        ours: The modules whose entries are stored, by name; None for all. With an adapter, other state of the base
            model's modules is not.
    """

    walk: Walk
    extra_states: Mapping[str, nn.Module]
    omits: Callable[[str], bool]
    ours: tuple[str, ...] | None = None

    @torch.no_grad()  # in a load as in a save: what a hook computes from a DTensor would differ otherwise
    def told(self, called: str) -> OwnEntries:
        """What the model's own state_dict returns beyond what was walked; nothing for most.

        Args:
            called: The model's name, for messages.

        Raises:
            CheckpointConfigError: A state_dict() raises.
        """
        inner = self.walk.inner_modules
        metadata: dict[str, Any] = {
            name.removesuffix("."): {"version": module._version}
            for name, module in inner.items()
            if module._version != 1
        }
        if not self.customizes_saving:
            return OwnEntries([], metadata)
        entries = []
        for core in self.walk.cores:
            told = told_by(core, called)
            found = own_entries(told, self.walk.tensors, list(self.extra_states))
            again = repeated(told, self.walk.tensors)
            loading = self._loading() if found or again else ()
            self._refuse_unloadable(called, core, found, loading)
            found.update({name: value for name, value in again.items() if name.startswith(loading)})
            entries.append({name: value for name, value in found.items() if self._is_ours(name)})
            for name, local in getattr(told, "_metadata", {}).items():
                if local != {"version": 1}:
                    metadata[canonical(f"{name}.").removesuffix(".")] = local
        return OwnEntries(entries, metadata)

    def _refuse_unloadable(
        self, called: str, core: nn.Module, entries: Iterable[str], loading: tuple[str, ...]
    ) -> None:
        """Raise if entries of a state_dict() have no module that could load them: PyTorch would not expect them."""
        walked_tensors = self.walk.tensors
        lost = [
            name
            for name in entries
            # An entry with the name of a tensor is a copy of it, in another type.
            if canonical(name) not in walked_tensors and not self.omits(name) and not name.startswith(loading)
        ]
        if lost:
            raise CheckpointConfigError(
                f"{called} ({type(core).__qualname__}): its state_dict() adds {some_of(sorted(lost))}, which no "
                "load_state_dict() of its modules accepts. Add a hook that loads them "
                f"(register_load_state_dict_pre_hook), {leave_out(f'{called}.{min(lost)}')}"
            )

    def _loading(self) -> tuple[str, ...]:
        """What the names begin with of everything in modules with a loading of their own: hooks come and go."""
        return tuple(walked.name for walked in self.walk.modules if customizes_loading(walked.module))

    def lacking(self, called: str, saved: Sequence[Collection[str]]) -> list[str]:
        """Entries that the modules report and a checkpoint lacks.

        Args:
            called: The model's name, for messages.
            saved: For each part the names of its saved entries; or nothing.
        """
        if not (self.customizes_saving and self.customizes_loading):
            return []  # what no module loads is none of its state
        walked, apart = self.walk.tensors, list(self.extra_states)
        pairs = zip(self.walk.cores, saved or [()] * len(self.walk.cores), strict=False)
        return [
            name
            for core, known in pairs
            for name in own_entries(told_by(core, called), walked, apart)
            if name not in known and canonical(name) not in walked and self._is_ours(name)
        ]

    def outlasting(self, entries: Collection[str]) -> set[str]:
        """Entries that modules report still when they have loaded a state without them; see `growing.outlasting`."""
        return outlasting(self.walk.inner_modules, entries)

    def accepted(self, odd: Mapping[str, torch.Tensor]) -> set[str]:
        """Which tensors that the model lacks, or has in another size, its modules take; see `growing.accepted`."""
        if self.ours is not None or len(self.walk.cores) > 1 or set(odd) & set(self.walk.aliases.values()):
            return set()
        return accepted(self.walk.inner_modules, odd)

    def renamed(self, odd: Mapping[str, torch.Tensor], missing: Collection[str]) -> tuple[set[str], set[str]]:
        """Which tensors of other names the hooks take, and which missing ones they make; see `growing.renamed`."""
        tied = {*self.walk.aliases, *self.walk.aliases.values()}
        if self.ours is not None or len(self.walk.cores) > 1 or not tied.isdisjoint({*odd, *missing}):
            return set(), set()
        return renamed(self.walk.inner_modules, odd, missing)

    def give_back(
        self,
        called: str,
        saved: Sequence[Mapping[str, Any]],
        metadata: Mapping[str, Any] | None,
        resized: Mapping[str, torch.Tensor],
        left: Collection[str] = (),
        made: Collection[str] = (),
    ) -> list[str]:
        """Give each part its entries, or let it do what else it does when it loads; see `module_oracle.give_back`.

        Args:
            called: The model's name, for messages.
            saved: For each part its entries; or nothing.
            metadata: Metadata of the modules' state, including versions other than 1; None if unknown.
            resized: Buffers of another size than the live ones, and tensors of other names.
            left: Names of tensors that were not loaded.
            made: Names of tensors that hooks make from `resized`.

        Returns:
            Names of those that the module reports differently afterwards.
        """
        known = {} if metadata is None or self.ours is not None else metadata
        older = set() if metadata is None or self.ours is not None else self._of_other_versions(known)
        if not (any(saved) or self.customizes_loading or older or resized):
            return []
        cores, walked = self.walk.cores, (self.walk.tensors, list(self.extra_states))
        return [
            name
            for core, entries in zip(cores, saved or [{} for _ in cores], strict=True)
            for name in give_back(
                core, called, OwnEntries([dict(entries)], known, resized), *walked, self._is_ours, older, left, made
            )
        ]

    def _of_other_versions(self, metadata: Mapping[str, Any]) -> set[str]:
        """The modules whose state was saved by another version of them."""
        versions = {name.removesuffix("."): module._version for name, module in self.walk.inner_modules.items()}
        return {name for name, version in versions.items() if metadata.get(name, {}).get("version", 1) != version}

    @property
    def customizes_saving(self) -> bool:
        """Whether any module changes what state_dict() returns; only then is it called."""
        return self._adds or any(map(customizes, self.walk.inner_modules.values()))

    @property
    def _adds(self) -> bool:
        """Whether a wrapper adds entries to what it passes on."""
        return any(walked.is_wrapper and adds_entries(walked.module) for walked in self.walk.modules)

    @property
    def customizes_loading(self) -> bool:
        """Whether any module does more in loading than copying tensors."""
        # PyTorch calls load_state_dict() of the outermost module only.
        return self.ours is None and (
            self._adds
            or any(map(customizes_loading, self.walk.inner_modules.values()))
            or any(type(unwrap(core)).load_state_dict is not nn.Module.load_state_dict for core in self.walk.cores)
        )

    def _is_ours(self, name: str) -> bool:
        """Whether an entry belongs to what is stored of the model."""
        owner = f"{name.rpartition('.')[0]}."
        return self.ours is None or any(owner.startswith(f"{place}.") for place in self.ours)

    def extra_state(self, called: str) -> dict[str, Any]:
        """The modules' extra state by canonical name.

        Args:
            called: The model's name, for messages.

        Raises:
            CheckpointConfigError: A get_extra_state() raises.
        """
        return {name: self._extra_state_of(called, name) for name in self.extra_states}

    def _extra_state_of(self, called: str, name: str) -> Any:
        if self.omits(name):
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
        """Load extra state into the modules that have it.

        Args:
            called: The model's name, for messages.
            states: Extra states by name; other names are ignored.

        Raises:
            CheckpointError: A set_extra_state() raises.
        """
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
