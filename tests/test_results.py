"""What jobs return is recorded exactly, or not at all."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hydra_ckpt.sweeps.record import JobRecord, read_record
from hydra_ckpt.sweeps.summary import write_summary


def _nested(depth: int) -> Any:
    return [_nested(depth - 1)] if depth else 1.0


def _recorded(value: Any, directory: Path) -> JobRecord:
    JobRecord.begin((), {}, directory).returned(value).write(directory)
    record = read_record(directory)
    assert record is not None
    assert record.state == "finished"
    json.dumps(write_summary(directory.parent))
    return record


class _Choice(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((same, same) for same in (None, True, 7, 10**400, 0.1, "\udcff", [1.0, [2]], _nested(32))),
        *(
            (same, same)
            for same in ("nan", {"not finite": "nan"}, {"not finite": {"not finite": 3}}, {"not finite": {}})
        ),
        *((same, same) for same in ([{"not finite": [float("inf")]}], {"not finite": "best", "b": -float("inf")})),
        ({"a": [float("nan")]}, {"a": [float("nan")]}),
        ({"not finite": float("nan")}, {"not finite": float("nan")}),
        ((1.0, 2.0), [1.0, 2.0]),
        (_Choice.ONE, 1),
        (np.float64(0.1), 0.1),
        (np.int64(2**60 + 1), 2**60 + 1),
        (torch.tensor(0.5), 0.5),
    ],
)
def test_a_result_is_read_as_it_was_returned(value: Any, expected: Any, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    record = _recorded(value, tmp_path / "0")
    assert (record.has_objective, repr(record.objective)) == (True, repr(expected))


@pytest.mark.parametrize(
    "value",
    [
        _nested(33),
        _nested(500),
        {1: 2.0},
        {"a": {None: 1}},
        b"1.5",
        bytearray(b"2"),
        1j,
        "\ud800\udc00",
        10**5000,
        object(),
        torch.ones(2),
        {1.0},
        "x" * (16 << 20),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_job_whose_result_cannot_be_recorded_exactly_has_finished_without_one(value: Any, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    record = _recorded(value, tmp_path / "0")
    assert (record.has_objective, record.objective) == (False, None)
