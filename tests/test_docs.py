"""The documentation is true: its examples run, its links lead somewhere, its tables are those of the code.

How blocks are marked: ```python and ```bash are executed, in order, in one scratch directory for each document; a block
whose first line is a comment with a file's name is written to that file instead; ```sh is for commands that need minutes,
a network or an environment of their own, and is only shown.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from hydra_ckpt import CheckpointCallback, CheckpointingConfig
from hydra_ckpt.config import SaveConsolidatedMode
from hydra_ckpt.storage import tree
from hydra_ckpt.storage.digests import _RECORD
from hydra_ckpt.store.manifest import FORMAT, FileRecord, Manifest, PartRecord

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = sorted([REPOSITORY / "README.md", *REPOSITORY.glob("docs/**/*.md")])
WITH_EXAMPLES = [path for path in DOCS if re.search(r"^```(python|bash)$", path.read_text(), re.MULTILINE)]
# What may be shown without being executed.
SHOWN = re.compile(
    r"scripts/(demo|test|setup|torture|bench/\w+\.py)|source |pip install|git clone|sbatch|srun|(?:[\w.]+/)?torchrun --nnodes|#"
)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line it begins on."""

    language: str
    text: str
    line: int


def blocks(document: Path) -> Iterator[Block]:
    pattern = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    content = document.read_text()
    for match in pattern.finditer(content):
        yield Block(match[1], match[2], content[: match.start()].count("\n") + 2)


def name(document: Path) -> str:
    return str(document.relative_to(REPOSITORY))


def section(document: str, title: str) -> str:
    """The text below a heading, up to the next one."""
    content = (REPOSITORY / document).read_text()
    return re.split(r"^#+ ", content.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The rows of the tables in a text, without their heads; backquotes around a whole cell are taken off."""
    found = []
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.append([cell[1:-1] if re.fullmatch(r"`[^`]*`", cell) else cell for cell in cells])
    heads = {index - 1 for index, row in enumerate(found) if all(set(cell) <= set("-:") for cell in row)}
    return [row for index, row in enumerate(found) if index not in heads and index - 1 not in heads]


# --- examples


@pytest.mark.parametrize("document", WITH_EXAMPLES, ids=name)
def test_examples_run(document: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # Python blocks share one interpreter's names, as a reader's session would; each is a step of its own otherwise.
    python: list[str] = []
    for block in blocks(document):
        file = re.match(r"# ([\w./]+\.\w+)\n", block.text)
        if file and block.language in {"python", "yaml"}:
            (tmp_path / file[1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file[1]).write_text(block.text)
            continue
        if block.language == "python":
            command = [sys.executable, "-c", "\n".join([*python, block.text])]
            python += [line for line in block.text.splitlines() if re.match(r"(from|import) ", line)]
        elif block.language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", block.text]
        else:
            continue
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, f"{name(document)}:{block.line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("document", DOCS, ids=name)
def test_what_is_only_shown_could_not_be_executed(document: Path) -> None:
    for block in blocks(document):
        assert block.language in {"python", "bash", "sh", "yaml", "json", "text"}, f"{name(document)}:{block.line}"
        if block.language == "sh":
            for line in block.text.splitlines():
                assert not line.strip() or SHOWN.match(line), f"{name(document)}:{block.line}: {line}"


# --- links


def anchors(document: Path) -> set[str]:
    """The anchors that a document's headings get."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), f"{name(document)}: {link}"
        assert target.is_relative_to(REPOSITORY), f"{name(document)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name(document)}: {link}"


@pytest.mark.parametrize("document", DOCS, ids=name)
def test_lines_are_short_enough_to_read(document: Path) -> None:
    for number, line in enumerate(document.read_text().splitlines(), 1):
        assert line == line.rstrip(), f"{name(document)}:{number}: space at the end"
        assert len(line) <= 120 or line.startswith("|"), f"{name(document)}:{number}: longer than 120"
