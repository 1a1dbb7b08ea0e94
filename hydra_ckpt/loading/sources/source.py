"""What a checkpoint holds, as a load needs it. For other tools' directories see `hydra_ckpt.loading.foreign`."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.loading.notes import Notes
from hydra_ckpt.loading.sources.per_rank import PerRank
from hydra_ckpt.state import stage_documents as stages
from hydra_ckpt.state.app_state import AppState, counterparts
from hydra_ckpt.state.capture import Extractor
from hydra_ckpt.state.packing import unpack
from hydra_ckpt.state.ranks import Topology
from hydra_ckpt.storage.distcp import stored_tensors
from hydra_ckpt.storage.header import read_tensors
from hydra_ckpt.storage.naming import decode_naming
from hydra_ckpt.storage.verification import read_small
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.parts import is_export, models_in


@dataclass
class Source:
    """One of our checkpoints, opened for one load.

    Args:
        checkpoint: The checkpoint.
        state: The live objects.
        extractor: Knows the models' maps.
        channel: To the other ranks; not used to communicate here.
        topology: How they are arranged.
        parts: Which parts are wanted.

    Attributes:
        notes: Collects what to report.
        shared: What is the same on all ranks, encoded.
        own: What this rank, or its counterpart, stored for itself; None if there is nothing.
        other_stages: Whether it was saved by other pipeline stages.
        optimized: Parameters that the optimizers of any stage held.
        per_rank: What differed between the ranks.
        lengths: Record lengths of `.distcp` files, by file and offset.
        given: Tensors already in memory, by name.
    """

    checkpoint: Checkpoint
    state: AppState
    extractor: Extractor
    channel: Channel
    topology: Topology
    parts: Collection[str]
    notes: Notes = field(default_factory=Notes)
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] | None = None
    other_stages: bool = False
    optimized: set[str] = field(default_factory=set)
    per_rank: PerRank = field(default_factory=PerRank)
    lengths: dict[tuple[str, int], int] = field(default_factory=dict)
    given: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The checkpoint's directory."""
        return self.checkpoint.path

    @property
    def same_ranks(self) -> bool:
        """Whether each rank finds what it saved itself."""
        return self.topology.equals(self.checkpoint.manifest.topology)

    def has(self, part: str) -> bool:
        """Whether the checkpoint has something of a part."""
        if part in ("rng", "dataloader"):
            return self.own is not None and self.own.get(part) is not None
        return part in ("model", "progress") or bool(self.shared.get(part))

    def available(self) -> set[str]:
        """The parts that are wanted, in the checkpoint, and have an object to take them."""
        takers = {
            "model": True,
            "optimizer": bool(self.state.optimizers),
            "lr_scheduler": bool(self.state.lr_schedulers),
            "dataloader": hasattr(self.state.dataloader, "load_state_dict"),
            "rng": True,
            "extras": bool(set(self.state.extras) & set(self.shared.get("extras", {}))),
            "progress": True,
        }
        return {part for part in self.parts if takers[part] and self.has(part)}

    def counterparts(self, kind: str, count: int, live: int) -> list[int | None]:
        """For each live optimizer or scheduler the number of the saved one; None if there is none.

        Args:
            kind: `optimizer` or `lr_scheduler`.
            count: How many were saved.
            live: How many there are here.
        """
        saved = self.shared.get("keys", {}).get(kind)  # older checkpoints have none
        return counterparts(count if saved is None or len(saved) != count else saved, self.state.keys[kind] or live)

    def read(self) -> None:
        """Read the values that are not tensors.

        Raises:
            CorruptCheckpointError: A file is damaged or missing.
        """
        files = self.checkpoint.manifest.files
        shared = [name for name in files if name.startswith(f"{names.PROGRESS}/shared-")]
        documents = [self.document(name) for name in sorted(shared)]
        if not documents:
            raise CorruptCheckpointError(self.root, "it holds no progress")
        held, schedulers = self.extractor.held(self.state), len(self.state.lr_schedulers)
        self.shared, notes = stages.combine(documents, held, self.extractor.stage, schedulers)
        self.other_stages = self.shared not in documents
        self.optimized = stages.optimized(documents)
        self.notes.texts += notes
        counterpart = self.topology.counterpart(self.checkpoint.manifest.topology)
        rank = self.channel.rank if self.same_ranks else counterpart or 0
        own = f"{names.PROGRESS}/rank-{rank:05d}.safetensors"
        if own in files:
            self.own = unpack(self.root / own, read_small(self.root, own, files[own]))
            if not self.same_ranks and counterpart is None and not self.own.get("dataloader_is_global"):
                self._leave_data(self.own)
        is_here = self.same_ranks and not self.other_stages
        record = self.checkpoint.manifest.parts.get(names.OWN)
        rank_here = self.channel.rank if is_here else None
        self.per_rank = PerRank.read(self.root, self.shared, self.own, record, rank_here)

    def _leave_data(self, own: dict[str, Any]) -> None:
        """Drop the state of a data loader that belongs to one rank, if the data is now divided differently."""
        if own.get("dataloader") is None or not hasattr(self.state.dataloader, "load_state_dict"):
            return
        own["dataloader"] = None
        if "dataloader" in self.parts:
            self.notes.derived(
                "dataloader",
                "the data loader starts from the beginning: its state belongs to one of "
                f"{len(self.checkpoint.manifest.topology.get('leaders', []))} data-parallel ranks, and this run has "
                f"{len(self.topology.leaders)}. A loader made by resumable() continues with any number of ranks",
            )

    def document(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint."""
        data = read_small(self.root, name, self.checkpoint.manifest.files[name])
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(self.root / name, f"is not JSON that hydra_ckpt wrote: {error}") from None

    def stored(self, part: str) -> dict[str, StoredTensor]:
        """The tensors of a part in its files, by name."""
        record = self.checkpoint.manifest.parts.get(part)
        if record is None:
            return {}
        if record.format == "distcp":
            self.lengths.update({(f"{part}/{row[5]}", row[6]): row[7] for row in record.index})
            return stored_tensors(self.root / names.MANIFEST, part, record.index)
        return read_tensors(self.root, list(record.files))

    def models(self) -> set[str]:
        """The parts that hold models."""
        return set(models_in(self.checkpoint.manifest.parts))

    def is_export(self, part: str) -> bool:
        """Whether the files of a model are an export, and have its names."""
        record = self.checkpoint.manifest.parts.get(part)
        return record is not None and is_export(record.files)

    def naming(self, part: str) -> TensorMapping | None:
        """The names of the saved model's tensors in its export, if they differ."""
        name = f"{part}/{names.NAMING}"
        listed = self.checkpoint.manifest.files
        return decode_naming(self.root / name, read_small(self.root, name, listed[name])) if name in listed else None
