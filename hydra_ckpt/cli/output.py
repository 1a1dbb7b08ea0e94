"""Printing for all commands. Does not import torch."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.text import Text

from hydra_ckpt.errors import one_line, printable
from hydra_ckpt.store.manifest import Manifest
from hydra_ckpt.sweeps.summary import finite

__all__ = ["cell", "console", "iso_time", "parts_data", "print_json", "print_line", "shown_size", "shown_time"]

# Version of the JSON output's keys, which docs/format.md lists.
_VERSION = 1

# If the output is not a terminal, other programs read the lines, so they must not be wrapped.
_ENDLESS = 1000


def console() -> Console:
    """Standard output; as wide as its terminal, or of unlimited width if it is not one."""
    return Console(width=None if sys.stdout.isatty() else _ENDLESS, highlight=False)


def cell(text: str, style: str = "") -> Text:
    """A text for a table, on one line, without terminal control characters."""
    return Text(one_line(text), style=style)


def print_line(out: Console, text: str, style: str | None = None) -> None:
    """Print a line without wrapping, and without terminal control characters."""
    out.print(printable(text), style=style, markup=False, soft_wrap=True)


def print_json(data: dict[str, Any]) -> None:
    """Print data as JSON that every reader accepts, in ASCII; NaN and infinities, which JSON lacks, become null."""
    print(json.dumps(finite({"version": _VERSION, **data}), indent=2))


def parts_data(manifest: Manifest) -> dict[str, Any]:
    """The parts of a checkpoint, for JSON."""
    return {
        name: {
            "format": part.format,
            "files": list(part.files),
            "bytes": sum(manifest.files[file].bytes for file in part.files),
        }
        for name, part in manifest.parts.items()
    }


def iso_time(seconds: float) -> str:
    """Unix time as ISO 8601 in UTC, for JSON."""
    return datetime.fromtimestamp(seconds, tz=timezone.utc).isoformat()


def shown_size(nbytes: float) -> str:
    """A number of bytes in a readable unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def shown_time(seconds: float) -> str:
    """Unix time as local time, to the minute."""
    return datetime.fromtimestamp(seconds, tz=timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M")
