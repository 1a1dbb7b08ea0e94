"""A compiled optimizer.step is not changed by our hook, and still waits for staging."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig


class Graphs:
    """A backend that compiles nothing and counts what it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.count += 1
        return graph.forward


def run(directory: Path | None, *, early: bool) -> tuple[int, list[float]]:
    """Steps of a compiled optimizer; returns how many graphs they were and the weights, as they are at the end."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
    graphs = Graphs()
    step = torch.compile(optimizer.step, backend=graphs) if early else None
    callback = None
    if directory is not None:
        config = CheckpointingConfig(checkpoint_dir=str(directory), is_async=True)
        callback = CheckpointCallback(config, every_n_steps=1)
        callback.on_train_begin(AppState(model, optimizer))
    step = step or torch.compile(optimizer.step, backend=graphs)
    for number in range(1, 5):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(number))
        step()
        if callback is not None:
            callback.on_step_end(number)
    if callback is not None:
        callback.on_train_end()
        callback.close()
    return graphs.count, [value for p in model.parameters() for value in p.flatten().tolist()]


@pytest.mark.parametrize("early", [True, False])
def test_the_hook_adds_no_graphs_to_a_compiled_step(tmp_path: Path, early: bool) -> None:
    without, expected = run(None, early=early)
    with_hook, found = run(tmp_path, early=early)
    assert found == expected
    assert with_hook == without


def test_a_compiled_step_waits_for_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra_ckpt.saving.pending import PendingSave

    waited: list[int] = []
    original = PendingSave.wait_staged
    monkeypatch.setattr(
        PendingSave, "wait_staged", lambda self, *args, **kw: (waited.append(1), original(self, *args, **kw))[1]
    )
    run(tmp_path, early=False)
    assert len(waited) >= 3


def test_hooks_bring_no_import_that_optimizers_do_not_bring() -> None:
    program = (
        "import sys, torch; torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0); "
        "sys.exit('torch._dynamo' not in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
