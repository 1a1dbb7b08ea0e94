"""Differences from a checkpoint are shown on resuming; those that make the resume inexact cause a warning."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hydra_ckpt import AppState, Checkpointer, CheckpointingConfig
from hydra_ckpt.jobs.differences import differences, kind_of, shown
from hydra_ckpt.jobs.yaml_text import parse_config
from hydra_ckpt.loading.changes import changes, log_changes
from hydra_ckpt.store import names


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("seed", "seed"),
        ("trainer.random_seed", "seed"),
        ("trainer.batch_size", "batch size"),
        ("per_device_train_batch_size", "batch size"),
        ("loader.bs", "batch size"),
        ("micro_batch_size", "batch size"),
        ("trainer.grad_accumulation", "gradient accumulation"),
        ("trainer.accumulate_grad_batches", "gradient accumulation"),
        ("gradient_accumulation_steps", "gradient accumulation"),
        ("optimizer", "optimizer type"),
        ("optim.name", "optimizer type"),
        ("model.optimizer._target_", "optimizer type"),
        ("trainer.devices", "number of ranks"),
        ("mesh.tp", "number of ranks"),
        ("num_nodes", "number of ranks"),
        ("trainer.precision", "precision"),
        ("trainer.mixed_precision", "precision"),
        ("data.path", "data"),
        ("datamodule.train.root", "data"),
        ("train_dataset._target_", "data"),
        ("data.seq_len", "data"),
        ("shuffle", "data"),
        ("optimizer.lr", ""),
        ("model.hidden_size", ""),
        ("trainer.max_steps", ""),
        ("data.num_workers", ""),
        ("dataloader.pin_memory", ""),
        ("checkpoint.checkpoint_dir", ""),
        ("callbacks.early.seed", ""),
        ("metadata.author", ""),
        ("database", ""),
        ("logger.seed", ""),
        ("seedling", ""),
        ("absolute", ""),
    ],
)
def test_kinds_are_told_from_keys(key: str, kind: str) -> None:
    assert kind_of(key) == kind


def test_differences_are_listed_by_full_key() -> None:
    before = {"a": {"b": 1, "same": [1, 2]}, "gone": None, "text": "x" * 100, "flag": True}
    now = {"a": {"b": 2, "same": [1, 2]}, "new": {"deep": 1.5}, "text": "y", "flag": False}
    assert [str(item) for item in differences(before, now)] == [
        "a.b: 1 -> 2",
        "flag: true -> false",
        "gone: null -> (absent)",
        "new.deep: (absent) -> 1.5",
        f"text: {'x' * 60}… -> y",
    ]
    assert differences(before, before) == []


def test_all_settings_of_a_large_configuration_are_compared_and_the_first_differences_shown() -> None:
    before = {"aa": {f"k{number:05}": number for number in range(30_000)}, "lr": 0.1, "b": {"c": 1}, "b.c": 2}
    assert list(map(str, differences(before, {**before, "lr": 0.2}))) == ["lr: 0.1 -> 0.2"]
    assert list(map(str, differences(before, {**before, "b": {"c": 3}}))) == ["b.c: 1 -> 3"]
    found = differences(before, {"lr": 0.1})
    assert len(found) == 30_002
    assert shown(found).endswith("aa.k00029: 29 -> (absent); and 29972 more")
    assert len(str(differences({"k" * 5000: 1}, {})[-1])) < 300


@pytest.mark.parametrize(
    "text", ["", "- 1", "a: [", "a: &x [*x", "&a [*a]", "x" * (2 << 20), "!!python/object:os.system {}"]
)
def test_what_is_no_configuration_is_left_alone(text: str) -> None:
    assert parse_config(text) is None


def test_a_configuration_made_to_explode_does_not() -> None:
    levels = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}" for n in range(1, 40)]
    data = parse_config("\n".join(levels))
    assert differences(data, data) == []
    loop = parse_config("a: &a\n  b: *a")
    assert differences(loop, loop) == []


def save(directory: Path, optimizer: type[torch.optim.Optimizer], text: str) -> Path:
    model = nn.Linear(2, 2)
    config = replace(CheckpointingConfig(checkpoint_dir=str(directory)).resolve(), hydra_texts=(("config.yaml", text),))
    with Checkpointer(config, dp_rank=0, tp_rank=0, pp_rank=0) as engine:
        return engine.save(AppState(model, optimizer(model.parameters(), lr=0.1)), step=1).result().path


def test_settings_and_facts_that_differ_are_told_and_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, torch.optim.SGD, "trainer:\n  batch_size: 8\noptimizer:\n  lr: 0.1\n")
    assert (path / names.CONFIG / "config.yaml").exists()
    now = {"config.yaml": "trainer:\n  batch_size: 16\noptimizer:\n  lr: 0.2\n"}
    found = changes(path, now, ["AdamW"], 2)
    assert [(str(item), item.kind) for item in found] == [
        ("optimizer: SGD -> AdamW", "optimizer type"),
        ("world size: 1 -> 2", "number of ranks"),
        ("optimizer.lr: 0.1 -> 0.2", ""),
        ("trainer.batch_size: 8 -> 16", "batch size"),
    ]
    with caplog.at_level(logging.INFO):
        log_changes(path, found)
    shown, warned = caplog.records
    assert shown.getMessage() == "settings that differ from those of epoch_0_step_1: optimizer.lr: 0.1 -> 0.2"
    assert warned.levelno == logging.WARNING
    assert "optimizer: SGD -> AdamW (optimizer type); world size: 1 -> 2 (number of ranks)" in warned.getMessage()
    assert "trainer.batch_size: 8 -> 16 (batch size)" in warned.getMessage()
    assert "lr" not in warned.getMessage()
    assert changes(path, {}, ["SGD"], 1) == []
    assert changes(tmp_path, now, ["AdamW"], 2) == []  # no checkpoint of ours
