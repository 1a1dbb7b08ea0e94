"""What a load compares before it changes anything: memory, names, and state that only one side has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from hydra_ckpt import AppState, CheckpointingConfig, KeyMismatchError, LoadReport
from hydra_ckpt.testing import run_distributed
from tests.holders import Holder, Module


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


# --- own state that the checkpoint lacks


class Slow(torch.optim.SGD):
    """With slow weights, as Lookahead has."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.slow = [item.detach().clone() for group in self.param_groups for item in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "slow": self.slow, "later": {}}

    def load_state_dict(self, state: Any) -> None:
        self.slow = state["slow"]
        super().load_state_dict({key: value for key, value in state.items() if key not in ("slow", "later")})


class Counting(torch.optim.SGD):
    """Keeps a counter under a key of its own, from its first step on."""

    def step(self, closure: Any = None) -> Any:
        self.state["all"] = {"steps": self.state.get("all", {"steps": 0})["steps"] + 1}
        return super().step(closure)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    sum(item.square().sum() for item in model.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_slow_weights_that_the_checkpoint_lacks_are_missing(tmp_path: Path) -> None:
    saved, live = nn.Linear(2, 2), nn.Linear(2, 2)
    save(tmp_path, AppState(saved, torch.optim.SGD(saved.parameters(), lr=0.5)))
    optimizer = Slow(live.parameters(), lr=0.1)
    with pytest.raises(KeyMismatchError) as caught:
        load(tmp_path, AppState(live, optimizer))
    assert caught.value.missing == ["optimizer.slow"]
    assert load(tmp_path, AppState(live, optimizer), load_strict=False).missing == ("optimizer.slow",)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_counter_that_began_after_the_save_goes_away(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = Counting(model.parameters(), lr=0.1, momentum=0.9)
    save(tmp_path, AppState(model, optimizer))
    step(model, optimizer)
    report = load(tmp_path, AppState(model, optimizer))
    assert "optimizer" in report.exact
    assert not report.missing
    assert not optimizer.state


class Seen(nn.Linear):
    """Its hooks save and load a counter, which is 0 if it was not saved."""

    def __init__(self, seen: int = 0, *, always: bool = True) -> None:
        super().__init__(2, 2)
        self.seen, self.always = seen, always
        self.register_state_dict_post_hook(self.add)
        self.register_load_state_dict_pre_hook(self.take)

    @staticmethod
    def add(module: Seen, state: dict[str, Any], prefix: str, _: Any) -> None:
        state.update({f"{prefix}seen": module.seen} if module.seen or module.always else {})

    @staticmethod
    def take(module: Seen, state: dict[str, Any], prefix: str, *_: Any) -> None:
        module.seen = state.pop(f"{prefix}seen", 0)


def test_an_entry_that_the_checkpoint_lacks_is_missing(tmp_path: Path) -> None:
    saved, live = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(Seen(5))
    save(tmp_path, AppState(saved))
    with pytest.raises(KeyMismatchError) as caught:
        load(tmp_path, AppState(live))
    assert caught.value.missing == ["0.seen"]
    assert live[0].seen == 5
    assert load(tmp_path, AppState(live), load_strict=False).missing == ("model.0.seen",)
    assert live[0].seen == 5  # as built
    assert torch.equal(live[0].weight, saved[0].weight)


def test_an_entry_that_goes_away_without_a_saved_one_is_exact(tmp_path: Path) -> None:
    saved, live = nn.Sequential(Seen(always=False)), nn.Sequential(Seen(5, always=False))
    save(tmp_path, AppState(saved))
    report = load(tmp_path, AppState(live))
    assert ("model" in report.exact, report.missing) == (True, ())
    assert live[0].seen == 0


def test_an_extra_state_that_the_checkpoint_lacks_is_missing(tmp_path: Path) -> None:
    saved, live = nn.Linear(4, 4), Module(7)
    save(tmp_path, AppState(saved))
    with pytest.raises(KeyMismatchError) as caught:
        load(tmp_path, AppState(live))
    assert caught.value.missing == ["_extra_state"]
    assert load(tmp_path, AppState(live), load_strict=False).missing == ("model._extra_state",)
    assert live.held == 7


# --- state that stays as it was built


def with_lbfgs(*shapes: tuple[int, int]) -> tuple[nn.Module, torch.optim.LBFGS, Any]:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in zip("abc", shapes, strict=False)})
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((item.sum() - 1).square() + item.square().sum() for item in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model, optimizer, closure


@pytest.mark.parametrize(
    "shapes",
    [[(2, 3), (3, 2)], [(2, 3), (2, 4)], [(2, 3)], [(2, 3), (2, 3), (2, 3)]],
    ids=["same", "sum", "less", "more"],
)
def test_one_state_for_all_parameters_stays_if_not_all_of_them_are_loaded(tmp_path: Path, shapes: Any) -> None:
    model, optimizer, _ = with_lbfgs((2, 3), (2, 3))
    save(tmp_path, AppState(model, optimizer))
    again, restored, closure = with_lbfgs(*shapes)
    before = restored.state[again["a"].weight]["d"].clone()
    report = load(tmp_path, AppState(again, restored), load_strict=False)
    assert {"optimizer", "optimizer.a.weight"} <= set(report.missing)
    assert "optimizer" not in report.exact
    assert torch.equal(restored.state[again["a"].weight]["d"], before)
    restored.step(closure)  # of the sizes that its parameters have
    with pytest.raises(KeyMismatchError, match="one state for all parameters"):
        load(tmp_path, AppState(again, restored))


class Numbered(torch.optim.SGD):
    """With a number of its own."""

    number = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "number": self.number}

    def load_state_dict(self, state: Any) -> None:
        self.number = state["number"]
        super().load_state_dict({key: value for key, value in state.items() if key != "number"})


def _sharded(shards: bool, kind: type[torch.optim.SGD]) -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6))
    if shards:
        fully_shard(model)
    optimizer = kind(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer)
    return model, optimizer


def _save_own_tensors(root: Path) -> None:
    rank = dist.get_rank()
    for name in ("option", "state"):
        model, optimizer = _sharded(True, torch.optim.SGD if name == "option" else Numbered)
        own = torch.ones(3) * (1 + rank)
        optimizer.param_groups[0]["lr"] = 0.5
        if name == "option":
            optimizer.param_groups[0]["own"] = own
        else:
            optimizer.number = 5
            optimizer.state[model[0].weight]["own"] = own
        with CheckpointingConfig(checkpoint_dir=str(root / name)).build(rank, 0, 0) as checkpointer:
            checkpointer.save(AppState(model, optimizer), step=1).result()


def test_all_that_stays_with_a_tensor_of_each_rank_is_named(tmp_path: Path) -> None:
    run_distributed(_save_own_tensors, 2, tmp_path)
    model, optimizer = _sharded(False, torch.optim.SGD)
    optimizer.param_groups[0]["own"] = torch.zeros(3)
    report = load(tmp_path / "option", AppState(model, optimizer), load_strict=False)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert set(report.missing) == {"optimizer.0.weight.options.own", "optimizer.param_groups.0"}
    model, optimizer = _sharded(False, Numbered)
    report = load(tmp_path / "state", AppState(model, optimizer), load_strict=False)
    assert (optimizer.number, optimizer.param_groups[0]["lr"]) == (0, 0.5)
    assert set(report.missing) == {"optimizer.0.weight", "optimizer.0.weight.own", "optimizer.state_dict()"}


# --- names in reports


def _drifted(root: Path) -> list[LoadReport]:
    rank = dist.get_rank()

    def make() -> AppState:
        torch.manual_seed(0)
        models = {name: nn.Linear(2, 2) for name in "ab"}
        optimizers = {name: torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for name, one in models.items()}
        for name, model in models.items():
            step(model, optimizers[name])
        mesh = init_device_mesh("cpu", (2,))
        return AppState(
            models, optimizers, extras={"ema": Holder(distribute_tensor(torch.ones(4), mesh, [Replicate()]))}
        )

    state, reports = make(), []
    with CheckpointingConfig(checkpoint_dir=str(root)).build(rank, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()
        for held in state.optimizer["b"].state.values():
            held["momentum_buffer"].add_(rank)
        state.extras["ema"].held.to_local().add_(rank)
        checkpointer.save(state, step=2).result()
        reports.append(checkpointer.load(make(), restore_from="latest"))
    return [report for report in reports if report is not None]


def test_objects_that_had_drifted_are_named_and_not_exact(tmp_path: Path) -> None:
    for [report] in run_distributed(_drifted, 2, tmp_path):
        assert {"optimizer.b", "extras.ema"} <= set(report.rederived)
        assert not {"optimizer", "model", "extras", "optimizer.b", "extras.ema"} & set(report.exact)
        assert not {"optimizer", "extras"} & set(report.rederived)


class Buffered(nn.Module):
    """With one buffer of this name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_buffer(name, torch.ones(2))


def test_all_names_in_reports_are_dotted(tmp_path: Path) -> None:
    def make(name: str, *more: str) -> AppState:
        models: dict[str, nn.Module] = {
            "net": Buffered(name),
            "fc": nn.ModuleDict({one: nn.Linear(1, 1) for one in more}),
        }
        optimizer = torch.optim.SGD(models["fc"].parameters(), lr=0.1, momentum=0.9)
        step(models["fc"], optimizer)
        return AppState(models, optimizer)

    save(tmp_path / "one", AppState(Buffered("y")))
    report = load(tmp_path / "one", AppState(Buffered("z")), load_strict=False)
    assert (report.skipped, report.missing) == (("model.y",), ("model.z",))
    save(tmp_path / "two", make("y", "a", "b"))
    report = load(tmp_path / "two", make("z", "a", "c"), load_strict=False)
    there, here = (
        {f"{owner}.{name}.{kind}" for owner in ("model.fc", "optimizer.fc") for kind in ("weight", "bias")}
        for name in "bc"
    )
    assert set(report.skipped) == {"model.net.y", *there}
    assert set(report.missing) == {"model.net.z", *here}


# --- schedulers


def scheduled(*kinds: Any) -> AppState:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return AppState(model, optimizer, [kind(optimizer) for kind in kinds])


def step_lr(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3)


def exponential(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def test_a_scheduler_of_another_class_with_other_fields_is_not_loaded(tmp_path: Path) -> None:
    save(tmp_path, scheduled(step_lr))
    state = scheduled(exponential)
    with pytest.raises(KeyMismatchError, match=r"lr_scheduler: StepLR in the checkpoint, ExponentialLR .*step_size"):
        load(tmp_path, state)
    report = load(tmp_path, state, load_strict=False)
    assert state.lr_schedulers[0].gamma == 0.9
    assert "lr_scheduler" in report.missing
    assert "lr_scheduler" not in (*report.exact, *report.loaded)


def test_a_scheduler_of_another_class_with_the_same_fields_is_noted(tmp_path: Path) -> None:
    class Ours(torch.optim.lr_scheduler.StepLR):
        pass

    save(tmp_path, scheduled(step_lr))
    report = load(tmp_path, scheduled(lambda optimizer: Ours(optimizer, 7)))
    assert "lr_scheduler" in report.exact
    assert any("lr_scheduler was a StepLR when saved" in note for note in report.notes)


def test_a_scheduler_that_is_not_here_is_skipped(tmp_path: Path) -> None:
    save(tmp_path, scheduled(step_lr, exponential))
    report = load(tmp_path, scheduled(step_lr), load_strict=False)
    assert report.skipped == ("lr_scheduler.1",)


def test_schedulers_whose_groups_have_moved_stay_as_built(tmp_path: Path) -> None:
    def make(*, is_swapped: bool) -> AppState:
        model = nn.Linear(2, 2)
        groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.5}]
        optimizer = torch.optim.SGD(groups[::-1] if is_swapped else groups)
        return AppState(model, optimizer, step_lr(optimizer))

    save(tmp_path, make(is_swapped=False))
    state = make(is_swapped=True)
    report = load(tmp_path, state, load_strict=False)
    assert state.lr_scheduler.base_lrs == [0.5, 0.1]
    assert "lr_scheduler" in report.missing


# --- wrappers


class Passing(nn.Module):
    """Passes its child's state on, with a counter once it is not 0."""

    def __init__(self, count: int = 0) -> None:
        super().__init__()
        self.inner, self.count = nn.Linear(2, 2), count

    def state_dict(self, *args: Any, **options: Any) -> Any:
        state = self.inner.state_dict(*args, **options)
        state.update({"count": self.count} if self.count else {})
        return state

    def load_state_dict(self, state: Any, *args: Any, **options: Any) -> Any:
        rest = dict(state)
        self.count = rest.pop("count", 0)
        return self.inner.load_state_dict(rest, *args, **options)


@pytest.mark.parametrize(("there", "here"), [(3, 0), (0, 3), (3, 5), (0, 0)])
def test_what_a_wrapper_adds_now_does_not_change_the_names(tmp_path: Path, there: int, here: int) -> None:
    def make(count: int) -> tuple[Passing, torch.optim.Optimizer]:
        model = Passing(count)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    (saved, optimizer), (live, fresh) = make(there), make(here)
    step(saved, optimizer)
    save(tmp_path, AppState(saved, optimizer))
    report = load(tmp_path, AppState(live, fresh))
    assert {"model", "optimizer"} <= set(report.exact)
    assert (live.count, report.missing) == (there, ())
    assert torch.equal(live.inner.weight, saved.inner.weight)
    assert fresh.state[live.inner.weight]["step"] == 1


def test_a_wrapper_may_begin_to_add_between_saves(tmp_path: Path) -> None:
    model, live = Passing(), Passing()
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.save(AppState(model), step=1).result()
        model.count = 4
        checkpointer.save(AppState(model), step=2).result()
    load(tmp_path, AppState(live))
    assert live.count == 4


def test_a_run_of_one_process_is_told_nothing_of_stages(tmp_path: Path) -> None:
    save(tmp_path, AppState(nn.Sequential(Seen(5))))
    with pytest.raises(KeyMismatchError) as caught:
        load(tmp_path, AppState(nn.Sequential(Seen(5), nn.Linear(2, 2))))
    assert "stage" not in str(caught.value)
