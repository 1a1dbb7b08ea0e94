"""A run that takes the lease removes what others have prepared to take it with, and only that."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_ckpt.files import Files
from hydra_ckpt.store import names
from hydra_ckpt.store.lease import Lease, Times, is_held
from hydra_ckpt.store.owner import Owner

OWN = "0123456789ab"


def test_a_claim_that_came_too_late_has_no_file_left(tmp_path: Path) -> None:
    late = tmp_path / f".{names.OWNER}.after-{OWN}"
    released = tmp_path / f".{names.OWNER}.{OWN}"
    others = [tmp_path / f".LATEST.{OWN}", tmp_path / f".metrics.json.{OWN}", tmp_path / "owner.json.txt"]
    for path in (late, released, *others):
        path.write_text("x")
    lease = Lease(Files(), tmp_path, Owner.here(), Times())
    lease.acquire()
    assert not late.exists()
    assert not released.exists()
    assert all(path.exists() for path in others)
    lease.release()


def record(**changed: object) -> dict[str, object]:
    return {**json.loads(Owner.here("sweep/1").to_bytes()), **changed}


def test_a_record_survives_its_file_and_unknown_keys_are_left_out() -> None:
    owner = Owner.here("sweep/1")
    assert Owner.from_data(json.loads(owner.to_bytes())) == owner
    assert Owner.from_data({**json.loads(owner.to_bytes()), "newer": 1}) == owner


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 7) for name in ("incarnation", "host", "job", "run", "boot", "namespace", "launch")),
        *((name, value) for name in ("pid", "ticks") for value in (-1, 1.0, True, "1", None)),
        *(("started", value) for value in ("1", None, True, float("nan"), float("inf"), float("-inf"))),
        *(("restarts", value) for value in (None, [], {"slurm=7": "1"}, {"slurm=7": True}, {"slurm=7": None})),
    ],
)
def test_a_record_with_a_value_of_the_wrong_kind_is_none(name: str, value: object) -> None:
    assert Owner.from_data(record(**{name: value})) is None


@pytest.mark.parametrize("name", ["incarnation", "host", "pid", "started"])
def test_a_record_that_lacks_what_every_version_wrote_is_none(name: str) -> None:
    data = record()
    del data[name]
    assert Owner.from_data(data) is None


@pytest.mark.parametrize("data", [None, 7, "text", [], [["host", "x"]]])
def test_what_is_no_object_is_no_record(data: object) -> None:
    assert Owner.from_data(data) is None


def test_who_is_shown_as_holding_a_directory(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    lease = Lease(Files(), tmp_path, Owner.here(), Times())
    lease.acquire()
    assert is_held(tmp_path)
    lease.release()
    assert not is_held(tmp_path)
    path, elsewhere = tmp_path / names.OWNER, replace(Owner.here(), boot="elsewhere")
    path.write_bytes(elsewhere.to_bytes())
    assert is_held(tmp_path)  # its heartbeat is new
    for age_s in (-3600.0, 3600.0):
        then = time.time() - age_s
        os.utime(path, (then, then))
        assert not is_held(tmp_path)
    path.write_bytes(replace(Owner.here(), ticks=1 << 60).to_bytes())
    assert not is_held(tmp_path)  # another process has its number
