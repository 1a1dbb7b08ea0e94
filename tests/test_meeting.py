"""Ranks that do not come to `build()`: the others end in one clear error, within a limit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from hydra_ckpt import CheckpointError
from hydra_ckpt.distributed import group
from hydra_ckpt.testing import run_distributed
from tests.test_lease import build


def _one_waits_elsewhere(root: Path, meets_first: bool) -> str:
    group._START_S = 3.0  # ten minutes otherwise
    if meets_first:
        build(root).close()
    if dist.get_rank() == 1:
        time.sleep(9.0)  # or a barrier that only this rank has reached, or a debugger
        return "late"
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="the ranks did not meet when the Checkpointer was built") as error:
        build(root, consolidation_timeout_minutes=0.02)
    assert time.monotonic() - began < 8.0
    return str(error.value)


@pytest.mark.parametrize("meets_first", [False, True])
def test_a_rank_that_does_not_come_is_waited_for_within_a_limit(tmp_path: Path, meets_first: bool) -> None:
    waited, late = run_distributed(_one_waits_elsewhere, 2, tmp_path, meets_first)
    assert late == "late"
    assert "one of them has ended, hangs, or waits for the others in another collective call" in waited


def _one_ends(root: Path) -> str:
    if dist.get_rank() == 1:
        dist.destroy_process_group()
        return "ended"
    with pytest.raises(CheckpointError, match="the ranks did not meet when the Checkpointer was built") as error:
        build(root)
    return str(error.value)


def test_a_rank_that_has_ended_is_noticed_before_the_limit(tmp_path: Path) -> None:
    waited, _ = run_distributed(_one_ends, 2, tmp_path)
    assert "gloo" in waited
    assert "no answer within" not in waited
