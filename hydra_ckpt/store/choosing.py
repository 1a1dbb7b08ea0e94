"""Which checkpoint of a directory `restore_from` means. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_ckpt import metrics as metric
from hydra_ckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Catalog, listing, scan, select
from hydra_ckpt.store.pointers import read_pointer
from hydra_ckpt.store.strangers import refuse_strangers

__all__ = ["choose", "deciding_metric"]

# Number of attempts at a directory that changes while it is read.
_LOOKS = 5


def choose(root: Path, selector: str, passed_over: Mapping[str, str], best: tuple[str, str]) -> dict[str, Any]:
    """The checkpoint that a selector means, as plain data; for `auto` the best one that is not skipped, or none.

    Tries again if the directory has changed meanwhile: a live run may be pruning it.

    Args:
        root: The checkpoint directory.
        selector: The selector.
        passed_over: Names of damaged checkpoints, and what is wrong with them.
        best: The configured metric and its mode, min or max.

    Raises:
        CheckpointNotFoundError: An explicitly named one does not exist.
        CheckpointFormatError: A newer version wrote it, or one that the automatic choice would have to skip.
        CorruptCheckpointError: An explicitly named one is damaged.
        CheckpointConfigError: A link has a checkpoint's name, and the selector names none.
    """
    for _ in range(_LOOKS - 1):
        before = listing(root)
        try:
            found = _look(root, selector, passed_over, best)
            if not found["passed_over"] or listing(root) == before:
                return found
        except (CheckpointNotFoundError, CorruptCheckpointError):
            if listing(root) == before:
                raise
    return _look(root, selector, passed_over, best)


def _look(root: Path, selector: str, passed_over: Mapping[str, str], best: tuple[str, str]) -> dict[str, Any]:
    catalog = scan(root)
    if selector in ("auto", "latest", "best"):
        # Links to older checkpoints, moved to an archive, are in nobody's way.
        newest = catalog.checkpoints[-1].step if catalog.checkpoints else -1
        is_best = selector == "best" and read_pointer(root, names.BEST) in catalog.links
        catalog.refuse_links(-1 if is_best else newest)
    if selector == "auto":
        return _newest(catalog, passed_over)
    configured, mode = best
    chosen = select(catalog, selector, deciding_metric(catalog, configured), mode)
    chosen.check_files()
    return {"path": str(chosen.path), "passed_over": {}}


def _newest(catalog: Catalog, passed_over: Mapping[str, str]) -> dict[str, Any]:
    damaged = {**catalog.damaged, **passed_over}
    target = read_pointer(catalog.root, names.LATEST)
    if target is not None and not (catalog.root / target).exists():
        damaged[target] = f"{names.LATEST} leads to it, but it is gone"
    for candidate in catalog.candidates():
        if candidate.name in damaged:
            continue
        try:
            candidate.check_files()
        except CheckpointError as error:
            damaged[candidate.name] = str(error)
            continue
        catalog.refuse_newer(names.LATEST, candidate.step)
        return {"path": str(candidate.path), "passed_over": damaged}
    catalog.refuse_newer(names.LATEST, None)
    refuse_strangers(catalog.root)
    return {"path": None, "passed_over": damaged}


def deciding_metric(catalog: Catalog, configured: str) -> str:
    """The deciding metric: under the default key, the only metric of the checkpoints if there is just one."""
    found = {name for item in catalog.checkpoints for name in item.metrics}
    if configured != metric.DEFAULT_KEY or configured in found:
        return configured
    return next(iter(found)) if len(found) == 1 else configured
