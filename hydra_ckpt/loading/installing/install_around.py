"""The state around models and optimizers: schedulers, extras, the data loader."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.loading.installing.decoded import Values
from hydra_ckpt.loading.installing.guard import Guard
from hydra_ckpt.loading.installing.untouched import Options
from hydra_ckpt.loading.planning.load_plan import LoadPlan
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.state.around import told_by
from hydra_ckpt.state.dataloader import ResumableLoader
from hydra_ckpt.state.optimizer_oracle import differing
from hydra_ckpt.storage.encoding import UNSAVED


@dataclass(frozen=True)
class AroundInstaller:
    """Gives schedulers, extras and the data loader their state.

    Args:
        source: The checkpoint, read.
        plan: What was read.
        values: The saved values.
        guard: Watches what objects do while they load.
    """

    source: Source
    plan: LoadPlan
    values: Values
    guard: Guard

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
            _load("dataloader", state.dataloader, source.own["dataloader"])
            is_known = isinstance(state.dataloader, ResumableLoader)
            (source.notes.exact if is_known else source.notes.trusted).append("dataloader")

    def _give(self, dotted: str, item: Any, tree: Any) -> None:
        """Let an object load its state, and check whether it reports the same state afterwards."""
        if isinstance(tree, dict) and tree.get("~") == UNSAVED:
            return  # left out entirely: it stays as it was built
        whole, before = self.values.whole(dotted, item, tree), self.values.before(tree)
        optimizers = self.source.state.named_optimizers
        options = Options.of(optimizers)
        with self.guard.watch(dotted, () if _is_of_torch(item) else self.plan.restored):
            _load(dotted, item, whole(made=self.values.given))
        for name, changed in options.changed(optimizers).items():
            self.source.notes.changed(name, dotted, changed)
        if self.source.other_stages:  # it was given the state of all stages, and keeps its own
            self.source.notes.trusted.append(dotted)
            return
        unlike = list(differing(whole(), told_by(dotted, item), dotted))
        self.source.notes.took(dotted, [*unlike, *(f"{dotted}.{name.rpartition(':')[2]}" for name in before.changed())])


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
