"""`hydra-ckpt diff`: the tensors in which two checkpoints differ."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from hydra_ckpt.cli.locating import open_one
from hydra_ckpt.cli.output import cell, console, print_json

if TYPE_CHECKING:
    from hydra_ckpt.storage.compare import TensorDifference

__all__ = ["diff"]


def diff(
    first: Annotated[
        Path, typer.Argument(help="A checkpoint; in a directory with several, the one that LATEST names.")
    ],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the tensors in which two checkpoints differ, bit by bit.

    Exit code 1: some tensors differ.
    """
    from hydra_ckpt.storage.compare import compare

    one, other = open_one(first), open_one(second)
    found = list(compare(one, other))
    if as_json:
        tensors = [asdict(item) for item in found]
        print_json({"first": str(one.path), "second": str(other.path), "tensors": tensors})
    elif found:
        _show(found)
    else:
        print("no tensor differs")
    raise typer.Exit(1 if found else 0)


def _show(found: list[TensorDifference]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("part", "name", "first", "second", "elements", "largest difference"):
        table.add_column(title, overflow="fold")
    for item in found:
        second = "same" if item.elements is not None else item.second or "-"
        elements = "" if item.elements is None else str(item.elements)
        largest = "" if item.largest is None else f"{item.largest:.3g}"
        table.add_row(*map(cell, (item.part, item.name, item.first or "-", second, elements, largest)))
    console().print(table)
