"""Real optimizers of torch and of libraries: restored exactly wherever PyTorch's own round trip is, or refused by name.

By default a tenth of them, at least one of each kind of difficulty; with `--slow` all.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.testing import run_distributed
from hydra_ckpt.testing.processes import PATIENCE
from tests.optimizer_trials import Outcome, different, trials
from tests.real_optimizers import LIBRARIES, of_library

MODULES = {"lion-pytorch": "lion_pytorch"}
TENTH = (
    "torch LBFGS",  # a list of tensors; a step that takes a closure
    "torch AdamW, tensor lr",  # a tensor among the options
    "torch SGD, two groups",
    "pytorch_optimizer Lookahead",  # wrappers
    "pytorch_optimizer Lookahead over Lion",  # a counter among the inner optimizer's options
    "pytorch_optimizer WSAM",  # an empty state in the outer optimizer alone
    "pytorch_optimizer SafeFP16Optimizer",  # an inner optimizer over copies of the parameters
    "pytorch_optimizer TRAC",  # state under keys that are no parameters
    "pytorch_optimizer SOAP",  # strides
    "pytorch_optimizer AdaShift",  # a deque
    "pytorch_optimizer SCION",  # an enum
    "pytorch_optimizer Conda",  # an object of a class of its own: refused
    "pytorch_optimizer SGDSaI",  # partial sums under FSDP2: refused
    "pytorch_optimizer AggMo",
    "torchao AdamW8bit",  # tensor subclasses
    "torchao AdamWFp8",
    "bitsandbytes AdamW8bit",
    "bitsandbytes Lion32bit",
    "schedulefree AdamWScheduleFree",
    "schedulefree ScheduleFreeWrapperReference",  # no Optimizer
    "prodigyopt Prodigy, slices",  # a single element with a stride
    "lion-pytorch Lion",
    "transformers Adafactor",
    "timm Lookahead",
    "timm Adahessian",  # a generator of its own: PyTorch does not restore it either
)
REFUSED = {"pytorch_optimizer Conda", "pytorch_optimizer ScalableShampoo"}
REFUSED_WHEN_SHARDED = {"pytorch_optimizer Conda", "pytorch_optimizer Nero", "pytorch_optimizer SGDSaI"}


def _try(names: list[str], steps: tuple[int, ...], root: str, sharded: bool) -> list[Outcome]:
    return trials(names, steps, sharded=sharded, told=root)


def _judge(outcomes: list[Outcome], refused: set[str]) -> None:
    worse = [outcome for outcome in outcomes if outcome.verdict == "worse"]
    assert not worse, worse
    for outcome in outcomes:
        assert outcome.finite, outcome.name
        assert (outcome.verdict == "refused") == (outcome.name in refused and not outcome.cannot), outcome
        assert not outcome.refusal or "optimizer." in outcome.refusal or ":" in outcome.refusal
    assert sum(outcome.verdict == "exact" for outcome in outcomes) >= len(outcomes) / 3


def _installed(library: str) -> bool:
    return importlib.util.find_spec(MODULES.get(library, library)) is not None


@pytest.mark.parametrize("world", [1, 2])
def test_a_tenth_of_all_optimizers_continues_as_if_nothing_had_happened(tmp_path: Path, world: int) -> None:
    names = [name for name in TENTH if _installed(name.split()[0])]
    outcomes = run_distributed(_try, world, names, (3, 7), str(tmp_path), world > 1, timeout_s=400)[0]
    _judge(outcomes, REFUSED if world == 1 else REFUSED_WHEN_SHARDED)


@pytest.mark.slow
@pytest.mark.timeout(3600 * PATIENCE)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_optimizer_continues_as_if_nothing_had_happened(tmp_path: Path, library: str, world: int) -> None:
    if not _installed(library):
        pytest.skip(f"{library} is not installed")
    names = list(of_library(library))
    outcomes: list[Outcome] = []
    for begin in range(0, len(names), 20):
        part = names[begin : begin + 20]
        outcomes += run_distributed(_try, world, part, (3, 7), str(tmp_path), world > 1, timeout_s=500)[0]
    worse = [outcome for outcome in outcomes if outcome.verdict == "worse"]
    assert not worse, worse
    allowed = REFUSED if world == 1 else REFUSED_WHEN_SHARDED
    assert {outcome.name for outcome in outcomes if outcome.verdict == "refused"} <= allowed


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LambdaLR of an object": lambda o: lr_scheduler.LambdaLR(o, _Decay()),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 9]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 6),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 15, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4, mode="exp_range", gamma=0.9),
    "CyclicLR with a function": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4, scale_fn=_Decay()),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 9)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, 5),
}


class _Decay:
    """A callable with numbers of its own, which schedulers save."""

    def __init__(self) -> None:
        self.factor = 0.9

    def __call__(self, step: float) -> float:
        return self.factor**step


def _advance(optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler, steps: range) -> list[float]:
    seen = []
    for step in steps:
        optimizer.step()
        is_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(1.0 + step // 9) if is_plateau else scheduler.step()
        seen += [group[key] for group in optimizer.param_groups for key in ("lr", "momentum")]
    return seen


@pytest.mark.parametrize("steps", [3, 7])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_of_torch_continues_as_if_nothing_had_happened(tmp_path: Path, kind: str, steps: int) -> None:
    def make() -> AppState:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return AppState(model, optimizer, SCHEDULERS[kind](optimizer))

    state, again = make(), make()
    _advance(state.optimizers[0], state.lr_schedulers[0], range(steps))
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()
        report = checkpointer.load(again, restore_from="latest")
    assert report is not None
    assert "lr_scheduler" in report.exact
    assert not list(different(state.lr_schedulers[0].state_dict(), again.lr_schedulers[0].state_dict()))
    further = range(steps, steps + 12)
    expected = _advance(state.optimizers[0], state.lr_schedulers[0], further)
    assert _advance(again.optimizers[0], again.lr_schedulers[0], further) == expected
