"""The documentation is true: its examples run, its links lead somewhere, its tables are those of the code.

How blocks are marked: ```python and ```bash are executed, in order, in one scratch directory for each document, the
Python ones in one session; a block that names a file, in a comment in its first line or after its language, is written
to that file instead; ```sh is for commands that need minutes, a network or an environment of their own, and is only
shown.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from hydra_ckpt import CheckpointCallback, CheckpointingConfig, errors
from hydra_ckpt.layout.plan import CELL_BYTES
from hydra_ckpt.state.optimizer_oracle import PARAMETER
from hydra_ckpt.storage.decoding import DECODERS
from hydra_ckpt.storage.digests import _RECORD
from hydra_ckpt.storage.encoding import OWN
from hydra_ckpt.store import lease
from hydra_ckpt.store.manifest import FORMATS, FileRecord, Manifest, PartRecord
from tests.programs import Program

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
WITH_EXAMPLES = [path for path in DOCS if re.search(r"^```(python|bash)$", path.read_text(), re.MULTILINE)]
LANGUAGES = {"python", "bash", "sh", "yaml", "json", "text", "mermaid"}
# What may be shown without being executed.
SHOWN = re.compile(r"([A-Z_]+=\S+ )*(scripts/|\S+python \w+\.py|cd |source |pip install|torchrun --nnodes|srun |#)")


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


def whole(document: str) -> str:
    """A whole document."""
    return (REPOSITORY / document).read_text()


def section(document: str, title: str) -> str:
    """The text below a heading, up to the next one."""
    content = whole(document)
    return re.split(r"^##+ ", content.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


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


PROGRAMS = {
    "hydra-ckpt": ["-m", "hydra_ckpt.cli"],
    "hydra-ckpt-train": ["-m", "hydra_ckpt.recipe"],
    "python": [],
    "torchrun": ["-m", "torch.distributed.run"],
}


def shell(text: str) -> None:
    """Run commands as a reader in an activated environment would; tests/test_packaging.py has the installed scripts."""
    if re.search(r"[|&;<>$`]", text):
        return succeed(["bash", "-euo", "pipefail", "-c", text], subprocess.Popen)
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] in PROGRAMS:
            succeed([sys.executable, *PROGRAMS[words[0]], *words[1:]], Program)
        elif words:
            succeed(words, subprocess.Popen)
    return None


def succeed(command: list[str], kind: type[subprocess.Popen[str]]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment["HF_HUB_OFFLINE"] = "1"
    pipe = subprocess.PIPE
    with kind(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, f"{command}: {output[-6000:]}"


# Their commands take a minute each; those of the README and the tutorial are always run.
SLOW = {"clusters.md", "configuration.md", "hydra.md", "huggingface.md", "sweeps.md", "tutorial.md"}


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, marks=pytest.mark.slow) if path.name in SLOW else path for path in WITH_EXAMPLES],
    ids=name,
)
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
        assert block.language in LANGUAGES, f"{name(document)}:{block.line}"
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


# --- tables


def same_default(shown: str, default: Any) -> bool:
    """Whether a cell of a table, read as YAML, is a default."""
    value = yaml.safe_load(shown)
    return type(value) is type(default) and value == default


def test_the_configuration_table_is_the_dataclass() -> None:
    fields = [(field.name, field.default) for field in dataclasses.fields(CheckpointingConfig)]
    table = rows(section("docs/configuration.md", "checkpoint"))
    assert [row[0] for row in table] == [field for field, _ in fields]
    for (field, default), (_, shown, meaning) in zip(fields, table, strict=True):
        assert same_default(shown, default), f"{field}: {default!r} in the code, {shown} in the document"
        assert len(meaning) > 10


def test_the_callback_table_is_its_signature() -> None:
    parameters = list(inspect.signature(CheckpointCallback).parameters.values())
    ours = [parameter for parameter in parameters if parameter.name not in {"config", "checkpointer"}]
    table = rows(section("docs/configuration.md", "callbacks.checkpoint"))
    assert [row[0] for row in table] == [parameter.name for parameter in ours]
    for parameter, (_, shown, _) in zip(ours, table, strict=True):
        default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        assert same_default(shown, default), f"{parameter.name}: {default!r} in the code, {shown} in the document"


def test_the_reference_is_what_the_code_says() -> None:
    script = runpy.run_path(str(REPOSITORY / "scripts" / "reference.py"))
    document = whole("docs/configuration.md")
    assert script["written"](document) == document, "run: python scripts/reference.py"


def test_every_rule_of_retention_is_in_the_table() -> None:
    from hydra_ckpt.store.retention import _ANY_OF, _POLICIES

    assert [row[0] for row in rows(section("docs/configuration.md", "Retention"))] == [*_POLICIES, _ANY_OF]


# The setting to the attribute of the resolved configuration where they differ.
RESOLVED = {
    "model_cache_dir": "cache_dir",
    "model_repo_id": "repo_id",
    "dequantize_base_checkpoint": "dequantize",
    "skip_task_head_prefixes_for_base_model": "skip_prefixes",
    "allow_legacy_pickle_restore": "allow_pickle",
    "model_save_format": "format",
    "save_consolidated": "consolidated",
    "model_state_dict_keys": "state_dict_keys",
    "restore_parts": "parts",
    "verify_on_load": "verify",
    "consolidation_timeout_minutes": "timeout_s",
    "max_recent_checkpoints": "max_recent",
    "on_save_failure": "raise_failures",
    "when_busy": "skips_when_busy",
    "on_drift": "raises_drift",
}


def test_what_is_said_to_have_no_effect_is_read_nowhere_and_the_rest_somewhere() -> None:
    engine = "".join(
        path.read_text()
        for path in (REPOSITORY / "hydra_ckpt").rglob("*.py")
        if path.name not in ("config.py", "resolved.py")
    )
    settings = {row[0] for row in rows(section("docs/configuration.md", "checkpoint"))}
    waiting = {row[0] for row in rows(section("docs/configuration.md", "checkpoint")) if "*No effect.*" in row[2]}
    for setting in waiting:
        attribute = RESOLVED.get(setting, setting)
        assert not re.search(rf"(write|read|hub|keep)\.{attribute}\b", engine), f"{setting} has an effect by now"
    for setting in settings - waiting:
        attribute = RESOLVED.get(setting, setting)
        assert re.search(rf"\.{attribute}\b", engine), f"{setting} is read nowhere"


# --- the format


@pytest.mark.parametrize(
    ("kind", "number"), [(Manifest, 0), (FileRecord, 1), (PartRecord, 2)], ids=["manifest", "file", "part"]
)
def test_the_manifest_s_fields_are_those_of_the_code(kind: type, number: int) -> None:
    tables = re.split(r"\n\n(?!\|)", section("docs/format.md", "manifest.json"))
    found = [table for table in map(rows, tables) if table][number]
    assert {row[0] for row in found} == {field.name for field in dataclasses.fields(kind)}
    assert f"`format` is {' or '.join(map(str, FORMATS))}" in section("docs/format.md", "manifest.json")


def test_the_record_of_digests_is_that_of_the_code() -> None:
    text = section("docs/format.md", "Digest files")
    assert [(row[0], f"<{row[1]}") for row in rows(text)] == [(name, kind) for name, kind in _RECORD.descr]
    assert f"records of {_RECORD.itemsize} bytes" in text
    assert f"{CELL_BYTES >> 20} MiB" in text


def test_the_tags_of_progress_are_those_of_the_code() -> None:
    tags = {row[0] for row in rows(section("docs/format.md", "Values in progress"))}
    assert tags == {"tensor", OWN, PARAMETER, *DECODERS}


def test_the_limits_are_those_of_the_code() -> None:
    protocol = (REPOSITORY / "docs/protocol.md").read_text()
    times = lease.Times()
    assert f"renewed every {times.heartbeat_s:.0f}\nseconds" in protocol
    assert f"does not change for {times.stale_s:.0f} seconds" in protocol
    assert f"waits up to {times.grace_s:.0f} seconds" in protocol


# --- errors


def messages() -> str:
    """Every text in the package, what is filled in replaced by an ellipsis."""
    found = []
    for path in (REPOSITORY / "hydra_ckpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]", "…", node.value))
    return "\n".join(found)


def test_the_symptoms_are_what_the_code_says() -> None:
    said = messages()
    symptoms = re.findall(r"\*\*Symptom\*\*(.*?)\n- \*\*Cause", whole("docs/troubleshooting.md"), re.DOTALL)
    assert len(symptoms) > 25
    for quote in (quote for symptom in symptoms for quote in re.findall(r"`([^`]*)`", symptom)):
        parts = re.split(r"…|\(expected|: rank|OSError.*", re.sub(r"\s+", " ", quote))
        for part in (part.strip(": ") for part in parts):
            assert len(part) < 8 or part in said, f"nothing says {part!r}"


def test_every_error_has_a_section() -> None:
    titles = set(re.findall(r"^## (\w+)$", whole("docs/troubleshooting.md"), re.MULTILINE))
    assert set(errors.__all__) <= titles


def test_the_versions_are_those_that_are_declared_and_pinned() -> None:
    text = (REPOSITORY / "README.md").read_text()
    declared = (REPOSITORY / "pyproject.toml").read_text()
    pinned = (REPOSITORY / "constraints.txt").read_text()
    for package, least in re.findall(r'"(torch|accelerate|safetensors|transformers|peft)>=([\d.]+)"', declared):
        row = next(line for line in text.splitlines() if line.startswith("|") and package in line.split("|")[1])
        assert f">={least}" in row, package
        version = re.search(rf"^{package}==([\d.]+)", pinned, re.MULTILINE)
        assert version is not None
        assert version[1] in row, package
