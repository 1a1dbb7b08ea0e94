"""A short run of scripts/torture.py; the long one is a script of its own."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "torture.py"


@pytest.mark.parametrize(("world", "kills"), [(1, 6), (2, 6)])
def test_random_kills_lose_nothing(tmp_path: Path, world: int, kills: int) -> None:
    spec = importlib.util.spec_from_file_location("torture", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    torture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(torture)
    seen = torture.torture(tmp_path, world, kills, random.Random(world))
    assert seen["all ranks killed"] + seen["one rank killed"] == kills
    assert seen["steps reached"] > 0
    assert not seen["lost or damaged"]
    assert not seen["hung"]
    assert not seen["bits differ at the end"]
