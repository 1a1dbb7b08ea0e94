"""The documentation is true: its examples run, its links lead somewhere, its tables are those of the code.

How blocks are marked: ```python and ```bash are executed, in order, in one scratch directory for each document, the
Python ones in one session; a block that names a file, in a comment in its first line or behind its language, is written
to that file instead; ```sh is for commands that need minutes, a network or an environment of their own, and is only
shown.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = sorted([REPOSITORY / "README.md", *REPOSITORY.glob("docs/**/*.md")])
WITH_EXAMPLES = [path for path in DOCS if re.search(r"^```(python|bash)$", path.read_text(), re.MULTILINE)]
# What may be shown without being executed.
SHOWN = re.compile(r"(PYTHON=\S+ )?scripts/|source |pip install|sbatch |srun |torchrun --nnodes|#")


class Block(NamedTuple):
    """A fenced block: its language, the file it is the content of, its text, and the line that begins on."""

    language: str
    file: str
    text: str
    line: int


def blocks(document: Path) -> Iterator[Block]:
    pattern = re.compile(r"^```(\w*) ?(\S*)\n(# ([\w./]+\.\w+)\n)?(.*?)^```$", re.MULTILINE | re.DOTALL)
    content = document.read_text()
    for match in pattern.finditer(content):
        line = content[: match.start()].count("\n") + 2
        yield Block(match[1], match[2] or match[4] or "", (match[3] or "") + match[5], line)


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


def shell(text: str) -> None:
    """Run commands as a reader in an activated environment would."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("document", WITH_EXAMPLES, ids=name)
def test_examples_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks(document):
        started = time.monotonic()
        if block.file:
            (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.file).write_text(block.text)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, document, "exec"), session)
        elif block.language == "bash":
            shell(block.text)
        print(f"{name(document)}:{block.line}: {time.monotonic() - started:.1f} s")


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
