"""Live objects are restored as they were: models, optimizers, schedulers and everything else in a run."""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from hydra_ckpt import AppState, CheckpointError, CheckpointingConfig, KeyMismatchError, LoadReport, resumable
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.testing import run_distributed


def save(directory: Path, state: AppState, step: int = 1, **options: Any) -> None:
    config = CheckpointingConfig(checkpoint_dir=str(directory), **options)
    with config.build(0, 0, 0) as engine:
        engine.save(state, step=step).result()


def load(directory: Path, state: AppState, **options: Any) -> LoadReport:
    with CheckpointingConfig(checkpoint_dir=str(directory), **options).build(0, 0, 0) as engine:
        report = engine.load(state)
        assert report is not None
        return report


def weights_on_disk(directory: Path, part: str = "model") -> dict[str, torch.Tensor]:
    [checkpoint] = directory.glob("epoch_*")
    found = {}
    for file in sorted((checkpoint / part).rglob("*.safetensors")):
        found.update(load_file(file))
    return found


def assert_same(one: Any, other: Any) -> None:
    """Equal to the last bit, types included."""
    assert type(one) is type(other), (one, other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        same = torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
        assert same, (one, other)
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert [type(key) for key in one] == [type(key) for key in other]
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, float):
        assert one == other or (math.isnan(one) and math.isnan(other))
    else:
        assert one == other


class Box:
    """An extra that is what it was given."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value


# -- models --------------------------------------------------------------------------------------------------------


class Gan:
    """Two models that train each other, with two optimizers and two schedulers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.models = {
            "generator": nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)),
            "discriminator": nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3), nn.Linear(5, 1)),
        }
        self.optimizers: dict[str, Optimizer] = {
            "generator": torch.optim.Adam(self.models["generator"].parameters(), lr=0.01, betas=(0.5, 0.9)),
            "discriminator": SGD(self.models["discriminator"].parameters(), lr=0.02, momentum=0.9),
        }
        self.schedulers = {
            name: schedulers.ExponentialLR(optimizer, 0.9) for name, optimizer in self.optimizers.items()
        }
        self.state = AppState(dict(self.models), dict(self.optimizers), dict(self.schedulers))

    def train(self, steps: int) -> None:
        generator, discriminator = self.models.values()
        for _ in range(steps):
            real, fake = torch.randn(8, 3), generator(torch.randn(8, 4))
            self._update("discriminator", (discriminator(fake.detach()) - discriminator(real)).mean())
            self._update("generator", -discriminator(fake).mean())

    def _update(self, name: str, loss: torch.Tensor) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        self.optimizers[name].step()
        self.schedulers[name].step()

    def snapshot(self) -> Any:
        return copy.deepcopy(
            [
                {name: dict(model.state_dict()) for name, model in self.models.items()},
                {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()},
                torch.get_rng_state(),
            ]
        )


@pytest.mark.parametrize("options", [{}, {"is_async": True, "save_consolidated": "always"}], ids=["sync", "async"])
def test_two_models_with_two_optimizers_go_on_bitwise(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = Gan()
    torch.manual_seed(7)
    whole.train(3)
    save(tmp_path, whole.state, step=3, **options)
    saved = whole.snapshot()
    whole.train(4)

    resumed = Gan()
    report = load(tmp_path, resumed.state)
    assert report.step == 3
    assert_same(resumed.snapshot(), saved)
    resumed.train(4)
    assert_same(resumed.snapshot(), whole.snapshot())
    assert set(weights_on_disk(tmp_path, "model/generator")) == set(whole.models["generator"].state_dict())
    assert set(weights_on_disk(tmp_path, "model/discriminator")) == set(whole.models["discriminator"].state_dict())


def test_a_model_of_the_dict_that_is_missing_or_new_is_named(tmp_path: Path) -> None:
    save(tmp_path, AppState({"teacher": nn.Linear(2, 2), "student": nn.Linear(2, 3)}))
    report = load(tmp_path, AppState({"teacher": nn.Linear(2, 2), "critic": nn.Linear(2, 3)}))
    assert (report.missing, report.skipped) == (("model.critic",), ("model.student",))
    assert "model.teacher" in report.exact
    with pytest.raises(KeyMismatchError) as failure:  # but a model that finds nothing at all is an error
        load(tmp_path, AppState({"critic": nn.Linear(2, 3)}))
    assert failure.value.unexpected == ["the model model/student", "the model model/teacher"]


def test_several_optimizers_over_one_model(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[nn.Module, list[Optimizer]]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        matrices = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() != 2]
        muon = getattr(torch.optim, "Muon", SGD)
        return model, [muon(matrices, lr=0.02, momentum=0.9), AdamW(others, lr=0.001)]

    def train(model: nn.Module, optimizers: list[Optimizer], steps: int) -> None:
        for _ in range(steps):
            model(torch.randn(6, 4)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    model, optimizers = make(0)
    train(model, optimizers, 3)
    save(tmp_path, AppState(model, optimizers), step=3)
    train(model, optimizers, 2)
    again, restored = make(1)
    load(tmp_path, AppState(again, restored))
    train(again, restored, 2)
    assert_same(again.state_dict(), model.state_dict())
    for one, other in zip(optimizers, restored, strict=True):
        assert_same(other.state_dict(), one.state_dict())


def test_param_groups_keep_their_options_and_keys_of_their_own(tmp_path: Path) -> None:
    def make(lr: float) -> tuple[nn.Module, Optimizer]:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        groups = [
            {"params": list(model[0].parameters()), "lr": lr, "weight_decay": 0.0, "name": "embeddings"},
            {"params": list(model[1].parameters()), "lr": lr * 10, "betas": (0.5, 0.6), "layer": {3: None}},
        ]
        return model, AdamW(groups, lr=torch.tensor(lr), foreach=False)

    model, optimizer = make(0.1)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    save(tmp_path, AppState(model, optimizer))
    fresh, restored = make(0.7)
    load(tmp_path, AppState(fresh, restored))
    for one, other in zip(optimizer.param_groups, restored.param_groups, strict=True):
        assert_same({k: v for k, v in other.items() if k != "params"}, {k: v for k, v in one.items() if k != "params"})


def test_an_optimizer_of_another_kind_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    def step(model: nn.Module, optimizer: Optimizer) -> None:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedulers.OneCycleLR(optimizer, 0.1, 10)  # puts options of its own into the groups
    step(model, optimizer)
    save(tmp_path, AppState(model, optimizer))
    fresh = nn.Linear(2, 2)
    before, other = copy.deepcopy(fresh.state_dict()), AdamW(fresh.parameters(), lr=1e-3)
    with pytest.raises(KeyMismatchError, match=r"restore_parts=\[model,") as failure:
        load(tmp_path, AppState(fresh, other))
    why = failure.value.mismatched["optimizer"]
    assert why.startswith("SGD in the checkpoint, AdamW in the AppState")
    assert "only there: dampening, momentum, nesterov; only here: amsgrad, betas, capturable" in why
    assert_same(fresh.state_dict(), before)
    assert other.param_groups[0]["lr"] == 1e-3
    # What the message says.
    parts = why[why.index("restore_parts=[") + len("restore_parts=[") : why.rindex("]")].split(",")
    load(tmp_path, AppState(fresh, other), restore_parts=parts)
    assert_same(fresh.state_dict(), model.state_dict())
    step(fresh, other)


class Later(AdamW):
    """A class that has gained an option since."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.defaults["added"] = 1
        for group in self.param_groups:
            group["added"] = 1


Later.__qualname__ = "AdamW"


@pytest.mark.parametrize("kind", [Adam, Later])
def test_an_optimizer_with_the_same_options_or_of_a_later_version_loads(tmp_path: Path, kind: type[Optimizer]) -> None:
    model = nn.Linear(2, 2)
    optimizer = AdamW(model.parameters(), lr=0.1)
    schedulers.StepLR(optimizer, 1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save(tmp_path, AppState(model, optimizer))
    other = kind(model.parameters(), lr=1e-3)
    load(tmp_path, AppState(model, other))
    assert other.param_groups[0]["lr"] == 0.1
    for parameter in model.parameters():
        assert_same(other.state[parameter], optimizer.state[parameter])
    other.step()


def test_optimizer_state_that_does_not_exist_yet_is_absent_afterwards_too(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "later": nn.Linear(3, 2)})
    optimizer = AdamW(model.parameters(), lr=0.1)
    save(tmp_path / "never", AppState(model, optimizer))
    model["used"](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save(tmp_path / "partly", AppState(model, optimizer))
    # One that has stepped everything gets back what was there, and no more.
    fresh = copy.deepcopy(model)
    other = AdamW(fresh.parameters(), lr=0.2)
    sum(layer(torch.ones(1, 3)).sum() for layer in fresh.values()).backward()
    other.step()
    load(tmp_path / "partly", AppState(fresh, other))
    assert {p for p in fresh.parameters() if p in other.state} == set(fresh["used"].parameters())
    for one, restored in zip(model["used"].parameters(), fresh["used"].parameters(), strict=True):
        assert_same(other.state[restored], optimizer.state[one])
    load(tmp_path / "never", AppState(fresh, other))
    assert not other.state
    assert other.param_groups[0]["lr"] == 0.1


def test_frozen_parts_are_saved_though_no_optimizer_holds_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = SGD(model[1].parameters(), lr=0.1, momentum=0.9)
    save(tmp_path, AppState(model, optimizer), is_async=True)
    fresh = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    load(tmp_path, AppState(fresh))
    assert_same(fresh.state_dict(), model.state_dict())


class Tied(nn.Module):
    """An output layer that shares its weight with the embedding, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("cache", torch.zeros(9), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x)) * self.scale


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    optimizer = AdamW(model.parameters())
    model(torch.arange(7)).sum().backward()
    optimizer.step()
    save(tmp_path, AppState(model, optimizer))
    assert sorted(weights_on_disk(tmp_path)) == ["embedding.weight", "head.bias", "scale"]  # and no cache
    fresh = Tied()
    fresh.cache.fill_(5)
    load(tmp_path, AppState(fresh, AdamW(fresh.parameters())))
    assert fresh.head.weight is fresh.embedding.weight
    assert_same(fresh.state_dict(), model.state_dict())
    assert (fresh.cache == 5).all()


class WithExtraState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.amax: Any = {"history": torch.arange(3.0), 0: (1, math.inf)}

    def get_extra_state(self) -> Any:
        return self.amax

    def set_extra_state(self, state: Any) -> None:
        self.amax = state


def test_extra_state_of_modules_comes_back(tmp_path: Path) -> None:
    for name, model in {"one": WithExtraState(), "nested": nn.Sequential(nn.ReLU(), WithExtraState())}.items():
        save(tmp_path / name, AppState(model))
        fresh = copy.deepcopy(model)
        for module in fresh.modules():
            if isinstance(module, WithExtraState):
                module.amax = None
        load(tmp_path / name, AppState(fresh))
        holder = fresh if isinstance(fresh, WithExtraState) else fresh[1]
        assert_same(holder.amax, WithExtraState().amax)
    pair = {"left": WithExtraState(), "right": WithExtraState()}
    pair["right"].amax = torch.ones(2)
    save(tmp_path / "pair", AppState(dict(pair)))
    fresh_pair = {"left": WithExtraState(), "right": WithExtraState()}
    load(tmp_path / "pair", AppState(dict(fresh_pair)))
    assert_same(fresh_pair["right"].amax, torch.ones(2))
    assert_same(fresh_pair["left"].amax, pair["left"].amax)


def test_wrappers_leave_no_trace_in_names(tmp_path: Path) -> None:
    def plain() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))

    def regional() -> nn.Module:
        model = plain()
        model[1] = torch.compile(model[1])
        return model

    def activation_checkpointed() -> nn.Module:
        model = plain()
        model[1] = checkpoint_wrapper(model[1])
        return checkpoint_wrapper(model)

    def both() -> nn.Module:
        return torch.compile(activation_checkpointed())

    expected = set(plain().state_dict())
    makers: list[Callable[[], nn.Module]] = [plain, lambda: torch.compile(plain()), regional, both]
    for number, make in enumerate([*makers, activation_checkpointed]):
        model = make()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        save(tmp_path / str(number), AppState(model, optimizer))
        assert set(weights_on_disk(tmp_path / str(number))) == expected
        for other in makers:
            fresh = other()
            load(tmp_path / str(number), AppState(fresh, SGD(fresh.parameters(), lr=0.2, momentum=0.9)))
            for one, restored in zip(model.parameters(), fresh.parameters(), strict=True):
                assert_same(restored.data, one.data)


@pytest.mark.parametrize("options", [{"is_async": True}, {"model_save_format": "torch_save"}], ids=["ours", "distcp"])
def test_every_element_type_and_odd_shape_comes_back(tmp_path: Path, options: dict[str, Any]) -> None:
    def make() -> nn.Module:
        module = nn.Module()
        for name, dtype in TORCH_DTYPE.items():
            for number, shape in enumerate([(), (3,), (2, 5), (0, 4)]):
                noise = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
                module.register_buffer(f"{name}_{number}", noise.view(dtype).reshape(shape))
        module.register_parameter("strided", nn.Parameter(torch.randn(4, 6).t()))
        module.register_parameter("channels_last", nn.Parameter(torch.randn(2, 3, 4, 5)))
        module.channels_last.data = module.channels_last.data.to(memory_format=torch.channels_last)
        module.register_buffer("conjugated", torch.randn(3, dtype=torch.complex64).conj())
        return module

    model = make()
    save(tmp_path, AppState(model), **options)
    fresh = make()
    load(tmp_path, AppState(fresh))
    for (name, one), (_, restored) in zip(model.state_dict().items(), fresh.state_dict().items(), strict=True):
        if one.is_conj():
            assert torch.equal(restored, one), name
        else:
            assert_same(restored, one)
        assert restored.stride() == one.stride()


# -- schedulers ----------------------------------------------------------------------------------------------------


class Halving:
    """A schedule that is an object keeps its own state."""

    def __init__(self, every: int) -> None:
        self.every = every

    def __call__(self, step: int) -> float:
        return 0.5 ** (step // self.every)


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "multi_step": lambda o: schedulers.MultiStepLR(o, [2, 4, 4]),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.5, total_steps=12),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, factor=0.3),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.CosineAnnealingLR(o, 6)], milestones=[3]
    ),
    "chained": lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)]),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1.0 / (1 + step)),
    "object": lambda o: schedulers.LambdaLR(o, Halving(2)),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on(tmp_path: Path, name: str) -> None:
    def make() -> tuple[AppState, Optimizer, Any]:
        model = nn.Linear(2, 2)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = SCHEDULES[name](optimizer)
        return AppState(model, optimizer, schedule), optimizer, schedule

    def run(optimizer: Optimizer, schedule: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            optimizer.step()
            schedule.step(*([1.0] if name == "plateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    state, optimizer, schedule = make()
    run(optimizer, schedule, 5)
    save(tmp_path, state, step=5)
    expected = run(optimizer, schedule, 6)
    fresh, restored, again = make()
    load(tmp_path, fresh)
    assert run(restored, again, 6) == expected


def test_a_number_of_schedulers_that_differs_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    def make(count: int) -> AppState:
        model = nn.Linear(2, 2)
        optimizer = SGD(model.parameters(), lr=0.1)
        return AppState(model, optimizer, [schedulers.ConstantLR(optimizer) for _ in range(count)])

    save(tmp_path, make(2))
    fresh = make(1)
    before = copy.deepcopy(fresh.model.state_dict())
    with pytest.raises(KeyMismatchError, match="lr_scheduler: 2 in the checkpoint, 1 in the AppState"):
        load(tmp_path, fresh)
    assert_same(fresh.model.state_dict(), before)


# -- extras --------------------------------------------------------------------------------------------------------


def test_extras_come_back_as_they_were(tmp_path: Path) -> None:
    value = {
        "tensor": torch.randn(3, 2),
        "scalar": torch.tensor(5),
        "empty": torch.empty(0, 3, dtype=torch.int8),
        "array": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "zero-dimensional": np.array(2.5),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "numpy scalar": np.float32(1.25),
        "numpy bool": np.bool_(True),
        "numpy text": np.str_("x"),
        "counter": Counter({3: 2, "a": 1}),
        "tuple": (1, (2.5, None), [True, "x"]),
        "int keys": {0: "zero", 1: {2: torch.ones(1)}, (3, "t"): 4},
        "looks like ours": {"~": "tensor", "v": "nothing"},
        "dotted.key": {"a": {"b.c": torch.zeros(1)}},
        "floats": [math.nan, math.inf, -math.inf, -0.0, 1e-310, 0.1],
        "big": 1 << 100,
        "text": 'ünïcode \ud800 "quoted"\n',
        "bytes": b"\0\xff",
        "set": {1, 2},
        "ordered": OrderedDict([("z", 1), ("a", 2)]),
        "types": [torch.float16, torch.device("cpu"), torch.Size([1, 2])],
        "nothing": None,
        "": {"": []},
    }
    model = nn.Linear(1, 1)
    extras = {"ema": Box(copy.deepcopy(value)), "list": Box([torch.ones(2), 1]), "bare": Box(torch.arange(4))}
    save(tmp_path, AppState(model, extras=extras), is_async=True)
    found: dict[str, Any] = {name: Box({}) for name in extras}
    load(tmp_path, AppState(model, extras=found))
    assert_same(found["ema"].value, value)
    assert_same(found["list"].value, [torch.ones(2), 1])
    assert_same(found["bare"].value, torch.arange(4))


def test_extras_that_one_side_lacks_are_left_alone_and_reported(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    save(tmp_path, AppState(model, extras={"ema": Box(1), "gone": Box(2)}))
    ema, new = Box(0), Box(7)
    report = load(tmp_path, AppState(model, extras={"ema": ema, "new": new}))
    assert (ema.value, new.value) == (1, 7)
    assert any("new" in note for note in report.notes)
    assert report.missing == ("extras.new",)
    bare = load(tmp_path, AppState(model))
    assert "extras" in bare.skipped
    assert not bare.notes


def test_what_begins_again_because_the_checkpoint_lacks_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(1, 1)
    save(tmp_path, AppState(model))
    optimizer = SGD(model.parameters(), lr=0.1)
    loader = resumable(DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2))
    full = AppState(model, optimizer, schedulers.StepLR(optimizer, 1), loader, extras={"ema": Box(1)})
    report = load(tmp_path, full)
    assert report.rederived == ("dataloader",)  # it starts from the beginning
    assert set(report.missing) == {"optimizer", "lr_scheduler", "dataloader", "extras.ema"}
    assert "not in the checkpoint, so left as it was built: optimizer" in caplog.text
    assert "not in the checkpoint, so left as it was built: extras.ema" in caplog.text
    # Who asks for the weights only wants nothing else.
    bare = load(tmp_path, full, restore_parts=["model"])
    assert (bare.missing, bare.rederived) == ((), ())


UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "object": ({"deep": [0, {"inner": object()}]}, r"extras\.bad\.deep\.1\.inner: a builtins\.object"),
    "function": ({"f": len}, r"extras\.bad\.f: "),
    "structured array": ({"names": np.zeros(2, [("a", "f4")])}, r"extras\.bad\.names: "),
    "long double": ([np.longdouble(1)], r"extras\.bad\.0: "),
    "array of objects": ([np.array([None])], r"extras\.bad\.0: "),
    "sparse tensor": ({"s": torch.eye(2).to_sparse()}, r"extras\.bad\.s: a tensor of torch\.float32, torch\.sparse"),
    "wide complex": ({"c": torch.zeros(1, dtype=torch.complex128)}, r"extras\.bad\.c: "),
    "same name twice": ({1: torch.ones(1), "1": torch.zeros(1)}, r"bad:1: "),
    "subclass of dict": ({"d": type("Odd", (dict,), {})()}, r"extras\.bad\.d: "),
}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_cannot_be_stored_is_refused_by_its_path_and_the_next_save_works(
    tmp_path: Path, kind: str, is_async: bool
) -> None:
    value, pattern = UNSUPPORTED[kind]
    model, bad = nn.Linear(2, 2), Box(value)
    state = AppState(model, SGD(model.parameters(), lr=0.1), extras={"bad": bad})
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), is_async=is_async)
    with config.build(0, 0, 0) as engine:
        for step in (1, 3):  # at the first save, and when a layout is agreed already
            bad.value = value
            with pytest.raises(CheckpointError, match=pattern):
                engine.save(state, step=step).result()
            bad.value = 1
            assert engine.save(state, step=step).result() is not None
        assert not list((tmp_path / "run").glob(".epoch*"))


def test_an_optimizer_built_before_its_model_is_told_so(tmp_path: Path) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    state = AppState(model, SGD(other.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match="Build the optimizer after wrapping"):
        save(tmp_path, state)
    save(tmp_path, AppState(model, SGD(model.parameters(), lr=0.1)))
    with pytest.raises(CheckpointError, match="Build the optimizer after wrapping"):
        load(tmp_path, state)


# -- parts ---------------------------------------------------------------------------------------------------------


def test_weights_alone_start_at_step_0(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    ema = Box(1)
    save(tmp_path / "first", AppState(model, optimizer, extras={"ema": ema}), step=9)

    fresh = nn.Linear(3, 2)
    other = AdamW(fresh.parameters(), lr=0.1)
    state = AppState(fresh, other, extras={"ema": Box(0)})
    random = torch.get_rng_state()
    config = CheckpointingConfig(
        checkpoint_dir=str(tmp_path / "second"),
        restore_from=str(tmp_path / "first" / "epoch_0_step_9"),
        restore_parts=["model"],
    )
    with config.build(0, 0, 0) as engine:
        report = engine.start(state)
        assert report is not None
        assert (report.step, report.epoch, report.loaded) == (0, 0, ("model",))
        assert {"optimizer", "rng", "extras", "progress"} <= set(report.skipped)
        assert_same(fresh.state_dict(), model.state_dict())
        assert not other.state
        assert other.param_groups[0]["lr"] == 0.1
        assert state.extras["ema"].value == 0
        assert torch.equal(torch.get_rng_state(), random)
        assert engine.save(state, step=1).result().step == 1


def test_a_part_that_does_not_exist_is_a_configuration_error(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    save(tmp_path, AppState(model))
    with (
        CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as engine,
        pytest.raises(CheckpointError, match="optimiser; choose from model, optimizer"),
    ):
        engine.load(AppState(model), parts=["optimiser"])


def test_a_data_loader_that_cannot_tell_its_place_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Hopeless:
        def state_dict(self) -> Any:
            raise NotImplementedError("no place")

        def load_state_dict(self, state: Any) -> None:
            raise AssertionError("nothing was saved for it")

    state = AppState(nn.Linear(1, 1), dataloader=Hopeless())
    save(tmp_path, state)  # without `start`, too
    assert "cannot report its position (NotImplementedError: no place)" in caplog.text
    assert "dataloader" not in load(tmp_path, state).loaded


# -- accelerate ----------------------------------------------------------------------------------------------------


class Prepared:
    """A run with everything accelerate wraps: DDP, its optimizer, its scheduler, gradient accumulation."""

    def __init__(self) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration

        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=2, dataloader_config=DataLoaderConfiguration(split_batches=False)
        )
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
        optimizer = AdamW(model.parameters(), lr=0.05)
        schedule = schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=200)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        data = list(torch.randn(44, 5))
        loader = DataLoader(data, batch_size=2, shuffle=True)  # type: ignore[arg-type]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.state = AppState.from_accelerator(self.accelerator, extras={"steps": Box(0)})
        self.loader = self.state.dataloader = resumable(loader, seed=5, rank=rank, world_size=world)
        torch.manual_seed(10 + rank)

    def train(self, until: int, step: int = 0, at_step: Callable[[int], None] | None = None) -> list[Any]:
        while True:
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(batch).square().mean())
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                if not self.accelerator.sync_gradients:
                    continue
                step += 1
                if at_step is not None:
                    at_step(step)
                if step == until:
                    return self.result()

    def result(self) -> list[Any]:
        inner = self.optimizer.optimizer
        return copy.deepcopy(
            [self.accelerator.unwrap_model(self.model).state_dict(), inner.state_dict(), torch.get_rng_state()]
        )


def _accelerate(directory: Path) -> list[str]:
    config = CheckpointingConfig(checkpoint_dir=str(directory), is_async=True)
    whole = Prepared()
    with config.build(whole.accelerator.process_index, 0, 0) as engine:
        engine.start(whole.state)

        def at_step(step: int) -> None:
            if step == 7:
                engine.save(whole.state, step=step)

        expected = whole.train(16, at_step=at_step)
    whole.accelerator.free_memory()
    resumed = Prepared()
    with config.build(resumed.accelerator.process_index, 0, 0) as engine:
        report = engine.start(resumed.state)
        assert report is not None
        assert set(report.loaded) >= {"model", "optimizer", "lr_scheduler", "dataloader", "rng", "extras"}
        found = resumed.train(16, step=report.step)
    assert_same(found, expected)
    return sorted(found[0])


def test_accelerate_under_ddp_continues_bitwise(tmp_path: Path) -> None:
    names = run_distributed(_accelerate, 2, tmp_path)
    assert names[0] == names[1]
    assert sorted(weights_on_disk(tmp_path)) == names[0]  # DDP leaves no prefix
