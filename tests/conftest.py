"""What all tests share: a server to fork processes from that has imported what most of them need."""

from __future__ import annotations

import gc

import pytest

from hydra_ckpt.testing.processes import PRELOADED

PRELOADED += ["hydra._internal.hydra", "peft", "pytest", "transformers.modeling_utils"]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keep the garbage collector from searching what was imported, a million objects, in each test."""
    gc.collect()
    gc.freeze()
