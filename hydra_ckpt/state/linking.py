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
from hydra_ckpt.storage.sharing import Apart


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
    """Finds links at each save; optimizers whose tensors are where they were are not looked at again."""

    _before: dict[str, tuple[Any, list[int], list[Link]]] = field(default_factory=dict)

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
        addresses = _addresses([slot.tensor for slots in linking.targets.places.values() for slot in slots])
        for dotted, known in zip(optimizers, apart, strict=False):
            found[dotted] = [*self._of_state(linking, dotted, known.seen, addresses), *linking.of_options(dotted)]
        for dotted, state in told:
            found.setdefault(dotted, []).extend(linking.of_other(dotted, state))
        return {dotted: [link.data() for link in links] for dotted, links in found.items() if links}

    def _of_state(self, linking: Linking, dotted: str, seen: Any, addresses: list[int] | None) -> list[Link]:
        before = self._before.get(dotted)
        if before is not None and seen is not None and before[0] is seen and before[1] == addresses:
            return before[2]
        found = linking.of_state(dotted)
        self._before.pop(dotted, None)
        if seen is not None and addresses is not None:
            self._before[dotted] = (seen, addresses, found)
        return found


def _addresses(tensors: Sequence[torch.Tensor]) -> list[int] | None:
    """Where the memory of tensors is; None if one has none."""
    try:
        return [(item._local_tensor if type(item) is DTensor else item).data_ptr() for item in tensors]  # noqa: SLF001
    except RuntimeError:  # a tensor subclass or a sparse tensor
        return None
