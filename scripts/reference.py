"""Writes the tables of docs/configuration.md from the dataclass, the callback and the options in conf/.

Defaults come from the code, meanings from the docstrings, options from the files. `tests/test_docs.py` fails if the
document differs from what this script writes.

    python scripts/reference.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "configuration.md"
GROUPS = (
    "checkpoint",
    "checkpoint/retention",
    "checkpoint/schedule",
    "callbacks",
    "hydra/output",
    "hydra/job_logging",
    "hydra/callbacks",
)


def entries(docstring: str, section: str) -> dict[str, str]:
    """Name to text of a section of a Google docstring."""
    text = re.split(rf"^{section}:\n", inspect.cleandoc(docstring), maxsplit=1, flags=re.MULTILINE)[1]
    text = re.split(r"^\S", text, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", meaning).replace("``", "`") for name, meaning in found}


def shown(value: Any) -> str:
    """A value as one types it."""
    plain = list(value) if isinstance(value, tuple) else value
    return "`" + yaml.safe_dump(plain, default_flow_style=True).split("\n")[0] + "`"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    escaped = [tuple(cell.replace("|", r"\|") for cell in row) for row in rows]
    lines = [head, tuple("---" for _ in head), *escaped]
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")
    )


def settings() -> str:
    """The keys of the group `checkpoint`."""
    from hydra_ckpt import CheckpointingConfig

    meanings = entries(CheckpointingConfig.__doc__ or "", "Attributes")
    fields = dataclasses.fields(CheckpointingConfig)
    return table(
        ("key", "default", "meaning"),
        [(f"`{field.name}`", shown(field.default), meanings[field.name]) for field in fields],
    )


def callback() -> str:
    """The keys of `callbacks.checkpoint`."""
    from hydra_ckpt import CheckpointCallback

    meanings = entries(CheckpointCallback.__doc__ or "", "Args")
    parameters = [
        parameter
        for parameter in inspect.signature(CheckpointCallback).parameters.values()
        if parameter.name not in {"config", "checkpointer"}
    ]
    return table(
        ("key", "default", "meaning"),
        [(f"`{item.name}`", shown(item.default), meanings[item.name]) for item in parameters],
    )


def options() -> str:
    """Every option, what it changes and what for."""
    rows = []
    for group in GROUPS:
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            text = path.read_text()
            said = " ".join(re.findall(r"^# (?!@package)(.*)$", text, re.MULTILINE))
            content = yaml.safe_load(text) or {}
            changes = {key: value for key, value in content.items() if key != "defaults"}
            if group == "checkpoint/schedule":  # each sets all cadences, most of them to nothing
                changes = {key: value for key, value in changes.items() if value}
            plain = group.startswith("checkpoint")
            keys = ", ".join(f"`{key}: {yaml.safe_dump(value).split()[0]}`" for key, value in changes.items() if plain)
            rows.append((f"`{group}={path.stem}`", keys, said))
    return table(("option", "sets", "meaning"), rows)


def written(text: str) -> str:
    """The document with its tables as they should be."""
    for name, make in {"options": options, "settings": settings, "callback": callback}.items():
        between = re.compile(rf"(<!-- generated: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not between.search(text):
            raise SystemExit(f"{DOCUMENT}: there is no place for {name}")
        body = make()
        text = between.sub(lambda match, body=body: match[1] + body + match[2], text)
    return text


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
