"""A checkpoint that was moved away and replaced by a link is neither followed nor skipped silently."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hydra_ckpt import CheckpointConfigError
from tests.test_failed_start import build
from tests.test_zombies import make_state


def moved(root: Path, disk: Path, steps: tuple[int, ...]) -> Path:
    """A directory whose last checkpoint is a link to another place; returns that place."""
    with build(root) as engine:
        for step in steps:
            engine.save(make_state(), step=step, metrics={"loss": 1.0 / step}).result()
    link = root / f"epoch_0_step_{steps[-1]}"
    shutil.move(link, disk / link.name)
    link.symlink_to(disk / link.name)
    return disk / link.name


@pytest.mark.parametrize("steps", [(3,), (1, 2, 3)])
@pytest.mark.parametrize("selector", ["auto", "latest", "best"])
def test_a_link_in_the_place_of_a_checkpoint_is_refused_by_name(
    tmp_path: Path, steps: tuple[int, ...], selector: str
) -> None:
    root, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    place = moved(root, disk, steps)
    before = {path.name: os.path.realpath(path) for path in root.iterdir()}
    with build(root, restore_from=selector) as engine, pytest.raises(CheckpointConfigError) as refused:
        engine.start(make_state())
    assert str(root / place.name) in str(refused.value)
    assert f"restore_from={place}" in str(refused.value)
    assert {path.name: os.path.realpath(path) for path in root.iterdir()} == before


def test_the_remedies_work(tmp_path: Path) -> None:
    root, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    place = moved(root, disk, (1, 3))
    engine = build(root, restore_from="none", on_conflict="set_aside")
    with engine, pytest.raises(CheckpointConfigError, match="symbolic link"):
        engine.start(make_state())
    with build(root, restore_from=str(place)) as engine:
        assert engine.start(make_state()) is not None
        assert (root / "LATEST").readlink() == (root / "BEST").readlink() == Path(place.name)
        engine.save(make_state(), step=4).result()
    (root / place.name).unlink()
    shutil.move(place, root / place.name)
    with build(root) as engine:
        report = engine.start(make_state())
        assert report is not None
        assert report.step == 4


def test_links_to_older_checkpoints_are_in_nobodys_way(tmp_path: Path) -> None:
    root, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    place = moved(root, disk, (1,))
    with build(root, restore_from=str(place)) as engine:
        engine.start(make_state())
        engine.save(make_state(), step=2, metrics={"loss": 0.1}).result()
    for selector in ("auto", "latest", "best"):
        with build(root, restore_from=selector) as engine:
            report = engine.start(make_state())
            assert report is not None
            assert report.step == 2
    assert (root / place.name).is_symlink()
