"""Metrics that arrive without the deciding one, and the best value after a resume."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig
from hydra_ckpt.store.catalog import scan

Order = Callable[[CheckpointCallback, int], None]


def make_state() -> AppState:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    return AppState(model, torch.optim.SGD(model.parameters(), lr=0.1))


def train(root: Path, order: Order, key: str = "val/loss") -> float | None:
    state = make_state()
    config = CheckpointingConfig(checkpoint_dir=str(root), best_metric_key=key, save_consolidated="false")
    with CheckpointCallback(config, every_n_steps=5) as callback:
        callback.on_train_begin(state)
        for epoch in range(4):
            for step in range(5 * epoch + 1, 5 * epoch + 6):
                state.optimizers[0].step()
                callback.on_step_end(step, epoch, metrics={"train/loss": 0.5})
            order(callback, epoch)
        callback.on_train_end()
        return callback.best_metric


def validates_every_second_epoch(callback: CheckpointCallback, epoch: int) -> None:
    if epoch % 2:
        callback.on_validation_end({"val/loss": 4.0 - epoch})
    callback.on_epoch_end(epoch, {"train/epoch_loss": 0.3})


def epoch_before_validation(callback: CheckpointCallback, epoch: int) -> None:
    callback.on_epoch_end(epoch, {"train/epoch_loss": 0.3})
    callback.on_validation_end({"val/loss": 4.0 - epoch})


def two_validation_sets(callback: CheckpointCallback, epoch: int) -> None:
    callback.on_validation_end({"val_b/acc": 0.9})
    callback.on_validation_end({"val/loss": 4.0 - epoch})


def the_other_way_round(callback: CheckpointCallback, epoch: int) -> None:
    callback.on_validation_end({"val/loss": 4.0 - epoch})
    callback.on_validation_end({"val_b/acc": 0.9})


ORDERS = [epoch_before_validation, two_validation_sets, the_other_way_round, validates_every_second_epoch]


@pytest.mark.parametrize("order", ORDERS)
def test_metrics_without_the_one_that_decides_are_kept_and_decide_nothing(
    tmp_path: Path, order: Order, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(tmp_path, order) == 1.0
    catalog = scan(tmp_path)
    best = catalog.pointed("BEST")
    assert best is not None
    assert (best.step, best.metrics["val/loss"]) == (20, 1.0)
    assert len(best.metrics) == 3 or order in (two_validation_sets, the_other_way_round)
    assert all("train/loss" in item.metrics for item in catalog.checkpoints)
    assert ("best_metric_key=val/loss" in caplog.text) == (order is validates_every_second_epoch)


@pytest.mark.parametrize("steps", [1, 7])
def test_a_key_that_never_comes_is_warned_about_once(
    tmp_path: Path, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    state = make_state()
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), best_metric_key="val/loss")
    with CheckpointCallback(config, every_n_steps=1) as callback:
        callback.on_train_begin(state)
        for step in range(1, steps + 1):
            state.optimizers[0].step()
            callback.on_step_end(step)
            callback.on_validation_end({"val_loss": 1.0, "epoch": step})
        callback.on_train_end()
        assert callback.best_metric is None
    [told] = [record.getMessage() for record in caplog.records if "best_metric_key" in record.getMessage()]
    assert "did you mean val_loss" in told
    assert "epoch, val_loss" in told
    assert scan(tmp_path).pointed("BEST") is None


# -- the best value after a resume -------------------------------------------------------------------------------------

VALUES = [5.0, 4.0, 1.0, 3.0, 2.5, 2.0, 2.2, 2.1]  # the best one comes at step 3, where nothing is saved


def run(root: Path, until: int, values: list[float], *, in_steps: bool = False, **options: object) -> float | None:
    state = make_state()
    config = CheckpointingConfig(checkpoint_dir=str(root), save_consolidated="false", **options)
    with CheckpointCallback(config, every_n_steps=2) as callback:
        start = callback.on_train_begin(state)
        for step in range(start.step if start else 0, until):
            state.optimizers[0].step()
            callback.on_step_end(step + 1, metrics={"val": values[step]} if in_steps else None)
            if not in_steps:
                callback.on_validation_end({"val": values[step]})
        if until == len(values):
            callback.on_train_end()
        return callback.best_metric


@pytest.mark.parametrize("in_steps", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("key", ["default", "val"])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_resumed_run_knows_the_best_value_of_steps_that_were_not_saved(
    tmp_path: Path, mode: str, key: str, is_async: bool, in_steps: bool
) -> None:
    values = VALUES if mode == "min" else [-value for value in VALUES]
    options = {"best_metric_mode": mode, "best_metric_key": key, "is_async": is_async}
    assert run(tmp_path, 4, values, in_steps=in_steps, **options) == values[2]
    assert run(tmp_path, 6, values, in_steps=in_steps, **options) == values[2]  # it is handed on
    assert run(tmp_path, 8, values, in_steps=in_steps, **options) == values[2]
    assert run(tmp_path, 8, values, in_steps=in_steps, **options) == values[2]  # nothing is left to do
    best = scan(tmp_path).pointed("BEST")
    assert best is not None
    assert best.step == 6  # of those that were saved


def test_what_was_rolled_back_does_not_count(tmp_path: Path) -> None:
    values = [5.0, 4.0, 3.0, 3.5, 1.0, 3.2, 3.3, 3.4]
    assert run(tmp_path, 6, values) == 1.0
    again = [5.0, 4.0, 3.0, 3.5, 3.1, 3.2, 3.3, 3.4]
    options = {"restore_from": "epoch_0_step_4", "on_conflict": "set_aside"}
    assert run(tmp_path, 8, again, **options) == 3.0
    assert run(tmp_path, 8, again) == 3.0


def test_a_value_of_another_metric_or_of_weights_alone_does_not_count(tmp_path: Path) -> None:
    assert run(tmp_path / "a", 4, VALUES) == 1.0
    source = str(tmp_path / "a" / "epoch_0_step_4")
    assert run(tmp_path / "b", 8, VALUES, restore_from=source) == 1.0
    assert run(tmp_path / "c", 4, [9.0] * 8, restore_from=source, restore_parts=["model"]) == 9.0
    assert run(tmp_path / "d", 8, VALUES, restore_from=source, best_metric_mode="max") == 2.5
    assert run(tmp_path / "e", 8, VALUES, restore_from=source, best_metric_key="other") is None


def test_best_is_decided_again_when_a_step_s_metric_is_given_again(tmp_path: Path) -> None:
    state = make_state()
    with CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(tmp_path)), every_n_steps=1) as callback:
        callback.on_train_begin(state)
        for step, (train_loss, validated) in enumerate([(0.1, 0.9), (0.3, 0.5)], start=1):
            callback.on_step_end(step, metrics={"loss": train_loss})
            callback.on_validation_end({"loss": validated})
        callback.on_train_end()
        assert callback.best is not None
        assert callback.best.step == 2
