"""What all tests share: the modules of the server that they fork processes from, time limits, and their order."""

from __future__ import annotations

import gc
import os

import pytest

from hydra_ckpt.testing.processes import PATIENCE, PRELOADED

PRELOADED += ["hydra._internal.hydra", "peft", "pytest", "transformers.modeling_utils"]

LONG = ("test_docs", "test_launch", "test_launchers", "test_recipes", "test_recipe", "test_copied_runs", "test_torture")
"""Files with the longest single tests. They come first, so that no process is left with one at the end."""

if PATIENCE != 1:
    os.environ.setdefault("PYTEST_TIMEOUT", str(600 * PATIENCE))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keep the garbage collector from searching what was imported, a million objects, in each test."""
    gc.collect()
    gc.freeze()
