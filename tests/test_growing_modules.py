"""Modules that get the sizes and parts of what they load only while they load it, and ties that no longer exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hydra_ckpt import AppState, CheckpointingConfig, LoadReport
from hydra_ckpt.errors import KeyMismatchError


class Cached(nn.Linear):
    """Its buffer is None until it is loaded."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("cache", None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}cache")
        self.cache = None if given is None else torch.empty_like(given)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Sized(nn.Module):
    """Its parameter takes the size of what is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.weight.data = torch.empty_like(state_dict[f"{prefix}weight"])
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Growing(nn.Module):
    """A hook adds as many heads as there are to load."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList()
        self.register_load_state_dict_pre_hook(self._grow)

    @staticmethod
    def _grow(module: Any, state_dict: Any, prefix: str, *_: Any) -> None:
        names = {name.removeprefix(prefix).split(".")[1] for name in state_dict if name.startswith(prefix)}
        module.heads.extend(nn.Linear(2, 2) for _ in range(len(names) - len(module.heads)))


CASES: list[tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = [
    (Cached, lambda model: setattr(model, "cache", torch.randn(3))),
    (Sized, lambda model: setattr(model.weight, "data", torch.randn(3))),
    (Growing, lambda model: model.heads.extend([nn.Linear(2, 2), nn.Linear(2, 2)])),
]


def carried(root: Path, model: nn.Module, fresh: nn.Module) -> LoadReport:
    with CheckpointingConfig(checkpoint_dir=str(root)).build(0, 0, 0) as checkpointer:
        checkpointer.save(AppState(model), step=1).result()
        return checkpointer.load(AppState(fresh), restore_from="latest")


def assert_equal(model: nn.Module, fresh: nn.Module) -> None:
    saved, loaded = model.state_dict(), fresh.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in saved.items())


@pytest.mark.parametrize("inside", [False, True], ids=["outermost", "inside"])
@pytest.mark.parametrize(("build", "grow"), CASES, ids=["buffer", "parameter", "modules"])
def test_a_module_that_grows_while_it_loads(tmp_path: Path, build: Any, grow: Any, inside: bool) -> None:
    model, fresh = build(), build()
    grow(model)
    if inside:
        model, fresh = (nn.Sequential(nn.Linear(2, 2), one) for one in (model, fresh))
    report = carried(tmp_path, model, fresh)
    assert "model" in report.exact
    assert_equal(model, fresh)


def test_a_module_that_does_not_grow_is_refused_as_before(tmp_path: Path) -> None:
    model, fresh = nn.Linear(2, 3), nn.Linear(2, 2)
    before = fresh.weight.detach().clone()
    with pytest.raises(KeyMismatchError, match="different"):
        carried(tmp_path, model, fresh)
    assert torch.equal(fresh.weight, before)


class Anchored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("now", torch.randn(2))
        self.register_buffer("anchor", torch.randn(2))


def test_buffers_that_are_one_tensor_when_saved(tmp_path: Path) -> None:
    model, fresh = Anchored(), Anchored()
    model.anchor = model.now
    report = carried(tmp_path, model, fresh)
    assert_equal(model, fresh)
    assert any("anchor was one tensor with now" in note for note in report.notes)


def test_weights_that_are_tied_only_when_saved(tmp_path: Path) -> None:
    model, fresh = (nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}) for _ in range(2))
    model["b"].weight = model["a"].weight
    report = carried(tmp_path, model, fresh)
    assert_equal(model, fresh)
    assert any("b.weight was one tensor with a.weight" in note for note in report.notes)
