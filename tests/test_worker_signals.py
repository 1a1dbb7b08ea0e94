"""Stop signals that reach the workers of a data loader too, as those of Slurm, torchrun and `timeout` do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hydra_ckpt.store.catalog import scan

PROGRAM = """
import sys, time
from pathlib import Path
import torch
from torch.utils.data import DataLoader, Dataset
from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig, resumable

class Numbers(Dataset):
    def __len__(self):
        return 400
    def __getitem__(self, index):
        return torch.full((2,), float(index))

if __name__ == "__main__":
    root, kind, start = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    loader = DataLoader(Numbers(), num_workers=2, multiprocessing_context=start, persistent_workers=kind == "kept")
    if kind == "ours":
        loader = resumable(loader)
    if kind == "torchdata":
        from torchdata.stateful_dataloader import StatefulDataLoader
        loader = StatefulDataLoader(Numbers(), num_workers=2)
    model = torch.nn.Linear(2, 1)
    state = AppState(model, torch.optim.SGD(model.parameters(), lr=0.1), dataloader=loader if kind == "ours" else None)
    callback = CheckpointCallback(
        CheckpointingConfig(checkpoint_dir=str(root / "run")), every_n_steps=10_000, signals=["SIGTERM", "SIGUSR1"]
    )
    callback.on_train_begin(state)
    for step, batch in enumerate(loader, 1):
        time.sleep(0.1)
        callback.on_step_end(step)
        if step == 3:
            (root / "three").touch()
        if callback.should_stop:
            break
    callback.on_train_end()
    print("stopped at", step)
"""


def _started(root: Path, kind: str, start: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """The program, after three steps, and its workers."""
    program = root / "program.py"
    program.write_text(PROGRAM)
    run = subprocess.Popen(
        [sys.executable, str(program), str(root), kind, start],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (root / "three").exists() and run.poll() is None:
        time.sleep(0.05)
    workers = [p for p in psutil.Process(run.pid).children(recursive=True) if p.name() == "pt_data_worker"]
    assert len(workers) == 2
    return run, workers


@pytest.mark.parametrize(
    ("kind", "start", "number"),
    [
        ("plain", "fork", signal.SIGTERM),
        ("kept", "fork", signal.SIGUSR1),
        ("ours", "spawn", signal.SIGTERM),
        ("torchdata", "fork", signal.SIGTERM),
    ],
)
def test_a_stop_signal_to_the_whole_group_saves(tmp_path: Path, kind: str, start: str, number: signal.Signals) -> None:
    if kind == "torchdata":
        pytest.importorskip("torchdata")
    run, workers = _started(tmp_path, kind, start)
    os.killpg(run.pid, number)
    out, err = run.communicate(timeout=120)
    assert out.startswith("stopped at"), err
    assert run.returncode == 0
    assert [item.step for item in scan(tmp_path / "run").checkpoints] == [int(out.split()[-1])]
    assert not [worker for worker in workers if worker.is_running()]


def test_workers_end_when_the_training_process_is_killed(tmp_path: Path) -> None:
    run, workers = _started(tmp_path, "plain", "fork")
    run.kill()
    run.communicate(timeout=120)
    assert psutil.wait_procs(workers, timeout=60)[1] == []


def test_the_training_process_can_end_a_worker(tmp_path: Path) -> None:
    """What PyTorch does with a worker that does not end by itself."""
    program = tmp_path / "program.py"
    program.write_text(
        PROGRAM.replace(
            "time.sleep(0.1)", "time.sleep(0.1)\n        for worker in started._workers: worker.terminate()"
        )
        .replace("enumerate(loader, 1)", "enumerate(started, 1)")
        .replace("    for step, batch", "    started = iter(loader)\n    for step, batch")
    )
    found = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "plain", "fork"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "exited unexpectedly" in found.stderr
