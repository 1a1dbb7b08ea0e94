"""Asks the objects of an AppState what they have in common with its models and with its optimizers' groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.holders import Holder, holders
from hydra_ckpt.state.links import Link, Targets, options_of, states_of
from hydra_ckpt.state.model_map import ModelMap
from hydra_ckpt.storage.sharing import Apart, objects_in

_Memory = tuple[list[int], list[torch.Size], list[tuple[int, ...]]]


@dataclass(frozen=True)
class Linking:
    """The live objects of one AppState at one moment.

    Attributes:
        targets: What the state of objects may be linked to.
        names: Identity of a parameter to its name.
        inside: What each optimizer is called, to it and those that it wraps.
    """

    targets: Targets
    names: Mapping[int, str]
    inside: Mapping[str, Sequence[Holder]]

    @classmethod
    def of(cls, state: AppState, maps: Mapping[str, ModelMap], names: Mapping[int, str]) -> Linking:
        """Look at all models and optimizers.

        Args:
            state: The objects.
            maps: What messages call a model, to where its tensors live.
            names: Identity of a parameter to its name.
        """
        everyone = holders(state.named_optimizers, names)
        places = {dotted: [*mapped.walk.slots, *mapped.walk.unsaved] for dotted, mapped in maps.items()}
        inside = {called: [one for one in everyone if one.called == called] for called in state.named_optimizers}
        return cls(Targets.of(places, everyone), names, inside)

    def of_optimizer(self, dotted: str) -> list[Link]:
        """The links of an optimizer's state and options."""
        return [*self.of_state(dotted), *self.of_options(dotted)]

    def of_state(self, dotted: str) -> list[Link]:
        """The links of the state that an optimizer holds for parameters."""
        return self.targets.links(dotted, {"state": states_of(self.inside[dotted], self.names)})

    def of_options(self, dotted: str) -> list[Link]:
        """The links of the options of an optimizer's groups."""
        return self.targets.links(dotted, {"options": options_of(self.inside[dotted])})

    def of_other(self, dotted: str, told: Any) -> list[Link]:
        """The links of what another object returns as its state."""
        found = self.targets.links(dotted, told)
        # Buffers that are stored as extra state are the model's own.
        return [link for link in found if link.target != ".".join([dotted, *map(str, link.path)])]


@dataclass
class Links:
    """Finds links at each save; tensors that are where they were at the last one are not looked at again."""

    _before: dict[str, tuple[Any, _Memory, list[Link]]] = field(default_factory=dict)
    _apart: dict[str, tuple[_Memory, _Memory]] = field(default_factory=dict)  # what was linked to nothing

    def of(
        self, linking: Linking, optimizers: Sequence[str], apart: Sequence[Apart], told: Sequence[tuple[str, Any]]
    ) -> dict[str, list[Any]]:
        """The links of all objects as JSON data, by dotted name.

        Args:
            linking: The live objects.
            optimizers: What the optimizers are called.
            apart: For each optimizer what is known of its tensors.
            told: Dotted name of each other object, and its state.
        """
        found: dict[str, list[Link]] = {}
        places, options = linking.targets.places.values(), linking.targets.options.values()
        held = [slot.tensor for slots in places for slot in slots]
        memory = _memory_of([*held, *(item for item in options if isinstance(item, torch.Tensor))])
        for dotted, known in zip(optimizers, apart, strict=False):
            found[dotted] = [*self._of_state(linking, dotted, known.seen, memory), *linking.of_options(dotted)]
        for dotted, state in told:
            found.setdefault(dotted, []).extend(self._of_other(linking, dotted, state, memory))
        return {dotted: [link.data() for link in links] for dotted, links in found.items() if links}

    def _of_other(self, linking: Linking, dotted: str, told: Any, memory: _Memory | None) -> list[Link]:
        objects = objects_in(told)
        mine = _memory_of([item for item in objects.values() if isinstance(item, torch.Tensor)])
        before = self._apart.pop(dotted, None)
        is_apart = mine is not None and memory is not None and before == (mine, memory)
        found = [] if is_apart and not linking.targets.hold_any(objects) else linking.of_other(dotted, told)
        if mine is not None and memory is not None and not found:
            self._apart[dotted] = (mine, memory)
        return found

    def _of_state(self, linking: Linking, dotted: str, seen: Any, memory: _Memory | None) -> list[Link]:
        before = self._before.get(dotted)
        if before is not None and seen is not None and before[0] is seen and before[1] == memory:
            return before[2]
        found = linking.of_state(dotted)
        self._before.pop(dotted, None)
        if seen is not None and memory is not None:
            self._before[dotted] = (seen, memory, found)
        return found


def _memory_of(tensors: Sequence[torch.Tensor]) -> _Memory | None:
    """Where the memory of tensors is, and how much they have of it; None if one has none."""
    parts = [item._local_tensor if type(item) is DTensor else item for item in tensors]  # noqa: SLF001
    try:
        return [part.data_ptr() for part in parts], [part.shape for part in parts], [part.stride() for part in parts]
    except RuntimeError:  # a tensor subclass or a sparse tensor
        return None
