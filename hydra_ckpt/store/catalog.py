"""What a checkpoint directory holds, and which checkpoint a selector means. Reads only."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import (
    CheckpointConfigError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
)
from hydra_ckpt.store import names
from hydra_ckpt.store.manifest import Manifest, read_manifest, read_metrics
from hydra_ckpt.store.pointers import read_pointer
from hydra_ckpt.store.small_files import size_of

log = logging.getLogger(__name__)

_RETRY_S = 0.05


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        path: Its directory, absolute.
        step: Completed optimizer steps.
        epoch: Epoch at the save.
    """

    path: Path
    step: int
    epoch: int

    @classmethod
    def open(cls, path: Path, *, patience_s: float = 0.0) -> Checkpoint:
        """Read and check the manifest.

        Args:
            path: The checkpoint's directory.
            patience_s: How long to look for it, in seconds, if another host has seen it: network file systems show a
                new or renamed directory late.

        Raises:
            CheckpointNotFoundError: The directory is not a finished checkpoint.
            CheckpointFormatError: A newer version wrote it.
            CorruptCheckpointError: The manifest is damaged.
        """
        manifest = _patiently(lambda: read_manifest(path), patience_s)
        checkpoint = cls(path, manifest.step, manifest.epoch)
        checkpoint.__dict__["manifest"] = manifest
        return checkpoint

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, read once."""
        return read_manifest(self.path)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics known at the save, and those added since."""
        return {**self.manifest.metrics, **self.added.get("metrics", {})}

    @property
    def added(self) -> dict[str, Any]:
        """What came after the save: `metrics`, and the best value then."""
        try:
            return read_metrics(self.path)
        except FileNotFoundError:
            return {}
        except CorruptCheckpointError as error:
            log.warning("metrics of %s are left out: %s", self.path, error)
            return {}

    @property
    def pointers_pending(self) -> bool:
        """Whether a crash came after it was published and before its pointers were moved."""
        return os.path.isfile(self.path / names.TOKEN)  # noqa: PTH113 - pathlib raises if the disk fails

    def check_files(self) -> None:
        """Compare the presence and size of every file with the manifest; contents are not read.

        Raises:
            CorruptCheckpointError: A file is missing, not a regular file, or has another size.
        """
        for name, record in self.manifest.files.items():
            size = size_of(self.path / name)
            if size != record.bytes:
                raise CorruptCheckpointError(
                    self.path / name, "the file has another size", expected=record.bytes, found=size
                )


def _patiently(read: Callable[[], Manifest], patience_s: float) -> Manifest:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return read()
        except (CheckpointNotFoundError, CorruptCheckpointError, OSError) as error:
            # An error of the file system may be temporary; damage is not.
            passes = not isinstance(error, CorruptCheckpointError) or isinstance(error.__cause__, OSError)
            if not passes or time.monotonic() >= deadline:
                raise
        time.sleep(_RETRY_S)


@dataclass(frozen=True)
class Catalog:
    """The published checkpoints of a directory.

    Attributes:
        root: The directory.
        checkpoints: Those with a complete manifest, by step.
        damaged: Name to what is wrong, for directories that have a checkpoint's name.
        newer: Name to the error that describes it, for checkpoints of a newer format. Nothing that changes a directory
            touches them.
        links: Symbolic links that have a checkpoint's name, by step. They are not followed, and nothing touches them.
    """

    root: Path
    checkpoints: tuple[Checkpoint, ...]
    damaged: dict[str, str]
    newer: dict[str, CheckpointFormatError] = field(default_factory=dict)
    links: tuple[str, ...] = ()

    def find(self, name: str) -> Checkpoint | None:
        """The checkpoint of this name."""
        return next((item for item in self.checkpoints if item.name == name), None)

    def pointed(self, pointer: str) -> Checkpoint | None:
        """The checkpoint that a pointer leads to."""
        target = read_pointer(self.root, pointer)
        return self.find(target) if target else None

    def refuse_newer(self, pointer: str | None, beyond: int | None) -> None:
        """Raise if a choice would skip a checkpoint of a newer format.

        Args:
            pointer: The pointer that was followed, if any.
            beyond: The step that was chosen instead; None if nothing was.

        Raises:
            CheckpointFormatError: The pointer names such a checkpoint, or there is one after the step.
        """
        target = read_pointer(self.root, pointer) if pointer else None
        if target in self.newer:
            raise self.newer[target]
        for name in sorted(self.newer, key=names.step_of, reverse=True):
            if beyond is None or names.step_of(name) > beyond:
                raise self.newer[name]

    def refuse_links(self, beyond: int = -1) -> None:
        """Raise if a link has the name of a checkpoint after a step: what it leads to must not be skipped silently.

        Raises:
            CheckpointConfigError: There is one; names the last, and the remedy.
        """
        if self.links and names.step_of(self.links[-1]) > beyond:
            link = self.root / self.links[-1]
            target = os.path.realpath(link)
            raise CheckpointConfigError(
                f"{link} is a symbolic link to {target}, and links to checkpoints are not followed. Move the "
                f"checkpoint back in place of the link, or set restore_from={target} to continue from it"
            )

    def best(self, key: str, mode: str, *, after: int = 0) -> Checkpoint | None:
        """The checkpoint after a step with the best value of a metric; the earliest of equals."""
        sign = 1.0 if mode == "min" else -1.0
        known = [item for item in self.checkpoints if item.step > after or not after]
        rated = [(sign * item.metrics[key], item.step, item) for item in known if _rates(item, key)]
        return min(rated, key=lambda entry: entry[:2])[2] if rated else None

    def candidates(self) -> list[Checkpoint]:
        """What an automatic resume tries, in order: what LATEST names, then from new to old.

        A newer one whose pointers were never moved, because of a crash, comes before LATEST.
        """
        newest_first = sorted(self.checkpoints, key=lambda item: -item.step)
        latest = self.pointed(names.LATEST)
        if latest is None:
            return newest_first
        newer = [item for item in newest_first if item.step > latest.step and item.pointers_pending]
        rest = [item for item in newest_first if item is not latest and item not in newer]
        return [*newer, latest, *rest]

    def describe(self) -> str:
        """One line that lists the checkpoints, for error messages."""
        there = ", ".join(item.name for item in self.checkpoints) or "no checkpoint"
        bad = f"; damaged: {', '.join(sorted(self.damaged))}" if self.damaged else ""
        newer = f"; of a newer format: {', '.join(sorted(self.newer))}" if self.newer else ""
        links = f"; links that are not followed: {', '.join(self.links)}" if self.links else ""
        return f"{self.root} holds {there}{bad}{newer}{links}"


def _rates(checkpoint: Checkpoint, key: str) -> bool:
    value = checkpoint.metrics.get(key)
    return isinstance(value, float | int) and math.isfinite(value)


def is_checkpoint_directory(path: Path) -> bool:
    """Whether this is a directory with a checkpoint's name, and not a link to one."""
    if not names.is_checkpoint_name(path.name):
        return False
    return os.path.isdir(path) and not os.path.islink(path)  # noqa: PTH112, PTH114 - pathlib raises if the disk fails


def scan(root: Path) -> Catalog:
    """Read a directory; one that does not exist is empty."""
    found, damaged, newer, links = [], {}, {}, []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if not is_checkpoint_directory(path):
            links += [path.name] if names.is_checkpoint_name(path.name) and path.is_symlink() else []
            continue
        try:
            found.append(Checkpoint.open(path))
        except CheckpointFormatError as error:
            newer[path.name] = error
        except CheckpointError as error:
            if os.path.lexists(path):  # a run may be pruning: a checkpoint that is gone was not damaged
                damaged[path.name] = str(error)
    published = tuple(sorted(found, key=lambda item: (item.step, item.epoch)))
    return Catalog(root, published, damaged, newer, tuple(sorted(links, key=names.step_of)))


def listing(root: Path) -> tuple[object, ...]:
    """A directory's listing without opening a checkpoint; compare two to see whether the directory has changed."""
    below = sorted(path.name for path in root.iterdir() if names.is_checkpoint_name(path.name)) if root.is_dir() else []
    return (*below, read_pointer(root, names.LATEST), read_pointer(root, names.BEST))


def _refuse_parents(path: Path, selector: str) -> None:
    """Distinguish a directory of checkpoints, or the run directory around it, from one checkpoint."""
    for root in () if (path / names.MANIFEST).exists() else (path, path / "checkpoints"):
        latest = scan(root).pointed(names.LATEST)
        if latest is not None:
            raise CheckpointNotFoundError(
                f"restore_from={selector}: this is not a checkpoint, but a directory with some in it; the latest is "
                f"restore_from={latest.path}"
            )


def select(catalog: Catalog, selector: str, key: str, mode: str) -> Checkpoint:
    """The one checkpoint an explicit selector means: latest, best, a name, or a path.

    Raises:
        CheckpointNotFoundError: It does not exist; the message lists those that do.
        CheckpointFormatError: A newer version wrote it.
        CorruptCheckpointError: It exists, but is damaged.
    """
    pointer = {"latest": names.LATEST, "best": names.BEST}.get(selector)
    target = read_pointer(catalog.root, pointer) if pointer else None
    if target in catalog.damaged:
        raise CorruptCheckpointError(catalog.root / target, f"{pointer} leads here, but {catalog.damaged[target]}")
    if selector == "latest":
        # A checkpoint that a crash left without a pointer is still the latest.
        candidates = catalog.candidates()
        catalog.refuse_newer(names.LATEST, candidates[0].step if candidates else None)
        if candidates and (catalog.pointed(names.LATEST) or candidates[0].pointers_pending):
            return candidates[0]
        raise CheckpointNotFoundError(f"restore_from=latest: no LATEST leads to a checkpoint; {catalog.describe()}")
    if selector == "best":
        best = catalog.pointed(names.BEST)
        if best is None:
            catalog.refuse_newer(names.BEST, None)  # their metrics are not known
            best = catalog.best(key, mode)
        if best is None:
            raise CheckpointNotFoundError(f"restore_from=best: none has a metric {key!r}; {catalog.describe()}")
        return best
    for path in (catalog.root / selector, Path.cwd() / selector):
        if path.is_dir():
            _refuse_parents(path.resolve(), selector)
            return Checkpoint.open(path.resolve())
    raise CheckpointNotFoundError(
        f"restore_from={selector}: there is no such directory in {catalog.root} or {Path.cwd()}; {catalog.describe()}. "
        "Choose one of these, or auto, latest, best, none"
    )
