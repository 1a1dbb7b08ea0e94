"""Random numbers: objects that draw some while they report their state, or load it, change none of the run's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig


def draw() -> list[float]:
    """One number of each generator."""
    return [torch.rand(()).item(), random.random(), float(np.random.rand())]


class Drawing:
    """A loader, scheduler or extra that draws numbers whenever it is asked or given its state."""

    at = 0

    def __iter__(self) -> Any:
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        draw()
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        draw()
        self.at = state["at"]


class DrawingSGD(torch.optim.SGD):
    """An optimizer that draws numbers when it is asked for its state."""

    def state_dict(self) -> dict[str, Any]:
        draw()
        return {**super().state_dict(), "more": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        draw()
        super().load_state_dict({key: value for key, value in state.items() if key != "more"})


class DrawingModule(nn.Linear):
    """A module that draws numbers when it is asked for its state, and for its extra state."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        draw()
        return super().state_dict(*args, **options)

    def get_extra_state(self) -> Any:
        draw()
        return {"at": 1}

    def set_extra_state(self, state: Any) -> None:
        draw()


def objects(kind: str) -> AppState:
    """A model and its objects; one of them draws random numbers."""
    model = DrawingModule(2, 2) if kind == "model" else nn.Linear(2, 2)
    optimizer = (DrawingSGD if kind == "optimizer" else torch.optim.SGD)(model.parameters(), lr=0.1)
    state = AppState(model, optimizer)
    if kind == "extras":
        state.extras = {"one": Drawing()}
    elif kind in ("dataloader", "lr_scheduler"):
        setattr(state, kind, Drawing())
    return state


def train(root: Path, kind: str, steps: int, *, saves: bool = True) -> list[list[float]]:
    """Train up to a step, saving every second one, and return the numbers drawn in each."""
    config = CheckpointingConfig(checkpoint_dir=str(root), enabled=saves)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    drawn = []
    with CheckpointCallback(config, every_n_steps=2) as callback:
        state = objects(kind)
        report = callback.on_train_begin(state)
        assert report is None or "rng" in report.exact
        for step in range(report.step if report else 0, steps):
            drawn.append(draw())
            state.optimizer.step()
            callback.on_step_end(step + 1)
    return drawn


@pytest.mark.parametrize("kind", ["dataloader", "lr_scheduler", "extras", "optimizer", "model"])
def test_a_run_draws_the_same_whether_it_saves_or_resumes(tmp_path: Path, kind: str) -> None:
    plain = train(tmp_path / "none", kind, 6, saves=False)
    assert train(tmp_path / "whole", kind, 6) == plain
    assert train(tmp_path / "parts", kind, 2) == plain[:2]
    assert train(tmp_path / "parts", kind, 6) == plain[2:]
