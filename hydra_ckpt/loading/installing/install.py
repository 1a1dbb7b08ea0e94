"""Installs what was read into the live objects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from hydra_ckpt.errors import counted, some_of
from hydra_ckpt.loading.installing.decoded import Values
from hydra_ckpt.loading.installing.guard import Guard
from hydra_ckpt.loading.installing.install_around import AroundInstaller
from hydra_ckpt.loading.installing.install_links import LinkInstaller
from hydra_ckpt.loading.installing.install_models import ModelInstaller
from hydra_ckpt.loading.installing.install_optimizers import OptimizerInstaller
from hydra_ckpt.loading.planning.load_plan import LoadPlan
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.state import rng
from hydra_ckpt.state.capture import called
from hydra_ckpt.state.dataloader import ResumableLoader
from hydra_ckpt.state.optimizer_loading import empty_states
from hydra_ckpt.state.optimizer_oracle import is_own_method
from hydra_ckpt.state.ranks import Topology
from hydra_ckpt.storage.read import Fetch
from hydra_ckpt.store.catalog import Checkpoint


@dataclass(frozen=True)
class Installer:
    """Gives an AppState's objects their state.

    Args:
        source: The checkpoint, read.
        plan: What was read.
        read_again: Reads tensors once more.
    """

    source: Source
    plan: LoadPlan
    read_again: Callable[[Sequence[Fetch]], Any]

    def install(self) -> None:
        """Install everything that is wanted and there, and note the rest; local."""
        source, plan = self.source, self.plan
        available, parts = source.available(), source.parts
        values = Values(source, plan)
        links = LinkInstaller(source)
        guard = Guard(source, plan, self.read_again, is_needed=self._runs_code(available))
        models, around = (
            ModelInstaller(source, plan, values, guard, links),
            AroundInstaller(source, plan, values, links),
        )
        optimizers = OptimizerInstaller(source, plan, values, links)
        guard.begin()
        if "model" in available:
            models.install(plan.absent)
        if "optimizer" in available:
            assert plan.fit is not None  # made while comparing
            optimizers.install(plan.fit, empty_states(source.shared["optimizer"]))
            guard.keep_states()
        around.install(available)
        unlike: dict[str, list[str]] = {}
        for _ in range(2):  # what runs to compare one object may change another that was compared before
            for one in (models, optimizers, around):
                for name, found in one.unlike():
                    unlike.setdefault(name, []).extend(found)
        for name, found in unlike.items():
            source.notes.took(name, list(dict.fromkeys(found)))
        guard.end()
        links.join_optimizers()
        links.check()
        if "rng" in parts:
            self._rng(source.checkpoint, source.topology, source.channel.world_size)
        if "progress" in parts:
            source.notes.exact.append("progress")
        self._note_new(parts, available, plan.absent, plan.mismatch.left)

    def _runs_code(self, available: Collection[str]) -> bool:
        """Whether any object that is restored runs code as it loads, besides PyTorch's own."""
        state, fit = self.source.state, self.plan.fit
        maps = self.source.extractor.maps(state).values() if "model" in available else ()
        return (
            "extras" in available
            or not all(map(_is_of_torch, state.lr_schedulers))
            or ("dataloader" in available and type(state.dataloader) is not ResumableLoader)
            or (fit is not None and bool(fit.own))
            or any(mapped.beyond.extra_states or mapped.beyond.customizes_loading for mapped in maps)
        )

    def _rng(self, checkpoint: Checkpoint, topology: Topology, world_size: int) -> None:
        """Restore the random generators, or derive them if the ranks differ."""
        if self.source.own is not None and self.source.same_ranks:
            rng.restore(self.source.own["rng"])
            self.source.notes.exact.append("rng")
            return
        # Not from the tensor-parallel rank: peers work on the same activations and must drop the same ones.
        rng.derive(checkpoint.step, topology.place.dp, topology.place.pp)
        self.source.notes.derived(
            "rng",
            "random numbers are derived from step, data-parallel rank and stage: the checkpoint was written by "
            f"{counted(checkpoint.manifest.world_size, 'rank')}, this run has {world_size}, or its ranks are arranged "
            "differently",
        )

    def _note_new(
        self, wanted: Collection[str], available: Collection[str], absent: Collection[str], left: Collection[str]
    ) -> None:
        """Report the objects that have no state in the checkpoint and so stay as they were built.

        Args:
            wanted: The parts to load.
            available: Those that the checkpoint has.
            absent: Single objects of available parts that the checkpoint lacks, by dotted name.
            left: Objects that it has and that do not fit; they are reported already.
        """
        state, notes = self.source.state, self.source.notes
        here = {
            "optimizer": list(state.named_optimizers),
            "lr_scheduler": list(state.named_schedulers),
            "dataloader": ["dataloader"] if hasattr(state.dataloader, "load_state_dict") else [],
            "extras": [f"extras.{name}" for name in state.extras],
            "model": [called(name) for name in self.source.extractor.maps(state)],
        }
        saved = {"extras": [f"extras.{name}" for name in self.source.shared.get("extras", {})]}
        if "extras" in available:
            left = [name for name in saved["extras"] if name not in here["extras"]]
            notes.skipped += left
            notes.texts += [f"in the checkpoint, but not used here: {', '.join(left)}"] if left else []
        elif "extras" in wanted and saved["extras"] and here["extras"]:
            notes.texts.append(f"in the checkpoint, but not used here: {', '.join(saved['extras'])}")
        for part, dotted in here.items():
            known = saved.get(part, dotted if part in available else [])
            new = [name for name in dotted if (name not in known or name in absent) and name not in left]
            if part not in wanted or not new or part in notes.rederived:
                continue
            notes.missing += new
            notes.texts.append(f"not in the checkpoint, so left as it was built: {', '.join(new)}")
            if part == "dataloader":  # it starts from the beginning
                notes.rederived.append(part)
        if "dataloader" in wanted and state.dataloader is not None and not here["dataloader"]:
            notes.derived("dataloader", "the data loader has no load_state_dict(), so it starts from the beginning")
        if "model" in available and self.source.extractor.is_peft:
            notes.trusted += [f"{called(name)}.base_model" for name in state.models]
            notes.texts.append("the base model is not in the checkpoint; it must be the one that was trained with")
        omitted = [
            name for name in self.source.shared.get("unsaved", []) if name.split(".")[0] in {*available, "model"}
        ]
        notes.missing += omitted
        notes.texts += [f"left out of the checkpoint, so left as it was built: {some_of(omitted)}"] if omitted else []


def _is_of_torch(scheduler: Any) -> bool:
    """Whether a scheduler, with those inside it, runs only PyTorch's code as it loads."""
    return (
        type(scheduler).__module__ == LRScheduler.__module__
        and is_own_method(scheduler, "load_state_dict", LRScheduler.__module__)
        and all(map(_is_of_torch, getattr(scheduler, "_schedulers", ())))
    )
