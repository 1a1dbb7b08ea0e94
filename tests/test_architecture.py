"""docs/architecture.md and CONTRIBUTING.md name what there is."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "hydra_ckpt"


def test_every_package_has_a_line() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text()
    table = text.split("## The packages")[1].split("##")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= named, "add a line to docs/architecture.md"
    for name in named:
        assert (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file(), f"{name} does not exist"


def test_the_layers_are_those_of_the_contract() -> None:
    contract = (REPOSITORY / "pyproject.toml").read_text().split('name = "imports point down"')[1].split("[[")[0]
    layers = contract.split("\nlayers = [\n")[1].split("\n]")[0]
    text = (REPOSITORY / "docs/architecture.md").read_text()
    block = text.split("## The direction of imports")[1].split("```text\n")[1].split("```")[0]
    assert [set(re.findall(r"\w+", line)) for line in block.splitlines()] == [
        set(re.findall(r"\w+", line)) for line in layers.splitlines()
    ]


def test_the_files_to_touch_exist() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:hydra_ckpt|tests|docs|scripts|conf)/[\w/.]+)`", text)
    assert len(paths) > 20
    for path in paths:
        if not re.search(r"NAME|VERB|/integrations/", path):
            assert (REPOSITORY / path).exists(), path


def test_the_glossary_s_types_exist_and_no_term_is_there_twice() -> None:
    glossary = (REPOSITORY / "docs/concepts.md").read_text().split("## Terms")[1].split("\n## ")[0]
    classes = {
        name for path in PACKAGE.rglob("*.py") for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE)
    }
    types = set(re.findall(r"\(`(\w+)`\)", glossary))
    assert len(types) > 5
    assert types <= classes
    terms = [term for row in re.findall(r"^\| (.*?) \|", glossary, re.MULTILINE) for term in row.split(", ")]
    terms = [term for term in terms if term != "term" and not set(term) <= {"-"}]
    assert len(terms) == len(set(terms)) > 50
