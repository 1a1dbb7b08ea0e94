"""Crash replay: the machine may stop after any operation on disk, and nothing published is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hydra_ckpt import AppState, Checkpointer, CheckpointingConfig
from hydra_ckpt.storage.verification import checks, findings
from hydra_ckpt.store.catalog import Checkpoint, scan
from hydra_ckpt.store.names import is_checkpoint_name
from hydra_ckpt.testing import Operation, RecordingFiles, replay, run_distributed


def _state() -> AppState:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return AppState(model, optimizer)


def _build(root: Path, files: RecordingFiles | None = None, **options: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=str(root), **options)
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Checkpointer(config.resolve(), dp_rank=rank, tp_rank=0, pp_rank=0, files=files)


def _record(root: Path, story: str) -> tuple[list[Operation], Path]:
    """Do the story's first part, copy the directory, record the second part."""
    state, files = _state(), RecordingFiles()
    options = {"save": {"save_consolidated": "always"}, "export": {}, "prune": {"max_recent_checkpoints": 1}}[story]
    with _build(root, files, **options) as checkpointer:
        checkpointer.save(state, step=1, metrics={"loss": 2.0}).result()
        if story == "export":
            checkpointer.save(state, step=2, metrics={"loss": 1.0}).result()
        checkpointer.drain()
        before = root.with_name("before")
        if checkpointer.group.rank == 0:
            shutil.copytree(root, before, symlinks=True)
        checkpointer.on_rank_0("copied", lambda: True)
        files.operations.clear()
        if story == "export":
            checkpointer.save(state, step=2, is_final=True).result()
        else:
            checkpointer.save(state, step=2, metrics={"loss": 1.0}).result()
    return list(files.operations), before


def _verifies(checkpoint: Checkpoint) -> bool:
    manifest = checkpoint.manifest
    checkpoint.check_files()
    return not list(findings(checkpoint.path, checks(checkpoint.path, manifest.files, manifest.digests)))


def _check_invariants(root: Path, must_stay: set[str]) -> None:
    catalog = scan(root)
    latest = catalog.pointed("LATEST")
    assert latest is not None, "LATEST is lost"
    assert not catalog.damaged, catalog.damaged
    assert all(_verifies(checkpoint) for checkpoint in catalog.checkpoints)
    assert must_stay <= {checkpoint.name for checkpoint in catalog.checkpoints}
    for pointer in root.iterdir():
        if pointer.is_symlink() and pointer.name in ("LATEST", "BEST"):
            assert is_checkpoint_name(pointer.readlink().name)
    fresh = _state()
    with _build(root, save_consolidated="always") as checkpointer:
        report = checkpointer.start(fresh)
        assert report is not None
        assert report.step >= latest.step
        saved = checkpointer.save(fresh, step=3).result()
    assert saved is not None
    assert _verifies(saved)
    assert scan(root).pointed("LATEST") == saved
    assert not [path for path in root.iterdir() if ".draft-" in path.name or ".deleting-" in path.name]


STAYS = {"save": {"epoch_0_step_1"}, "export": {"epoch_0_step_1", "epoch_0_step_2"}, "prune": set()}


def _replay_every_prefix(
    tmp_path: Path, record: Callable[[Path], tuple[list[Operation], Path]], stays: set[str], every: int
) -> int:
    root = tmp_path / "recorded"
    operations, before = record(root)
    operations.sort(key=lambda operation: operation.at)
    for length in {*range(0, len(operations), every), len(operations)}:
        for torn in (False, True):
            if torn and (length == 0 or operations[length - 1].kind not in ("write_at", "remove_tree")):
                continue
            crashed = tmp_path / "crashed"
            shutil.copytree(before, crashed, symlinks=True)
            replay(operations[:length], root, crashed, torn=torn)
            try:
                _check_invariants(crashed, stays)
            except Exception as error:
                last = operations[length - 1] if length else None
                raise AssertionError(f"stopped after operation {length} ({last}), torn={torn}") from error
            shutil.rmtree(crashed)
    return len(operations)


# A prime, so that the lengths tried meet operations of all kinds; `--slow` tries all.
EVERY = pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])


@EVERY
@pytest.mark.parametrize("story", ["save", "export", "prune"])
def test_every_prefix_of_one_rank(tmp_path: Path, story: str, every: int) -> None:
    count = _replay_every_prefix(tmp_path, lambda root: _record(root, story), STAYS[story], every)
    assert count > 20


@EVERY
@pytest.mark.parametrize("story", ["save", "export"])
def test_every_prefix_of_two_ranks(tmp_path: Path, story: str, every: int) -> None:
    def record(root: Path) -> tuple[list[Operation], Path]:
        recorded = run_distributed(_record, 2, root, story)
        return [operation for operations, _ in recorded for operation in operations], recorded[0][1]

    count = _replay_every_prefix(tmp_path, record, STAYS[story], every)
    assert count > 30


def test_best_is_moved_after_a_crash_before_it(tmp_path: Path) -> None:
    root, files = tmp_path / "run", RecordingFiles()
    state = _state()
    with _build(root, files) as checkpointer:
        checkpointer.save(state, step=1, metrics={"loss": 2.0}).result()
        checkpointer.drain()
        shutil.copytree(root, tmp_path / "crashed", symlinks=True)
        files.operations.clear()
        checkpointer.save(state, step=2, metrics={"loss": 1.0}).result()
    moving = next(
        number
        for number, operation in enumerate(files.operations)
        if operation.kind == "symlink" and "BEST" in operation.path.name
    )
    replay(files.operations[:moving], root, tmp_path / "crashed")
    assert (tmp_path / "crashed" / "BEST").readlink() == Path("epoch_0_step_1")
    with _build(tmp_path / "crashed") as checkpointer:
        checkpointer.start(_state())
    assert (tmp_path / "crashed" / "BEST").readlink() == Path("epoch_0_step_2")
