"""A run that takes the lease removes what others have prepared to take it with, and only that."""

from __future__ import annotations

from pathlib import Path

from hydra_ckpt.files import Files
from hydra_ckpt.store import names
from hydra_ckpt.store.lease import Lease, Times
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
