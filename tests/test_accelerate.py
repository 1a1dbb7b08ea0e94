"""An AppState made from an Accelerator holds everything that `accelerator.save_state` would save."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from hydra_ckpt import AppState, CheckpointCallback, CheckpointConfigError, CheckpointingConfig, LoadReport, resumable
from hydra_ckpt.state.accelerated import UndecidedLoader
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.testing import run_distributed


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    """Accelerators of one process share their state."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Counter:
    """An object for register_for_checkpointing."""

    def __init__(self, n: int = 0) -> None:
        self.n = n
        self.tensor = torch.full((2,), float(n))

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n, "tensor": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n, self.tensor = state["n"], state["tensor"]


class Other(Counter):
    pass


def loader(*, shuffle: bool = False, size: int = 8) -> Any:
    return DataLoader(TensorDataset(torch.arange(float(size)).view(-1, 1)), batch_size=2, shuffle=shuffle)


def save(directory: Path, state: AppState) -> Path:
    with CheckpointingConfig(checkpoint_dir=str(directory), save_consolidated="always").build(_rank(), 0, 0) as engine:
        return engine.save(state, step=1).result().path


def load(directory: Path, state: AppState) -> LoadReport:
    with CheckpointingConfig(checkpoint_dir=str(directory)).build(_rank(), 0, 0) as engine:
        report = engine.load(state)
        assert report is not None
        return report


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


# -- registered objects --------------------------------------------------------------------------------------------


class Registered:
    """A run with objects of several classes, two of one, beside extras of the user's own."""

    def __init__(self, n: int) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        torch.manual_seed(n)
        model = nn.Linear(1, 1)
        optimizer = SGD(model.parameters(), lr=0.1 * (n + 1), momentum=0.9)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, StepLR(optimizer, 1))
        self.objects = [Counter(n), Other(n + 1), Counter(n + 2)]
        self.accelerator.register_for_checkpointing(*self.objects)
        self.mine = Counter(n + 3)
        self.accelerator.step = n
        self.state = AppState.from_accelerator(self.accelerator, extras={"other": self.mine})

    def held(self) -> list[Any]:
        counters = [(item.n, item.tensor.tolist()) for item in [*self.objects, self.mine]]
        weights = [p.tolist() for p in self.model.parameters()]
        return [counters, weights, self.optimizer.param_groups[0]["lr"], self.accelerator.step]


def _registered(directory: Path) -> list[str]:
    saved = Registered(5)
    expected = saved.held()
    save(directory, saved.state)
    saved.accelerator.free_memory()
    again = Registered(0)
    assert again.held() != expected
    report = load(directory, again.state)
    assert again.held() == expected
    assert "extras" in report.loaded
    assert not report.rederived
    return sorted(again.state.extras)


NAMES = ["accelerator", "counter_0", "counter_1", "other", "other_0"]


def test_registered_objects_are_extras_under_their_class_s_name(tmp_path: Path) -> None:
    assert _registered(tmp_path) == NAMES


def test_registered_objects_of_two_ranks(tmp_path: Path) -> None:
    assert run_distributed(_registered, 2, tmp_path) == [NAMES, NAMES]


def test_an_object_that_is_an_extra_already_is_saved_once() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(1, 1))
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    state = AppState.from_accelerator(accelerator, {"mine": counter, "accelerator": Other()})
    assert sorted(state.extras) == ["accelerator", "accelerator_0", "mine"]


@pytest.mark.parametrize("what", ["registered", "prepared"])
def test_what_comes_later_is_refused_by_name(tmp_path: Path, what: str) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(1, 1))
    state = AppState.from_accelerator(accelerator)
    if what == "registered":
        accelerator.register_for_checkpointing(Counter())
    else:
        accelerator.prepare(nn.Bilinear(1, 1, 1))
    name = "Counter" if what == "registered" else "Bilinear"
    with pytest.raises(CheckpointConfigError, match=f"got {name} after it was called"):
        save(tmp_path, state)


def test_a_validation_s_loader_may_come_later(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(1, 1))
    state = AppState.from_accelerator(accelerator)
    accelerator.prepare(loader())
    save(tmp_path, state)


# -- models --------------------------------------------------------------------------------------------------------


def _two_models(directory: Path) -> list[str]:
    def build(seed: int) -> tuple[Any, list[nn.Module], AppState]:
        torch.manual_seed(seed)
        accelerator = Accelerator(cpu=True)
        models: list[nn.Module] = [nn.Linear(2, 2), nn.Linear(2, 1)]
        optimizers = [SGD(models[0].parameters(), lr=0.1), Adam(models[1].parameters(), lr=0.1 + seed)]
        prepared = accelerator.prepare(*models, *optimizers)
        for optimizer in prepared[2:]:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.grad = torch.full_like(parameter, float(seed + 1))
            optimizer.step()
        return accelerator, list(prepared[:2]), AppState.from_accelerator(accelerator)

    accelerator, models, state = build(1)
    path = save(directory, state)
    accelerator.free_memory()
    again, others, fresh = build(0)
    load(directory, fresh)
    for one, other in zip(models, others, strict=True):
        for left, right in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(left, right)
    assert [item.param_groups[0]["lr"] for item in fresh.optimizers] == [0.1, 1.1]
    moments = [[s["exp_avg"] for s in item.optimizers[1].state.values()] for item in (state, fresh)]
    assert all(torch.equal(*pair) for pair in zip(*moments, strict=True))
    again.free_memory()
    return sorted(item.name for item in (path / "model").iterdir())


def test_several_models_are_independent(tmp_path: Path) -> None:
    assert _two_models(tmp_path) == ["model_0", "model_1"]


def test_several_models_of_two_ranks(tmp_path: Path) -> None:
    assert run_distributed(_two_models, 2, tmp_path) == [["model_0", "model_1"]] * 2


def test_models_of_transformers_are_exported_each_with_its_configuration(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    from tests.hub_models import gpt2, llama

    accelerator = Accelerator(cpu=True)
    models = {"student": llama(), "teacher": gpt2()}
    accelerator.prepare(*models.values())
    path = save(tmp_path, AppState.from_accelerator(accelerator, models=models))
    for name, model in models.items():
        kind = AutoModelForCausalLM if hasattr(model, "lm_head") else AutoModel
        opened = kind.from_pretrained(path / "model" / name / "consolidated")
        assert type(opened) is type(model)
        assert all(torch.equal(*pair) for pair in zip(opened.parameters(), model.parameters(), strict=True))


def test_names_of_models_have_to_be_complete() -> None:
    accelerator = Accelerator(cpu=True)
    one, other = nn.Linear(1, 1), nn.Linear(1, 2)
    accelerator.prepare(one, other)
    with pytest.raises(CheckpointConfigError, match="a Linear has no name"):
        AppState.from_accelerator(accelerator, models={"one": one})
    with pytest.raises(CheckpointConfigError, match=r"models\['x'\] was not prepared"):
        AppState.from_accelerator(accelerator, models={"one": one, "other": other, "x": nn.Linear(1, 3)})
    assert AppState.from_accelerator(accelerator, models={"b": other, "a": one}).model == {"b": other, "a": one}


# -- loaders -------------------------------------------------------------------------------------------------------


class Canonical:
    """prepare(model, optimizer, train, eval, scheduler), as accelerate's examples have it."""

    def __init__(self, *, names_loader: bool = False) -> None:
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        optimizer = Adam(model.parameters(), lr=0.1)
        train, evaluation = loader(shuffle=True), loader()
        if names_loader:
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
            self.train_loader = resumable(train, seed=3, rank=rank, world_size=world)
            found = self.accelerator.prepare(model, optimizer, evaluation, StepLR(optimizer, 2))
            self.model, self.optimizer, _, self.scheduler = found
        else:
            found = self.accelerator.prepare(model, optimizer, train, evaluation, StepLR(optimizer, 2))
            self.model, self.optimizer, self.train_loader, _, self.scheduler = found
        given = self.train_loader if names_loader else None
        self.state = AppState.from_accelerator(self.accelerator, dataloader=given)

    def train(self, directory: Path, until: int) -> tuple[Any, list[float]]:
        config = CheckpointingConfig(checkpoint_dir=str(directory))
        with CheckpointCallback(config, every_n_steps=2) as callback:
            report = callback.on_train_begin(self.state)
            step = report.step if report else 0
            while step < until:
                for (batch,) in self.train_loader:
                    self.accelerator.backward(self.model(batch).square().mean())
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                    step += 1
                    callback.on_step_end(step)
                    if step == until:
                        break
        weights = [p.item() for p in self.accelerator.unwrap_model(self.model).parameters()]
        self.accelerator.free_memory()
        return report, [*weights, self.scheduler.get_last_lr()[0]]


def _canonical(directory: Path, names_loader: bool) -> list[str]:
    _, expected = Canonical(names_loader=names_loader).train(directory / "whole", 7)
    Canonical(names_loader=names_loader).train(directory / "parts", 4)
    report, found = Canonical(names_loader=names_loader).train(directory / "parts", 7)
    assert report.step == 4
    assert set(report.loaded) >= {"model", "optimizer", "lr_scheduler", "rng", "extras"}
    if names_loader:
        assert found == expected
    return sorted(report.rederived)


@pytest.mark.parametrize("names_loader", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_canonical_script_resumes(tmp_path: Path, names_loader: bool, world_size: int) -> None:
    if world_size == 1:
        found = [_canonical(tmp_path, names_loader)]
    else:
        found = run_distributed(_canonical, world_size, tmp_path, names_loader)
    assert found == [[] if names_loader else ["dataloader"]] * world_size


def test_the_training_loader_is_the_one_that_shuffles() -> None:
    accelerator = Accelerator(cpu=True)
    _, _, train = accelerator.prepare(nn.Linear(1, 1), loader(), loader(shuffle=True))
    assert AppState.from_accelerator(accelerator).dataloader is train


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_doubt_about_the_training_loader_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shuffle: bool
) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(1, 1), loader(shuffle=shuffle), loader(shuffle=shuffle))
    state = AppState.from_accelerator(accelerator)
    assert isinstance(state.dataloader, UndecidedLoader)
    with caplog.at_level(logging.WARNING):
        save(tmp_path, state)
    assert "AppState.from_accelerator(accelerator, dataloader=loader)" in caplog.text
    assert "dataloader" in load(tmp_path, state).rederived


def test_loaders_that_can_tell_their_place_are_saved(tmp_path: Path) -> None:
    pytest.importorskip("torchdata")
    from accelerate.utils import DataLoaderConfiguration

    def build() -> tuple[Any, Any, AppState]:
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
        found = accelerator.prepare(nn.Linear(1, 1), loader(), loader(shuffle=True), loader(size=6))
        return found[1], found[3], AppState.from_accelerator(accelerator)

    first, third, state = build()
    for item, count in ((first, 1), (third, 2)):
        batches = iter(item)
        for _ in range(count):
            next(batches)
    assert sorted(state.extras) == ["accelerator", "dataloader_0", "dataloader_2"]
    save(tmp_path, state)
    first, third, again = build()
    report = load(tmp_path, again)
    assert {"dataloader", "extras"} <= set(report.loaded)
    assert [batch[0].flatten().tolist() for batch in first] == [[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    assert [batch[0].flatten().tolist() for batch in third] == [[4.0, 5.0]]
    assert [item.step for item in scan(tmp_path).checkpoints] == [1]


def test_a_save_in_the_middle_of_an_accumulation_warns_of_its_gradients(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(plain, SGD(plain.parameters(), lr=0.1))
    state = AppState.from_accelerator(accelerator)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as engine:
        for step in range(1, 5):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.ones(1, 1)).sum())
                optimizer.step()
                optimizer.zero_grad()
            engine.save(state, step=step).result()
    warnings = [text for text in caplog.messages if "in the middle of gradient accumulation" in text]
    assert len(warnings) == 1
    assert "gradient_accumulation_steps=2" in warnings[0]


def test_an_accelerator_that_has_prepared_nothing_is_refused_with_the_remedy() -> None:
    with pytest.raises(CheckpointConfigError, match=r"nothing is prepared yet. Call it after the last prepare\(\)"):
        AppState.from_accelerator(Accelerator(cpu=True))
