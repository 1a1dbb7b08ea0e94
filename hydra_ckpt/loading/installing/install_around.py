"""The state around models and optimizers: schedulers, extras, the data loader."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hydra_ckpt.errors import CheckpointError, some_of
from hydra_ckpt.loading.installing.decoded import Values
from hydra_ckpt.loading.installing.install_links import LinkInstaller
from hydra_ckpt.loading.installing.untouched import Before, Options
from hydra_ckpt.loading.planning.load_plan import LoadPlan
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.state.around import told_by
from hydra_ckpt.state.dataloader import ResumableLoader
from hydra_ckpt.state.optimizer_oracle import differing
from hydra_ckpt.storage.encoding import UNSAVED


@dataclass(frozen=True)
class _Given:
    """An object that has loaded its state.

    Attributes:
        dotted: What reports call it.
        item: The object.
        expected: Makes the state that it was given.
        before: The tensors in it, as they were.
        has_shared: Whether other objects may have been given parts of it too.
        rounds: What each comparison so far has found.
    """

    dotted: str
    item: Any
    expected: Callable[..., Any]
    before: Before
    has_shared: bool = False
    rounds: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class AroundInstaller:
    """Gives schedulers, extras and the data loader their state.

    Args:
        source: The checkpoint, read.
        plan: What was read.
        values: The saved values.
        links: What objects have in common with others.
    """

    source: Source
    plan: LoadPlan
    values: Values
    links: LinkInstaller
    _given: list[_Given] = field(default_factory=list)

    def install(self, available: Collection[str]) -> None:
        """Install schedulers, extras and the data loader, if they are requested and stored."""
        source, state, saved = self.source, self.source.state, self.source.shared
        if "lr_scheduler" in available:
            for name, tree in self.plan.schedulers.items():
                self._give(name, state.named_schedulers[name], tree)
        if "extras" in available:
            for name, extra in state.extras.items():
                if name in saved["extras"]:
                    self._give(f"extras.{name}", extra, saved["extras"][name])
        if "dataloader" in available and source.own is not None:
            position = source.own["dataloader"]
            with self._watching_options("dataloader"):
                _load("dataloader", state.dataloader, copy.deepcopy(position))
            if type(state.dataloader) is ResumableLoader:
                expected = partial(_copy_of, position)
                self._given.append(_Given("dataloader", state.dataloader, expected, Before.of({})))
            else:  # others may lose the order although they report their position
                source.notes.trusted.append("dataloader")

    def _give(self, dotted: str, item: Any, tree: Any) -> None:
        """Let an object load its state."""
        if isinstance(tree, dict) and tree.get("~") == UNSAVED:
            return  # left out entirely: it stays as it was built
        whole, before = self.links.joining(dotted, self.values.whole(dotted, item, tree)), self.values.before(tree)
        with self._watching_options(dotted):
            has_shared = self._load_shared(dotted, item, whole)
        if self.source.other_stages:  # it was given the state of all stages, and keeps its own
            self.source.notes.trusted.append(dotted)
        else:
            self._given.append(_Given(dotted, item, whole, before, has_shared))

    def _load_shared(self, dotted: str, item: Any, whole: Callable[..., Any]) -> bool:
        """Let an object load a state whose parts other objects may be given too; returns whether they may."""
        may_share = bool(self.values.given)
        try:
            _load(dotted, item, whole(made=self.values.given))
        except CheckpointError:
            if not may_share:
                raise
            self._load_copy(dotted, item, whole)  # another object has taken apart what both were given
            return False
        return may_share

    def _load_copy(self, dotted: str, item: Any, whole: Callable[..., Any]) -> None:
        _load(dotted, item, whole(made={}))
        self.source.notes.texts.append(f"{dotted} was given a copy of what it shared with other objects")

    def _unlike(self, one: _Given) -> list[str]:
        expected, told = one.expected(), told_by(one.dotted, one.item)
        if isinstance(one.item, ResumableLoader):  # later versions report more
            told = {key: value for key, value in told.items() if key in expected}
        return list(differing(expected, told, one.dotted))

    @contextmanager
    def _watching_options(self, dotted: str) -> Iterator[None]:
        """Note the options of optimizers that an object changes while it loads; schedulers do."""
        optimizers = self.source.state.named_optimizers
        options = Options.of(optimizers)
        yield
        for changed in options.changed(optimizers).values():
            self.source.notes.texts.append(f"{dotted} changed {some_of(sorted(changed))} while it loaded its state")

    def unlike(self) -> Iterator[tuple[str, list[str]]]:
        """Each object, and where it reports another state than it was given."""
        for one in self._given:
            unlike = self._unlike(one)
            if unlike and one.has_shared and not one.rounds:
                self._load_copy(one.dotted, one.item, one.expected)  # another object may have taken apart what it got
                unlike = self._unlike(one)
            if unlike and one.rounds and not one.rounds[-1]:
                _load(one.dotted, one.item, one.expected(made={}))  # the comparison itself has changed it
            one.rounds.append(unlike)
            changed = (f"{one.dotted}.{name.rpartition(':')[2]}" for name in one.before.changed())
            yield one.dotted, [*unlike, *changed]


def _copy_of(value: Any, made: Any = None) -> Any:  # noqa: ARG001 - other values collect in it what they share
    return copy.deepcopy(value)


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
