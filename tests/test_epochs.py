"""Saves around the end of an epoch: a resumed run does every epoch once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig, resumable
from hydra_ckpt.store.catalog import scan

BATCHES, EPOCHS = 4, 3


class _StopError(Exception):
    """Ends a run early."""


def train(
    directory: Path, options: dict[str, Any], epoch_end: Callable[[CheckpointCallback, int, int], None]
) -> list[float]:
    """Train; returns the samples seen, in their order.

    Args:
        directory: The checkpoint directory.
        options: Of the callback.
        epoch_end: What the loop does at the end of an epoch.
    """
    data = TensorDataset(torch.arange(2.0 * BATCHES).view(-1, 1))
    loader = resumable(DataLoader(data, batch_size=2, shuffle=True), seed=1)
    state = AppState(nn.Linear(1, 1), dataloader=loader)
    seen: list[float] = []
    config = CheckpointingConfig(checkpoint_dir=str(directory))
    with CheckpointCallback(config, **options) as callback:
        start = callback.on_train_begin(state)
        step, first = (start.step, start.epoch) if start else (0, 0)
        for epoch in range(first, EPOCHS):
            for [batch] in loader:
                step += 1
                seen += batch.flatten().tolist()
                callback.on_step_end(step, epoch)
            epoch_end(callback, epoch, step)
        callback.on_train_end()
    return seen


def _with_metrics(callback: CheckpointCallback, epoch: int, step: int) -> None:
    callback.on_epoch_end(epoch, {"loss": 1 / step})


def _validates_first(callback: CheckpointCallback, epoch: int, step: int) -> None:
    callback.on_validation_end({"loss": 1 / step})
    callback.on_epoch_end(epoch)


def _never_ends_epochs(callback: CheckpointCallback, epoch: int, step: int) -> None:
    callback.on_validation_end({"loss": 1 / step})


ROADS: dict[str, tuple[dict[str, Any], Callable[[CheckpointCallback, int, int], None]]] = {
    "metrics of the epoch": ({"on_improvement": True}, _with_metrics),
    "metrics and every epoch": ({"on_improvement": True, "every_n_epochs": 1}, _with_metrics),
    "validation before": ({"on_improvement": True}, _validates_first),
    "no end of epochs": ({"on_improvement": True}, _never_ends_epochs),
    "every epoch": ({"every_n_epochs": 1}, _validates_first),
    "last step": ({"every_n_steps": BATCHES}, _validates_first),
    "middle": ({"at_steps": [BATCHES - 1]}, _validates_first),
    "exception": ({"save_on_exception": True}, _validates_first),
}


@pytest.mark.parametrize("road", ROADS)
def test_a_run_that_stops_after_an_epoch_continues_in_the_next(tmp_path: Path, road: str) -> None:
    options, epoch_end = ROADS[road]

    def stop(callback: CheckpointCallback, epoch: int, step: int) -> None:
        if road == "exception":
            raise _StopError
        epoch_end(callback, epoch, step)
        raise _StopError

    whole = train(tmp_path / "whole", options, epoch_end)
    with pytest.raises(_StopError):
        train(tmp_path / "stopped", options, stop)
    [saved] = scan(tmp_path / "stopped").checkpoints
    assert train(tmp_path / "stopped", options, epoch_end) == whole[2 * saved.step :]
    assert scan(tmp_path / "stopped").checkpoints[-1].step == BATCHES * EPOCHS


def test_a_run_that_is_complete_may_be_given_more_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", {}, _never_ends_epochs)
    monkeypatch.setattr("tests.test_epochs.EPOCHS", EPOCHS - 1)
    first = train(tmp_path / "longer", {}, _never_ends_epochs)
    monkeypatch.undo()
    assert first + train(tmp_path / "longer", {}, _never_ends_epochs) == whole
