"""Models: their extra state, and whatever else their modules save. Their tensors were read in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hydra_ckpt.loading.installing.decoded import Values
from hydra_ckpt.loading.installing.guard import Guard
from hydra_ckpt.loading.installing.install_links import LinkInstaller
from hydra_ckpt.loading.installing.untouched import Before
from hydra_ckpt.loading.planning.load_plan import LoadPlan
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.state.capture import called
from hydra_ckpt.state.model_map import ModelMap
from hydra_ckpt.state.optimizer_oracle import differing
from hydra_ckpt.storage.decoding import fill, missing_from


@dataclass(frozen=True)
class ModelInstaller:
    """Gives models what they have besides the tensors that were read into them.

    Args:
        source: The checkpoint, read.
        plan: What was read.
        values: The saved values.
        guard: Watches what objects do while they load.
        links: What objects have in common with others.
    """

    source: Source
    plan: LoadPlan
    values: Values
    guard: Guard
    links: LinkInstaller
    _unlike: dict[str, list[str]] = field(default_factory=dict)
    _entries: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)

    def install(self, absent: Collection[str]) -> None:
        """Install what models have besides the tensors that were read into them.

        Args:
            absent: Objects that the checkpoint does not have, by dotted name.
        """
        for name, mapped in self.source.extractor.maps(self.source.state).items():
            if called(name) in absent:
                continue
            with self.guard.turn_of(called(name)):
                self._unlike[name] = self._install(name, mapped)
        if any(self._own_buffers.values()) and not self.source.same_ranks:
            self.source.notes.derived(
                "buffers", "buffers, which differed between the ranks, are those of rank 0 on all ranks"
            )

    @property
    def _own_buffers(self) -> Mapping[str, Any]:
        """This rank's buffers by model: checkpoints of earlier versions store all buffers this way."""
        found: Mapping[str, Any] = (self.source.own or {}).get("buffers", {})
        return found

    def _install(self, name: str, mapped: ModelMap) -> list[str]:
        """Install one model; returns what it reports differently afterwards."""
        dotted, saved, values = called(name), self.source.shared, self.values
        states = saved.get("extra_state", {}).get(name, {})
        entries = saved.get("entries", {}).get(name, [])
        metadata = saved.get("metadata", {}).get(name)
        before = values.before([states, entries, metadata])
        unlike = self._set_extra_states(name, mapped, states)
        if self.source.same_ranks:
            mapped.set_buffers(self._own_buffers.get(name, {}))
        self._entries[name] = entries
        if not self.source.other_stages:
            live = mapped.extra_state(dotted).keys()
            self.source.notes.skipped += [f"{dotted}.{key}" for key in sorted(states.keys() - live)]
            self.source.notes.missing += [f"{dotted}.{key}" for key in sorted(live - states.keys())]
        given = [values.present(part, values.given) for part in entries]
        decoded = None if metadata is None else values.decoded(metadata)
        resized, made = self.plan.resized.get(name, {}), self.plan.made.get(name, ())
        unlike += mapped.beyond.give_back(dotted, given, decoded, resized, self._left(dotted), made)
        return unlike + [key.rpartition(":")[2] for key in before.changed()]

    def unlike(self) -> Iterator[tuple[str, list[str]]]:
        """Each model, and where it reports another state than it was given."""
        for name, mapped in self.source.extractor.maps(self.source.state).items():
            if name in self._unlike:
                states = self.source.shared.get("extra_state", {}).get(name, {})
                found = self._unlike_extra_states(called(name), mapped, states)
                self._miss_entries(name, mapped)
                yield called(name), [*self._unlike[name], *found, *self._unlike_entries(name, mapped)]

    def _unlike_entries(self, name: str, mapped: ModelMap) -> list[str]:
        """The modules' own entries that are no longer those that were given to them."""
        saved = [self.values.present(part) for part in self._entries[name]]
        if self._unlike[name] or not any(saved):
            return []
        live = mapped.beyond.told(called(name)).entries
        return [
            key
            for given, told in zip(saved, live, strict=False)
            for key in given
            if key in told and list(differing(given[key], told[key]))
        ]

    def _miss_entries(self, name: str, mapped: ModelMap) -> None:
        """Note the entries that a model reports and the checkpoint lacks."""
        entries = self.source.shared.get("entries", {}).get(name, [])
        lacking = () if self.source.other_stages else mapped.beyond.lacking(called(name), entries)
        missing = self.source.notes.missing
        missing += [dotted for entry in sorted(lacking) if (dotted := f"{called(name)}.{entry}") not in missing]

    def _left(self, dotted: str) -> set[str]:
        """Names of a model's tensors that were not loaded."""
        missing = (*self.source.notes.missing, *self.source.shared.get("unsaved", ()))
        return {name.removeprefix(f"{dotted}.") for name in missing if name.startswith(f"{dotted}.")}

    def _set_extra_states(self, name: str, mapped: ModelMap, states: Mapping[str, Any]) -> list[str]:
        """Give modules their extra state, and their tensors what was saved if that has changed them.

        Returns:
            Names of tensors that were replaced by others that do not fit.
        """
        dotted = called(name)
        given = self._extra_states(dotted, mapped, states, self.values.given)
        if not given.keys() & mapped.beyond.extra_states.keys():
            mapped.set_extra_state(dotted, given)
            return []
        fetches = self.plan.restored.get(dotted, ())
        memory = mapped.memory()
        before = Before.of({str(number): item.into for number, item in enumerate(fetches)})
        mapped.set_extra_state(dotted, given)
        self.guard.read_again([fetches[int(number)] for number in before.changed()])
        return mapped.put_back(memory)

    def _extra_states(
        self, dotted: str, mapped: ModelMap, saved: Mapping[str, Any], made: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A new copy of a model's saved extra states; values left out come from the live ones."""
        found: dict[str, Any] = self.links.joining(dotted, partial(self.values.present, saved))(made=made)
        if missing_from([saved[name] for name in found]):
            fill(found, mapped.extra_state(dotted))
        return found

    def _unlike_extra_states(self, dotted: str, mapped: ModelMap, saved: Mapping[str, Any]) -> list[str]:
        """Extra states that modules report differently from those they were given."""
        live = mapped.extra_state(dotted)
        both = {name: tree for name, tree in self._extra_states(dotted, mapped, saved).items() if name in live}
        return [name.removeprefix(".") for name in differing(both, {name: live[name] for name in both})]
