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
from hydra_ckpt.testing.processes import PATIENCE

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
    out, err = run.communicate(timeout=120 * PATIENCE)
    assert out.startswith("stopped at"), err
    assert run.returncode == 0
    assert [item.step for item in scan(tmp_path / "run").checkpoints] == [int(out.split()[-1])]
    assert not [worker for worker in workers if worker.is_running()]


def test_workers_end_when_the_training_process_is_killed(tmp_path: Path) -> None:
    run, workers = _started(tmp_path, "plain", "fork")
    run.kill()
    run.communicate(timeout=120 * PATIENCE)
    assert psutil.wait_procs(workers, timeout=60 * PATIENCE)[1] == []


HANGING = """
import subprocess, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig

class Reading(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        program = subprocess.Popen(["sleep", "600"])
        program.terminate()
        program.wait()
        if index == 1:
            time.sleep(600)
        return torch.tensor(float(index))

model = torch.nn.Linear(2, 1)
callback = CheckpointCallback(CheckpointingConfig(checkpoint_dir=sys.argv[1]), every_n_steps=1)
callback.on_train_begin(AppState(model, torch.optim.SGD(model.parameters(), lr=0.1)))
batches = iter(DataLoader(Reading(), num_workers=1, batch_size=1, prefetch_factor=1))
print(next(batches), flush=True)
callback.on_step_end(1)
callback.on_train_end()
callback.close()
batches._shutdown = True  # so that the worker is left to the end of the program
torch.utils.data._utils.python_exit_status = True
"""


def test_a_worker_that_hangs_keeps_neither_its_programs_nor_the_training_process(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(HANGING)
    found = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "run")],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120 * PATIENCE,
        check=False,
    )
    assert found.stdout == "tensor([0.])\n", found.stderr
    assert found.returncode == 0
