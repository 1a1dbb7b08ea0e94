"""Faults around a save: a full disk, a quota, a directory that vanishes, local disks, dead and stuck ranks."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hydra_ckpt import AppState, CheckpointError, CheckpointingConfig, SaveFailedError
from hydra_ckpt.checkpointer import Checkpointer
from hydra_ckpt.files import Files
from hydra_ckpt.storage.memory import available_bytes
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.testing import FaultyFiles, Operation, run_distributed
from hydra_ckpt.testing.processes import PATIENCE, forkserver

LIMIT_MINUTES = 0.05 * PATIENCE


def make_state(width: int = 8) -> AppState:
    torch.manual_seed(0)
    return AppState(nn.Linear(width, 3))


def build(directory: Path, files: Files | None = None, **options: Any) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=str(directory), **options)
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Checkpointer(config.resolve(), dp_rank=rank, tp_rank=0, pp_rank=0, files=files)


def steps(directory: Path) -> list[int]:
    return [item.step for item in scan(directory).checkpoints]


def failure(engine: Checkpointer, state: AppState, step: int) -> SaveFailedError:
    with pytest.raises(SaveFailedError) as caught:
        engine.save(state, step=step).result()
    return caught.value


# -- room ----------------------------------------------------------------------------------------------------------

FULL_DISK = """
import sys
import time
from pathlib import Path
from tests.test_faults import build, failure, make_state, steps

root = Path(sys.argv[1])
small, large = make_state(8), make_state(1 << 17)  # 1.5 MB each
with build(root / "run", max_recent_checkpoints=1, is_async=bool(int(sys.argv[2]))) as engine:
    engine.save(large, step=1).result()
    print(failure(engine, large, 2))
    assert steps(root / "run") == [1]
    engine.save(small, step=3).result()
    engine.drain()
    assert steps(root / "run") == [3]  # which made room, as soon as it is deleted
    while any(path.is_dir() for path in (root / "run").glob(".*")):
        time.sleep(0.01)
    engine.save(large, step=4).result()
    engine.drain()
    filler = root / "filler"
    try:
        with filler.open("wb") as file:
            while True:
                file.write(b"x" * 4096)
    except OSError:
        pass
    print(failure(engine, small, 5))
    assert steps(root / "run") == [4]
    filler.unlink()
    engine.save(small, step=6).result()
    engine.drain()
    print("steps", steps(root / "run"))
"""


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_disk_that_is_full(tmp_path: Path, is_async: bool) -> None:
    (tmp_path / "program.py").write_text(FULL_DISK)
    (tmp_path / "disk").mkdir()
    program = f"{sys.executable} {tmp_path}/program.py {tmp_path}/disk {int(is_async)}"
    inside = f"mount -t tmpfs -o size=2500k none {tmp_path}/disk && exec {program}"
    probe = subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True)
    if shutil.which("unshare") is None or probe.returncode:
        pytest.skip("this system lets no user mount a small disk")
    found = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inside],
        capture_output=True,
        text=True,
        check=False,
        timeout=120 * PATIENCE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert found.returncode == 0, found.stderr
    first, second, last = found.stdout.splitlines()
    assert "GB free and this save needs 0.00157 GB" in first
    assert "checkpoint.max_recent_checkpoints" in first
    assert "saving step 5 failed: rank 0: " in second
    assert "ree some space" in second
    assert last == "steps [6]"


def test_memory_for_the_copy_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state()
    with build(tmp_path, is_async=True) as engine:
        monkeypatch.setattr("hydra_ckpt.saving.staged.available_bytes", lambda: 10)
        error = failure(engine, state, 1)
        assert "an asynchronous save needs" in str(error)
        assert "checkpoint.is_async=false" in str(error)
        monkeypatch.undo()
        engine.save(state, step=2).result()
        monkeypatch.setattr("hydra_ckpt.saving.staged.available_bytes", lambda: 10)
        engine.save(state, step=3).result()  # the buffer is there already
    assert steps(tmp_path) == [2, 3]


def test_a_control_groups_limit_counts(tmp_path: Path) -> None:
    free = available_bytes(tmp_path)
    assert free > 0
    for name, text in {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 1\nfile 300\n"}.items():
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 400


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EACCES])
def test_a_pointer_that_cannot_be_moved_takes_nothing_back(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    state, broken = make_state(), [False]
    pointers = ("symlink", "replace")
    files = FaultyFiles(lambda operation: number if broken[0] and operation.kind in pointers else None)
    with build(tmp_path, files) as engine:
        engine.save(state, step=1).result()
        broken[0] = True
        assert engine.save(state, step=2).result().step == 2
        assert "is published, but its pointers could not be moved" in caplog.text
        assert (tmp_path / "LATEST").readlink() == Path("epoch_0_step_1")
        broken[0] = False
        engine.save(state, step=3).result()
        assert (tmp_path / "LATEST").readlink() == Path("epoch_0_step_3")
    assert steps(tmp_path) == [1, 2, 3]
    with build(tmp_path) as engine:
        assert engine.start(state).step == 3


def test_metrics_that_a_full_disk_does_not_take_are_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = False

    def fails(operation: Operation) -> int | None:
        return errno.ENOSPC if full and operation.kind == "write_at" else None

    with build(tmp_path, FaultyFiles(fails), best_metric_key="loss", retention={"best": 1}) as engine:
        state = make_state()
        for step in (1, 2):
            engine.save(state, step=step, metrics={"loss": 3.0}).result()
        full = True
        engine.add_metrics(1, 0, {"loss": 1.0})
        engine.drain()
        assert "are kept" in caplog.text
        assert engine.pointed("BEST").metrics == {"loss": 3.0}  # type: ignore[union-attr]
        full = False
        engine.save(state, step=3, metrics={"loss": 2.0}).result()
        engine.drain()
        # In time for retention: what is best by the metrics that came late stays.
        assert {item.name: item.metrics["loss"] for item in scan(tmp_path).checkpoints} == {
            "epoch_0_step_1": 1.0,
            "epoch_0_step_3": 2.0,
        }
        assert engine.pointed("BEST").step == 1  # type: ignore[union-attr]
        full = True
        engine.add_metrics(3, 0, {"loss": 0.5})
        engine.drain()
        full = False
    best = scan(tmp_path).pointed("BEST")
    assert best is not None
    assert best.metrics == {"loss": 0.5}
    assert not list(best.path.glob(".metrics*"))


def test_a_quota_is_named_with_its_remedy(tmp_path: Path) -> None:
    files = FaultyFiles(lambda operation: errno.EDQUOT if operation.kind == "allocate" else None)
    with build(tmp_path) as engine:
        engine.save(make_state(), step=1).result()
    with build(tmp_path / "other", files) as engine, pytest.raises(CheckpointError, match="Disk quota exceeded"):
        engine.save(make_state(), step=1).result()


# -- the directory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_directory_removed_under_a_run_is_an_error_and_no_hang(tmp_path: Path, is_async: bool) -> None:
    root, state = tmp_path / "run", make_state()
    with build(root, is_async=is_async) as engine:
        engine.save(state, step=1).result()
        shutil.rmtree(root)
        error = failure(engine, state, 2)
        assert "is gone: it was removed or renamed while this run wrote to it" in str(error)
        assert not root.exists()  # not created again without the user's knowledge
    with build(root) as engine:
        engine.save(state, step=3).result()
    assert steps(root) == [3]


def _local_disk(root: Path) -> tuple[str, float]:
    if dist.get_rank() == 1:
        libc = ctypes.CDLL(None, use_errno=True)
        clone_newns, ms_rec, ms_private = 0x00020000, 0x4000, 1 << 18
        if libc.unshare(clone_newns) or libc.mount(b"none", b"/", None, ms_rec | ms_private, None):
            return "not permitted", 0.0
        assert libc.mount(b"none", str(root).encode(), b"tmpfs", 0, None) == 0
    begun = time.monotonic()
    try:
        with build(root, consolidation_timeout_minutes=LIMIT_MINUTES) as engine:
            engine.save(make_state(), step=1).result()
    except CheckpointError as error:
        return str(error), time.monotonic() - begun
    return "saved", 0.0


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount of one rank's own needs root")
def test_a_local_disk_taken_for_a_shared_one_is_found_out(tmp_path: Path) -> None:
    found = run_distributed(_local_disk, 2, tmp_path)
    if found[1][0] == "not permitted":
        pytest.skip("no mount namespaces here")
    for text, took_s in found:
        assert "must be one directory shared by all hosts, not a local disk" in text
        assert took_s < 60 * LIMIT_MINUTES + 30
    assert steps(tmp_path) == []
    assert not [path for path in tmp_path.iterdir() if ".draft-" in path.name]


# -- ranks ---------------------------------------------------------------------------------------------------------


class Stuck(Files):
    """One that hangs in a write until it is let go."""

    def __init__(self) -> None:
        self.hold_s = 0.0

    def write_new(self, path: Path, data: bytes) -> None:
        if "progress" in str(path) and self.hold_s:
            time.sleep(self.hold_s)
        super().write_new(path, data)


def _stuck(root: Path, is_async: bool) -> list[str]:
    state, files, told = make_state(), Stuck(), []
    with build(root, files, consolidation_timeout_minutes=LIMIT_MINUTES, is_async=is_async) as engine:
        engine.save(state, step=1).result()
        if dist.get_rank() == 1:
            files.hold_s = 60 * LIMIT_MINUTES + 4
        begun = time.monotonic()
        try:
            engine.save(state, step=2).result()
        except SaveFailedError as error:
            told.append(str(error))
        assert time.monotonic() - begun < 3 * 60 * LIMIT_MINUTES
        files.hold_s = 0.0
        dist.barrier()
        engine.save(state, step=3).result()
    return told


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_rank_that_is_stuck_beyond_the_limit(tmp_path: Path, is_async: bool) -> None:
    for told in run_distributed(_stuck, 2, tmp_path, is_async):
        assert len(told) == 1
        assert "saving step 2 failed" in told[0]
        assert "rank 1" in told[0]
    assert steps(tmp_path) == [1, 3]
    assert (tmp_path / "LATEST").readlink() == Path("epoch_0_step_3")


class Deadly(Files):
    """One whose process dies in the middle of a write."""

    def __init__(self) -> None:
        self.armed = False

    def write_new(self, path: Path, data: bytes) -> None:
        if self.armed and "progress" in str(path):
            os.kill(os.getpid(), 9)
        super().write_new(path, data)


def _dying(rank: int, root: Path, store: Path, is_async: bool) -> None:
    logging.disable()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    state, files = make_state(), Deadly()
    engine = build(root, files, consolidation_timeout_minutes=LIMIT_MINUTES, is_async=is_async)
    engine.save(state, step=1).result()
    files.armed = rank == 1
    begun = time.monotonic()
    try:
        engine.save(state, step=2).result()
    except SaveFailedError as error:
        (root / "told").write_text(f"{time.monotonic() - begun}\n{error}")
    with pytest.raises(CheckpointError):
        engine.save(state, step=3).result()
    engine.close()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_rank_that_dies_in_a_save(tmp_path: Path, is_async: bool) -> None:
    root = tmp_path / "run"
    ranks = [forkserver().Process(target=_dying, args=(rank, root, tmp_path / "store", is_async)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120 * PATIENCE)
        assert process.exitcode is not None, "a rank hangs"
    assert ranks[1].exitcode == -9
    took_s, told = (root / "told").read_text().split("\n", 1)
    assert float(took_s) < 60 * LIMIT_MINUTES + 20
    assert "saving step 2 failed: rank 1: " in told
    assert steps(root) == [1]
    with build(root) as engine:
        assert engine.start(make_state()).step == 1
        engine.save(make_state(), step=2).result()
    assert steps(root) == [1, 2]
