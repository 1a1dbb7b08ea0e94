"""`hydra-ckpt show`: one checkpoint's content, and the command that continues its run. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hydra_ckpt.cli.locating import open_one
from hydra_ckpt.cli.output import cell, console, iso_time, parts_data, print_json, print_line, shown_size, shown_time
from hydra_ckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, counted, printable
from hydra_ckpt.jobs.command import resume_command
from hydra_ckpt.jobs.differences import differences
from hydra_ckpt.jobs.yaml_text import MAX_BYTES, parse_config
from hydra_ckpt.loading.changes import saved_config
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint, scan
from hydra_ckpt.store.origin import Origin
from hydra_ckpt.store.pointers import pointers_in, read_pointer
from hydra_ckpt.store.small_files import read_small_file

__all__ = ["show"]


def show(
    directory: Annotated[
        Path, typer.Argument(help="A checkpoint; in a directory with several, the one that LATEST names.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    command: Annotated[
        bool,
        typer.Option(
            "--command", help="Print the command that continues the run; run it only if you trust the checkpoint."
        ),
    ] = False,
) -> None:
    """Show what one checkpoint holds: parts, files, sizes, metrics, configuration.

    Reads the manifest and compares the files' presence and sizes with it. Exit code 1: something is damaged.
    """
    checkpoint = open_one(directory)
    if command:
        typer.echo(_command(checkpoint).encode())  # a shell needs the exact bytes, whatever the terminal shows
        return
    problem = _problem(checkpoint)
    # A checkpoint of a newer format cannot be opened; the key exists because `list` also has it.
    data = {**_content(checkpoint), "problem": problem, "newer_format": False}
    if as_json:
        print_json(data)
    else:
        _print(data, checkpoint.manifest.created, console())
    raise typer.Exit(1 if problem else 0)


def _problem(checkpoint: Checkpoint) -> str | None:
    try:
        checkpoint.check_files()
    except CheckpointError as error:
        return str(error)
    return None


def _content(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest, root = checkpoint.manifest, checkpoint.path.parent
    return {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "step": manifest.step,
        "epoch": manifest.epoch,
        "created": iso_time(manifest.created),
        "bytes": manifest.nbytes,
        "world_size": manifest.world_size,
        "topology": dict(manifest.topology),
        "metrics": checkpoint.metrics,
        "pointers": [name for name in sorted(pointers_in(root)) if read_pointer(root, name) == checkpoint.name],
        "parts": parts_data(manifest),
        "exports": dict(manifest.exports),
        "files": {name: record.bytes for name, record in sorted(manifest.files.items())},
        "overrides": _overrides(checkpoint),
        "details": dict(manifest.details),
        "changed": _changed(checkpoint),
    }


def _overrides(checkpoint: Checkpoint) -> list[str]:
    typed = (_hydra(checkpoint) or {}).get("overrides")
    task = typed.get("task") if isinstance(typed, dict) else None
    return [str(item) for item in task] if isinstance(task, list) else []


def _changed(checkpoint: Checkpoint) -> list[str]:
    """Settings that differ from those of the previous checkpoint."""
    earlier = [item for item in scan(checkpoint.path.parent).checkpoints if item.step < checkpoint.step]
    now = saved_config(checkpoint.path)
    before = saved_config(earlier[-1].path) if earlier else None
    return [] if before is None or now is None else [str(item) for item in differences(before, now)]


def _hydra(checkpoint: Checkpoint) -> dict[str, Any] | None:
    path = checkpoint.path / names.CONFIG / "hydra.yaml"
    try:
        text = read_small_file(path, MAX_BYTES).decode()
    except (OSError, CorruptCheckpointError, UnicodeDecodeError):
        return None
    found = (parse_config(text) or {}).get("hydra")
    return found if isinstance(found, dict) else None


def _command(checkpoint: Checkpoint) -> str:
    hydra, launch = _hydra(checkpoint), checkpoint.manifest.details.get("launch")
    if hydra is None or not isinstance(launch, dict):
        raise CheckpointNotFoundError(
            f"{checkpoint.path} does not record how its run was started: it was not written by a Hydra application"
        )
    try:
        command = resume_command(launch, hydra, _run_dir(checkpoint, hydra))
        if printable(command).replace("\t", "") != command.replace("\t", ""):
            raise ValueError("control characters")
        return command
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointNotFoundError(f"{checkpoint.path}: its record of the run is invalid: {error!r}") from None


def _run_dir(checkpoint: Checkpoint, hydra: dict[str, Any]) -> Path:
    """The run's current directory, which may have been moved together with its checkpoints."""
    recorded = Path(hydra["runtime"]["output_dir"])
    above = [path for path in checkpoint.path.parents if (path / (hydra.get("output_subdir") or ".hydra")).is_dir()]
    return above[0] if above and not checkpoint.path.is_relative_to(recorded) else recorded


def _print(data: dict[str, Any], created: float, out: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    for title, text in _rows(data, created):
        if text:
            table.add_row(cell(title, "dim"), cell(text))
    print_line(out, data["path"])
    out.print(table)
    if data["problem"]:
        print_line(out, f"damaged: {data['problem']}", "red")


def _origin(details: dict[str, Any]) -> str:
    """The checkpoint of another run, or an earlier one, that the run was told to begin from."""
    found = Origin.recorded_in(details)
    return found.path if found is not None else ""


def _rows(data: dict[str, Any], created: float) -> list[tuple[str, str]]:
    parts = [
        (name, f"{shown_size(part['bytes'])} in {counted(len(part['files']), part['format'] + ' file')}")
        for name, part in data["parts"].items()
    ]
    return [
        ("step", f"{data['step']}, epoch {data['epoch']}"),
        ("created", f"{shown_time(created)} on {data['details'].get('host', '?')}"),
        ("size", f"{shown_size(data['bytes'])} in {counted(len(data['files']), 'file')}"),
        ("written by", counted(data["world_size"], "rank")),
        ("began from", _origin(data["details"])),
        ("replicas", str(data["details"].get("replicas", ""))),
        ("left out", ", ".join(map(str, data["details"].get("unsaved", ())))),
        ("pointers", ", ".join(data["pointers"])),
        ("metrics", ", ".join(f"{name} {value:.6g}" for name, value in sorted(data["metrics"].items()))),
        *parts,
        ("exports", ", ".join(data["exports"].values())),
        ("overrides", " ".join(data["overrides"])),
        ("changed", "; ".join(data["changed"])),
    ]
