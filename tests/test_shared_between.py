"""What two objects of one AppState share is one again after a load."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hydra_ckpt import AppState, CheckpointingConfig, KeyMismatchError, LoadReport
from hydra_ckpt.testing import run_distributed
from tests.holders import Holder, Module


def config(root: Path, **options: Any) -> CheckpointingConfig:
    return CheckpointingConfig(checkpoint_dir=str(root), **options)


def save(root: Path, state: AppState, rank: int = 0) -> None:
    with config(root).build(rank, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()


def load(root: Path, state: AppState, rank: int = 0, **options: Any) -> LoadReport:
    with config(root, **options).build(rank, 0, 0) as checkpointer:
        report = checkpointer.load(state, restore_from="latest")
    assert report is not None
    return report


def values() -> dict[str, Any]:
    base = torch.arange(6.0)
    return {
        "tensor": torch.ones(3),
        "list": [1, {"x": 2}],
        "deque": deque([1], maxlen=3),
        "tensors in a list": [torch.zeros(2), torch.ones(2)],
        "base": base,
        "requires grad": torch.ones(2, requires_grad=True),
    }


@pytest.mark.parametrize("kind", values())
def test_an_object_that_several_hold_is_one_again(tmp_path: Path, kind: str) -> None:
    value = values()[kind]
    first, second, scheduler, module = Holder(value), Holder({"inner": value}), Holder(value), Module(value)
    save(tmp_path, AppState(module, None, scheduler, extras={"first": first, "second": second}))
    one, two, there, fresh = Holder(), Holder(), Holder(), Module()
    report = load(tmp_path, AppState(fresh, None, there, extras={"first": one, "second": two}))
    assert one.held is two.held["inner"]
    assert one.held is there.held
    assert one.held is fresh.held
    assert repr(one.held) == repr(value)
    assert {"extras.first", "extras.second", "lr_scheduler", "model"} <= set(report.exact)


def test_views_of_one_memory_in_two_extras_share_it_again(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    save(tmp_path, AppState(nn.Linear(1, 1), extras={"row": Holder(base[2:4]), "all": Holder(base)}))
    row, everything = Holder(), Holder()
    load(tmp_path, AppState(nn.Linear(1, 1), extras={"row": row, "all": everything}))
    everything.held[2] = 9.0
    assert torch.equal(row.held, torch.tensor([9.0, 3.0]))


@pytest.mark.parametrize("kept", ["first", "second"])
def test_one_of_them_loads_alone(tmp_path: Path, kept: str) -> None:
    value = [torch.ones(3), {"n": 1}]
    save(tmp_path, AppState(nn.Linear(1, 1), extras={"first": Holder(value), "second": Holder(value)}))
    fresh = Holder()
    report = load(tmp_path, AppState(nn.Linear(1, 1), extras={kept: fresh}))
    assert repr(fresh.held) == repr(value)
    assert f"extras.{kept}" in report.exact


def test_an_extra_under_two_names_and_one_inside_another_are_loaded(tmp_path: Path) -> None:
    inner = Holder(torch.ones(2))
    save(tmp_path, AppState(nn.Linear(1, 1), extras={"a": inner, "b": inner, "outer": Holder(inner.state_dict())}))
    fresh, outer = Holder(), Holder()
    load(tmp_path, AppState(nn.Linear(1, 1), extras={"a": fresh, "b": fresh, "outer": outer}))
    assert fresh.held is outer.held["held"]


def _own_tensor(root: Path) -> list[str]:
    rank = dist.get_rank()
    value = torch.full((3,), float(rank))

    def state(held: Any) -> AppState:
        torch.manual_seed(0)
        return AppState(nn.Linear(1, 1), extras={"first": Holder(held), "second": Holder([held])})

    save(root, state(value), rank)
    fresh = state(None)
    load(root, fresh, rank)
    assert torch.equal(fresh.extras["first"].held, value)
    assert fresh.extras["first"].held is fresh.extras["second"].held[0]
    return [value.__repr__()]


def test_a_shared_tensor_of_each_rank_comes_back_or_both_objects_are_refused(tmp_path: Path) -> None:
    run_distributed(_own_tensor, 2, tmp_path)
    first, second = Holder("built"), Holder("built")
    state = AppState(nn.Linear(1, 1), extras={"first": first, "second": second})
    with pytest.raises(KeyMismatchError, match="the ranks that saved it had different values"):
        load(tmp_path, state)
    report = load(tmp_path, state, load_strict=False)
    assert {"extras.first", "extras.second"} <= set(report.missing)
    assert (first.held, second.held) == ("built", "built")
