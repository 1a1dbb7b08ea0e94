"""`hydra-ckpt repair`: cleans up a directory now, as the next run would. Does not import torch."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hydra_ckpt.cli.holding import decision, held
from hydra_ckpt.cli.locating import locate
from hydra_ckpt.cli.output import print_json
from hydra_ckpt.errors import CheckpointError, CheckpointFormatError, printable
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint, is_checkpoint_directory, scan
from hydra_ckpt.store.owner import read_owner
from hydra_ckpt.store.pointers import read_pointer
from hydra_ckpt.store.recovery import is_late

__all__ = ["repair"]


def repair(
    directory: Annotated[Path, typer.Argument(help="A checkpoint directory, or a run directory with checkpoints/.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Clean up a directory after a crash.

    Complete drafts are published, everything else that a dead run has left is removed, and LATEST and BEST are pointed
    at existing checkpoints. Damaged checkpoints stay as they are; `verify` finds them. Refused while a run writes to
    the directory.
    """
    root = locate(directory).root
    plan = _plan(root)
    before = _pointers(root)
    if dry_run:
        done = [item.announced for item in plan] + _dangling(root, {item.target for item in plan})
    else:
        with held(root, decision(scan(root))):
            pass
        done = [item.result(root) for item in plan]
        after = _pointers(root)
        done += [f"{name} leads to {after[name] or 'nothing'}" for name in before if before[name] != after[name]]
    if as_json:
        print_json({"directory": str(root), "done": not dry_run, "actions": done})
        return
    for line in done or ["nothing to do"]:
        print(printable(line))


@dataclass(frozen=True)
class _Action:
    """What is done to a file or directory.

    Attributes:
        name: Its name.
        what: published, removed, or why it is left alone.
        target: The name that it gets when it is published.
        why: More about it, for people; empty if there is nothing to add.
    """

    name: str
    what: str
    target: str = ""
    why: str = ""

    @property
    def announced(self) -> str:
        """What would be done."""
        return self._line(f"would be {self.what}" if self._changes else self.what)

    @property
    def _changes(self) -> bool:
        return self.what in ("published", "removed")

    def result(self, root: Path) -> str:
        """What was done."""
        remains = os.path.lexists(root / self.name)
        if self.what == "published" and not (root / self.target).is_dir():
            return self._line("could not be published")
        return self._line("could not be removed" if self.what == "removed" and remains else self.what)

    def _line(self, what: str) -> str:
        return f"{self.name}: {what}{self.why}"


def _plan(root: Path) -> list[_Action]:
    """What is done to everything in a directory that a dead run has left."""
    owner = read_owner(root)
    previous = owner[0].incarnation if owner is not None else None
    found = [_action(root, path, previous) for path in sorted(root.iterdir())]
    return [item for item in found if item is not None]


def _action(root: Path, path: Path, previous: str | None) -> _Action | None:
    hidden = names.parse_hidden(path.name)
    if hidden is None:
        return _small(path)
    name, kind = hidden
    if kind not in ("draft", "deleting"):
        return None
    whole = (kind == "draft" or is_late(path.name, previous)) and _is_whole(path)
    if whole is None:
        return _Action(path.name, "left alone, a newer version wrote it")
    if whole and (root / name).is_symlink():
        return _Action(path.name, "left alone, a symbolic link has its name")
    publish = whole and not (root / name).exists()
    return _Action(path.name, "published", name) if publish else _Action(path.name, "removed")


def _small(path: Path) -> _Action | None:
    """What is done to a small file, or to a checkpoint's token, which marks that its pointers were not moved."""
    if names.is_prepared(path.name) and (path.is_symlink() or not path.is_dir()):
        return _Action(path.name, "removed", why=", the rest of an interrupted replacement")
    if not is_checkpoint_directory(path):
        return None
    token = path / names.TOKEN
    is_pending = os.path.isfile(token) and _is_whole(path)  # noqa: PTH113 - pathlib raises if the disk fails
    return _Action(f"{path.name}/{token.name}", "removed", why=", the pointers are right") if is_pending else None


def _dangling(root: Path, published: Collection[str]) -> list[str]:
    """LATEST and BEST, if they lead to nothing, also after these checkpoints have been published."""
    return [
        f"{name} would be moved: it leads to {target}, which does not exist"
        for name, target in _pointers(root).items()
        if target is not None and target not in published and not os.path.lexists(root / target)
    ]


def _is_whole(path: Path) -> bool | None:
    """Whether a draft has all its files; None if that is unknown because a newer version wrote it."""
    try:
        Checkpoint.open(path).check_files()
    except CheckpointFormatError:
        return None
    except CheckpointError:
        return False
    return True


def _pointers(root: Path) -> dict[str, str | None]:
    return {name: read_pointer(root, name) for name in (names.LATEST, names.BEST)}
