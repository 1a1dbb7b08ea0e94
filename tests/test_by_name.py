"""Schedulers and wrappers given as a dict find their state by their keys, not by their position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import StepLR

from hydra_ckpt import AppState, CheckpointConfigError, CheckpointingConfig, KeyMismatchError, LoadReport
from hydra_ckpt.state.app_state import counterparts
from hydra_ckpt.testing import run_distributed

SIZES = {"gen": 1, "disc": 2}
PERIODS = {"gen": 5, "disc": 7}


class Wrapper:
    """No torch Optimizer, and no groups: only its key or position tells which one it is."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Training:
    """Two models, each with an optimizer and a scheduler; the latter two in any order."""

    def __init__(self, optimizers: Sequence[str] = ("gen", "disc"), schedulers: Sequence[str] = ("gen", "disc")):
        self.models = {name: nn.Linear(size, size) for name, size in SIZES.items()}
        every = {name: torch.optim.SGD(model.parameters(), lr=SIZES[name]) for name, model in self.models.items()}
        self.optimizers: dict[str, torch.optim.Optimizer] = {name: every[name] for name in optimizers}
        self.schedulers: dict[str, StepLR] = {name: StepLR(every[name], PERIODS[name]) for name in schedulers}

    def state(self, *, lists: bool = False) -> AppState:
        if lists:
            return AppState(dict(self.models), list(self.optimizers.values()), list(self.schedulers.values()))
        return AppState(dict(self.models), dict(self.optimizers), dict(self.schedulers))

    def told(self) -> dict[str, tuple[int, int]]:
        return {name: (item.step_size, item.last_epoch) for name, item in self.schedulers.items()}


def trained() -> Training:
    training = Training()
    for _ in range(3):
        training.optimizers["gen"].step()
        training.schedulers["gen"].step()
    return training


def save(root: Path, state: AppState, rank: int = 0) -> None:
    with CheckpointingConfig(checkpoint_dir=str(root)).build(rank, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()


def load(root: Path, state: AppState, rank: int = 0, **options: Any) -> LoadReport:
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(rank, 0, 0) as checkpointer:
        report = checkpointer.load(state, restore_from="latest")
    assert report is not None
    return report


@pytest.mark.parametrize("optimizers", [("gen", "disc"), ("disc", "gen")])
def test_schedulers_are_matched_by_their_keys(tmp_path: Path, optimizers: Sequence[str]) -> None:
    save(tmp_path, trained().state())
    fresh = Training(optimizers, ["disc", "gen"])
    report = load(tmp_path, fresh.state())
    assert fresh.told() == {"gen": (5, 3), "disc": (7, 0)}
    assert {"lr_scheduler.gen", "lr_scheduler.disc"} <= set(report.exact)


def test_a_key_that_the_checkpoint_lacks_is_missing_and_one_that_is_not_used_is_skipped(tmp_path: Path) -> None:
    before = trained()
    save(tmp_path, before.state())
    fresh = Training(schedulers=["disc"])
    fresh.schedulers["warm"] = StepLR(fresh.optimizers["gen"], 11)
    report = load(tmp_path, fresh.state())
    assert fresh.told() == {"disc": (7, 0), "warm": (11, 0)}
    assert (report.missing, report.skipped) == (("lr_scheduler.warm",), ("lr_scheduler.gen",))
    assert "lr_scheduler.warm" not in report.exact


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_without_keys_on_both_sides_the_position_counts(tmp_path: Path, before: bool, after: bool) -> None:
    save(tmp_path, trained().state(lists=before))
    fresh = Training()
    load(tmp_path, fresh.state(lists=after))
    assert fresh.told() == {"gen": (5, 3), "disc": (7, 0)}
    with pytest.raises(KeyMismatchError, match="identifies groups by position"):
        load(tmp_path, Training(["disc", "gen"], ["disc", "gen"]).state(lists=after))


def test_a_scheduler_whose_optimizer_got_other_groups_is_refused(tmp_path: Path) -> None:
    save(tmp_path, trained().state())
    fresh = Training()
    fresh.optimizers = {"gen": fresh.optimizers["disc"], "disc": fresh.optimizers["gen"]}
    with pytest.raises(KeyMismatchError, match=r"optimizer\.gen, group 0"):
        load(tmp_path, fresh.state())


def test_wrappers_without_parameters_are_matched_by_their_keys(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    save(tmp_path, AppState(model, {"a": Wrapper(1), "sgd": sgd, "b": Wrapper(2)}))
    fresh = {"new": Wrapper(7), "b": Wrapper(), "sgd": torch.optim.SGD(model.parameters(), lr=9.0)}
    report = load(tmp_path, AppState(model, fresh))
    assert (fresh["new"].value, fresh["b"].value, fresh["sgd"].param_groups[0]["lr"]) == (7, 2, 0.1)
    assert (report.missing, report.skipped) == (("optimizer.new",), ("optimizer.a",))
    assert {"optimizer.b", "optimizer.sgd"} <= set(report.exact)
    assert "optimizer.new" not in report.exact


def test_wrappers_in_lists_are_matched_by_position(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    save(tmp_path, AppState(model, [Wrapper(1), Wrapper(2)]))
    fresh = [Wrapper(), Wrapper(), Wrapper(7)]
    report = load(tmp_path, AppState(model, fresh))
    assert [item.value for item in fresh] == [1, 2, 7]
    assert report.missing == ("optimizer.2",)
    assert "optimizer.2" not in report.exact


def test_options_of_empty_groups_follow_the_key(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)

    def empty(rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": []}], lr=rate)

    save(tmp_path, AppState(model, {"a": empty(0.1), "b": empty(0.2)}))
    fresh = {"b": empty(9.0), "a": empty(9.0)}
    load(tmp_path, AppState(model, dict(fresh)))
    assert [fresh[name].param_groups[0]["lr"] for name in ("a", "b")] == [0.1, 0.2]


def test_where_one_side_has_no_keys_as_in_older_checkpoints_the_position_counts() -> None:
    assert counterparts(2, ["b", "a", "c"]) == [0, 1, None]
    assert counterparts(["a", "b"], 1) == [0]
    assert counterparts(["a", "b"], ["b", "c"]) == [1, None]


def test_keys_that_would_give_two_objects_one_name_are_refused() -> None:
    with pytest.raises(CheckpointConfigError, match=r"two objects would be called optimizer\.1"):
        AppState(nn.Linear(1, 1), {1: Wrapper(), "1": Wrapper()})


def _ranks(root: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    rank, model = dist.get_rank(), nn.Linear(1, 1)
    torch.manual_seed(0)
    orders = (("a", "b"), ("b", "a"))
    values = {"a": 1, "b": 2}
    save(root, AppState(model, {name: Wrapper(values[name]) for name in orders[rank]}), rank)
    fresh = {name: Wrapper() for name in orders[0]}
    report = load(root, AppState(model, dict(fresh)), rank)
    return {name: item.value for name, item in fresh.items()}, report.exact


def test_each_rank_may_have_its_own_order(tmp_path: Path) -> None:
    for found, exact in run_distributed(_ranks, 2, tmp_path):
        assert found == {"a": 1, "b": 2}
        assert {"optimizer.a", "optimizer.b"} <= set(exact)
