"""The result of a load, and the cost of checkpointing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class LoadReport:
    """The result of a load.

    Attributes:
        step: Completed optimizer steps; 0 if progress was not loaded.
        epoch: The epoch to continue in; 0 if progress was not loaded.
        path: The checkpoint.
        metrics: Its metrics.
        loaded: Parts of which anything was loaded.
        exact: Objects that were restored and compared with what was saved, by dotted name: `model`, `optimizer`,
            `extras.ema`; except what the other fields name inside them (`optimizer.param_groups.0`,
            `model.head.weight`, and `buffers` for those of models). None of these names is in another field.
        trusted: Objects, or parts of them, that loaded their state themselves and do not show that they have it, such
            as data loaders of other libraries.
        rederived: State that does not continue exactly, but was derived from the step or taken from another rank:
            `rng`, `buffers`, `dataloader`, `lr_scheduler`, `extras.ema`, `optimizer.param_groups.0`.
        skipped: State in the checkpoint that was not loaded: parts that were not requested, or for which the AppState
            has no object, and with `load_strict=false` single names.
        missing: State of the AppState that the checkpoint lacks, so it stays as it was built: `optimizer`,
            `extras.ema`, `model.head.weight`.
        notes: What does not continue exactly, and why.
        passed_over: Damaged checkpoints that an automatic choice skipped: name to what is wrong.
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
    """The cost of checkpointing so far on this rank.

    Attributes:
        saves: Saves begun; those that only add an export to a published checkpoint are `exports_added`.
        exports_added: Exports begun that are added to a published checkpoint.
        skipped: Saves left out because another one was in progress.
        blocked_s: Seconds the training thread spent in `save()` and waiting for staging.
        waited_s: Of these, seconds spent waiting for the previous save.
        written_bytes: Bytes of tensors this rank wrote.
    """

    saves: int = 0
    exports_added: int = 0
    skipped: int = 0
    blocked_s: float = 0.0
    waited_s: float = 0.0
    written_bytes: int = 0
