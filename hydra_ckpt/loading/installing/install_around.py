"""The state around models and optimizers: schedulers, extras, the data loader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.loading.installing.decoded import Values
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
    """

    dotted: str
    item: Any
    expected: Callable[..., Any]
    before: Before


@dataclass(frozen=True)
class AroundInstaller:
    """Gives schedulers, extras and the data loader their state.

    Args:
        source: The checkpoint, read.
        plan: What was read.
        values: The saved values.
    """

    source: Source
    plan: LoadPlan
    values: Values
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
            with self._watching_options("dataloader"):
                _load("dataloader", state.dataloader, source.own["dataloader"])
            is_known = isinstance(state.dataloader, ResumableLoader)
            (source.notes.exact if is_known else source.notes.trusted).append("dataloader")

    def _give(self, dotted: str, item: Any, tree: Any) -> None:
        """Let an object load its state."""
        if isinstance(tree, dict) and tree.get("~") == UNSAVED:
            return  # left out entirely: it stays as it was built
        whole, before = self.values.whole(dotted, item, tree), self.values.before(tree)
        with self._watching_options(dotted):
            self._load_shared(dotted, item, whole)
        self._given.append(_Given(dotted, item, whole, before))

    def _load_shared(self, dotted: str, item: Any, whole: Callable[..., Any]) -> None:
        """Let an object load a state whose parts other objects may be given too."""
        shared = set(self.values.given)
        try:
            _load(dotted, item, whole(made=self.values.given))
        except CheckpointError:
            if not shared:
                raise
            _load(dotted, item, whole(made={}))  # another object has taken apart what both were given
            self.source.notes.texts.append(f"{dotted} was given a copy of what it shared with other objects")

    @contextmanager
    def _watching_options(self, dotted: str) -> Iterator[None]:
        """Note the options of optimizers that an object changes while it loads; schedulers do."""
        optimizers = self.source.state.named_optimizers
        options = Options.of(optimizers)
        yield
        for name, changed in options.changed(optimizers).items():
            self.source.notes.changed(name, dotted, changed)

    def compare(self) -> None:
        """Note which objects report the state that they were given, once all of them have loaded theirs."""
        for one in self._given:
            if self.source.other_stages:  # it was given the state of all stages, and keeps its own
                self.source.notes.trusted.append(one.dotted)
                continue
            unlike = list(differing(one.expected(), told_by(one.dotted, one.item), one.dotted))
            if not unlike and list(differing(one.expected(), told_by(one.dotted, one.item), one.dotted)):
                _load(one.dotted, one.item, one.expected(made={}))  # asking has changed it
                unlike = ["its state_dict() changes it"]
            changed = (f"{one.dotted}.{name.rpartition(':')[2]}" for name in one.before.changed())
            self.source.notes.took(one.dotted, [*unlike, *changed])


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
