"""What a load did, and what checkpointing has cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class LoadReport:
    """The result of a load.

    Attributes:
        step: Completed optimizer steps; 0 where progress was not loaded.
        epoch: The epoch to continue in; 0 where progress was not loaded.
        path: The checkpoint.
        metrics: Its metrics.
        loaded: Parts of which anything was installed.
        exact: Objects that were restored and compared with what was saved, by dotted name: `model`, `optimizer`,
            `extras.ema`. What the other fields name inside them is excepted.
        trusted: Objects, or parts of them, that took their state over themselves and do not show that they have it,
            such as data loaders of other libraries.
        rederived: What was not continued exactly but derived from the step or from another rank's: `rng`, `buffers`,
            `dataloader`.
        skipped: What the checkpoint has and nobody took: parts that were not asked for, or for which the AppState has
            no object, and with `load_strict=false` single names.
        missing: What the AppState has and the checkpoint has not, so that it is as it was built: `optimizer`,
            `extras.ema`, `model.head.weight`.
        notes: What could not be continued exactly, and why.
        passed_over: Damaged checkpoints that an automatic choice went past: name to what is wrong.
        read_bytes: Bytes of tensors this rank read.
    """

    step: int
    epoch: int
    path: Path
    metrics: dict[str, float] = field(default_factory=dict)
    loaded: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    trusted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    rederived: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    passed_over: dict[str, str] = field(default_factory=dict)
    read_bytes: int = 0


@dataclass
class Stats:
    """What checkpointing has cost so far on this rank.

    Attributes:
        saves: Saves begun.
        skipped: Saves left out because another was under way.
        blocked_s: Seconds the training thread spent in `save()` and waiting for staging.
        waited_s: Of these, seconds spent waiting for the save before.
        written_bytes: Bytes of tensors this rank wrote.
    """

    saves: int = 0
    skipped: int = 0
    blocked_s: float = 0.0
    waited_s: float = 0.0
    written_bytes: int = 0
