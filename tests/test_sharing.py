"""Objects and memory that are shared within a state are shared again after a load."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hydra_ckpt import AppState, CheckpointError, CheckpointingConfig, CorruptCheckpointError, LoadReport
from hydra_ckpt.storage.decoding import decode
from hydra_ckpt.storage.encoding import encode
from hydra_ckpt.testing import run_distributed


def save_and_load(root: Path, state: AppState, fresh: AppState, **options: Any) -> LoadReport:
    rank = dist.get_rank() if dist.is_initialized() else 0
    config = CheckpointingConfig(checkpoint_dir=str(root), **options)
    with config.build(rank, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()
    with config.build(rank, 0, 0) as checkpointer:
        report = checkpointer.load(fresh, restore_from="latest")
    assert report is not None
    return report


class Holder:
    """Takes its state over as it is."""

    def __init__(self, held: Any = None) -> None:
        self.held = held

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = state["held"]


class Shared(torch.optim.Optimizer):
    """Counts the steps of all parameters in one tensor, and keeps their moments as parts of one buffer."""

    def __init__(self, parameters: Any, *, flat: bool = True) -> None:
        self.flat = flat
        super().__init__(parameters, {"lr": torch.tensor(0.1)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        if not self.state:
            count = torch.zeros(())
            buffer = torch.zeros(sum(item.numel() for item in members))
            for item, part in zip(members, buffer.split([item.numel() for item in members]), strict=True):
                self.state[item] = {"step": count, "m": part.view_as(item) if self.flat else torch.zeros_like(item)}
            if self.flat:
                self.state[members[0]]["buffer"] = buffer
        for item in members:
            held = self.state[item]
            held["step"] += 1
            held["m"].add_(item.grad)
            item.sub_(held["m"] * self.param_groups[0]["lr"] / held["step"])
        if self.flat:
            self.state[members[0]]["buffer"].mul_(0.5)


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        model(torch.linspace(-1, 1, 4).expand(2, 4) + 0.1 * step).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


@pytest.mark.parametrize("flat", [True, False])
def test_an_optimizer_whose_state_is_shared_continues_as_it_would_have(tmp_path: Path, *, flat: bool) -> None:
    model, fresh = net(), net()
    optimizer, other = Shared(model.parameters(), flat=flat), Shared(fresh.parameters(), flat=flat)
    train(model, optimizer, 3)
    report = save_and_load(tmp_path, AppState(model, optimizer), AppState(fresh, other))
    assert "optimizer" in report.exact
    for item in (optimizer, other):
        assert len({id(held["step"]) for held in item.state.values()}) == 1
    train(model, optimizer, 4)
    train(fresh, other, 4)
    for one, another in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, another)


def test_groups_that_share_a_learning_rate_share_it_again(tmp_path: Path) -> None:
    model, fresh = net(), net()

    def build(module: nn.Module) -> torch.optim.Optimizer:
        rate = torch.tensor(0.25)
        return torch.optim.SGD([{"params": [item]} for item in module.parameters()], lr=rate)

    optimizer, other = build(model), build(fresh)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    save_and_load(tmp_path, AppState(model, optimizer), AppState(fresh, other))
    other.param_groups[0]["lr"].fill_(0.75)
    assert [float(group["lr"]) for group in other.param_groups] == [0.75] * 4


def _share_under_fsdp(root: Path) -> list[bool]:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return model, torch.optim.Adam(model.parameters(), foreach=False)

    (model, optimizer), (fresh, other) = build(), build()
    train(model, optimizer, 2)
    everyone = list(optimizer.state.values())
    for held in everyone:
        held["step"] = everyone[0]["step"]
        held["again"] = held["exp_avg"].detach()
    report = save_and_load(root, AppState(model, optimizer), AppState(fresh, other))
    state = list(other.state.values())
    state[0]["step"].fill_(7)
    state[1]["exp_avg"].fill_(3)
    return [
        "optimizer" in report.exact,
        all(float(held["step"]) == 7 for held in state),
        bool((state[1]["again"].to_local() == 3).all()),
    ]


def test_sharded_state_is_shared_again(tmp_path: Path) -> None:
    for found in run_distributed(_share_under_fsdp, 2, tmp_path):
        assert all(found), found


def _one_list() -> Any:
    inner = [1, 2]
    return [inner, inner]


def _one_of_each() -> Any:
    kinds: list[Any] = [{"a": 1}, deque([1]), {1}, bytearray(b"ab"), np.arange(3), OrderedDict(a=1), Counter("ab")]
    return {"first": kinds, "second": list(reversed(kinds))}


def _nested() -> Any:
    inner = {"t": torch.arange(3.0)}
    return {"a": inner, "b": [inner, {"t": inner["t"]}]}


def _parameters() -> Any:
    one, leaf = nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)
    return [one, leaf, one, leaf, one.data]


def _views() -> Any:
    whole = torch.arange(12.0)
    return [whole[2:5], whole, whole.view(3, 4).t(), whole.detach()]


def _windows() -> Any:
    whole = torch.arange(10.0)
    return {"a": whole[0:6], "b": whole[4:8], "c": whole[::2]}


CASES = [_one_list, _one_of_each, _nested, _parameters, _views, _windows]


def flattened(value: Any) -> list[Any]:
    """The objects that may change, in the order of their places."""
    if isinstance(value, dict):
        return [value, *(found for item in value.values() for found in flattened(item))]
    if isinstance(value, list | deque | tuple):
        return [value, *(found for item in value for found in flattened(item))]
    return [value] if isinstance(value, torch.Tensor | set | bytearray | np.ndarray) else []


def pattern(value: Any) -> tuple[list[int], list[int]]:
    """Which places hold one object, and which tensors begin at what distance in memory from each other."""
    found = flattened(value)
    tensors = [item for item in found if isinstance(item, torch.Tensor)]
    objects = [next(n for n, other in enumerate(found) if other is item) for item in found]
    memory = []
    for item in tensors:
        storage = item.untyped_storage().data_ptr()
        first = next(other for other in tensors if other.untyped_storage().data_ptr() == storage)
        memory.append(tensors.index(first) * 1000 + item.data_ptr() - first.data_ptr() if first is not item else 0)
    return objects, memory


@pytest.mark.parametrize("make", CASES, ids=[case.__name__.strip("_") for case in CASES])
def test_what_is_shared_in_an_extra_is_shared_again(tmp_path: Path, make: Callable[[], Any]) -> None:
    holder, fresh = Holder(make()), Holder()
    model = nn.Linear(1, 1)
    report = save_and_load(tmp_path, AppState(model, extras={"box": holder}), AppState(model, extras={"box": fresh}))
    assert "extras.box" in report.exact
    old, new = flattened(holder.held), flattened(fresh.held)
    assert list(map(type, old)) == list(map(type, new))
    for one, other in zip(old, new, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()
            assert one.requires_grad == other.requires_grad
        elif isinstance(one, np.ndarray):
            assert one.tolist() == other.tolist()
    assert [n for n, item in enumerate(old) if item is old[n]] == [n for n, item in enumerate(new) if item is new[n]]
    assert pattern(holder.held)[0] == pattern(fresh.held)[0]
    assert [a - b for a, b in zip(*(pattern(item)[1] for item in (holder.held, fresh.held)), strict=True)] == [0] * len(
        pattern(holder.held)[1]
    )


def test_columns_of_one_matrix_share_nothing(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors: dict[str, torch.Tensor] = {}
    tree = encode([whole[:, 0], whole[:, 1]], "x", tensors)
    assert sum(item.numel() for item in tensors.values()) == 6
    assert [item.tolist() for item in decode(tree, tensors)] == [[0, 4, 8], [1, 5, 9]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: (whole := torch.arange(4.0), whole.view(torch.int32)),
        lambda: (whole := torch.zeros(4, dtype=torch.complex64), torch.view_as_real(whole)),
    ],
    ids=["bits", "real"],
)
def test_memory_that_is_shared_otherwise_is_refused_by_name(tmp_path: Path, make: Callable[[], Any]) -> None:
    one, other = make()
    with pytest.raises(CheckpointError, match=r"extras\.box\.held\.0: it shares memory with another tensor.*clone"):
        save_and_load(
            tmp_path, AppState(nn.Linear(1, 1), extras={"box": Holder([one, other])}), AppState(nn.Linear(1, 1))
        )


def test_an_object_that_copies_what_it_shared_is_not_called_exact(tmp_path: Path) -> None:
    class Copying(Holder):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.held = [item.clone() for item in state["held"]]

    tensor, model = torch.ones(3), nn.Linear(1, 1)
    fresh = Copying()
    state = AppState(model, extras={"box": Holder([tensor, tensor])})
    report = save_and_load(tmp_path, state, AppState(model, extras={"box": fresh}))
    assert report.trusted == ("extras.box",)
    assert any("extras.box.held.1" in note for note in report.notes)


def test_attributes_of_tensors_and_state_dicts_come_back(tmp_path: Path) -> None:
    tensor: Any = torch.ones(2)
    tensor.scale, tensor.parent = 0.5, torch.zeros(1)
    inner = nn.BatchNorm1d(2).state_dict()
    holder, fresh, model = Holder([tensor, inner]), Holder(), nn.Linear(1, 1)
    save_and_load(tmp_path, AppState(model, extras={"box": holder}), AppState(model, extras={"box": fresh}))
    assert fresh.held[0].scale == 0.5
    assert torch.equal(fresh.held[0].parent, torch.zeros(1))
    assert fresh.held[1]._metadata == inner._metadata
    assert fresh.held[1]._metadata[""] == {"version": 2}


def test_an_attribute_that_cannot_be_stored_is_refused_by_name(tmp_path: Path) -> None:
    tensor: Any = torch.ones(2)
    tensor.hook = lambda: None
    state = AppState(nn.Linear(1, 1), extras={"box": Holder(tensor)})
    with pytest.raises(CheckpointError, match=r"extras\.box\.held\.<attributes>\.hook"):
        save_and_load(tmp_path, state, state)


@pytest.mark.parametrize(
    "tree",
    [
        {"~": "view", "v": [{"~": "tensor", "v": "t"}, 2, [3], [1]]},
        {"~": "view", "v": [{"~": "tensor", "v": "t"}, -1, [1], [1]]},
        {"~": "view", "v": [{"~": "tensor", "v": "t"}, 0, [2], [-1]]},
        {"~": "attributes", "v": [{"~": "tensor", "v": "t"}, {"__class__": 1}]},
        {"~": "same", "v": ["a"]},
    ],
)
def test_a_hostile_tree_is_damage(tree: Any) -> None:
    with pytest.raises(CorruptCheckpointError):
        decode(tree, {"t": torch.zeros(4)})


# -- live objects that share, while the saved ones did not -----------------------------------------------------------


def momentum(model: nn.Module, **held: Any) -> torch.optim.Optimizer:
    """An SGD that has made a step; the state of each parameter has these entries as well."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    for state in optimizer.state.values():
        state.update(held)
    return optimizer


def test_two_optimizers_built_with_one_learning_rate_get_their_own(tmp_path: Path) -> None:
    def build(*rates: torch.Tensor) -> AppState:
        one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        optimizers = [torch.optim.SGD(m.parameters(), lr=rate) for m, rate in zip((one, two), rates, strict=True)]
        return AppState({"one": one, "two": two}, optimizers)

    rate = torch.tensor(0.1)
    fresh = build(rate, rate)
    save_and_load(tmp_path, build(torch.tensor(0.25), torch.tensor(0.5)), fresh)
    assert [float(item.param_groups[0]["lr"]) for item in fresh.optimizers] == [0.25, 0.5]
    assert float(rate) == pytest.approx(0.1)  # what an optimizer keeps as its default is not overwritten


def test_state_that_begins_as_its_parameter_does_not_overwrite_it(tmp_path: Path) -> None:
    model, fresh = net(), net()
    optimizer, other = momentum(model), torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    for item in fresh.parameters():
        other.state[item]["momentum_buffer"] = item.data
    save_and_load(tmp_path, AppState(model, optimizer), AppState(fresh, other))
    for one, another in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, another)
        assert torch.equal(optimizer.state[one]["momentum_buffer"], other.state[another]["momentum_buffer"])


def test_attributes_of_live_state_do_not_stay(tmp_path: Path) -> None:
    model, fresh = net(), net()
    optimizer, other = momentum(model), momentum(fresh)
    for held in other.state.values():
        held["momentum_buffer"].scale = 9
    save_and_load(tmp_path, AppState(model, optimizer), AppState(fresh, other))
    assert not any(held["momentum_buffer"].__dict__ for held in other.state.values())


# -- ranks, meshes and saves in the background -----------------------------------------------------------------------


def _attribute_of_rank_0(root: Path) -> tuple[bool, Any]:
    model, fresh = net(), net()
    optimizer, other = momentum(model), torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    first, loaded = next(model.parameters()), next(fresh.parameters())
    if dist.get_rank() == 0:
        optimizer.state[first]["momentum_buffer"].note = 1
    save_and_load(root, AppState(model, optimizer), AppState(fresh, other))
    buffer = other.state[loaded]["momentum_buffer"]
    return torch.equal(buffer, optimizer.state[first]["momentum_buffer"]), dict(buffer.__dict__)


def test_an_attribute_that_one_rank_has_costs_the_others_nothing(tmp_path: Path) -> None:
    assert run_distributed(_attribute_of_rank_0, 2, tmp_path) == [(True, {"note": 1}), (True, {})]


def _load_sharded(root: Path) -> list[float]:
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with CheckpointingConfig(checkpoint_dir=str(root)).build(dist.get_rank(), 0, 0) as checkpointer:
        assert checkpointer.load(AppState(model, optimizer), restore_from="latest") is not None
    row: torch.Tensor = optimizer.state[model.weight]["row"]
    return row.tolist()


def test_a_view_of_state_is_loaded_where_the_state_is_sharded(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = momentum(model)
    held = optimizer.state[model.weight]
    held["row"] = held["momentum_buffer"][1]
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.save(AppState(model, optimizer), step=1).result()
    for found in run_distributed(_load_sharded, 2, tmp_path):
        assert found == held["row"].tolist()


@pytest.mark.parametrize("kind", ["windows", "detached"])
def test_a_write_to_shared_memory_is_never_published(tmp_path: Path, kind: str) -> None:
    count = 600_000
    buffer = torch.zeros(2 * count)
    held = [buffer[: count + 10], buffer[count:]] if kind == "windows" else [buffer, buffer.data]
    state = AppState(nn.Linear(1, 1), extras={"box": Holder(held)})
    fresh = Holder()
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), is_async=True)
    with config.build(0, 0, 0) as checkpointer:
        pending = checkpointer.save(state, step=1)
        held[1][-100] = 7
        try:
            pending.result()
        except CheckpointError:
            return  # refused, which is right too
    with config.build(0, 0, 0) as checkpointer:
        checkpointer.load(AppState(nn.Linear(1, 1), extras={"box": fresh}), restore_from="latest")
    assert float(fresh.held[1][-100]) == 0


# -- what is left out, and what is far too large --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "place"),
    [
        (deque([1, object()]), "1"),
        ({"a": {1: {object()}}}, "a"),
        ({object(): 1}, "<key>"),
        (OrderedDict(a=(object(),)), "a.0"),
    ],
    ids=["deque", "set", "key", "tuple"],
)
def test_the_remedy_of_a_refusal_works(tmp_path: Path, held: Any, place: str) -> None:
    state = AppState(nn.Linear(1, 1), extras={"box": Holder(held)})
    with pytest.raises(CheckpointError, match="leave it out") as caught:
        save_and_load(tmp_path / "refused", state, state)
    assert f"extras.box.held.{place}" in str(caught.value)
    remedy = str(caught.value).partition('allow_unsaved=["')[2].partition('"]')[0]
    fresh = AppState(nn.Linear(1, 1), extras={"box": Holder({"a": ("live",)})})
    report = save_and_load(tmp_path / "left", state, fresh, allow_unsaved=[remedy])
    assert report.missing
    assert "object object" not in repr(fresh.extras["box"].held)


def test_what_is_nested_in_itself_many_times_is_written_once(tmp_path: Path) -> None:
    nested: list[Any] = [1]
    for _ in range(60):
        nested = [nested, nested]
    fresh, model = Holder(), nn.Linear(1, 1)
    state = AppState(model, extras={"box": Holder(nested)})
    save_and_load(tmp_path, state, AppState(model, extras={"box": fresh}))
    found = fresh.held
    for _ in range(60):
        assert found[0] is found[1]
        found = found[0]
    assert found == [1]


def test_expanded_tensors_are_compared_by_the_memory_they_have(tmp_path: Path) -> None:
    one = torch.zeros(1).expand(1 << 45)
    fresh, model = Holder(), nn.Linear(1, 1)
    state = AppState(model, extras={"box": Holder([one, one[5:]])})
    save_and_load(tmp_path, state, AppState(model, extras={"box": fresh}))
    assert fresh.held[0].shape == (1 << 45,)
    assert fresh.held[0].data_ptr() == fresh.held[1].data_ptr()


def test_state_that_is_nested_too_deeply_is_refused_by_name(tmp_path: Path) -> None:
    model = net()
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"in": deep}
    state = AppState(model, momentum(model, deep=deep))
    with pytest.raises(CheckpointError, match="optimizer: a state holds itself, or is nested too deeply"):
        save_and_load(tmp_path, state, state)
