"""Programs whose main thread ends before their training does."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hydra_ckpt import CheckpointError
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.store.owner import read_owner
from hydra_ckpt.testing.processes import PATIENCE
from hydra_ckpt.worker import Worker

PROGRAM = """
import sys, threading
from hydra_ckpt import CheckpointError, CheckpointingConfig
from tests.test_zombies import make_state

config = CheckpointingConfig(checkpoint_dir=sys.argv[1], is_async=sys.argv[2] == "async")
engine = config.build(0, 0, 0)

def train():
    threading.main_thread().join()
    state = make_state()
    engine.start(state)
    for step in (1, 2, 3):
        threading.Event().wait(0.6)  # longer than an idle thread of ours takes to look around
        engine.save(state, step=step)
    if sys.argv[3] == "close":
        engine.close()
    print("trained", flush=True)

threading.Thread(target=train).start()
"""


@pytest.mark.parametrize(("mode", "end"), [("sync", "close"), ("async", "close"), ("async", "leave")])
def test_training_continues_when_the_main_thread_has_ended(tmp_path: Path, mode: str, end: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), mode, end],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120 * PATIENCE,
        check=False,
    )
    assert found.stdout == "trained\n", found.stderr
    assert found.returncode == 0
    assert [item.step for item in scan(tmp_path).checkpoints] == [1, 2, 3]
    assert scan(tmp_path).pointed("LATEST").step == 3  # type: ignore[union-attr]
    assert read_owner(tmp_path)[0].released is (end == "close")  # type: ignore[index]


def test_a_worker_that_has_left_takes_no_jobs() -> None:
    worker = Worker("test")
    done = threading.Event()
    worker.submit(done.set)
    worker.close()
    assert done.is_set()
    with pytest.raises(CheckpointError, match="has ended"):
        worker.submit(done.clear)
    assert done.is_set()
    worker.drain()
    worker.close()
