"""What messages and reports claim: every error names its object, and `exact` means equal to what was saved."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from hydra_ckpt import AppState, CheckpointError, CheckpointingConfig, LoadReport
from hydra_ckpt.testing import run_distributed


class Holder:
    """Takes its state over as it is; fails if it is set to."""

    def __init__(self, held: Any = None, fails: str = "") -> None:
        self.held, self.fails = held, fails

    def state_dict(self) -> Any:
        if self.fails == "state_dict":
            raise ValueError("boo")
        return {"held": self.held}

    def load_state_dict(self, state: Any) -> None:
        if self.fails == "load_state_dict":
            raise ValueError("boo")
        self.held = state["held"]


class Module(nn.Linear):
    """With extra state; its methods fail if they are set to."""

    def __init__(self, fails: str = "", held: Any = 1) -> None:
        super().__init__(1, 1)
        self.fails, self.held = fails, held

    def get_extra_state(self) -> Any:
        if self.fails == "get_extra_state":
            raise ValueError("boo")
        return self.held

    def set_extra_state(self, state: Any) -> None:
        if self.fails == "set_extra_state":
            raise ValueError("boo")
        self.held = state


def save(root: Path, *states: AppState, rank: int = 0, **options: Any) -> None:
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(rank, 0, 0) as checkpointer:
        for step, state in enumerate(states, 1):
            checkpointer.save(state, step=step).result()


def load(root: Path, state: AppState, rank: int = 0, **options: Any) -> LoadReport:
    with CheckpointingConfig(checkpoint_dir=str(root), **options).build(rank, 0, 0) as checkpointer:
        report = checkpointer.load(state, restore_from="latest")
    assert report is not None
    return report


# --- errors


def test_an_extra_state_that_raises_is_named_when_it_is_saved(tmp_path: Path) -> None:
    model = nn.Sequential(Module("get_extra_state"))
    remedy = r'checkpoint\.allow_unsaved=\["model\.0\._extra_state"\]'
    with pytest.raises(CheckpointError, match=rf"model\.0\._extra_state \(Module\).* ValueError: boo.*{remedy}"):
        save(tmp_path, AppState(model))
    save(tmp_path, AppState(model), allow_unsaved=["model.0._extra_state"])  # the remedy works
    fresh = nn.Sequential(Module(held=7))
    report = load(tmp_path, AppState(fresh))
    assert fresh[0].held == 7
    assert report.missing == ("model.0._extra_state",)


def test_an_extra_state_that_raises_is_named_when_it_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, AppState({"net": Module()}))
    with pytest.raises(CheckpointError, match=r"model\.net\._extra_state \(Module\): its set_extra_state\(\) raises"):
        load(tmp_path, AppState({"net": Module("set_extra_state")}))


def test_a_part_of_an_extra_state_may_be_left_out(tmp_path: Path) -> None:
    save(tmp_path, AppState(Module(held={"a": 1, "b": 2})), allow_unsaved=["model._extra_state.b"])
    fresh = Module(held={"a": 7, "b": 8})
    report = load(tmp_path, AppState(fresh))
    assert fresh.held == {"a": 1, "b": 8}
    assert report.missing == ("model._extra_state.b",)
    assert "model" in report.exact


def test_a_loader_that_raises_later_is_named(tmp_path: Path) -> None:
    loader = Holder(1)
    state = AppState(nn.Linear(1, 1), dataloader=loader)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()
        loader.fails = "state_dict"
        with pytest.raises(CheckpointError, match=r"dataloader \(Holder\): its state_dict\(\) raises.*resumable"):
            checkpointer.save(state, step=2).result()
    fresh = Holder(fails="load_state_dict")
    with pytest.raises(CheckpointError, match=r"dataloader \(Holder\): its load_state_dict\(\) raises.*restore_parts"):
        load(tmp_path, AppState(nn.Linear(1, 1), dataloader=fresh))


def test_extras_that_raise_are_named_with_a_remedy(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    remedy = r'checkpoint\.allow_unsaved=\["extras\.box"\]'
    with pytest.raises(CheckpointError, match=rf"extras\.box \(Holder\): its state_dict\(\) raises.*{remedy}"):
        save(tmp_path, AppState(model, extras={"box": Holder(fails="state_dict")}))
    save(tmp_path, AppState(model, extras={"box": Holder(1)}))
    with pytest.raises(CheckpointError, match=r"extras\.box \(Holder\): its state_dict\(\) raises ValueError: boo"):
        load(tmp_path, AppState(model, extras={"box": Holder(fails="state_dict")}))


LONG = 10**5000


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (LONG, "extras.box.held"),
        ([1, -LONG], "extras.box.held.1"),
        ({LONG: 1}, "extras.box.held.<key>"),
        (range(LONG), "extras.box.held"),
    ],
    ids=["bare", "list", "key", "range"],
)
def test_an_int_that_python_does_not_write_out_is_named(tmp_path: Path, held: Any, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, AppState(nn.Linear(1, 1), extras={"box": Holder(held)}))
    assert f"{name}" in str(caught.value)
    assert "an int of more than 4300 digits cannot be stored" in str(caught.value)
    assert f'checkpoint.allow_unsaved=["{name.removesuffix(".<key>")}"]' in str(caught.value)


def test_the_longest_int_that_python_writes_out_is_saved(tmp_path: Path) -> None:
    longest, fresh = 2**14284 - 1, Holder()
    save(tmp_path, AppState(nn.Linear(1, 1), extras={"box": Holder([longest, -longest])}))
    load(tmp_path, AppState(nn.Linear(1, 1), extras={"box": fresh}))
    assert fresh.held == [longest, -longest]


def _unequal(root: Path, kind: str) -> str:
    rank = dist.get_rank()
    torch.manual_seed(0)
    held = {
        "shape": {"a": torch.ones(3 + rank)},
        "key": {"a": torch.ones(1)} if rank else {},
        "type": {"a": torch.ones(1, dtype=(torch.float32, torch.float64)[rank])},
    }[kind]
    state = AppState(nn.Linear(1, 1), extras={"box": Holder(held)})
    try:
        save(root, state, rank=rank)
    except CheckpointError as error:
        save(root / "2", state, rank=rank, allow_unsaved=["extras.box"])  # the remedy works
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["shape", "key", "type"])
def test_extras_that_differ_between_ranks_are_named_with_a_remedy(tmp_path: Path, kind: str) -> None:
    for text in run_distributed(_unequal, 2, tmp_path, kind):
        assert "extras.box: give it the same keys, and tensors of the same shapes and types, on every rank" in text
        assert 'checkpoint.allow_unsaved=["extras.box"]' in text
        assert "Build the same model" not in text


class Listing(nn.Linear):
    """Has a list of tensors in its state_dict, as metrics have."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__(1, 1)
        self.held = held

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}held.{number}": item for number, item in enumerate(self.held)})

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self.held = [state.pop(key) for key in list(state) if key.startswith(f"{prefix}held.")]
        super()._load_from_state_dict(state, prefix, *args)


def _unequal_in_model(root: Path, kind: str) -> list[str]:
    rank = dist.get_rank()
    torch.manual_seed(0)
    tensors = [torch.ones(1), torch.ones(3 + rank)]
    model = {"entries": lambda: Listing(tensors), "extra_state": lambda: Module(held=tensors)}[kind]()
    state = AppState(nn.Sequential(model))
    with pytest.raises(CheckpointError) as caught:
        save(root, state, rank=rank)
    text = str(caught.value)
    patterns = [part.partition('"]')[0] for part in text.split('allow_unsaved=["')[1:]]
    save(root / "2", state, rank=rank, allow_unsaved=patterns)  # the remedy works
    return [text, *patterns]


@pytest.mark.parametrize(
    ("kind", "name", "pattern"),
    [
        ("entries", "model.0.held.1", "model.0.held.*"),
        ("extra_state", "model.0._extra_state.1", "model.0._extra_state"),
    ],
)
def test_state_of_modules_that_differs_between_ranks_is_named_with_a_remedy(
    tmp_path: Path, kind: str, name: str, pattern: str
) -> None:
    for text, *patterns in run_distributed(_unequal_in_model, 2, tmp_path, kind):
        assert patterns == [pattern]
        assert f"only on rank 0: {name} F32 [3]" in text
        assert "gather or pad tensors" in text


# --- what is exact


class Doubling(Holder):
    """Takes over what it is given, and changes it in place."""

    def load_state_dict(self, state: Any) -> None:
        self.held = state["held"]
        self.held["tensor"].mul_(2)
        self.held["array"] += 1


def test_what_an_extra_does_to_the_tensors_that_it_is_given_is_not_exact(tmp_path: Path) -> None:
    held = {"tensor": torch.arange(6.0).view(2, 3).t(), "array": np.arange(3), "same": torch.ones(2)}
    save(tmp_path, AppState(nn.Linear(1, 1), extras={"box": Holder(held), "plain": Holder(copy.deepcopy(held))}))
    fresh = Doubling()
    report = load(tmp_path, AppState(nn.Linear(1, 1), extras={"box": fresh, "plain": Holder()}))
    assert report.trusted == ("extras.box",)
    assert "extras.plain" in report.exact
    assert "extras.box" not in report.exact
    [note] = [note for note in report.notes if note.startswith("extras.box loaded its state, but")]
    assert "extras.box.held.array, extras.box.held.tensor" in note
    assert "same" not in note


def test_a_wrapper_that_changes_its_state_in_place_is_not_exact(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    held = {"tensor": torch.ones(2), "array": np.arange(3)}
    save(tmp_path, AppState(model, Holder(held)))
    report = load(tmp_path, AppState(model, Doubling()))
    assert report.trusted == ("optimizer",)
    assert "optimizer" not in report.exact


def test_an_extra_state_that_changes_what_it_is_given_is_not_exact(tmp_path: Path) -> None:
    class Changing(Module):
        def set_extra_state(self, state: Any) -> None:
            self.held = state
            state["tensor"].mul_(2)

    save(tmp_path, AppState(Module(held={"tensor": torch.ones(2)})))
    report = load(tmp_path, AppState(Changing()))
    assert report.trusted == ("model",)
    assert "model" not in report.exact


class Overwriting(nn.Module):
    """Its extra state overwrites its tensors, and those of its child, in place or with others."""

    def __init__(self, value: float, *, replaces: bool = False, size: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.register_buffer("count", torch.full((2,), value))
        self.child = nn.Linear(2, 2)
        self.replaces, self.size = replaces, size

    def get_extra_state(self) -> Any:
        return 1

    def set_extra_state(self, state: Any) -> None:
        if self.replaces:
            self.count = torch.zeros(self.size)
            return
        self.weight.data.fill_(9)
        self.count.zero_()
        self.child.weight.data.fill_(9)


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("consolidated", [False, "always"])
def test_what_was_saved_is_live_whatever_an_extra_state_does_to_it(
    tmp_path: Path, replaces: bool, consolidated: Any
) -> None:
    saved, fresh = Overwriting(1.0), Overwriting(0.0, replaces=replaces)
    save(tmp_path, AppState(saved), save_consolidated=consolidated)
    report = load(tmp_path, AppState(fresh))
    for name, value in saved.state_dict().items():
        assert name.endswith("_extra_state") or torch.equal(value, fresh.state_dict()[name]), name
    assert "model" in report.exact


def test_a_tensor_that_an_extra_state_replaces_by_another_size_is_named(tmp_path: Path) -> None:
    save(tmp_path, AppState(Overwriting(1.0)))
    report = load(tmp_path, AppState(Overwriting(0.0, replaces=True, size=3)))
    assert report.trusted == ("model",)
    assert any(note.startswith("model loaded its state, but") and "count" in note for note in report.notes)


class Rates(Holder):
    """A scheduler that sets its optimizer's rate when it is loaded."""

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Any) -> None:
        super().__init__()
        self.optimizer, self.rate = optimizer, rate

    def load_state_dict(self, state: Any) -> None:
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(self.rate)
        else:
            group["lr"] = self.rate


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_rate_that_a_scheduler_changes_as_it_loads_is_put_back(tmp_path: Path, kind: Any) -> None:
    def state(rate: float) -> tuple[AppState, torch.optim.Optimizer]:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=kind(0.5))
        return AppState(model, optimizer, Rates(optimizer, rate)), optimizer

    save(tmp_path, state(0.25)[0])
    fresh, optimizer = state(0.25)
    report = load(tmp_path, fresh)
    assert optimizer.param_groups[0]["lr"] == 0.5  # as in the run that saved
    assert {"optimizer", "lr_scheduler"} <= set(report.exact)
    assert "lr_scheduler changed optimizer.0.lr while it loaded its state" in report.notes
    unchanged = load(tmp_path, state(0.5)[0])
    assert {"optimizer", "lr_scheduler"} <= set(unchanged.exact)


# --- each name in one field


def _two_ranks(root: Path, names: bool) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    save(root, _differing(rank, names), rank=rank)


def _differing(value: int, names: bool) -> AppState:
    """Everything that is plain data differs with the value."""
    model = Module(held=value)
    optimizers: dict[str, Any] = {"main": torch.optim.SGD(model.parameters(), lr=0.5 + value), "wrapper": Holder(value)}
    schedulers = {"one": Holder(value), "two": Holder(5), "three": Holder(torch.full((2,), float(value)))}
    extras = {"box": Holder(value), "same": Holder(1), "gone": Holder(value)}
    optimizers["main"].state[model.weight]["note"] = value
    if names:
        return AppState(model, optimizers, schedulers, extras=extras)
    return AppState(model, optimizers["main"], schedulers["one"], extras=extras)


@pytest.mark.parametrize("names", [False, True])
def test_what_is_rank_0_s_is_rederived_by_name_and_not_exact(tmp_path: Path, names: bool) -> None:
    run_distributed(_two_ranks, 2, tmp_path, names)
    fresh = _differing(7, names)
    del fresh.extras["gone"]
    report = load(tmp_path, fresh)
    inside = {"rng", "extras.box", "model.extra_state"}
    if names:
        schedulers = {"lr_scheduler.one", "lr_scheduler.three"}
        inside |= {
            *schedulers,
            "optimizer.main.weight",
            "optimizer.main.param_groups.0",
            "optimizer.wrapper.state_dict()",
        }
        exact = {"optimizer.main", "optimizer.wrapper", "lr_scheduler.two"}
    else:
        inside |= {"lr_scheduler", "optimizer.weight", "optimizer.param_groups.0"}
        exact = {"optimizer"}
    assert set(report.rederived) == inside
    assert set(report.exact) == {"model", "extras.same", "progress", *exact}
    assert report.skipped == ("extras.gone",)
    for name in inside - {"rng"}:
        assert f"{name}: each rank had its own values; those of rank 0 are used on all ranks" in report.notes


def _with_entries(root: Path) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    save(root, AppState(Entries(float(rank))), rank=rank)


class Entries(nn.Linear):
    """Its state_dict() has an entry that is no buffer."""

    def __init__(self, value: float) -> None:
        super().__init__(1, 1)
        self.seen = torch.full((2,), value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}seen"] = self.seen

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.seen = state.pop(f"{prefix}seen")
        super()._load_from_state_dict(state, prefix, *rest)


def test_entries_of_rank_0_are_named(tmp_path: Path) -> None:
    run_distributed(_with_entries, 2, tmp_path)
    report = load(tmp_path, AppState(Entries(7.0)))
    assert "model.state_dict()" in report.rederived


def test_what_is_left_out_as_a_whole_is_not_exact(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    options = {"allow_unsaved": ["optimizer.wrapper", "extras.box", "lr_scheduler"]}
    main = torch.optim.SGD(model.parameters(), lr=0.5)
    state = AppState(model, {"main": main, "wrapper": Holder(1)}, Holder(1), extras={"box": Holder(1)})
    save(tmp_path, state, **options)
    fresh = AppState(model, {"main": main, "wrapper": Holder(7)}, Holder(7), extras={"box": Holder(7)})
    report = load(tmp_path, fresh)
    assert set(report.missing) == {"optimizer.wrapper", "extras.box", "lr_scheduler"}
    assert set(report.exact) == {"model", "optimizer.main", "rng", "progress"}


class Changing(Holder):
    """Does something to what it takes over."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def load_state_dict(self, state: Any) -> None:
        self.held = self.change(state["held"])


TWICE = [1]
CHANGES: dict[str, tuple[Any, Any]] = {
    "sign of zero": (0.0, lambda value: -value),
    "sign of zero in a list": ([0.0, 1], lambda _: [-0.0, 1]),
    "sign of a complex zero": (0j, lambda _: complex(-0.0, 0.0)),
    "type of keys": ({1: 2}, lambda value: {float(key): item for key, item in value.items()}),
    "type of a set's items": ({1, 2}, lambda value: set(map(float, value))),
    "length of a deque": (deque([1], maxlen=3), deque),
    "type of a deque's items": (deque([1, 2]), lambda value: deque(map(float, value))),
    "factory": (defaultdict(list, a=1), lambda value: defaultdict(int, value)),
    "slice": (slice(1, 2), lambda _: slice(1.0, 2)),
    "order of an ordered dict": (OrderedDict(a=1, b=2), lambda value: OrderedDict(reversed(value.items()))),
    "strides of an array": (np.ones((3, 2)), np.asfortranarray),
    "one list becomes two": ([TWICE, TWICE], lambda value: [value[0], list(value[1])]),
    "tuple": ((1, 2), list),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_object_that_changes_what_it_takes_over_is_not_exact(tmp_path: Path, kind: str) -> None:
    value, change = CHANGES[kind]
    save(tmp_path, AppState(nn.Linear(1, 1), extras={"box": Holder(value), "same": Holder(value)}))
    state = AppState(nn.Linear(1, 1), extras={"box": Changing(change), "same": Holder()})
    report = load(tmp_path, state)
    assert report.trusted == ("extras.box",)
    assert "extras.same" in report.exact


class Draining:
    """Hands its items over when it is asked for its state."""

    def __init__(self, items: list[int]) -> None:
        self.items = items

    def state_dict(self) -> Any:
        found, self.items = {"items": self.items}, []
        return found

    def load_state_dict(self, state: Any) -> None:
        self.items = state["items"]


def test_an_object_that_asking_changes_has_its_state_afterwards_and_is_trusted(tmp_path: Path) -> None:
    save(tmp_path, AppState(nn.Linear(1, 1), extras={"queue": Draining([1, 2])}))
    fresh = Draining([])
    report = load(tmp_path, AppState(nn.Linear(1, 1), extras={"queue": fresh}))
    assert fresh.items == [1, 2]
    assert report.trusted == ("extras.queue",)


def test_tensors_require_gradients_as_they_did(tmp_path: Path) -> None:
    computed = nn.Parameter(torch.ones(3)) * 2
    save(tmp_path, AppState(nn.Linear(1, 1), extras={"box": Holder(computed)}))
    fresh = Holder()
    report = load(tmp_path, AppState(nn.Linear(1, 1), extras={"box": fresh}))
    assert fresh.held.requires_grad
    assert torch.equal(fresh.held, computed)
    assert "extras.box" in report.exact


def test_conjugated_tensors_stay_lazily_conjugated(tmp_path: Path) -> None:
    value = torch.randn(3, 2, dtype=torch.complex64).conj()
    save(tmp_path, AppState(nn.Linear(1, 1), extras={"box": Holder(value)}))
    fresh = Holder()
    report = load(tmp_path, AppState(nn.Linear(1, 1), extras={"box": fresh}))
    assert fresh.held.is_conj()
    assert torch.equal(fresh.held, value)
    assert "extras.box" in report.exact


class OnOneRank(Holder):
    """Takes its state over on rank 0 only."""

    def load_state_dict(self, state: Any) -> None:
        self.held = state["held"] if dist.get_rank() == 0 else 99


def _on_one_rank(root: Path) -> tuple[str, ...]:
    torch.manual_seed(0)
    model, rank = nn.Linear(1, 1), dist.get_rank()
    save(root, AppState(model, extras={"box": Holder(1)}), rank=rank)
    report = load(root, AppState(model, extras={"box": OnOneRank()}), rank=rank)
    assert "extras.box" not in report.exact
    return report.trusted


def test_reports_are_equal_on_all_ranks(tmp_path: Path) -> None:
    assert run_distributed(_on_one_rank, 2, tmp_path) == [("extras.box",)] * 2


def test_an_item_of_a_list_is_left_out_and_only_where_it_is_named(tmp_path: Path) -> None:
    options = {"allow_unsaved": ["extras.a.held.1", "extras.b.held.p"]}
    both = {"p": 1, "q": 2}
    extras = {"a": Holder([1, 2, 3]), "b": Holder(both), "c": Holder(both)}
    save(tmp_path, AppState(nn.Linear(1, 1), extras=extras), **options)
    a, b, c = Holder([7, 8, 9]), Holder({"p": 50, "q": 60}), Holder()
    load(tmp_path, AppState(nn.Linear(1, 1), extras={"a": a, "b": b, "c": c}), **options)
    assert (a.held, b.held, c.held) == ([1, 8, 3], {"p": 50, "q": 2}, both)


def test_what_is_not_left_out_stays_shared(tmp_path: Path) -> None:
    options = {"allow_unsaved": ["extras.a.held.left", "extras.b.held.part.p", "extras.d.held.1.q"]}
    seen, part, average = [1], {"p": 1, "q": 2}, torch.ones(2)
    held = {"seen": seen, "part": part, "average": average, "view": average[1:]}
    extras = {"a": Holder({**held, "left": 3}), "b": Holder(dict(held)), "c": Holder(dict(held))}
    extras["d"] = Holder([part, part, seen])
    save(tmp_path, AppState(nn.Linear(1, 1), extras=extras), **options)
    fresh = {"a": Holder({"left": 9}), "b": Holder({"part": {"p": 7}}), "c": Holder()}
    fresh["d"] = Holder([{}, {"q": 8}, []])
    load(tmp_path, AppState(nn.Linear(1, 1), extras=fresh), **options)
    a, b, c, d = (fresh[name].held for name in "abcd")
    assert a["seen"] is b["seen"] is c["seen"] is d[2]
    assert a["average"] is b["average"] is c["average"]
    c["average"].add_(1)
    assert a["view"].item() == b["view"].item() == 2
    assert a["part"] is c["part"] is d[0]
    assert (a["left"], a["part"], b["part"], d[1]) == (9, part, {"p": 7, "q": 2}, {"p": 1, "q": 8})


def test_an_optimizer_of_another_class_with_the_same_options_says_so(tmp_path: Path) -> None:
    model, fresh = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.5)
    other = torch.optim.AdamW(fresh.parameters(), lr=0.1, weight_decay=0.5)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.save(AppState(model, optimizer), step=1).result()
        report = checkpointer.load(AppState(fresh, other), restore_from="latest")
    assert report is not None
    assert report.trusted == ("optimizer",)
    assert any(note.startswith("optimizer: Adam in the checkpoint, AdamW here") for note in report.notes)
    assert other.param_groups[0]["decoupled_weight_decay"]  # as after PyTorch's own load_state_dict()
