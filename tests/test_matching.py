"""What a load compares before it changes anything: memory, names, and state that only one side has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hydra_ckpt import AppState, CheckpointingConfig, KeyMismatchError, LoadReport


def save(root: Path, state: AppState, **options: Any) -> None:
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(0, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()


def load(root: Path, state: AppState, **options: Any) -> LoadReport:
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(0, 0, 0) as checkpointer:
        report = checkpointer.load(state, restore_from="latest")
    assert report is not None
    return report


# --- memory that live tensors share


class Sharing(nn.Module):
    """Its head may be tied to its embedding through `.data`, and one buffer may be a view of the other."""

    def __init__(self, *, tied: bool = False, view: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.register_buffer("row", torch.arange(4.0))
        self.register_buffer("part", self.row[::2] if view else torch.full((2,), 7.0))
        if tied:
            self.head.weight = nn.Parameter(self.embedding.weight.data)


@pytest.mark.parametrize(
    ("fresh", "lost", "by"),
    [
        (lambda: Sharing(tied=True), "embedding.weight", "head.weight"),
        (lambda: Sharing(view=True), "row", "part"),
    ],
    ids=["tied by data", "view"],
)
@pytest.mark.parametrize("model_save_format", ["safetensors", "torch_save"])
def test_tensors_that_share_memory_here_and_had_different_values(
    tmp_path: Path, fresh: Any, lost: str, by: str, model_save_format: str
) -> None:
    saved, live = Sharing(), fresh()
    save(tmp_path, AppState(saved), model_save_format=model_save_format)
    before = {name: value.clone() for name, value in live.state_dict().items()}
    with pytest.raises(KeyMismatchError) as caught:
        load(tmp_path, AppState(live))
    assert caught.value.mismatched.keys() == {lost}
    assert f"it shares memory with model.{by} here" in caught.value.mismatched[lost]
    assert all(torch.equal(value, before[name]) for name, value in live.state_dict().items())
    report = load(tmp_path, AppState(live), load_strict=False)
    assert report.missing == (f"model.{lost}",)
    assert all(
        torch.equal(value, saved.state_dict()[name]) for name, value in live.state_dict().items() if name != lost
    )


def test_models_that_share_a_parameter_here_and_had_two(tmp_path: Path) -> None:
    save(tmp_path, AppState({"teacher": nn.Linear(2, 2), "student": nn.Linear(2, 2)}))
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
    teacher.weight = student.weight
    with pytest.raises(KeyMismatchError) as caught:
        load(tmp_path, AppState({"teacher": teacher, "student": student}))
    [(name, why)] = caught.value.mismatched.items()
    assert (name, "model.student.weight here" in why) == ("teacher/weight", True)


@pytest.mark.parametrize("make", [lambda: Sharing(tied=True), lambda: Sharing(view=True)], ids=["tied", "view"])
def test_tensors_that_shared_memory_when_saved_are_loaded(tmp_path: Path, make: Any) -> None:
    saved, live = make(), make()
    save(tmp_path, AppState(saved))
    assert "model" in load(tmp_path, AppState(live)).exact
    assert all(torch.equal(value, live.state_dict()[name]) for name, value in saved.state_dict().items())


def test_a_parameter_that_two_models_shared_when_saved_is_loaded(tmp_path: Path) -> None:
    def make() -> dict[str, nn.Module]:
        models: dict[str, nn.Module] = {"teacher": nn.Linear(2, 2), "student": nn.Linear(2, 2)}
        models["teacher"].weight = models["student"].weight
        return models

    saved, live = make(), make()
    save(tmp_path, AppState(saved))
    assert {"model.teacher", "model.student"} <= set(load(tmp_path, AppState(live)).exact)
    assert torch.equal(saved["teacher"].weight, live["student"].weight)


def test_parameters_that_are_parts_of_one_row_are_loaded(tmp_path: Path) -> None:
    saved, live = (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5)) for _ in range(2))
    row = torch.cat([item.detach().flatten() for item in live.parameters()])
    start = 0
    for item in live.parameters():
        item.data = row[start : start + item.numel()].view(item.shape)
        start += item.numel()
    save(tmp_path, AppState(saved))
    assert "model" in load(tmp_path, AppState(live)).exact
    assert torch.equal(row, torch.cat([item.detach().flatten() for item in saved.parameters()]))


# --- entries that are tensors of the model once more


class Best(nn.Linear):
    """Its hook adds `best`, which may be its weight at the moment of the save."""

    def __init__(self, best: torch.Tensor | None = None) -> None:
        super().__init__(2, 2)
        self.best = best
        self.register_state_dict_post_hook(self.add)
        self.register_load_state_dict_pre_hook(self.take)

    @staticmethod
    def add(module: Best, state: dict[str, Any], prefix: str, _: Any) -> None:
        state.update({f"{prefix}best": module.best} if module.best is not None else {})

    @staticmethod
    def take(module: Best, state: dict[str, Any], prefix: str, *_: Any) -> None:
        module.best = state.pop(f"{prefix}best", None)


@pytest.mark.parametrize("here", [None, torch.zeros(2, 2), "weight"], ids=["none", "another", "weight"])
def test_an_entry_that_is_a_parameter_comes_back(tmp_path: Path, here: Any) -> None:
    saved, live = nn.Sequential(Best()), nn.Sequential(Best())
    saved[0].best = saved[0].weight.detach()
    live[0].best = live[0].weight.detach() if here == "weight" else here
    save(tmp_path, AppState(saved))
    assert "model" in load(tmp_path, AppState(live)).exact
    assert torch.equal(live[0].best, saved[0].weight)
    with torch.no_grad():
        live[0].weight.zero_()
    assert torch.equal(live[0].best, saved[0].weight)  # as after PyTorch's own loading


def test_an_entry_that_is_a_parameter_here_and_was_not_saved_goes_away(tmp_path: Path) -> None:
    saved, live = Best(), Best()
    live.best = live.weight.detach()
    save(tmp_path, AppState(saved))
    assert "model" in load(tmp_path, AppState(live)).exact
    assert live.best is None


def test_a_second_name_that_no_module_loads_is_no_entry(tmp_path: Path) -> None:
    def make() -> nn.Linear:
        module = nn.Linear(2, 2)
        module.register_state_dict_post_hook(lambda m, state, prefix, _: state.update({f"{prefix}kernel": m.weight}))
        return module

    saved, live = make(), make()
    save(tmp_path, AppState(saved))
    load(tmp_path, AppState(live))
    assert torch.equal(saved.weight, live.weight)
