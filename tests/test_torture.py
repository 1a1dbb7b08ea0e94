"""A short run of scripts/torture.py; the long one is a script of its own."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.mark.parametrize(("world", "kills"), [(1, 6), (2, 6)])
def test_random_kills_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, kills: int) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # the ranks' processes inherit it and find the module there
    seen = importlib.import_module("torture").torture(tmp_path, world, kills, random.Random(world))
    assert seen["all ranks killed"] + seen["one rank killed"] == kills
    assert seen["steps reached"] > 0
    assert not seen["lost or damaged"]
    assert not seen["hung"]
    assert not seen["bits differ at the end"]
