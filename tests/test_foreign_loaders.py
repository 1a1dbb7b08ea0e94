"""Data loaders of other libraries: asked at the right time, refused by name, and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hydra_ckpt import AppState, CheckpointCallback, CheckpointError, CheckpointingConfig


class AskedFirst:
    """As torchdata's `nodes.Loader`: a fresh one that is asked for its state begins, and then ignores what it loads."""

    def __init__(self) -> None:
        self.at: int | None = None
        self.then = 0

    def __iter__(self) -> Any:
        self.at = self.then if self.at is None else self.at
        while True:
            self.at += 1
            yield self.at

    def state_dict(self) -> Any:
        self.at = self.then if self.at is None else self.at
        return {"at": self.at}

    def load_state_dict(self, state: Any) -> None:
        self.then = state["at"]


class Late:
    """Can report its position only once it was iterated or loaded."""

    def __iter__(self) -> Any:
        self.at = getattr(self, "at", 0)
        while True:
            self.at += 1
            yield self.at

    def state_dict(self) -> Any:
        return {"at": self.at}

    def load_state_dict(self, state: Any) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("kind", [AskedFirst, Late])
def test_a_loader_is_asked_after_the_load_and_again_at_each_save(tmp_path: Path, kind: Any) -> None:
    seen = []
    for run in range(3):
        config = CheckpointingConfig(checkpoint_dir=str(tmp_path), restore_from="auto")
        with CheckpointCallback(config, every_n_steps=1) as callback:
            loader = kind()
            report = callback.on_train_begin(AppState(nn.Linear(1, 1), dataloader=loader))
            for step, sample in zip(range(2 * run + 1, 2 * run + 3), loader, strict=False):
                seen.append(sample)
                callback.on_step_end(step)
            callback.on_train_end()
        assert (report is None) == (run == 0)
    assert seen == [1, 2, 3, 4, 5, 6]


class Unstorable(Late):
    """One value of its state cannot be stored."""

    def state_dict(self) -> Any:
        return {"at": 1, "buffer": torch.eye(2).to_sparse()}


def test_a_loader_whose_state_cannot_be_stored_is_refused_by_name(tmp_path: Path) -> None:
    with (
        CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer,
        pytest.raises(CheckpointError, match=r"dataloader: dataloader\.buffer: .*resumable"),
    ):
        checkpointer.save(AppState(nn.Linear(1, 1), dataloader=Unstorable()), step=1).result()


def test_a_plain_loader_starts_from_the_beginning_and_the_report_says_so(tmp_path: Path) -> None:
    state = AppState(nn.Linear(1, 1), dataloader=DataLoader([1, 2, 3]))
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()
        report = checkpointer.load(state, restore_from="latest")
    assert report is not None
    assert "dataloader" in report.rederived
