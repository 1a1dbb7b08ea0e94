"""`hydra-ckpt repair`: cleans up a directory now, as the next run would. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hydra_ckpt.cli.holding import decision, held
from hydra_ckpt.cli.locating import locate
from hydra_ckpt.cli.output import print_json
from hydra_ckpt.errors import CheckpointError, CheckpointFormatError
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint, scan
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
    done = _plan(root, dry_run)
    before = _pointers(root)
    if not dry_run:
        with held(root, decision(scan(root))):
            pass
        after = _pointers(root)
        done += [f"{name} leads to {after[name] or 'nothing'}" for name in before if before[name] != after[name]]
    if as_json:
        print_json({"directory": str(root), "done": not dry_run, "actions": done})
        return
    for line in done or ["nothing to do"]:
        print(line)


def _plan(root: Path, dry_run: bool) -> list[str]:
    """What is done to each hidden directory, or would be, as lines to print."""
    found = []
    owner = read_owner(root)
    previous = owner[0].incarnation if owner is not None else None
    for path in sorted(root.iterdir()):
        hidden = names.parse_hidden(path.name)
        if hidden is None or hidden[1] not in ("draft", "deleting"):
            continue
        whole = (hidden[1] == "draft" or is_late(path.name, previous)) and _is_whole(path)
        if whole is None:
            found.append(f"{path.name}: left alone, a newer version wrote it")
            continue
        if whole and (root / hidden[0]).is_symlink():
            found.append(f"{path.name}: left alone, a symbolic link has its name")
            continue
        publish = whole and not (root / hidden[0]).exists()
        found.append(f"{path.name}: {'would be ' if dry_run else ''}{'published' if publish else 'removed'}")
    return found


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
