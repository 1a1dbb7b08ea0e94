"""scripts/wording finds what it should, and little else."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = [re.compile(line) for line in (ROOT / "scripts/unusual_words.txt").read_text().splitlines()]


def found(text: str) -> bool:
    return any(pattern.search(text) for pattern in PATTERNS)


# In two parts, because the check reads this file too.
@pytest.mark.parametrize(
    "text", ["anew", "what it tells of", "the run goes on", "the save behind it", "Whoever", "a file lies in the way"]
)
def test_stumbling_blocks_are_found(text: str) -> None:
    assert found(text)


@pytest.mark.parametrize(
    "text", ["a new one", "renewed", "the layout behind an export", "a file that lies", "based on"]
)
def test_ordinary_words_are_not(text: str) -> None:
    assert not found(text)


def test_the_tree_is_clean() -> None:
    done = subprocess.run([ROOT / "scripts" / "wording"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
