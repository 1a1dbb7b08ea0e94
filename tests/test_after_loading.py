"""What one object does to another while it loads, or while it is compared, never ends in a wrong `exact`."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hydra_ckpt import AppState, resumable
from hydra_ckpt.state.dataloader import ResumableLoader
from hydra_ckpt.state.optimizer_oracle import differing
from tests.holders import Holder
from tests.test_while_loading import resume

Act = Callable[[], object]


class Loading(Holder):
    """Does something when it loads."""

    def __init__(self, act: Act = lambda: None) -> None:
        super().__init__(1)
        self.act = act

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.act()


class Telling(Holder):
    """Does something when it is asked for its state."""

    def __init__(self, act: Act = lambda: None) -> None:
        super().__init__(1)
        self.act = act

    def state_dict(self) -> Any:
        self.act()
        return super().state_dict()

    def load_state_dict(self, state: Any) -> None:
        pass


def stepped(kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return model, optimizer


NESTED: dict[str, Callable[[dict[str, Any]], object]] = {
    "list": lambda state: state["list"].clear(),
    "dict": lambda state: state["dict"].update(tensor=torch.zeros(2)),
    "number": lambda state: state["dict"].update(number=9),
    "memory": lambda state: setattr(state["dict"]["tensor"], "data", torch.zeros(2)),
    "deque": lambda state: state["deque"].append(3),
    "set": lambda state: state["set"].add(7),
    "bytes": lambda state: state["bytes"].extend(b"c"),
    "array": lambda state: state["array"].fill(0),
    "in a tuple": lambda state: state["tuple"][0].append(2),
}


def _nested() -> dict[str, Any]:
    tensor = torch.ones(2)
    return {
        "list": [torch.ones(2)],
        "dict": {"tensor": tensor, "number": 1},
        "deque": deque([1], maxlen=4),
        "set": {1},
        "bytes": bytearray(b"a"),
        "array": np.ones(2),
        "tuple": ([1],),
    }


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("place", ["state", "options"])
def test_containers_in_state_and_options_are_put_back(tmp_path: Path, kind: str, place: str) -> None:
    (model, optimizer), (fresh, again) = stepped(), stepped()
    found = []
    for one, held in ((model, optimizer), (fresh, again)):
        home = held.state[one.weight] if place == "state" else held.param_groups[0]
        home.update(_nested())
        found.append(home)
    saved, live = AppState(model, optimizer, extras={"x": Loading()}), AppState(fresh, again)
    live.extras["x"] = Loading(
        lambda: NESTED[kind](again.state[fresh.weight] if place == "state" else again.param_groups[0])
    )
    report = resume(tmp_path, saved, live)
    now = again.state[fresh.weight] if place == "state" else again.param_groups[0]
    assert not list(differing(_nested(), {key: now[key] for key in _nested()}))
    assert "optimizer" in report.exact
    assert any(note.startswith("optimizer: ") for note in report.notes)


def test_a_large_tensor_among_the_options_is_put_back(tmp_path: Path) -> None:
    (model, optimizer), (fresh, again) = stepped(), stepped()
    optimizer.param_groups[0]["mask"] = torch.ones(5000)
    again.param_groups[0]["mask"] = torch.ones(5000)
    extras = {"x": Loading(again.param_groups[0]["mask"].zero_)}
    report = resume(
        tmp_path, AppState(model, optimizer, extras={"x": Loading()}), AppState(fresh, again, extras=extras)
    )
    assert torch.equal(again.param_groups[0]["mask"], torch.ones(5000))
    assert "optimizer" in report.exact


class Counting(torch.optim.SGD):
    """With state of its own."""

    count = 0

    def state_dict(self) -> Any:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]
        super().load_state_dict({key: value for key, value in state.items() if key != "count"})


class Entry(nn.Linear):
    """With an entry of its own in its state dict."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen = 0
        self.register_state_dict_post_hook(lambda _, state, prefix, __: state.update({prefix + "seen": self.seen}))
        self.register_load_state_dict_pre_hook(
            lambda _, state, prefix, *__: setattr(self, "seen", state.pop(prefix + "seen"))
        )


def test_own_state_that_another_object_changes_later_is_not_exact(tmp_path: Path) -> None:
    model, fresh = Entry(), Entry()
    optimizer, again = Counting(model.parameters(), lr=0.1), Counting(fresh.parameters(), lr=0.1)
    model.seen, optimizer.count = 3, 5
    extras = {"x": Loading(lambda: (setattr(fresh, "seen", 88), setattr(again, "count", 77)))}
    report = resume(
        tmp_path, AppState(model, optimizer, extras={"x": Loading()}), AppState(fresh, again, extras=extras)
    )
    assert {"model", "optimizer"} <= set(report.trusted)
    unchanged = resume(tmp_path / "b", AppState(model, optimizer), AppState(fresh, again))
    assert {"model", "optimizer"} <= set(unchanged.exact)
    assert (fresh.seen, again.count) == (3, 5)


def test_what_the_comparison_changes_is_put_back_or_not_exact(tmp_path: Path) -> None:
    def loader() -> ResumableLoader[Any]:
        return resumable(DataLoader(TensorDataset(torch.arange(40)), batch_size=4, shuffle=True))

    (model, optimizer), (fresh, again) = stepped(), stepped()
    held, data = Holder(), loader()

    def act() -> None:
        again.param_groups[0].update(lr=99.0)
        held.held = 9
        data.set_epoch(7)

    saved = AppState(model, optimizer, None, loader(), extras={"a": Holder(1), "b": Telling()})
    report = resume(tmp_path, saved, AppState(fresh, again, None, data, extras={"a": held, "b": Telling(act)}))
    assert again.param_groups[0]["lr"] == 0.1
    assert {"extras.a", "dataloader"} <= set(report.trusted)


def test_a_scheduler_with_a_method_of_its_own_is_watched(tmp_path: Path) -> None:
    (model, optimizer), (fresh, again) = stepped(), stepped()
    kind = torch.optim.lr_scheduler.StepLR
    scheduler, outer = kind(again, 3), kind(again, 3)
    load = scheduler.load_state_dict

    def replaced(_: Any, state: Any) -> None:
        load(state)
        fresh.weight.data.zero_()

    scheduler.load_state_dict = types.MethodType(replaced, scheduler)  # type: ignore[method-assign]
    chained = torch.optim.lr_scheduler.ChainedScheduler
    saved = AppState(model, optimizer, chained([kind(optimizer, 3), kind(optimizer, 3)]))
    report = resume(tmp_path, saved, AppState(fresh, again, chained([outer, scheduler])))
    assert torch.equal(fresh.weight, model.weight)
    assert "model" in report.exact


def test_a_loader_that_adds_state_of_its_own_is_trusted(tmp_path: Path) -> None:
    class Mixing(ResumableLoader[Any]):
        mix = 1

        def state_dict(self) -> Any:
            return {**super().state_dict(), "mix": self.mix}

        def load_state_dict(self, state: Any) -> None:
            super().load_state_dict(state)
            fresh.weight.data.zero_()

    model, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    saved, live = (Mixing(DataLoader(TensorDataset(torch.arange(40)), batch_size=4)) for _ in range(2))
    report = resume(tmp_path, AppState(model, dataloader=saved), AppState(fresh, dataloader=live))
    assert "dataloader" in report.trusted
    assert torch.equal(fresh.weight, model.weight)
    assert "model" in report.exact


class Popping(Holder):
    """Takes apart what it is given, without an error if something is gone."""

    def load_state_dict(self, state: Any) -> None:
        self.held = {"v": state["held"].pop("v", 0)}


def test_an_object_whose_share_another_has_taken_gets_a_copy(tmp_path: Path) -> None:
    shared = {"v": 5}
    fresh = {"a": Popping(), "b": Popping()}
    saved = AppState(nn.Linear(1, 1), extras={"a": Popping(shared), "b": Popping(shared)})
    report = resume(tmp_path, saved, AppState(nn.Linear(1, 1), extras=dict(fresh)))
    assert [one.held for one in fresh.values()] == [{"v": 5}, {"v": 5}]
    assert "extras.b was given a copy of what it shared with other objects" in report.notes
