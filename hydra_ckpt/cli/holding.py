"""Holds a directory's lease, as a run does, for commands that change it: never while a run has it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra_ckpt.files import Files
from hydra_ckpt.metrics import DEFAULT_KEY
from hydra_ckpt.resolved import KeepOptions
from hydra_ckpt.store.catalog import Catalog
from hydra_ckpt.store.directory import Directory
from hydra_ckpt.store.owner import read_owner

__all__ = ["decision", "held"]


def decision(catalog: Catalog) -> KeepOptions:
    """The metric that decides the best checkpoint: the one that the run recorded, otherwise its only metric."""
    details = [item.manifest.details for item in reversed(catalog.checkpoints)]
    noted = (str(item["deciding_metric"]) for item in details if "deciding_metric" in item)
    modes = (str(item["best_metric_mode"]) for item in details if "best_metric_mode" in item)
    measured = {name for item in catalog.checkpoints for name in item.metrics}
    only = next(iter(measured)) if len(measured) == 1 else DEFAULT_KEY
    return KeepOptions(next(noted, only), next(modes, "min"), max_recent=None, retention=None)


@contextmanager
def held(root: Path, keep: KeepOptions) -> Iterator[Directory]:
    """Hold a directory as its writer, after cleaning it up: drafts published or removed, pointers corrected.

    Raises:
        CheckpointExistsError: A run writes to it, or may do so. Does not wait for that run.
    """
    record = read_owner(root)
    # The directory still belongs to the job of the sweep that created it.
    directory = Directory(root, Files(), keep, record[0].run if record is not None else None, may_wait=False)
    directory.open(None)
    try:
        directory.settle(None, (), "raise")
        yield directory
    finally:
        directory.close()
