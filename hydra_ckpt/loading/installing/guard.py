"""Objects load their own state; what they overwrite in others meanwhile is put right."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra_ckpt.errors import some_of
from hydra_ckpt.loading.installing.untouched import Restored
from hydra_ckpt.loading.planning.load_plan import LoadPlan
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.state.capture import called
from hydra_ckpt.storage.read import Fetch


@dataclass(frozen=True)
class Guard:
    """Watches the tensors of models and optimizers while other objects load.

    Args:
        source: The checkpoint, read.
        plan: What was read.
        read_again: Reads tensors once more.
    """

    source: Source
    plan: LoadPlan
    read_again: Callable[[Sequence[Fetch]], Any]

    @contextmanager
    def watch(self, dotted: str, others: Collection[str]) -> Iterator[None]:
        """Let an object load its state; give other objects again what it overwrites in their tensors.

        Args:
            dotted: The object.
            others: Dotted names of those that are restored already.
        """
        every = self.source.extractor.maps(self.source.state) if others else {}
        maps = {called(name): mapped for name, mapped in every.items()}
        memory = {name: mapped.memory() for name, mapped in maps.items() if name in others}
        restored = Restored.of({name: self.plan.restored[name] for name in others if name in self.plan.restored})
        yield
        for name, fetches in restored.overwritten().items():
            self.read_again(fetches)
            self.source.notes.texts.append(
                f"{dotted} wrote to {some_of([item.stored.spec.name for item in fetches])} ({name}) while it loaded "
                "its state; they were read from the checkpoint again"
            )
        for name, tensors in memory.items():
            if unlike := maps[name].put_back(tensors):
                self.source.notes.changed(name, dotted, unlike)
