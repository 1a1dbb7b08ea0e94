"""Options of optimizers that a checkpoint leaves out: on request, or because the optimizer leaves them out itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hydra_ckpt import AppState, CheckpointError, CheckpointingConfig, KeyMismatchError, LoadReport


def save_and_load(root: Path, saved: AppState, fresh: AppState, **options: Any) -> LoadReport:
    config = CheckpointingConfig(checkpoint_dir=str(root), **options)
    with config.build(0, 0, 0) as checkpointer:
        checkpointer.save(saved, step=1).result()
    with config.build(0, 0, 0) as checkpointer:
        report = checkpointer.load(fresh, restore_from="latest")
    assert report is not None
    return report


def function(value: Any) -> Any:
    return value


class Calling(torch.optim.SGD):
    """Has a function among its options, and adds an option in its first step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.1, momentum=0.9)
        self.defaults["call"] = function
        self.param_groups[0]["call"] = function

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1


class Named(Calling):
    """The same with another name and an option that `Calling` lacks."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.defaults["more"] = self.param_groups[0]["more"] = 1


def made(kind: type[torch.optim.Optimizer], steps: int = 0) -> AppState:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    state = AppState(model, kind(model.parameters()))
    for _ in range(steps):
        step(state)
    return state


def step(state: AppState) -> None:
    state.optimizer.zero_grad()
    state.model(torch.ones(1, 2)).square().sum().backward()
    state.optimizer.step()


def test_an_option_that_was_left_out_counts_on_neither_side(tmp_path: Path) -> None:
    state, fresh = made(Calling, 2), made(Calling)
    report = save_and_load(tmp_path, state, fresh, allow_unsaved=["optimizer.*.options.call"])
    assert report.missing == ("optimizer.weight.options.call",)
    group = fresh.optimizer.param_groups[0]
    assert (group["count"], group["call"]) == (2, function)
    with pytest.raises(
        KeyMismatchError, match=r"Calling in the checkpoint, Named .* \(only there: count; only here: m"
    ):
        save_and_load(tmp_path / "other", state, made(Named), allow_unsaved=["optimizer.*.options.call"])


class Hiding(torch.optim.SGD):
    """Has a function among its options that its state_dict() leaves out, or returns as a text."""

    hides, other = True, None

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.1, momentum=0.9)
        self.param_groups[0]["_call"] = function

    def state_dict(self) -> dict[str, Any]:
        told = super().state_dict()
        for group in told["param_groups"] if self.hides else ():
            group.pop("_call", None)
            group.update({"_call": self.other} if self.other else {})
        return told

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.param_groups[0]["_call"] = function


class Telling(Hiding):
    other = "function"


class Showing(Hiding):
    hides = False


class Hooked(torch.optim.SGD):
    """A hook takes the function out, and PyTorch's own loading does not put it back."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.1, momentum=0.9)
        self.param_groups[0]["_call"] = function
        self.register_state_dict_post_hook(lambda _, told: told["param_groups"][0].pop("_call") and None)


class Around(torch.optim.Optimizer):
    """Wraps such an optimizer, as heavyball's SAMWrapper does."""

    def __init__(self, parameters: Any) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"ball": 0.1})
        self.inner = Hiding(parameters)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return {"wrapped": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["wrapped"])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Hiding, "optimizer.weight.options._call"),
        (Telling, "optimizer.weight.options._call"),
        (Hooked, "optimizer.weight.options._call"),
        (Around, "optimizer.weight.~inner.options._call"),
    ],
)
def test_an_option_that_the_optimizer_itself_leaves_out_stays_as_built(
    tmp_path: Path, kind: type[torch.optim.Optimizer], name: str
) -> None:
    state, fresh = made(kind, 2), made(kind)
    report = save_and_load(tmp_path, state, fresh)
    assert report.missing == (name,)
    assert f"left out of the checkpoint, so left as it was built: {name}" in report.notes
    assert "optimizer" in report.exact
    for item in (state, fresh):
        step(item)
        optimizer = getattr(item.optimizer, "inner", item.optimizer)
        assert optimizer.param_groups[0]["_call"] is function
    assert torch.equal(state.model.weight, fresh.model.weight)


def test_an_option_that_the_optimizer_returns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"optimizer\.weight\.options\._call: a builtins\.function .*allow_unsaved"
    ):
        save_and_load(tmp_path, made(Showing, 1), made(Showing))
