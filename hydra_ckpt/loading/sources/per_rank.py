"""What a checkpoint stores once per rank, because the ranks had different values under one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.state.plain import ABSENT, is_state, put_plain
from hydra_ckpt.storage.header import read_tensors
from hydra_ckpt.storage.stage_names import on_rank
from hydra_ckpt.store import names
from hydra_ckpt.store.manifest import PartRecord

ELSEWHERE = (
    "the ranks that saved it had different values for it, and this run's ranks are arranged differently; set "
    "checkpoint.load_strict=false to leave it as built"
)


@dataclass(frozen=True)
class PerRank:
    """The names of what is stored once per rank, and this rank's values if the ranks are arranged as before.

    Attributes:
        plain: Labels of plain data.
        tensors: Labels of tensors: `<part>/<name>`.
        is_here: Whether this rank finds what it saved.
        stored: This rank's tensors by label.
    """

    plain: tuple[str, ...] = ()
    tensors: frozenset[str] = frozenset()
    is_here: bool = True
    stored: Mapping[str, StoredTensor] | None = None

    @classmethod
    def read(
        cls,
        root: Path,
        shared: dict[str, Any],
        own: Mapping[str, Any] | None,
        record: PartRecord | None,
        rank: int | None,
    ) -> PerRank:
        """Read from a checkpoint; also puts this rank's plain data into the shared document.

        Args:
            root: The checkpoint.
            shared: What the ranks share, encoded.
            own: What this rank stored for itself.
            record: Where the ranks' own tensors are stored; None if there are none.
            rank: This rank; None if the ranks are arranged differently.

        Raises:
            CorruptCheckpointError: Something is missing.
        """
        listed = shared.get("per_rank", {"plain": [], "tensors": []})
        plain, tensors = tuple(listed["plain"]), frozenset(listed["tensors"])
        if rank is None:
            return cls(plain, tensors, is_here=False)
        for label in plain:
            mine = (own or {}).get("plain", {})
            if label not in mine and not is_state(label):
                raise CorruptCheckpointError(root, f"rank {rank}'s own {label} is missing")
            put_plain(shared, label, mine.get(label, ABSENT))
        stored: dict[str, StoredTensor] = {}
        if tensors:
            start = f"{names.OWN}/{names.OWN}-{rank + 1:05d}-of-"
            files = [file for file in (record.files if record is not None else ()) if file.startswith(start)]
            prefix = on_rank(rank, "")
            found = read_tensors(root, files)
            stored = {name.removeprefix(prefix): item for name, item in found.items() if name.startswith(prefix)}
        if missing := sorted(tensors - stored.keys()):
            raise CorruptCheckpointError(root, f"rank {rank}'s own {missing[0]} is missing")
        return cls(plain, tensors, stored=stored)

    def names_in(self, part: str) -> set[str]:
        """Names of a part's tensors that are stored once per rank."""
        return {label.removeprefix(f"{part}/") for label in self.tensors if label.startswith(f"{part}/")}

    def overlay(self, part: str, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The stored tensors of a part, with this rank's own replacing the shared ones."""
        if not self.stored:
            return stored
        own = {name: self.stored[f"{part}/{name}"] for name in self.names_in(part)}
        return {**stored, **{name: replace(item, spec=replace(item.spec, name=name)) for name, item in own.items()}}
