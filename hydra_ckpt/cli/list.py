"""`hydra-ckpt list`: what a checkpoint directory holds. Does not import torch, so that it is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_ckpt.cli.locating import Located, holds_checkpoints, locate
from hydra_ckpt.cli.output import cell, console, iso_time, parts_data, print_json, print_line, shown_size, shown_time
from hydra_ckpt.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint, is_checkpoint_directory
from hydra_ckpt.store.parts import models_in
from hydra_ckpt.store.pointers import pointers_in, read_pointer
from hydra_ckpt.sweeps.summary import is_sweep, summarize
from hydra_ckpt.sweeps.table import summary_table

__all__ = ["list_checkpoints"]

_HIDDEN_KINDS = {
    "draft": "being written, or left behind by a run that died; the next run publishes or removes it",
    "deleting": "being deleted, or left behind half deleted; the next run removes it",
    "corrupt": "set aside because it was damaged",
    "aside": "set aside by a run that went back to an earlier step or replaced it",
}


@dataclass(frozen=True)
class _Entry:
    """A directory with a checkpoint's name.

    Attributes:
        path: Where it is stored.
        checkpoint: The content of its manifest; None if that cannot be read.
        problem: What is wrong with it; empty if nothing is.
        pointers: Names that lead to it.
        is_newer: Whether the only problem is that a newer version wrote it.
    """

    path: Path
    checkpoint: Checkpoint | None
    problem: str = ""
    pointers: tuple[str, ...] = ()
    is_newer: bool = False

    @property
    def mark(self) -> str:
        """What is wrong, in a word or two; empty if nothing is."""
        return "" if not self.problem else "newer format" if self.is_newer else "damaged"

    def as_data(self) -> dict[str, Any]:
        """The data for `--json`; values from the manifest are null if it cannot be read."""
        known = self.checkpoint
        manifest = known.manifest if known else None
        return {
            "name": self.path.name,
            "path": str(self.path),
            "step": known.step if known else _step_of(self.path.name),
            "epoch": known.epoch if known else None,
            "created": iso_time(manifest.created) if manifest else None,
            "bytes": manifest.nbytes if manifest else None,
            "world_size": manifest.world_size if manifest else None,
            "parts": parts_data(manifest) if manifest else None,
            "exports": dict(manifest.exports) if manifest else None,
            "metrics": known.metrics if known else None,
            "pointers": list(self.pointers),
            "problem": self.problem or None,
            "newer_format": self.is_newer,
        }


@dataclass(frozen=True)
class _Listing:
    """What a directory holds.

    Attributes:
        root: The directory.
        entries: By step.
        hidden: Kind (draft, deleting, corrupt, aside) to the names of the hidden directories of that kind.
        dangling: Pointer to its missing target.
    """

    root: Path
    entries: tuple[_Entry, ...]
    hidden: dict[str, list[str]] = field(default_factory=dict)
    dangling: dict[str, str] = field(default_factory=dict)

    @property
    def is_fine(self) -> bool:
        """Whether nothing was found to be wrong."""
        return not self.dangling and not any(entry.problem for entry in self.entries)


def list_checkpoints(
    directory: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint directory, a run directory with checkpoints/ in it, a checkpoint, or a sweep."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the checkpoints of a directory, or the jobs of a sweep.

    Reads manifests and compares the files' presence and sizes with them; `verify` reads every byte.
    Exit code 1: something is damaged, or of a newer format.
    """
    if not holds_checkpoints(directory) and is_sweep(directory):
        _list_jobs(directory.resolve(), as_json)
        return
    listing = _read(locate(directory, or_else="It is not a sweep either: no job below it has checkpoints. "))
    if as_json:
        print_json(_as_data(listing))
    else:
        _show(listing, console())
    raise typer.Exit(0 if listing.is_fine else 1)


def _list_jobs(sweep_dir: Path, as_json: bool) -> None:
    """Print the sweep's summary, built from its current contents; as JSON it equals the summary file."""
    summary = summarize(sweep_dir)
    if as_json:
        print_json(summary)
    else:
        console().print(summary_table(summary))


def _read(located: Located) -> _Listing:
    below = [path for path in sorted(located.root.iterdir()) if is_checkpoint_directory(path)]
    paths = [path for path in below if located.wants(path.name)]
    if located.only is not None and not paths:
        paths = [located.root / located.only]  # a checkpoint that the user has renamed
    targets = {name: read_pointer(located.root, name) for name in sorted(pointers_in(located.root))}
    entries = [_entry(path, tuple(name for name, target in targets.items() if target == path.name)) for path in paths]
    # A run may be pruning meanwhile: a checkpoint that is gone was not damaged.
    present = sorted((entry for entry in entries if entry.path.exists()), key=_step_order)
    if located.only is not None:
        return _Listing(located.root, tuple(present))
    listing = _Listing(
        located.root,
        tuple(present),
        _hidden(located.root),
        {name: target for name, target in targets.items() if target and not (located.root / target).exists()},
    )
    if not listing.entries:
        left = ", ".join(f"{len(found)} {kind}" for kind, found in listing.hidden.items())
        raise CheckpointNotFoundError(
            f"{located.root} holds no checkpoints yet" + (f", only hidden directories ({left})" if left else "")
        )
    return listing


def _entry(path: Path, pointers: tuple[str, ...]) -> _Entry:
    checkpoint = None
    try:
        checkpoint = Checkpoint.open(path)
        checkpoint.check_files()
    except (CheckpointError, OSError) as error:
        return _Entry(path, checkpoint, str(error), pointers, isinstance(error, CheckpointFormatError))
    return _Entry(path, checkpoint, "", pointers)


def _step_of(name: str) -> int | None:
    return names.step_of(name) if names.is_checkpoint_name(name) else None


def _step_order(entry: _Entry) -> tuple[int, str]:
    return (entry.checkpoint.step if entry.checkpoint else _step_of(entry.path.name) or 0, entry.path.name)


def _hidden(root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(root.iterdir()):
        parsed = names.parse_hidden(path.name)
        if parsed is not None:
            found.setdefault(parsed[1], []).append(path.name)
    return found


def _as_data(listing: _Listing) -> dict[str, Any]:
    return {
        "directory": str(listing.root),
        "checkpoints": [entry.as_data() for entry in listing.entries],
        "drafts": listing.hidden.get("draft", []),
        "deleting": listing.hidden.get("deleting", []),
        "set_aside": [*listing.hidden.get("corrupt", []), *listing.hidden.get("aside", [])],
        "dangling": listing.dangling,
    }


def _show(listing: _Listing, out: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("name", "step", "epoch", "created", "size", "parts", "export", "metrics", ""):
        table.add_column(title, justify="right" if title in {"step", "epoch", "size"} else "left", overflow="fold")
    for entry in listing.entries:
        table.add_row(*_row(entry))
    print_line(out, str(listing.root))
    out.print(table)
    for entry in listing.entries:
        if entry.problem:
            print_line(out, f"{entry.mark}: {entry.problem}", "red")
    for pointer, target in listing.dangling.items():
        text = f"{pointer} leads to {target}, which does not exist; the next save moves it"
        print_line(out, text, "red")
    for kind, found in listing.hidden.items():
        for name in found:
            print_line(out, f"{name}: {_HIDDEN_KINDS[kind]}", "dim")


def _row(entry: _Entry) -> list[Text]:
    marks = [(entry.mark, "red")] if entry.problem else []
    marks += [(name, "green") for name in entry.pointers]
    shown = Text(" ").join(cell(word, style) for word, style in marks)
    if entry.checkpoint is None:
        cells = [entry.path.name, str(_step_of(entry.path.name) or ""), "", "", "", "", "", ""]
    else:
        manifest = entry.checkpoint.manifest
        cells = [
            entry.path.name,
            str(manifest.step),
            str(manifest.epoch),
            shown_time(manifest.created),
            shown_size(manifest.nbytes),
            ", ".join(_part(name, part.format) for name, part in manifest.parts.items()),
            _export(entry.checkpoint),
            ", ".join(f"{name} {value:.6g}" for name, value in sorted(entry.checkpoint.metrics.items())),
        ]
    return [*map(cell, cells), shown]


def _part(name: str, form: str) -> str:
    return name if form == "safetensors" else f"{name} ({form})"


def _export(checkpoint: Checkpoint) -> str:
    models = set(models_in(checkpoint.manifest.parts))
    exported = set(checkpoint.manifest.exports)
    if not exported:
        return "-"
    return "yes" if exported >= models else ", ".join(sorted(exported))
