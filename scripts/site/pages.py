"""The sources of the documentation site, and a check of the built site; scripts/docs calls both.

Links in the Markdown files are relative to the repository, so that they also work in an editor or on a code host. The
site is laid out differently (README.md is its index.md), so they are translated here. A file of the repository that is
not a page, such as a test, is copied into the site as plain text.

    python scripts/site/pages.py write    # docs/ and scripts/site/ to build/site-source/
    python scripts/site/pages.py check    # build/site/: every page is in the navigation, every link leads somewhere
"""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCE, SITE = ROOT / "build" / "site-source", ROOT / "build" / "site"
# Pages that are in the repository's root, and their names in the site.
AT_THE_ROOT = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def page_of(path: str) -> str | None:
    """The site's page for a file of the repository; None if it is not a page."""
    if path in AT_THE_ROOT:
        return AT_THE_ROOT[path]
    return path.removeprefix("docs/") if path.startswith("docs/") and path.endswith(".md") else None


def linked_file(path: str, link: str) -> str:
    """The file, relative to the repository, that a link in a file of the repository leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def other_files(path: str, markdown: str) -> set[str]:
    """The files of the repository, other than pages, that a page links to."""
    targets = {linked_file(path, link) for link, _ in _LINK.findall(_FENCE.sub("", markdown))}
    return {target for target in targets if page_of(target) is None and (ROOT / target).is_file()}


def translated(path: str, markdown: str) -> str:
    """A page's Markdown with the links that the site needs; code blocks are left as they are."""
    here = posixpath.dirname(page_of(path) or path) or "."

    def link(match: re.Match[str]) -> str:
        target = linked_file(path, match[1])
        page = page_of(target) or (f"source/{target}.txt" if (ROOT / target).is_file() else None)
        return match[0] if page is None else posixpath.relpath(page, here) + (match[2] or "")

    fences = _FENCE.findall(markdown)
    texts = [_LINK.sub(link, text) for text in _FENCE.split(markdown)]
    return "".join(text + fence for text, fence in zip(texts, [*fences, ""], strict=True))


def write(target: Path) -> None:
    """Write the site's configuration and pages into a directory, which is replaced."""
    shutil.rmtree(target, ignore_errors=True)
    pages = target / "pages"
    shutil.copytree(HERE / "pages", pages)
    shutil.copy(HERE / "site.yml", target)
    put(pages / "api-tool.md", tool_page())
    for file in [*(ROOT / name for name in AT_THE_ROOT), *(ROOT / "docs").rglob("*.md")]:
        path, markdown = file.relative_to(ROOT).as_posix(), file.read_text()
        put(pages / str(page_of(path)), translated(path, markdown))
        for other in other_files(path, markdown):
            put(pages / f"source/{other}.txt", (ROOT / other).read_text())


def tool_page() -> str:
    """The page of the hydra-ckpt tool, from its own help texts."""
    command = [sys.executable, "-m", "typer", "hydra_ckpt.cli", "utils", "docs", "--name", "hydra-ckpt"]
    done = subprocess.run([*command, "--title", "The tool"], cwd=ROOT, capture_output=True, text=True, check=True)
    text = re.sub(r"\*\*Usage\*\*:\n\n```console\n\$ (.*)\n```\n", r"```text\n\1\n```\n", done.stdout)
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text)  # cut short, and the headings name them
    return re.sub(r"^\* `--(help|install-completion|show-completion)`.*\n", "", text, flags=re.MULTILINE)


def put(path: Path, text: str) -> None:
    """Write a file, and the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class _Links(HTMLParser):
    """The local links and the anchors of one page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag links to, and the anchor it sets."""
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        link = values.get("src") if tag in ("img", "script") else values.get("href")
        if link and tag in ("a", "img", "script", "link") and not urlsplit(link).scheme:
            self.targets.add(link)


def broken(site: Path) -> list[str]:
    """The links of built pages, docstrings' included, that lead nowhere, as `page: link`."""
    # The page for errors is shown at any address, so its links start at the root of a server.
    pages = {path: _Links(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    found = []
    for path, page in pages.items():
        for link in sorted(page.targets):
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def not_in_navigation(source: Path) -> list[str]:
    """The pages that the navigation does not name."""
    navigation = (source / "site.yml").read_text().split("\nnav:\n")[1]
    pages = {path.relative_to(source / "pages").as_posix() for path in (source / "pages").rglob("*.md")}
    return sorted(pages - set(re.findall(r"[\w/-]+\.md", navigation)))


def check() -> list[str]:
    """What is wrong with the site that was built last."""
    return [
        *(f"not in the navigation of scripts/site/site.yml: {page}" for page in not_in_navigation(SOURCE)),
        *(f"broken link in {link}" for link in broken(SITE.resolve())),
    ]


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        write(SOURCE)
    elif sys.argv[1:] == ["check"]:
        sys.exit("\n".join(check()) or 0)
    else:
        sys.exit(__doc__)
