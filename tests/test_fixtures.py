"""Checkpoints that earlier versions have written load bit for bit; see `scripts/make_fixtures.py`."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from hydra_ckpt import CheckpointingConfig
from hydra_ckpt.cli import app
from hydra_ckpt.store.catalog import Checkpoint, scan
from hydra_ckpt.testing import run_distributed
from tests.fixture_cases import CASES, EPOCH, STEP, describe

FIXTURES = Path(__file__).parent / "fixtures"
STORED = sorted(str(path.relative_to(FIXTURES)).removesuffix(".tar.gz") for path in FIXTURES.glob("*/*.tar.gz"))


def unpack(stored: str, directory: Path) -> Path:
    with tarfile.open(FIXTURES / f"{stored}.tar.gz") as archive:
        archive.extractall(directory, filter="data")
    return directory / "checkpoints"


def restore(name: str, directory: Path) -> dict[str, Any]:
    """Load a case into new objects; returns what this rank holds before and after."""
    if name in ("lora", "two_adapters"):
        pytest.importorskip("peft")
    case, rank = CASES[name], dist.get_rank() if dist.is_initialized() else 0
    state = case.build()
    before = describe(state)
    config = CheckpointingConfig(checkpoint_dir=str(directory), restore_from="latest", **case.load_options)
    with config.build(0 if case.is_pipeline else rank, 0, rank if case.is_pipeline else 0) as engine:
        report = engine.load(state)
        assert report is not None
    found = {"before": before, "after": describe(state), "at": (report.step, report.epoch)}
    return {**found, "rederived": report.rederived, "skipped": report.skipped}


def test_there_are_fixtures_of_every_case() -> None:
    assert {stored.split("/")[1] for stored in STORED} == set(CASES)
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*")) < 2_000_000


@pytest.mark.parametrize("stored", STORED)
def test_what_an_earlier_version_saved_is_restored_bit_for_bit(tmp_path: Path, stored: str) -> None:
    name = stored.split("/")[1]
    directory = unpack(stored, tmp_path)
    world_size = CASES[name].world_size
    ranks = run_distributed(restore, world_size, name, directory) if world_size > 1 else [restore(name, directory)]
    wanted = json.loads((FIXTURES / f"{stored}.json").read_text())
    for found, expected in zip(ranks, wanted, strict=True):
        assert found["after"] == expected
        assert found["before"] != expected
        assert found["at"] == (STEP, EPOCH)
        assert (tuple(found["rederived"]), tuple(found["skipped"])) == ((), ())


@pytest.mark.parametrize("stored", STORED)
def test_what_an_earlier_version_saved_is_whole(tmp_path: Path, stored: str) -> None:
    directory = unpack(stored, tmp_path)
    outcome = CliRunner().invoke(app, ["verify", str(directory)])
    assert outcome.exit_code == 0, outcome.output
    [checkpoint] = scan(directory).checkpoints
    exported = checkpoint.manifest.exports
    case = CASES[stored.split("/")[1]]
    whole = case.adds_export or case.options.get("is_peft") or case.options.get("save_consolidated") == "always"
    assert bool(exported) == bool(whole)
    assert all((checkpoint.path / place).is_dir() for place in exported.values())


def test_metrics_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    for stored in (stored for stored in STORED if stored.endswith("/metrics")):
        directory = unpack(stored, tmp_path / stored)
        checkpoint = Checkpoint.open(directory / f"epoch_{EPOCH}_step_{STEP}")
        assert checkpoint.metrics == {"loss": 0.5, "default": 2.0, "accuracy": 0.25}
        assert (directory / "BEST").resolve() == checkpoint.path.resolve()
