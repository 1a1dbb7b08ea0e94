"""What a reader can find is on the device: a power failure loses all writes and names that were not flushed after.

`test_crash.py` replays what happened, and takes every write as done. Here only what was flushed counts: a file's bytes
once the file is synced after them, a name once its directory is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from hydra_ckpt import AppState, Checkpointer, CheckpointError, CheckpointingConfig, SaveFailedError
from hydra_ckpt.files import Files
from hydra_ckpt.layout import plan
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.store.fenced import FencedFiles
from hydra_ckpt.store.owner import Owner
from hydra_ckpt.testing import Operation, RecordingFiles, run_distributed

FIRST = "epoch_0_step_1"


@dataclass
class Device:
    """What a power failure would lose, after the operations given to `apply`.

    Attributes:
        bytes: Files with bytes that were not flushed.
        entries: Names that were created, replaced or moved, and whose directory was not flushed.
    """

    bytes: set[Path] = field(default_factory=set)
    entries: set[Path] = field(default_factory=set)

    def apply(self, operation: Operation) -> None:
        path = operation.path
        match operation.kind:
            case "write_at" | "write_runs":
                self.bytes.add(path)
            case "sync":
                self.bytes.discard(path)
            case "allocate":
                self.entries.add(path)
                if operation.args[0]:
                    self.bytes.add(path)
            case "make_dir" | "symlink":
                self.entries.add(path)
            case "sync_dir":
                self.entries = {entry for entry in self.entries if entry.parent != path}
            case "rename" | "replace":
                self._move(path, operation.args[0])
            case "unlink" | "remove_tree":
                self.bytes = {file for file in self.bytes if not file.is_relative_to(path)}
                self.entries = {entry for entry in self.entries if not entry.is_relative_to(path)}
            case other:
                raise AssertionError(f"what does {other} lose?")

    def _move(self, source: Path, target: Path) -> None:
        def moved(path: Path) -> Path:
            return target / path.relative_to(source) if path.is_relative_to(source) else path

        self.bytes = {moved(path) for path in self.bytes}
        self.entries = {moved(path) for path in self.entries} | {target}

    def lost_below(self, directory: Path) -> list[str]:
        found = {path for path in self.bytes | self.entries if path.is_relative_to(directory) and path != directory}
        return sorted(str(path.relative_to(directory)) for path in found)


def make_state() -> AppState:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return AppState(model, optimizer, extras={"ema": torch.optim.swa_utils.AveragedModel(model)})


def engine(root: Path, files: RecordingFiles, rank: int = 0, **options: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=str(root), **options)
    return Checkpointer(config.resolve(), dp_rank=rank, tp_rank=0, pp_rank=0, files=files)


def recorded(root: Path, save: Callable[[Checkpointer, AppState], None], **options: object) -> list[Operation]:
    files = RecordingFiles()
    with engine(root, files, **options) as checkpointer:
        save(checkpointer, make_state())
        checkpointer.drain()
    return files.operations


def check_publishing(operations: list[Operation], root: Path, target: Path) -> None:
    """At the rename everything below is on the device; before a pointer leads to it, so is its name."""
    device, published, finished, pointers = Device(), False, False, {root / "LATEST", root / "BEST"}
    for operation in operations:
        if operation.kind == "rename" and operation.args[0] == target:
            assert device.lost_below(operation.path) == [], "published before it was flushed"
            published = True
        if operation.kind == "replace" and operation.args[0] == root / "LATEST":
            assert published
            assert target not in device.entries, "LATEST is moved before the checkpoint's name was flushed"
        if operation.kind == "unlink" and operation.path == target / names.TOKEN:  # it says that pointers may be old
            assert not pointers & device.entries, "the token is removed before the pointers were flushed"
            finished = True
        device.apply(operation)
    assert published
    assert finished
    assert device.lost_below(target) == []
    assert not {target, *pointers} & device.entries


@pytest.mark.parametrize("mode", ["always", "never"])
def test_a_checkpoint_is_flushed_before_it_has_its_name_and_that_before_latest(tmp_path: Path, mode: str) -> None:
    def save(checkpointer: Checkpointer, state: AppState) -> None:
        checkpointer.save(state, step=1, metrics={"loss": 1.0}).result()

    check_publishing(recorded(tmp_path, save, save_consolidated=mode), tmp_path, tmp_path / FIRST)


def _two_ranks(root: Path, mode: str) -> list[Operation]:
    import torch.distributed as dist

    files = RecordingFiles()
    with engine(root, files, dist.get_rank(), save_consolidated=mode) as checkpointer:
        checkpointer.save(make_state(), step=1, metrics={"loss": 1.0}).result()
        checkpointer.drain()
    return files.operations


@pytest.mark.parametrize("mode", ["always", "never"])
def test_the_same_of_two_ranks(tmp_path: Path, mode: str) -> None:
    found = [operation for operations in run_distributed(_two_ranks, 2, tmp_path, mode) for operation in operations]
    check_publishing(sorted(found, key=lambda operation: operation.at), tmp_path, tmp_path / FIRST)


def test_an_export_is_flushed_before_the_manifest_lists_it(tmp_path: Path) -> None:
    def save(checkpointer: Checkpointer, state: AppState) -> None:
        checkpointer.save(state, step=1).result()
        checkpointer.save(state, step=1, is_final=True).result()

    device, replaced, manifest = Device(), 0, tmp_path / FIRST / names.MANIFEST
    for operation in recorded(tmp_path, save):
        if operation.kind == "replace" and operation.args[0] == manifest:
            replaced += 1
            assert operation.path not in device.bytes
            assert device.lost_below(tmp_path / FIRST) == []
        device.apply(operation)
    assert replaced == 1
    assert device.lost_below(tmp_path / FIRST) == []
    assert manifest not in device.entries


def test_metrics_that_are_added_are_flushed(tmp_path: Path) -> None:
    def save(checkpointer: Checkpointer, state: AppState) -> None:
        checkpointer.save(state, step=1).result()
        checkpointer.add_metrics(1, 0, {"loss": 1.0})

    device, target = Device(), tmp_path / FIRST / "metrics.json"
    for operation in recorded(tmp_path, save):
        if operation.kind == "replace" and operation.args[0] == target:
            assert operation.path not in device.bytes
        device.apply(operation)
    assert target.is_file()
    assert target not in device.entries


# -- the lease, read again before what others would see -------------------------------------------------------------


class Overtaken(RecordingFiles):
    """Another run takes the directory as soon as a matching operation begins."""

    def __init__(self, root: Path, when: Callable[[Operation], bool]) -> None:
        super().__init__()
        self._root, self._when, self.overtaken = root, when, False

    def report(self, operation: Operation) -> None:
        super().report(operation)
        if not self.overtaken and self._when(operation):
            self.overtaken = True
            (self._root / names.OWNER).write_bytes(Owner("0" * 12, "elsewhere", 1, 0.0).to_bytes())


def test_a_run_that_loses_the_lease_before_the_rename_publishes_nothing(tmp_path: Path) -> None:
    files = Overtaken(tmp_path, lambda operation: operation.path.name == names.MANIFEST and operation.kind == "sync")
    with engine(tmp_path, files) as checkpointer, pytest.raises(SaveFailedError, match="elsewhere"):
        checkpointer.save(make_state(), step=1).result()
    assert files.overtaken
    assert not scan(tmp_path).checkpoints
    assert not [operation for operation in files.operations if operation.kind == "rename"]


def test_a_run_that_loses_the_lease_adds_no_export(tmp_path: Path) -> None:
    """Neither files nor a manifest of it appear in the checkpoint, which the other run may be deleting."""
    armed: list[bool] = []
    files = Overtaken(
        tmp_path, lambda operation: bool(armed) and operation.kind == "sync" and "export" in str(operation.path)
    )
    with engine(tmp_path, files) as checkpointer:
        state = make_state()
        checkpointer.save(state, step=1).result()
        checkpointer.drain()
        armed.append(True)
        before = len(files.operations)
        with pytest.raises(SaveFailedError, match="elsewhere"):
            checkpointer.save(state, step=1, is_final=True).result()
    assert files.overtaken
    [found] = scan(tmp_path).checkpoints
    assert found.manifest.exports == {}
    assert not (found.path / "model" / names.CONSOLIDATED).exists()
    assert not [operation for operation in files.operations[before:] if operation.kind in ("rename", "replace")]


class _LostError(CheckpointError):
    """The lease is lost."""


def test_without_the_lease_nothing_is_renamed_replaced_or_removed(tmp_path: Path) -> None:
    def fence() -> None:
        raise _LostError

    files, one, other = FencedFiles(Files(), fence), tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.write_text("2")
    (tmp_path / "tree").mkdir()
    for change in (
        lambda: files.rename(one, tmp_path / "new"),
        lambda: files.replace(one, other),
        lambda: files.unlink(one),
        lambda: files.remove_tree(tmp_path / "tree"),
    ):
        with pytest.raises(_LostError):
            change()
    assert (one.read_text(), other.read_text(), (tmp_path / "tree").is_dir()) == ("1", "2", True)
    assert not (tmp_path / "new").exists()
    files.unlink(tmp_path / "missing")  # there is nothing to lose
    files.write_new(tmp_path / "new", b"3")  # adding does no harm


def test_a_run_that_loses_the_lease_after_the_rename_does_not_move_latest(tmp_path: Path) -> None:
    armed: list[bool] = []
    files = Overtaken(
        tmp_path, lambda operation: bool(armed) and operation.kind == "sync_dir" and operation.path == tmp_path
    )
    with engine(tmp_path, files) as checkpointer:
        state = make_state()
        checkpointer.save(state, step=1).result()
        checkpointer.drain()
        armed.append(True)
        before = len(files.operations)
        with contextlib.suppress(CheckpointError):
            checkpointer.save(state, step=2).result()
    assert files.overtaken
    assert not [item for item in files.operations[before:] if item.kind == "replace"]
    latest = scan(tmp_path).pointed("LATEST")
    assert latest is not None
    assert latest.step == 1


# -- what is left over ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pointer", ["LATEST", "BEST"])
def test_a_pointer_that_was_about_to_be_replaced_is_swept(tmp_path: Path, pointer: str) -> None:
    """A crash between the new link and the replacement leaves the link under its hidden name."""
    with engine(tmp_path, RecordingFiles()) as checkpointer:
        checkpointer.save(make_state(), step=1, metrics={"loss": 1.0}).result()
    left = [tmp_path / f".{pointer}.{names.nonce()}", tmp_path / f".{pointer}.txt.{names.nonce()}"]
    left[0].symlink_to(FIRST)
    left[1].write_text(f"{FIRST}\n")
    own = tmp_path / f".{pointer}.mine"
    own.write_text("a user's")
    with engine(tmp_path, RecordingFiles()) as checkpointer:
        checkpointer.start(make_state())
        checkpointer.save(make_state(), step=2).result()
    assert not [path for path in left if path.is_symlink() or path.exists()]
    assert own.read_text() == "a user's"
    assert scan(tmp_path).pointed("LATEST") is not None


# -- receipts ------------------------------------------------------------------------------------------------------


def _save_another_plan(root: Path) -> str:
    import torch.distributed as dist

    rank = dist.get_rank()
    with engine(root, RecordingFiles(), rank, save_consolidated="always") as checkpointer:
        state = make_state()
        checkpointer.start(state)
        make = checkpointer._saver._contents.make

        def other(*args: object, **options: object) -> object:
            content, sources = make(*args, **options)
            if rank == 1:
                object.__setattr__(content.plan, "fingerprint", plan.fingerprint(["another"]))
            return content, sources

        checkpointer._saver._contents.make = other
        try:
            checkpointer.save(state, step=1).result()
        except SaveFailedError as error:
            return str(error)
    return "published"


def test_a_rank_with_another_plan_is_found_by_its_receipt(tmp_path: Path) -> None:
    for said in run_distributed(_save_another_plan, 2, tmp_path):
        assert "rank 1 used another write plan" in said
    assert not scan(tmp_path).checkpoints
