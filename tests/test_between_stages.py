"""What pipeline stages hold under one name: equal values are stored once, different ones are never lost silently."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.testing import run_distributed


class Part(nn.Module):
    """A stage of a model whose class can tie its head to its embedding."""

    _tied_weights_keys = {"head.weight": "emb.weight"}  # noqa: RUF012 - as transformers declares it

    def __init__(self, stage: int, *, tied: bool | None) -> None:
        super().__init__()
        if tied is not None:
            self.config = SimpleNamespace(tie_word_embeddings=tied)
        self.emb = None if stage else nn.Embedding(6, 2)
        self.head = nn.Linear(2, 6, bias=False) if stage else None

    @property
    def weight(self) -> torch.Tensor:
        return next(self.parameters())


class Counter:
    """An extra: each stage has its own, under the same name."""

    def __init__(self, value: float) -> None:
        self.seen = torch.full((3,), value)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def built(stage: int, value: float, tied: bool | None, *, sharded: bool = False) -> AppState:
    part = Part(stage, tied=tied)
    with torch.no_grad():
        part.weight.fill_(value)
    if sharded:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        fully_shard(part, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(part.parameters())
    part.weight.grad = torch.full_like(part.weight, value)
    optimizer.step()
    return AppState(part, optimizer, extras={"counter": Counter(value)})


def numbers(state: AppState) -> list[float]:
    """One element of the weight, of its first moment, and of the extra."""
    weight = next(state.model.parameters())  # type: ignore[union-attr]
    moment = state.optimizer.state[weight]["exp_avg"]
    local = [item.to_local() if isinstance(item, DTensor) else item for item in (weight.detach(), moment)]
    return [item.flatten()[0].item() for item in (*local, state.extras["counter"].seen)]


def saved_and_loaded(root: str, tied: bool | None) -> list[Any]:
    stage = dist.get_rank()
    state, fresh = built(stage, 1.0 + stage, tied), built(stage, 9.0, tied)
    with CheckpointingConfig(checkpoint_dir=root).build(0, 0, stage) as checkpointer:
        try:
            checkpointer.save(state, step=1).result()
        except CheckpointError as error:
            return [type(error).__name__, str(error)]
        checkpointer.load(fresh, restore_from="latest")
    return [numbers(state), numbers(fresh)]


def test_a_head_that_the_configuration_unties_is_stored_beside_the_embedding(tmp_path: Path) -> None:
    for saved, loaded in run_distributed(saved_and_loaded, 2, str(tmp_path), False):
        assert loaded == saved


@pytest.mark.parametrize("tied", [None, True])
def test_tied_weights_of_stages_that_differ_are_refused_at_the_first_save(tmp_path: Path, tied: bool | None) -> None:
    for kind, text in run_distributed(saved_and_loaded, 2, str(tmp_path), tied):
        assert kind == "TopologyError"
        assert "pipeline stages share model: emb.weight" in text
        assert "tie_word_embeddings=False" in text
    assert not list(tmp_path.glob("epoch_*"))


def drifting(root: str, on_drift: str, sharded: bool) -> list[str]:
    """Two saves of equal tied weights, then two of different ones; what each of them said."""
    stage = dist.get_rank() // (dist.get_world_size() // 2)
    state = built(stage, 1.0, tied=True, sharded=sharded)
    found = []
    config = CheckpointingConfig(checkpoint_dir=root, on_drift=on_drift, is_async=False)
    with config.build(dist.get_rank() % 2 if sharded else 0, 0, stage) as checkpointer:
        for step in range(1, 5):
            if step == 3 and stage == 1:
                with torch.no_grad():
                    next(state.model.parameters()).add_(1.0)  # type: ignore[union-attr]
            try:
                checkpointer.save(state, step=step).result()
                found.append("saved")
            except CheckpointError as error:
                found.append(str(error))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_tied_weights_that_drift_apart_are_reported_as_replicas_are(tmp_path: Path, ranks: int) -> None:
    for found in run_distributed(drifting, ranks, str(tmp_path / "raise"), "raise", ranks == 4):
        assert found[:2] == ["saved"] * 2
        assert all("pipeline stages share model: emb.weight" in text for text in found[2:])
    assert run_distributed(drifting, ranks, str(tmp_path / "warn"), "warn", ranks == 4) == [["saved"] * 4] * ranks


def extras_of_stages(root: str) -> list[list[float]]:
    stage = dist.get_rank()
    state, fresh = built(stage, 1.0, tied=True), built(stage, 1.0, tied=True)
    state.extras["counter"].seen += stage
    with CheckpointingConfig(checkpoint_dir=root).build(0, 0, stage) as checkpointer:
        checkpointer.save(state, step=1).result()
        checkpointer.load(fresh, restore_from="latest")
    return [numbers(state), numbers(fresh)]


def test_an_extra_that_stages_hold_under_one_name_comes_back_to_each(tmp_path: Path) -> None:
    found = run_distributed(extras_of_stages, 2, str(tmp_path))
    assert [saved[2] for saved, _ in found] == [1.0, 2.0]
    for saved, loaded in found:
        assert loaded == saved
