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


def test_replicas_that_drift_are_told_at_that_save_and_no_checkpoint_mixes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    seen = importlib.import_module("torture").drift(tmp_path, 2, 0, random.Random(2))
    assert seen["compared"] > 100
    assert not seen["told late or never"]
    assert not seen["mixed"]
