"""The summary of a sweep as a table."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from hydra_ckpt.errors import one_line

__all__ = ["summary_table"]

_COLOURS = {"finished": "green", "running": "cyan", "failed": "red"}


def summary_table(summary: dict[str, Any]) -> Table:
    """A row for each job, with the overrides that not all jobs share; the best job is marked."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("job", "overrides", "state", "last", "best", "metric", "export", ""):
        table.add_column(title, overflow="fold")
    best = summary["best"] and summary["best"]["job"]
    common = _common(summary["jobs"])
    for job in summary["jobs"]:
        own = " ".join(item for item in job["overrides"] if item not in common)
        row = [job["job"], own, job["state"], *_checkpoints(job), _metric(job), _export(job)]
        cells = [Text(one_line(cell)) for cell in row]
        cells[2].stylize(_COLOURS.get(job["state"], "yellow"))
        table.add_row(*cells, Text("BEST" if job["job"] == best else "", style="green"))
    return table


def _common(jobs: list[dict[str, Any]]) -> set[str]:
    """Overrides that all jobs share; none if there is a single job."""
    typed = [set(job["overrides"]) for job in jobs]
    return set.intersection(*typed) if len(typed) > 1 else set()


def _checkpoints(job: dict[str, Any]) -> list[str]:
    return [f"step {job[name]['step']}" if job[name] else "-" for name in ("last", "best")]


def _metric(job: dict[str, Any]) -> str:
    return f"{job['metric']['name']} {job['metric']['value']:.6g}" if job["metric"] else "-"


def _export(job: dict[str, Any]) -> str:
    exported = [entry for entry in (job["best"], job["last"]) if entry and entry["exports"]]
    return f"step {exported[0]['step']}" if exported else "-"
