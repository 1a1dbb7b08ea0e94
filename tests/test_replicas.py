"""What ranks hold under one name is stored once if equal; otherwise for each rank, or by the first replica."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig, KeyMismatchError, TopologyError
from hydra_ckpt.errors import CheckpointError, SaveFailedError
from hydra_ckpt.storage.folding import fold
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.testing import run_distributed
from tests.meshes import Run, local, place
from tests.training import Run as Training

# Of a tensor that is digested in stretches, and not looked at in full at each asynchronous save.
LARGE = 6_000_000


class Holder:
    """An object that saves and takes over what it is told to."""

    def __init__(self, **held: Any) -> None:
        self.held = held

    def state_dict(self) -> dict[str, Any]:
        return self.held

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = state


class Net(nn.Module):
    """A parameter, buffers of all sizes, and extra state."""

    def __init__(self, number: float, *, table: int = 100_000) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.register_buffer("mean", torch.full((3,), number))
        self.register_buffer("large", torch.full((table,), number))
        self.register_buffer("table", torch.arange(1000.0))
        self.extra: Any = {"count": number, "tensor": torch.full((2,), number)}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def everything(number: float) -> AppState:
    """Objects of which much is `number`, and the rest is equal on all ranks."""
    model = Net(number)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(9.5 + number), momentum=0.9 + number / 10)
    optimizer.state[model.weight] = {"momentum_buffer": torch.ones(2, 3)}
    schedule = Holder(last=number, tensor=torch.full((2,), number))
    return AppState(
        model,
        optimizer,
        schedule,
        extras={"mine": Holder(x=torch.full((3,), number), n=number), "alike": Holder(x=torch.arange(9.0), n=1)},
    )


def values(state: AppState) -> dict[str, Any]:
    """What `everything` made depend on the number, as plain data."""
    model: Any = state.model
    group = state.optimizers[0].param_groups[0]
    return {
        "mean": model.mean.tolist(),
        "large": model.large[-1].item(),
        "table": model.table[-1].item(),
        "extra": (model.extra["count"], model.extra["tensor"].tolist()),
        "options": (float(group["lr"]), group["momentum"]),
        "schedule": (state.lr_scheduler.held["last"], state.lr_scheduler.held["tensor"].tolist()),
        "mine": (state.extras["mine"].held["n"], state.extras["mine"].held["x"].tolist()),
        "alike": (state.extras["alike"].held["n"], state.extras["alike"].held["x"].tolist()),
    }


def config_of(root: Path, **options: Any) -> CheckpointingConfig:
    return CheckpointingConfig(checkpoint_dir=str(root), **options)


def logged() -> list[str]:
    """Texts of warnings, from now on."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hydra_ckpt").addHandler(handler)
    return messages


def error_of(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        action()
    except CheckpointError as error:
        return type(error).__name__, str(error)
    return "", ""


# -- values of each rank -------------------------------------------------------------------------------------------


def _save_and_load(root: Path, options: dict[str, Any]) -> dict[str, Any]:
    rank, messages = dist.get_rank(), logged()
    state = everything(float(rank))
    with config_of(root, **options).build(rank, 0, 0) as engine:
        for step in (1, 2):  # the second knows what differs
            engine.save(state, step=step).result()
    fresh = everything(-7.0)
    with config_of(root).build(rank, 0, 0) as engine:
        report = engine.load(fresh)
    assert report is not None
    return {"got": values(fresh), "wanted": values(state), "report": report, "messages": messages}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_async": True, "save_consolidated": "always"},
        {"model_save_format": "torch_save", "save_consolidated": "never"},
    ],
    ids=["sync", "async", "torch_save"],
)
def test_each_rank_gets_its_own_values_back(tmp_path: Path, options: dict[str, Any]) -> None:
    for found in run_distributed(_save_and_load, 2, tmp_path, options):
        assert found["got"] == found["wanted"]
        assert found["report"].rederived == ()
        assert found["report"].notes == ()
        assert found["messages"] == []
    [shared] = list((tmp_path / "LATEST" / "progress").glob("shared-*.json"))
    assert '"extras.mine"' in shared.read_text().partition("per_rank")[2]
    assert "alike" not in shared.read_text().partition("per_rank")[2]


def test_on_other_ranks_plain_data_and_buffers_are_rank_0_s_and_tensors_are_refused_by_name(tmp_path: Path) -> None:
    run_distributed(_save_and_load, 2, tmp_path, {})
    fresh = everything(-7.0)
    with config_of(tmp_path).build(0, 0, 0) as engine:
        with pytest.raises(KeyMismatchError) as caught:
            engine.load(fresh)
        text = str(caught.value)
        assert "extras: mine:x: the ranks that saved it had different values for it" in text
        assert "optimizer: weight:options.lr: the ranks" in text
        assert "checkpoint.load_strict=false" in text
        assert "alike" not in text
        assert values(fresh) == values(everything(-7.0))  # nothing was changed
        report = engine.load(fresh, parts=["model", "lr_scheduler"])
        assert report is not None
        assert set(report.rederived) == {"buffers", "model.extra_state", "lr_scheduler"}
        assert any("large, mean" in note for note in report.notes)
    with config_of(tmp_path, load_strict=False).build(0, 0, 0) as engine:
        report = engine.load(fresh)
        assert report is not None
    wanted, left = values(everything(0.0)), values(everything(-7.0))
    assert values(fresh) == {**wanted, "options": left["options"], "mine": left["mine"]}
    assert {"extras.mine", "optimizer.weight.options.lr"} <= set(report.missing)


def _averages(root: Path) -> tuple[int, list[str]]:
    model = nn.Linear(300, 300)
    ema = Holder(shadow={name: p.detach().clone() * 0 for name, p in model.named_parameters()}, decay=0.9)
    with config_of(root).build(dist.get_rank(), 0, 0) as engine:
        engine.save(AppState(model, extras={"ema": ema}), step=1).result()
        return engine.stats.written_bytes, list(scan(root).checkpoints[0].manifest.parts)


def test_an_average_that_is_equal_is_stored_once_by_the_first_replica(tmp_path: Path) -> None:
    (first, parts), (second, _) = run_distributed(_averages, 2, tmp_path)
    assert "own" not in parts
    assert first + second == 2 * 4 * 300 * 301
    assert second <= 4 * 300 * 301 // 2 + 4 * 300


class Counting(torch.optim.Optimizer):
    """Keeps plain tensors and numbers of its own beside the shards."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["norm"] = state.get("norm", torch.zeros(1)) + 1 + dist.get_rank()
            state["step"] = state.get("step", torch.zeros(1)) + 1
            state["k"] = state.get("k", 0) + dist.get_rank()
            state["moment"] = torch.zeros_like(parameter)


def _sharded(root: Path, load: bool) -> Any:
    rank = dist.get_rank()
    model = nn.Linear(4, 4)
    nn.init.ones_(model.weight)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = Counting(model.parameters())
    with config_of(root).build(rank, 0, 0) as engine:
        if not load:
            optimizer.step()
            engine.save(AppState(model, optimizer), step=1).result()
            return None
        outcome = error_of(lambda: engine.load(AppState(model, optimizer)))
    state = optimizer.state[model.weight]
    return outcome, {key: value for key, value in state.items() if key == "k"}, _number(state.get("norm"))


def _number(value: Any) -> float | None:
    """Of a plain tensor, or of one that was made a DTensor."""
    return None if value is None else local(value).item()


def test_plain_state_of_a_sharded_parameter_is_each_rank_s(tmp_path: Path) -> None:
    run_distributed(_sharded, 2, tmp_path, False)
    for rank, (outcome, numbers, norm) in enumerate(run_distributed(_sharded, 2, tmp_path, True)):
        assert outcome == ("", "")
        assert (numbers, norm) == ({"k": rank}, 1.0 + rank)
    for outcome, *_ in run_distributed(_sharded, 4, tmp_path, True):
        assert outcome[0] == "KeyMismatchError"
        assert "optimizer: weight:norm: the ranks that saved it" in outcome[1]
        assert "weight:step" not in outcome[1]


def _stages(root: Path) -> tuple[Any, Any, Any]:
    """Two pipeline stages of two ranks, of which the second stage's ranks differ."""
    rank = dist.get_rank()
    dp, stage = rank % 2, rank // 2

    def state(number: float) -> AppState:
        model = nn.ModuleDict({str(stage): nn.BatchNorm1d(3)})
        model[str(stage)].running_mean.fill_(number)
        return AppState(model, extras={"x": Holder(t=torch.full((2,), number), n=stage)})

    saved, fresh = state(float(rank if stage else 5)), state(-1.0)
    with config_of(root).build(dp, 0, stage) as engine:
        engine.save(saved, step=1).result()
        report = engine.load(fresh, restore_from="latest")
    assert report is not None
    found = fresh.model[str(stage)].running_mean[0].item(), fresh.extras["x"].held  # type: ignore[index]
    return found, report.rederived, report.notes


def test_each_stage_has_ranks_of_its_own(tmp_path: Path) -> None:
    for rank, (found, rederived, notes) in enumerate(run_distributed(_stages, 4, tmp_path)):
        number = float(rank if rank > 1 else 5)
        assert found[0] == number
        assert torch.equal(found[1]["t"], torch.full((2,), number))
        assert (found[1]["n"], rederived, notes) == (rank // 2, (), ())


# -- replicas that drift -------------------------------------------------------------------------------------------


def large(number: float = 1.0) -> AppState:
    model = nn.ParameterDict({"a": torch.full((LARGE,), number), "b": torch.full((4000,), number)})
    return AppState(model, torch.optim.SGD(model.parameters(), lr=0.1))


def _hidden(root: Path, options: dict[str, Any], is_final: bool, saves: int) -> tuple[list[str], tuple[str, str], int]:
    """Rank 1 drifts in one element of a large tensor; saves until a warning, or so often."""
    rank, messages, state = dist.get_rank(), logged(), large()
    parameter: Any = state.model["a"]  # type: ignore[index]
    step = 1
    with config_of(root, **options).build(rank, 0, 0) as engine:
        engine.save(state, step=step).result()
        with torch.no_grad():
            parameter += 1 + rank * (torch.arange(LARGE) == LARGE - 2)  # far from all samples

        def save(step: int) -> None:
            engine.save(state, step=step, is_final=is_final).result()

        error = ("", "")
        for step in range(2, 2 + saves):
            error = error_of(functools.partial(save, step))
            found = engine.on_rank_0("whether it was told", lambda: len(messages))
            if error[0] or found:
                break
        if not error[0] and found:
            step += 1
            save(step)  # the next one is whole too, and nothing is said again
    return messages, error, step


@pytest.mark.parametrize(
    ("options", "is_final", "saves"),
    [({}, False, 1), ({"is_async": True}, True, 1), ({"is_async": True}, False, 12)],
    ids=["sync", "final", "async"],
)
def test_one_element_that_differs_is_found_and_the_checkpoint_is_rank_0_s(
    tmp_path: Path, options: dict[str, Any], is_final: bool, saves: int
) -> None:
    (messages, error, step), (others, _, _) = run_distributed(_hidden, 2, tmp_path, options, is_final, saves)
    assert error == ("", "")
    [message] = messages
    assert "ranks 0 and 1 are replicas and hold different values in 1 of the 2 tensors compared (model: a)" in message
    assert others == []
    fresh = large(0.0)
    with config_of(tmp_path).build(0, 0, 0) as engine:
        for name in (f"epoch_0_step_{step}", f"epoch_0_step_{step - 1}"):
            report = engine.load(fresh, restore_from=str(tmp_path / name), parts=["model"])
            assert report is not None
            assert report.rederived == ("model",)
            assert "replicas had drifted apart when this was saved" in report.notes[0]
            model: Any = fresh.model
            assert torch.equal(model["a"], torch.full((LARGE,), 2.0))
            assert torch.equal(model["b"], torch.full((4000,), 1.0))


@pytest.mark.parametrize("is_async", [False, True])
def test_on_drift_raise_fails_the_save_on_all_ranks_with_the_names(tmp_path: Path, is_async: bool) -> None:
    options = {"on_drift": "raise", "is_async": is_async}
    for _, (kind, text), step in run_distributed(_hidden, 2, tmp_path, options, is_async, 1):
        assert kind == SaveFailedError.__name__
        assert "hold different values in 1 of the 2 tensors compared (model: a)" in text
        assert step == 2
    assert [item.step for item in scan(tmp_path).checkpoints] == [1]


def _hsdp(root: Path) -> tuple[list[str], list[str]]:
    """Four ranks, two of which are the first replica; the last one drifts everywhere."""
    messages, here = logged(), place("hsdp2x2")
    run = Run(here)
    if dist.get_rank() == 3:
        for tensor in run.parameters.values():
            local(tensor).zero_()
    with here.build(root, is_async=True) as engine:
        engine.save(run.state, step=1).result()
        run.fill("other")
        engine.load(run.state, restore_from="latest")
    return messages, run.wrong()


def test_of_sharded_replicas_the_first_one_is_stored_whole(tmp_path: Path) -> None:
    results = run_distributed(_hsdp, 4, tmp_path)
    assert [wrong for _, wrong in results] == [[], [], [], []]
    [message] = [text for text in results[0][0] if "are replicas" in text]
    assert "ranks 1 and 3 are replicas" in message


# -- experts -------------------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """A part that all ranks share, and an expert of each rank under one name."""

    def __init__(self, name: str, number: float) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 3)
        torch.manual_seed(0)
        nn.init.normal_(self.shared.weight)
        nn.init.ones_(self.shared.bias)
        self.add_module(name, nn.Linear(3, 3))
        with torch.no_grad():
            for parameter in self.get_submodule(name).parameters():
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + number)


class Only(nn.Module):
    """Nothing but an expert of each rank, under one name."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.expert = nn.Linear(3, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + number)


def _only_experts(root: Path) -> tuple[tuple[str, str], ...]:
    model = Only(float(dist.get_rank()))
    state = AppState(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def run() -> None:
        with CheckpointCallback(config_of(root / "loop"), every_n_steps=1) as callback:
            callback.on_train_begin(state)
            callback.on_step_end(1)

    def save() -> None:
        with config_of(root / "own").build(dist.get_rank(), 0, 0) as engine:
            engine.save(state, step=1).result()

    return error_of(run), error_of(save)


def test_experts_are_refused_also_where_nothing_is_equal_on_all_ranks(tmp_path: Path) -> None:
    for errors in run_distributed(_only_experts, 2, tmp_path):
        for kind, text in errors:
            assert kind == TopologyError.__name__
            assert "model/expert.weight" in text
            assert "moe_mesh=" in text


def _experts(root: Path, name: str, has_mesh: bool, load: bool) -> Any:
    rank, messages = dist.get_rank(), logged()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",)) if has_mesh else None
    model = Routed(name, -1.0 if load else float(rank))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    state = AppState(model, optimizer)
    config = config_of(root, restore_from="auto" if load else "none", is_async=True)

    def run() -> None:
        with CheckpointCallback(config, every_n_steps=1) as callback:
            callback.on_train_begin(state, moe_mesh=mesh)
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1.0)
            for parameter in model.get_submodule(name).parameters():
                parameter.grad = torch.full_like(parameter, 1.0 + rank)
            if not load:
                optimizer.step()
                callback.on_step_end(1)

    error = error_of(run)
    expert: Any = model.get_submodule(name).weight
    moment = optimizer.state[expert].get("exp_avg", torch.zeros(1)).flatten()[0].item()
    return error, expert[0, 0].item(), round(moment, 3), model.shared.bias[0].item(), messages


@pytest.mark.parametrize("name", ["expert", "ffn"])
def test_experts_of_different_ranks_are_exact_through_moe_mesh_and_refused_without(tmp_path: Path, name: str) -> None:
    for error, *_ in run_distributed(_experts, 2, tmp_path / "refused", name, False, False):
        assert error[0] == TopologyError.__name__
        assert f"model/{name}.weight" in error[1]
        assert "moe_mesh=" in error[1]
        assert "shared" not in error[1]
    assert not scan(tmp_path / "refused").checkpoints
    for error, *_, messages in run_distributed(_experts, 2, tmp_path / "run", name, True, False):
        assert error == ("", "")
        assert messages == []
    for rank, found in enumerate(run_distributed(_experts, 2, tmp_path / "run", name, True, True)):
        assert found[:4] == (("", ""), float(rank), round(0.1 * (1 + rank), 3), 1.0)
    model = Routed(name, -1.0)
    with config_of(tmp_path / "run").build(0, 0, 0) as engine, pytest.raises(KeyMismatchError) as caught:
        engine.load(AppState(model, torch.optim.AdamW(model.parameters())))
    assert f"{name}.weight: the ranks that saved it had different values" in str(caught.value)
    assert f"optimizer: {name}.weight:exp_avg: the ranks" in str(caught.value)
    assert model.get_submodule(name).weight[0, 0].item() == -1.0


def _apart(root: Path, has_mesh: bool) -> Any:
    """Experts as DTensors on two meshes that have no rank in common."""
    rank = dist.get_rank()
    meshes = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2, 3])]
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "shard"))
    model = nn.Module()
    model.ffn = nn.Parameter(distribute_tensor(torch.full((4, 3), float(rank // 2)), meshes[rank // 2], [Shard(0)]))
    model.shared = nn.Parameter(torch.ones(3))
    with config_of(root).build(rank, 0, 0, whole if has_mesh else None) as engine:
        error = error_of(lambda: engine.save(AppState(model), step=1).result())
        with torch.no_grad():
            local(model.ffn).fill_(-1)
        if not error[0]:
            engine.load(AppState(model), restore_from="latest")
    return error, isinstance(model.ffn, DTensor), local(model.ffn).tolist()


def test_experts_on_meshes_of_their_own_are_exact_through_moe_mesh_and_refused_without(tmp_path: Path) -> None:
    for error, *_ in run_distributed(_apart, 4, tmp_path / "refused", False):
        assert error[0] == TopologyError.__name__
        assert "model/ffn" in error[1]
    for rank, found in enumerate(run_distributed(_apart, 4, tmp_path / "run", True)):
        assert found == (("", ""), True, [[float(rank // 2)] * 3] * 2)


# -- nothing to report ---------------------------------------------------------------------------------------------


def _trained(root: Path, parallel: str) -> tuple[list[str], set[str]]:
    messages = logged()
    run = Training(root, parallel, {"is_async": True}, every_n_steps=1, workers=0)
    known: set[str] = set()

    def look(step: int, callback: CheckpointCallback) -> None:
        assert callback.checkpointer is not None
        known.update(callback.checkpointer._saver._contents.comparer.known.own)

    run.train(30, after_step=look)
    return [text for text in messages if "replicas" in text], known


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_training_gives_no_false_alarm(tmp_path: Path, parallel: str) -> None:
    for messages, own in run_distributed(_trained, 2, tmp_path, parallel):
        assert messages == []
        if parallel == "fsdp":
            assert own == {"model/norm.running_mean", "model/norm.running_var"}
        else:
            assert own <= {"model/norm.running_mean", "model/norm.running_var"}  # DDP broadcasts them


def test_the_accelerators_digest_sees_every_byte_and_no_memory_around_it() -> None:
    data = torch.randn(70_001).to(torch.bfloat16)
    whole = fold(data)
    assert fold(data.clone()) == whole
    assert fold(torch.cat([data[:7], data])[7:]) == whole
    for position in (0, 35_000, 70_000):
        changed = data.clone()
        changed[position] += 1
        assert fold(changed) != whole
    assert fold(torch.zeros(8)) != fold(torch.zeros(9))


def _held_by_one_rank(root: Path, holder: int) -> dict[str, Any]:
    def build(*, is_held: bool) -> AppState:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.state[model.weight] = {"momentum_buffer": torch.ones(2, 2), **({"n": 3} if is_held else {})}
        return AppState(model, optimizer)

    rank = dist.get_rank()
    with config_of(root).build(rank, 0, 0) as engine:
        for step in (1, 2):
            engine.save(build(is_held=rank == holder), step=step).result()
    fresh = build(is_held=rank != holder)
    with config_of(root).build(rank, 0, 0) as engine:
        report = engine.load(fresh)
    assert report is not None
    return {key: value for held in fresh.optimizers[0].state.values() for key, value in held.items() if key == "n"}


@pytest.mark.parametrize("holder", [0, 1])
def test_plain_state_that_one_rank_has_alone_is_its_own(tmp_path: Path, holder: int) -> None:
    found = run_distributed(_held_by_one_rank, 2, tmp_path, holder)
    assert found[holder] == {"n": 3}
    assert found[1 - holder] == {}


def _drifts_before_its_last_save(root: str, last: int, on_drift: str) -> tuple[list[str], str]:
    """One element of rank 1 changes, in a large tensor, before a step that is saved by the cadence."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1500, 1500, bias=False) for _ in range(3)))
    state = AppState(model, torch.optim.SGD(model.parameters(), lr=0.0))
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hydra_ckpt").addHandler(handler)
    error = ""
    config = CheckpointingConfig(
        checkpoint_dir=root, is_async=True, wait_for_staging=True, save_consolidated="always", on_drift=on_drift
    )
    try:
        with CheckpointCallback(config, every_n_steps=2) as callback:
            callback.on_train_begin(state)
            for step in range(1, last + 1):
                if step == 4 and dist.get_rank() == 1:
                    with torch.no_grad():
                        model[2].weight[777, 555] = 5.0
                callback.on_step_end(step)
            callback.on_train_end()
    except CheckpointError as failure:
        error = str(failure)
    return texts, error


@pytest.mark.parametrize("last", [4, 5], ids=["saved by the cadence", "saved at the end"])
def test_the_last_checkpoint_is_compared_in_full_whoever_made_it(tmp_path: Path, last: int) -> None:
    (texts, _), _ = run_distributed(_drifts_before_its_last_save, 2, str(tmp_path), last, "warn")
    assert any("are replicas and hold different values in 1 of the 3 tensors" in text for text in texts)
    newest = scan(tmp_path).pointed("LATEST")
    assert newest is not None
    assert newest.step == last
    assert newest.manifest.details["replicas"] == "compared in full"
    (file,) = (newest.path / "model" / "consolidated").glob("*.safetensors")
    assert load_file(file)["2.weight"][777, 555] != 5.0


def test_a_run_whose_last_checkpoint_holds_drifted_replicas_ends_in_an_error_if_asked_to(tmp_path: Path) -> None:
    for _, error in run_distributed(_drifts_before_its_last_save, 2, str(tmp_path), 4, "raise"):
        assert "are replicas and hold different values in 1 of the 3 tensors" in error
        assert "epoch_0_step_4, which holds values of both, was set aside" in error
    catalog = scan(tmp_path)
    assert [item.step for item in catalog.checkpoints] == [2]  # a checkpoint never mixes values
    newest = catalog.pointed("LATEST")
    assert newest is not None
    assert newest.step == 2
