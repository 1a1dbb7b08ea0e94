"""Random training runs continue after a load as if nothing had happened, or are refused by name."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hydra_ckpt.testing import run_distributed
from tests.differential import Case, Outcome, check, draw, drawn, quiet  # noqa: F401 - a fixture

MOST_REFUSED = 0.05


@st.composite
def cases(choose: Any, parallel: str = "none") -> Case:
    return draw(lambda options: choose(st.sampled_from(list(options))), parallel)


class Tally:
    """Counts the kinds of refusals."""

    def __init__(self) -> None:
        self.cases, self.refused = 0, Counter[str]()

    def add(self, outcome: Outcome) -> None:
        self.cases += 1
        if outcome.refused is not None:
            kind = re.sub(r"extras\.\S+|'[^']*'|\[.*?\]|blocks\.\S+", "*", outcome.refused.splitlines()[0])
            self.refused[kind[:120]] += 1

    def check(self) -> None:
        print(f"{sum(self.refused.values())} of {self.cases} cases were refused")
        for kind, count in self.refused.most_common():
            print(f"{count:4} {kind}")
        # A single one of few cases says nothing.
        assert sum(self.refused.values()) <= max(2, MOST_REFUSED * self.cases)


def run_one_rank(root: Path, examples: int, *, is_fixed: bool) -> None:
    tally = Tally()
    phases = (Phase.explicit, Phase.generate) if is_fixed else tuple(Phase)

    @settings(
        max_examples=examples,
        derandomize=is_fixed,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case: Case) -> None:
        outcome = check(case, root / "run")
        assert outcome.faults == [], case
        tally.add(outcome)

    run()
    tally.check()


def test_whatever_one_rank_hands_over_comes_back_as_it_was(tmp_path: Path) -> None:
    run_one_rank(tmp_path, 30, is_fixed=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrapper", ["none", "hooked", "override", "compile", "fabric", "returning"])
@pytest.mark.parametrize(
    "blocks", [("fabric", "hooked"), ("casting",), ("fabric", "casting", "extra tensor"), ("pre-hooked",)]
)
def test_wrappers_inside_a_model_and_copies_of_another_type_are_not_refused(
    tmp_path: Path, blocks: tuple[str, ...], wrapper: str, dtype: str
) -> None:
    options = (("is_async", False), ("save_consolidated", "false"), ("model_save_format", "safetensors"))
    case = Case("none", dtype, ("linear", *blocks), wrapper, "adamw", "none", "one", "none", (), 2, options)
    outcome = check(case, tmp_path / "run")
    assert outcome.refused is None
    assert outcome.faults == []


@pytest.mark.slow
def test_whatever_one_rank_hands_over_comes_back_in_many_cases(tmp_path: Path) -> None:
    run_one_rank(tmp_path, 600, is_fixed=False)


def _on_this_rank(root: Path, parallel: str, seeds: range) -> list[tuple[Case, Outcome]]:
    logging.disable(logging.WARNING)
    torch.compiler.set_stance("force_eager")
    return [(case, check(case, root / str(seed))) for seed in seeds for case in [drawn(seed, parallel)]]


def run_two_ranks(root: Path, parallel: str, seeds: range) -> None:
    tally = Tally()
    for rank, results in enumerate(run_distributed(_on_this_rank, 2, root, parallel, seeds, timeout_s=500)):
        for case, outcome in results:
            assert outcome.faults == [], (rank, case)
            if rank == 0:
                tally.add(outcome)
    tally.check()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_whatever_two_ranks_hand_over_comes_back_as_it_was(tmp_path: Path, parallel: str) -> None:
    run_two_ranks(tmp_path, parallel, range(7))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_whatever_two_ranks_hand_over_comes_back_in_many_cases(tmp_path: Path, parallel: str) -> None:
    run_two_ranks(tmp_path, parallel, range(7, 150))
