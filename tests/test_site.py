"""The documentation site shows everything that users import, and its check finds what it should."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

import hydra_ckpt
import hydra_ckpt.storage
import hydra_ckpt.testing

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "site"
pages = SimpleNamespace(**runpy.run_path(str(SCRIPTS / "pages.py")))


def test_the_api_pages_show_every_public_name() -> None:
    text = "\n".join(page.read_text() for page in (SCRIPTS / "pages").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    for module in (hydra_ckpt, hydra_ckpt.storage, hydra_ckpt.testing):
        assert {f"{module.__name__}.{name}" for name in module.__all__} <= shown
    assert {f"hydra_ckpt.state.adapter.{name}" for name in ("StateDictAdapter", "StackedExperts")} <= shown


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("site") / "source"
    pages.write(written)
    return written


def test_every_page_is_in_the_navigation(source: Path) -> None:
    assert pages.not_in_navigation(source) == []
    lost = source / "pages/design/003-lost.md"
    lost.write_text("# Lost\n")
    assert pages.not_in_navigation(source) == ["design/003-lost.md"]
    lost.unlink()


def test_the_tools_page_has_every_verb(source: Path) -> None:
    text = (source / "pages/api-tool.md").read_text()
    for verb in ("list", "show", "verify", "export", "diff", "prune", "repair"):
        assert f"## `hydra-ckpt {verb}`" in text


def test_links_are_translated_outside_code() -> None:
    text = "[a](docs/dcp.md#x) [b](tests/test_site.py) [c](#here) [d](https://e.org)\n```text\n[a](docs/dcp.md)\n```\n"
    assert pages.translated("README.md", text) == (
        "[a](dcp.md#x) [b](source/tests/test_site.py.txt) [c](#here) [d](https://e.org)\n```text\n[a](docs/dcp.md)\n```\n"
    )
    assert pages.translated("docs/design/001.md", "[p](../protocol.md) [r](../../README.md)") == (
        "[p](../protocol.md) [r](../index.md)"
    )


def test_the_check_finds_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#there">.</a><a href="b.html#gone">.</a><a href="#no">.</a>')
    (tmp_path / "b.html").write_text(
        '<p id="there"><img src="c.png"><a href="https://example.org">.</a><a href="./">.</a>'
    )
    assert sorted(pages.broken(tmp_path)) == ["a.html: #no", "a.html: b.html#gone", "b.html: ./", "b.html: c.png"]
