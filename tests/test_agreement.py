"""The worked example in the docstring of saving/agreement.py, in numbers: two pipeline stages of two replicas each."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_ckpt.errors import TopologyError
from hydra_ckpt.saving import agreement

EMBED, A, B = (["embed", "F32", [8, 4], 1, ""], ["a", "F32", [4, 4], 1, ""], ["b", "F32", [4], 1, ""])


def note(stage: int, holds: str, host: str = "node0", meshes: tuple[str, ...] = ("",)) -> dict[str, Any]:
    return {"host": host, "stage": stage, "holds": holds, "meshes": list(meshes)}


def payload(stage: int, *rows: list[Any], objects: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"stage": stage, "parts": {"model": list(rows)}, "adapted": {}, "objects": list(objects)}


def test_ranks_that_hold_the_same_have_one_leader_and_are_copies_of_each_other() -> None:
    found = agreement._positions([note(0, "ea"), note(0, "ea"), note(1, "be"), note(1, "be", host="node1")])
    assert [row["leader"] for row in found] == [0, 0, 2, 2]
    assert [row["peer"] for row in found] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [row["copies"] for row in found] == [[(0, 2)], [(1, 2)], [(0, 2)], [(1, 2)]]
    assert all(row["several"] and not row["one_host"] for row in found)


def test_ranks_of_one_mesh_are_one_copy() -> None:
    found = agreement._positions(
        [note(0, "x", meshes=("m01",)), note(0, "x", meshes=("m01",)), note(0, "x", meshes=("m23",))]
    )
    assert [row["copies"] for row in found] == [[(0, 2)], [(0, 2)], [(1, 2)]]
    assert all(row["one_host"] and not row["several"] for row in found)


def test_the_first_stage_that_has_a_tensor_writes_it() -> None:
    merged = agreement._merge([payload(0, EMBED, A), None, payload(1, B, EMBED), None])
    assert [(row[0], row[-1]) for row in merged["parts"]["model"]] == [("embed", 0), ("a", 0), ("b", 2)]
    assert merged["shared"] == [("model", "embed", [0, 2])]


def test_the_order_is_that_of_the_stages_not_of_the_ranks() -> None:
    merged = agreement._merge([payload(1, B, EMBED), payload(0, EMBED, A)])
    assert [(row[0], row[-1]) for row in merged["parts"]["model"]] == [("embed", 1), ("a", 1), ("b", 0)]


def test_stages_that_disagree_about_a_tensor_are_refused() -> None:
    with pytest.raises(TopologyError, match=r"embed is F32 \[8, 5\] on rank 1, elsewhere F32 \[8, 4\]"):
        agreement._merge([payload(0, EMBED, A), payload(1, ["embed", "F32", [8, 5], 1, ""])])
    with pytest.raises(TopologyError, match="embed is BF16"):
        agreement._merge([payload(0, EMBED, A), payload(1, ["embed", "BF16", [8, 4], 1, ""])])


def test_ranks_of_one_stage_must_hold_the_same() -> None:
    with pytest.raises(TopologyError, match=r"of ranks 0 and 1, only on rank 0: model: a F32 \[4, 4\]"):
        agreement._merge([payload(0, EMBED, A), payload(0, EMBED)])
    with pytest.raises(TopologyError, match=r"only on rank 1: objects: extras\.ema"):
        agreement._merge([payload(0, EMBED), payload(0, EMBED, objects=("extras.ema",))])
