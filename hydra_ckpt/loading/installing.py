"""Putting what was read into the live objects. Tensors of models and optimizers were read straight into theirs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hydra_ckpt.errors import counted
from hydra_ckpt.state import optimizer as optimizer_state
from hydra_ckpt.state import rng
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Extractor
from hydra_ckpt.state.ranks import Topology
from hydra_ckpt.storage.tree import decode
from hydra_ckpt.store.catalog import Checkpoint


@dataclass
class Notes:
    """What a load report says beside what was loaded.

    Attributes:
        texts: In words.
        rederived: The parts that could not be taken over as they were.
        left: Extras that stay as they were built.
    """

    texts: list[str] = field(default_factory=list)
    rederived: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def derived(self, what: str, why: str) -> None:
        """Note a part that is not as it was, and why."""
        self.rederived += [what] if what not in self.rederived else []
        self.texts.append(why)


@dataclass(frozen=True)
class Installer:
    """Gives an AppState's objects their state.

    Args:
        state: The objects.
        extractor: Knows the models' maps.
        shared: What is the same on all ranks, encoded.
        own: What this rank, or its counterpart, had for itself; None if there is nothing.
        tensors: The tensors that encoded values refer to, read.
        same_ranks: Whether each rank finds what it saved itself.
        notes: Takes what is to be told.
    """

    state: AppState
    extractor: Extractor
    shared: Mapping[str, Any]
    own: Mapping[str, Any] | None
    tensors: Mapping[str, torch.Tensor]
    same_ranks: bool
    notes: Notes

    def models(self) -> None:
        """What models have beside the tensors that were read into them."""
        extra_states = self.shared.get("extra_state", {})
        own_buffers = (self.own or {}).get("buffers", {})
        for name, mapped in self.extractor.maps(self.state).items():
            mapped.set_extra_state(decode(extra_states.get(name, {}), self.tensors))
            if self.same_ranks:
                mapped.set_buffers(own_buffers.get(name, {}))
        # Checkpoints of earlier versions hold all buffers so.
        if any(own_buffers.values()) and not self.same_ranks:
            self.notes.derived("buffers", "buffers, which each rank had for itself, are those of rank 0 on all ranks")

    def optimizers(self, held: Mapping[str, Any], options: Sequence[Sequence[Any]]) -> None:
        """The optimizers' state and options.

        Args:
            held: The encoded state of the parameters that this rank's optimizers hold.
            options: For each optimizer and group its encoded options; None for a group that keeps its own.
        """
        optimizer_state.install(
            decode(held, self.tensors),
            [[decode(group, self.tensors) for group in groups] for groups in options],
            self.state.optimizers,
            self.extractor.parameter_names(self.state),
        )

    def objects(self, available: Collection[str]) -> None:
        """Schedulers, extras and data loader, as far as they are wanted and there."""
        if "lr_scheduler" in available:
            for scheduler, tree in zip(self.state.lr_schedulers, self.shared["lr_scheduler"], strict=True):
                scheduler.load_state_dict(decode(tree, self.tensors))
        if "extras" in available:
            for name, extra in self.state.extras.items():
                if name in self.shared["extras"]:
                    extra.load_state_dict(decode(self.shared["extras"][name], self.tensors))
        if "dataloader" in available and self.own is not None:
            self.state.dataloader.load_state_dict(self.own["dataloader"])

    def rng(self, checkpoint: Checkpoint, topology: Topology, world_size: int) -> None:
        """The random generators: as they were, or derived anew on other ranks."""
        if self.own is not None and self.same_ranks:
            rng.restore(self.own["rng"])
            return
        # Not from the tensor-parallel rank: peers work on the same activations and must drop the same ones.
        rng.derive(checkpoint.step, topology.place.dp, topology.place.pp)
        self.notes.derived(
            "rng",
            "random numbers are derived anew from step, data-parallel rank and stage: the checkpoint was written by "
            f"{counted(checkpoint.manifest.world_size, 'rank')}, this run has {world_size}, or they are arranged "
            "otherwise",
        )

    def note_new(self, wanted: Collection[str], available: Collection[str]) -> None:
        """Say which objects find nothing in the checkpoint, and so begin as they were built."""
        state = self.state
        here = {
            "optimizer": bool(state.optimizers),
            "lr_scheduler": bool(state.lr_schedulers),
            "dataloader": hasattr(state.dataloader, "load_state_dict"),
        }
        for part, is_here in here.items():
            if is_here and part in wanted and part not in {*available, *self.notes.rederived}:
                self.notes.derived(part, f"the checkpoint holds no {part}; the one of this run begins as it was built")
        for name in state.extras if "extras" in wanted else ():
            if name not in self.shared.get("extras", {}) and name not in self.notes.left:
                self.notes.derived("extras", f"extras[{name!r}]: not in the checkpoint, and so begins as it was built")
