"""Restored models and optimizers stay as they were saved, whatever code other objects run as they load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hydra_ckpt.errors import counted, some_of
from hydra_ckpt.loading.planning.load_plan import LoadPlan
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.state.capture import called
from hydra_ckpt.state.holders import holders
from hydra_ckpt.state.optimizer_oracle import is_same
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
        """Note the state of all optimizers, which were restored just now."""
        for place, live in self._live_states() if self.is_needed else ():
            self._states[place] = {key: _copied(state) for key, state in live.items()}
            for state in self._states[place].values():
                leaves = state.values() if isinstance(state, dict) else [state]
                tensors = [item for item in leaves if isinstance(item, torch.Tensor)]
                self._held += [(item, item.detach()) for item in tensors]

    def _live_states(self) -> Iterator[tuple[tuple[int, str], dict[Any, Any]]]:
        """The state of each optimizer, and of those inside others, by number and path."""
        known = self.source.extractor.parameter_names(self.source.state)
        for holder in holders(self.source.state.named_optimizers, known):
            if isinstance(holder.state, dict):
                yield (holder.number, holder.path), holder.state

    def end(self) -> None:
        """Put right whatever has changed."""
        for name in self._digests:
            self._put_right(name)
        changed = _put_memory_back(self._held)
        for place, live in self._live_states() if self._states else ():
            changed += _restore(live, self._states.get(place, {}))
        if changed:
            self.source.notes.texts.append(
                f"optimizer: the state of {counted(changed, 'parameter')} was replaced while other objects loaded "
                "theirs; it is as it was saved again"
            )

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
    live.update({key: _copied(kept[key]) for key in changed})
    return len(changed) + len(strange)


@torch.no_grad()
def _put_memory_back(held: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Copy into tensors what they had, if they were given other memory (`tensor.data = ...`); returns for how many."""
    moved = [(item, memory) for item, memory in held if addresses(item) != addresses(memory)]
    for item, memory in moved:
        item.data = memory
    return len(moved)


def _copied(state: Any) -> Any:
    """A parameter's state, which optimizers of their own kind keep as something other than a dict."""
    return dict(state) if isinstance(state, dict) else state


def _has_same(now: Any, before: Any) -> bool:
    """Whether a parameter's state has the same tensors and equal values."""
    if not isinstance(before, dict):
        return now is before or is_same(now, before)
    return (
        isinstance(now, dict)
        and now.keys() == before.keys()
        and all(now[key] is value or is_same(now[key], value) for key, value in before.items())
    )
