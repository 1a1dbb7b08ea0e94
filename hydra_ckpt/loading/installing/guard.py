"""Restored models and optimizers stay as they were saved, whatever code other objects run as they load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hydra_ckpt.errors import counted, some_of
from hydra_ckpt.loading.installing.untouched import snapshot, tensors_in
from hydra_ckpt.loading.planning.load_plan import LoadPlan
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.state.capture import called
from hydra_ckpt.state.holders import Holder, holders
from hydra_ckpt.state.optimizer_oracle import differing, is_same
from hydra_ckpt.storage.folding import digest_each
from hydra_ckpt.storage.read import Fetch
from hydra_ckpt.storage.subclasses import addresses


@dataclass
class Guard:
    """Knows what was restored, and puts right what has changed since.

    A value that others may write to is compared at the end, when no more code of objects runs: their load_state_dict()
    and hooks, and state_dict() for the comparison.

    Args:
        source: The checkpoint, read.
        plan: What was read.
        read_again: Reads tensors once more.
        is_needed: Whether any object runs code of its own as it loads; if not, nothing is looked at.
    """

    source: Source
    plan: LoadPlan
    read_again: Callable[[Sequence[Fetch]], Any]
    is_needed: bool
    _digests: dict[str, list[int]] = field(default_factory=dict)
    _memory: dict[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    _held: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _states: dict[tuple[int, str], dict[Any, Any]] = field(default_factory=dict)
    _options: dict[tuple[int, str], list[dict[str, Any]]] = field(default_factory=dict)

    def begin(self) -> None:
        """Look at all tensors that were read, before any code of an object runs."""
        for name in self.plan.restored if self.is_needed else ():
            self._look(name)

    @torch.no_grad()
    def _look(self, name: str) -> None:
        self._digests[name] = digest_each([item.into for item in self.plan.restored[name]])
        for model, mapped in self.source.extractor.maps(self.source.state).items():
            if called(model) == name:
                self._memory[name] = mapped.memory()

    @contextmanager
    def turn_of(self, name: str) -> Iterator[None]:
        """A model loads its own state, and may convert its own tensors as it does."""
        if not self.is_needed or name not in self._digests:
            yield
            return
        self._put_right(name)
        yield
        self._look(name)

    def keep_states(self) -> None:
        """Note the state and the options of all optimizers that were restored just now."""
        for place, holder in self._restored_holders() if self.is_needed else ():
            self._options[place] = [_options(group) for group in holder.groups]
            if isinstance(holder.state, dict):
                self._states[place] = {key: snapshot(state) for key, state in holder.state.items()}
                tensors = tensors_in(list(self._states[place].values()))
                self._held += [(item, item.detach()) for item in tensors]

    def _restored_holders(self) -> Iterator[tuple[tuple[int, str], Holder]]:
        """The optimizers, and those inside others, by number and path."""
        known, fit = self.source.extractor.parameter_names(self.source.state), self.plan.fit
        left = set() if fit is None else fit.absent | fit.refused
        for holder in holders(self.source.state.named_optimizers, known):
            if holder.number not in left:
                yield (holder.number, holder.path), holder

    def end(self) -> None:
        """Put right whatever has changed."""
        for name in self._digests:
            self._put_right(name)
        changed, groups = _put_memory_back(self._held), 0
        for place, holder in self._restored_holders() if self._options else ():
            if place in self._states and isinstance(holder.state, dict):
                changed += _restore(holder.state, self._states[place])
            groups += _restore_options(holder.groups, self._options.get(place, []))
        found = {"state": (changed, "parameter"), "options": (groups, "group")}
        self.source.notes.texts += [
            f"optimizer: other objects changed the {what} of {counted(*count)} while they loaded theirs; it is as it "
            "was saved again"
            for what, count in found.items()
            if count[0]
        ]

    @torch.no_grad()
    def _put_right(self, name: str) -> None:
        fetches = self.plan.restored[name]
        now = digest_each([item.into for item in fetches])
        changed = [item for item, one, other in zip(fetches, self._digests[name], now, strict=True) if one != other]
        if changed:
            self.read_again(changed)
            self.source.notes.texts.append(
                f"{name}: {some_of([item.stored.spec.name for item in changed])} was written to while other objects "
                "loaded their state; it was read from the checkpoint again"
            )
        for model, mapped in self.source.extractor.maps(self.source.state).items():
            if called(model) == name and (unlike := mapped.put_back(self._memory[name])):
                self.source.notes.changed(name, "another object", unlike)


def _restore(live: dict[Any, Any], kept: Mapping[Any, Any]) -> int:
    """Put an optimizer's state back; returns for how many parameters."""
    changed = [key for key in kept if not _has_same(live.get(key), kept[key])]
    strange = [key for key in live if key not in kept and isinstance(key, torch.Tensor)]
    for key in strange:
        del live[key]
    live.update({key: snapshot(kept[key]) for key in changed})
    return len(changed) + len(strange)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: snapshot(value, clone=True) for key, value in group.items() if key != "params"}


@torch.no_grad()
def _restore_options(live: Sequence[dict[str, Any]], kept: Sequence[Mapping[str, Any]]) -> int:
    """Put the options of groups back; returns of how many groups."""
    changed = [
        (group, options)
        for group, options in zip(live, kept, strict=False)
        if list(differing(options, {key: value for key, value in group.items() if key != "params"}))
    ]
    for group, options in changed:
        for key in group.keys() - options.keys() - {"params"}:
            del group[key]
        for key, value in options.items():
            here = group.get(key)
            if isinstance(value, torch.Tensor) and isinstance(here, torch.Tensor) and here.shape == value.shape:
                here.copy_(value)  # others may hold it
            elif list(differing(value, here)):
                group[key] = snapshot(value, clone=True)
    return len(changed)


@torch.no_grad()
def _put_memory_back(held: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Copy into tensors what they had, if they were given other memory (`tensor.data = ...`); returns for how many."""
    moved = [(item, memory) for item, memory in held if addresses(item) != addresses(memory)]
    for item, memory in moved:
        item.data = memory
    return len(moved)


def _has_same(now: Any, before: Any) -> bool:
    """Whether a parameter's state has the same tensors and equal values; some optimizers keep it as another object."""
    if not isinstance(before, dict):
        return now is before or is_same(now, before)
    return (
        isinstance(now, dict)
        and now.keys() == before.keys()
        and all(now[key] is value or is_same(now[key], value) for key, value in before.items())
    )
