"""Installs what was read into the live objects. Tensors of models and optimizers are already read in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from hydra_ckpt.errors import CheckpointError, counted, some_of
from hydra_ckpt.loading.untouched import Before, Options, Restored
from hydra_ckpt.state import rng
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.around import told_by
from hydra_ckpt.state.capture import Extractor, called
from hydra_ckpt.state.dataloader import ResumableLoader
from hydra_ckpt.state.model import ModelMap
from hydra_ckpt.state.optimizer_loading import Fit, give_back, install
from hydra_ckpt.state.optimizer_oracle import PARAMETER, differing
from hydra_ckpt.state.ranks import Topology
from hydra_ckpt.storage.decoding import OMITTED, decode, fill, missing_from, own_names, tensor_names
from hydra_ckpt.storage.encoding import OWN, UNSAVED
from hydra_ckpt.storage.read import Fetch
from hydra_ckpt.store.catalog import Checkpoint

_NO_OTHERS: Mapping[str, Callable[[Any], Any]] = {}


@dataclass
class Notes:
    """What a load report contains besides the step. Names are dotted: `optimizer`, `extras.ema`, `model.head.weight`.

    Attributes:
        texts: Notes in plain words.
        exact: Objects restored and compared.
        trusted: Objects that loaded their state themselves, but report a different one afterwards.
        rederived: The parts that could not be restored exactly.
        missing: What the checkpoint does not have.
        skipped: What was not loaded into anything.
    """

    texts: list[str] = field(default_factory=list)
    exact: list[str] = field(default_factory=list)
    trusted: list[str] = field(default_factory=list)
    rederived: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def derived(self, what: str, why: str) -> None:
        """Note a part that was not restored exactly, and why."""
        self.rederived += [what] if what not in self.rederived else []
        self.texts.append(why)

    def took(self, what: str, unlike: Collection[str]) -> None:
        """Note an object that loaded its state itself.

        Args:
            what: The object.
            unlike: Where its state_dict() afterwards differs from the state it was given.
        """
        if not unlike:
            self.exact.append(what)
            return
        self.trusted.append(what)
        self.texts.append(
            f"{what} loaded its state, but its state_dict() reports different values afterwards: "
            f"{some_of(sorted(unlike))}"
        )

    def changed(self, what: str, by: str, names: Collection[str]) -> None:
        """Note that an object that had been restored was changed by the loading of another one."""
        if what in self.exact:
            self.exact.remove(what)
            self.trusted.append(what)
        self.texts.append(f"{by} changed {some_of(sorted(names))} while it loaded its state")


@dataclass(frozen=True)
class Installer:
    """Gives an AppState's objects their state.

    Args:
        state: The objects.
        extractor: Provides the models' maps.
        shared: The state that is equal on all ranks, encoded.
        own: What this rank, or its counterpart, stored for itself; None if there is nothing.
        tensors: The tensors, already read, that encoded values refer to.
        like: Finds the parameter that a sharded tensor subclass of this name belongs to.
        same_ranks: Whether each rank finds what it saved itself.
        other_stages: Whether it was saved by other pipeline stages.
        schedulers: Dotted name of a live scheduler to its saved state, encoded.
        restored: What was read into tensors that live on in an object, by its dotted name.
        read_again: Reads such tensors once more.
        resized: For each model the buffers, already read, whose saved size differs from the live one.
        notes: Collects what the report will list.
    """

    state: AppState
    extractor: Extractor
    shared: Mapping[str, Any]
    own: Mapping[str, Any] | None
    tensors: Mapping[str, torch.Tensor]
    like: Callable[[str], DTensor]
    same_ranks: bool
    other_stages: bool
    schedulers: Mapping[str, Any]
    restored: Mapping[str, Sequence[Fetch]]
    read_again: Callable[[Sequence[Fetch]], Any]
    resized: Mapping[str, Mapping[str, torch.Tensor]]
    notes: Notes
    _given: dict[str, Any] = field(default_factory=dict)

    def models(self, absent: Collection[str]) -> None:
        """Install what models have besides the tensors that were read into them.

        Args:
            absent: Objects that the checkpoint does not have, by dotted name.
        """
        own_buffers = (self.own or {}).get("buffers", {})
        for name, mapped in self.extractor.maps(self.state).items():
            dotted, unlike = called(name), list[str]()
            if dotted in absent:
                continue
            states = self.shared.get("extra_state", {}).get(name, {})
            entries = self.shared.get("entries", {}).get(name, [])
            metadata = self.shared.get("metadata", {}).get(name)
            before = self._before([states, entries, metadata])
            unlike += self._set_extra_states(name, mapped, states)
            if self.same_ranks:
                mapped.set_buffers(own_buffers.get(name, {}))
            given = [
                {key: value for key, value in self._decoded(part, made=self._given).items() if value is not OMITTED}
                for part in entries
            ]
            decoded = None if metadata is None else self._decoded(metadata)
            unlike += mapped.give_back(dotted, given, decoded, self.resized.get(name, {}), self._left(dotted))
            unlike += self._unlike_extra_states(dotted, mapped, states)
            unlike += [key.rpartition(":")[2] for key in before.changed()]
            self.notes.took(dotted, unlike)
        # Checkpoints of earlier versions store all buffers this way.
        if any(own_buffers.values()) and not self.same_ranks:
            self.notes.derived("buffers", "buffers, which differed between the ranks, are those of rank 0 on all ranks")

    def _left(self, dotted: str) -> set[str]:
        """Names of a model's tensors that were not loaded."""
        missing = (*self.notes.missing, *self.shared.get("unsaved", ()))
        return {name.removeprefix(f"{dotted}.") for name in missing if name.startswith(f"{dotted}.")}

    def _set_extra_states(self, name: str, mapped: ModelMap, states: Mapping[str, Any]) -> list[str]:
        """Give modules their extra state, and their tensors what was saved if that has changed them.

        Returns:
            Names of tensors that were replaced by others that do not fit.
        """
        dotted = called(name)
        given = self._extra_states(dotted, mapped, states, self._given)
        if not given.keys() & mapped.extra_states.keys():
            mapped.set_extra_state(dotted, given)
            return []
        fetches = self.restored.get(dotted, ())
        memory = mapped.memory()
        before = Before.of({str(number): item.into for number, item in enumerate(fetches)})
        mapped.set_extra_state(dotted, given)
        self.read_again([fetches[int(number)] for number in before.changed()])
        return mapped.put_back(memory)

    def _before(self, trees: Any) -> Before:
        """The tensors that encoded data refers to, before an object gets them."""
        shards = {} if self.own is None else self.own.get("shards", {})
        own = {name: shards[name] for name in own_names(trees) if name in shards}
        return Before.of({name: self.tensors[name] for name in tensor_names(trees) if name in self.tensors} | own)

    def _extra_states(
        self, dotted: str, mapped: ModelMap, saved: Mapping[str, Any], made: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A new copy of a model's saved extra states; values left out come from the live ones."""
        found = {name: value for name, value in self._decoded(saved, made=made).items() if value is not OMITTED}
        if missing_from([saved[name] for name in found]):
            fill(found, mapped.extra_state(dotted))
        return found

    def _unlike_extra_states(self, dotted: str, mapped: ModelMap, saved: Mapping[str, Any]) -> list[str]:
        """Extra states that modules report differently from those they were given; notes those on one side only."""
        live = mapped.extra_state(dotted)
        if not self.other_stages:
            for names, found in (
                (saved.keys() - live.keys(), self.notes.skipped),
                (live.keys() - saved.keys(), self.notes.missing),
            ):
                found += [f"{dotted}.{name}" for name in sorted(names)]
        both = {name: tree for name, tree in self._extra_states(dotted, mapped, saved).items() if name in live}
        return [name.removeprefix(".") for name in differing(both, {name: live[name] for name in both})]

    def optimizers(self, found: Fit, empty: Mapping[str, Collection[str]]) -> None:
        """Install the optimizers' state and options, and whatever else they save.

        Args:
            found: The parts of the saved description that fit.
            empty: Parameters whose state was empty, by the path of the optimizer that held it.
        """
        parameters = self.extractor.parameter_names(self.state)
        live = {name: parameter for parameter, name in self._parameters(parameters)}

        def walk(*, is_first: bool = False) -> None:
            made: dict[str, Any] = {}
            states = [self._decoded(state, made=made) for state in found.state]
            options = [[self._decoded(group, made=made) for group in groups] for groups in found.options]
            install(found, states, options, self.state.named_optimizers, parameters, empty, is_first=is_first)

        walk(is_first=True)
        named = list(self.state.named_optimizers.items())
        for number, tree in found.own.items():
            dotted, optimizer = named[number]
            decoded = self._whole(dotted, optimizer, tree, {PARAMETER: live.__getitem__})
            before = self._before(tree)
            with self._guarding(dotted, [name for name in self.restored if name != "optimizer"]):
                unlike = give_back(dotted, optimizer, decoded, found, walk)
            self.notes.took(dotted, [*unlike, *before.changed()])
        left = found.absent | found.refused | found.own.keys()
        for number, (dotted, _) in enumerate(named):
            self.notes.exact += [dotted] if number not in left else []

    def _parameters(self, known: Mapping[int, str]) -> Iterator[tuple[torch.Tensor, str]]:
        """All live parameters with their names."""
        for modules in self.state.models.values():
            for module in modules:
                yield from ((item, known[id(item)]) for item in module.parameters() if id(item) in known)

    def _decoded(
        self,
        tree: Any,
        others: Mapping[str, Callable[[Any], Any]] = _NO_OTHERS,
        made: dict[str, Any] | None = None,
    ) -> Any:
        """Saved data with its tensors filled in; data that belongs to this rank alone comes from its own file."""
        return decode(tree, self.tensors, {OWN: self._shard, **others}, made)

    def _shard(self, name: str) -> torch.Tensor:
        """This rank's shard of a tensor subclass, as the DTensor it belonged to."""
        local, like = (self.own or {})["shards"][name], self.like(name)
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def objects(self, available: Collection[str]) -> None:
        """Install schedulers, extras and the data loader, if they are requested and stored."""
        if "lr_scheduler" in available:
            for name, tree in self.schedulers.items():
                self._give(name, self.state.named_schedulers[name], tree)
        if "extras" in available:
            for name, extra in self.state.extras.items():
                if name in self.shared["extras"]:
                    self._give(f"extras.{name}", extra, self.shared["extras"][name])
        if "dataloader" in available and self.own is not None:
            _load("dataloader", self.state.dataloader, self.own["dataloader"])
            claims = self.notes.exact if isinstance(self.state.dataloader, ResumableLoader) else self.notes.trusted
            claims.append("dataloader")

    @contextmanager
    def _guarding(self, dotted: str, others: Collection[str]) -> Iterator[None]:
        """Let an object load its state; give other objects again what it overwrites in their tensors.

        Args:
            dotted: The object.
            others: Dotted names of those that are restored already.
        """
        maps = {called(name): mapped for name, mapped in self.extractor.maps(self.state).items()} if others else {}
        memory = {name: mapped.memory() for name, mapped in maps.items() if name in others}
        restored = Restored.of({name: self.restored[name] for name in others if name in self.restored})
        yield
        for name, fetches in restored.overwritten().items():
            self.read_again(fetches)
            self.notes.texts.append(
                f"{dotted} wrote to {some_of([item.stored.spec.name for item in fetches])} ({name}) while it loaded "
                "its state; they were read from the checkpoint again"
            )
        for name, tensors in memory.items():
            if unlike := maps[name].put_back(tensors):
                self.notes.changed(name, dotted, unlike)

    def _whole(
        self, dotted: str, item: Any, tree: Any, others: Mapping[str, Callable[[Any], Any]] = _NO_OTHERS
    ) -> Callable[..., Any]:
        """A function that builds a new copy of an object's saved state; values left out come from the live object.

        Its argument `made`, a dict or None, collects what other objects have too, for the copies they are given.
        """
        live = told_by(dotted, item) if missing_from(tree) else None
        if live is None:
            return partial(self._decoded, tree, others)

        def whole(made: dict[str, Any] | None = None) -> Any:
            return fill(self._decoded(tree, others, made), live)

        return whole

    def _give(self, dotted: str, item: Any, tree: Any) -> None:
        """Let an object load its state, and check whether it reports the same state afterwards."""
        if isinstance(tree, dict) and tree.get("~") == UNSAVED:
            return  # left out entirely: it stays as it was built
        whole, before = self._whole(dotted, item, tree), self._before(tree)
        optimizers = self.state.named_optimizers
        options = Options.of(optimizers)
        with self._guarding(dotted, () if _is_of_torch(item) else self.restored):
            _load(dotted, item, whole(made=self._given))
        for name, changed in options.changed(optimizers).items():
            self.notes.changed(name, dotted, changed)
        if self.other_stages:  # it was given the state of all stages, and keeps its own
            self.notes.trusted.append(dotted)
            return
        unlike = list(differing(whole(), told_by(dotted, item), dotted))
        self.notes.took(dotted, [*unlike, *(f"{dotted}.{name.rpartition(':')[2]}" for name in before.changed())])

    def rng(self, checkpoint: Checkpoint, topology: Topology, world_size: int) -> None:
        """Restore the random generators, or derive them if the ranks differ."""
        if self.own is not None and self.same_ranks:
            rng.restore(self.own["rng"])
            self.notes.exact.append("rng")
            return
        # Not from the tensor-parallel rank: peers work on the same activations and must drop the same ones.
        rng.derive(checkpoint.step, topology.place.dp, topology.place.pp)
        self.notes.derived(
            "rng",
            "random numbers are derived from step, data-parallel rank and stage: the checkpoint was written by "
            f"{counted(checkpoint.manifest.world_size, 'rank')}, this run has {world_size}, or its ranks are arranged "
            "differently",
        )

    def note_new(
        self, wanted: Collection[str], available: Collection[str], absent: Collection[str], left: Collection[str]
    ) -> None:
        """Report the objects that have no state in the checkpoint and so stay as they were built.

        Args:
            wanted: The parts to load.
            available: Those that the checkpoint has.
            absent: Single objects of available parts that the checkpoint lacks, by dotted name.
            left: Objects that it has and that do not fit; they are reported already.
        """
        state, notes = self.state, self.notes
        here = {
            "optimizer": list(state.named_optimizers),
            "lr_scheduler": list(state.named_schedulers),
            "dataloader": ["dataloader"] if hasattr(state.dataloader, "load_state_dict") else [],
            "extras": [f"extras.{name}" for name in state.extras],
            "model": [called(name) for name in self.extractor.maps(state)],
        }
        saved = {"extras": [f"extras.{name}" for name in self.shared.get("extras", {})]}
        if "extras" in available:
            left = [name for name in saved["extras"] if name not in here["extras"]]
            notes.skipped += left
            notes.texts += [f"in the checkpoint, but not used here: {', '.join(left)}"] if left else []
        for part, dotted in here.items():
            known = saved.get(part, dotted if part in available else [])
            new = [name for name in dotted if (name not in known or name in absent) and name not in left]
            if part not in wanted or not new or part in notes.rederived:
                continue
            notes.missing += new
            notes.texts.append(f"not in the checkpoint, so left as it was built: {', '.join(new)}")
            if part == "dataloader":  # it starts from the beginning
                notes.rederived.append(part)
        notes.missing += [
            name for name in self.shared.get("unsaved", []) if name.split(".")[0] in {*available, "model"}
        ]


def _is_of_torch(item: Any) -> bool:
    """Whether an object is one of PyTorch's own schedulers, which write to options alone."""
    return type(item).__module__ == LRScheduler.__module__


def _load(dotted: str, item: Any, state: Any) -> None:
    """Let an object load its state.

    Raises:
        CheckpointError: It raises.
    """
    try:
        item.load_state_dict(state)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{dotted} ({type(item).__qualname__}): its load_state_dict() raises {type(error).__name__}: {error}. "
            "Build it as in the run that saved, or leave it out: give AppState no such object, or load only other "
            "parts (restore_parts)"
        ) from error
