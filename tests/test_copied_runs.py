"""Directories of runs that were copied, moved or mounted twice: a copy is free, and a live run keeps its directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_ckpt import CheckpointExistsError
from hydra_ckpt.cli.holding import decision, held
from hydra_ckpt.files import Files
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.store.lease import is_held
from hydra_ckpt.store.owner import Owner
from hydra_ckpt.store.relocated import belongs_to_same_job, is_copy
from hydra_ckpt.testing.processes import PATIENCE
from tests.sweep_app import App
from tests.test_lease import another_run, build, record_of, saves
from tests.test_zombies import make_state

REPOSITORY = Path(__file__).parents[1]


def test_a_copy_of_a_live_run_s_directory_is_free_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original, copy = tmp_path / "a", tmp_path / "b"
    with another_run(original) as process:
        saves(process, 1)
        shutil.copytree(original, copy, symlinks=True)
        assert (is_held(original), is_held(copy)) == (True, False)
        with held(copy, decision(scan(copy))):  # what prune and repair do
            pass
        shutil.copy(original / "owner.json", copy)
        with build(copy) as engine:
            assert engine.start(make_state()).step == 1
            engine.save(make_state(), step=2).result()
            saves(process, 2)
        assert "Watching" not in caplog.text
        for root in (original, copy):
            assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
        with build(original) as engine, pytest.raises(CheckpointExistsError) as refused:
            engine.start(make_state())
        assert "remove" not in str(refused.value)


def test_a_copy_within_the_process_that_holds_the_original_is_free_too(tmp_path: Path) -> None:
    with build(tmp_path / "a") as engine:
        engine.save(make_state(), step=1).result()
        shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
        with build(tmp_path / "b") as other:
            assert other.start(make_state()).step == 1
        engine.save(make_state(), step=2).result()


def test_a_live_run_keeps_its_directory_under_every_other_name(tmp_path: Path) -> None:
    root = tmp_path / "a"
    (tmp_path / "link").symlink_to(root)
    with another_run(root) as process:
        saves(process, 1)
        with build(tmp_path / "link") as engine, pytest.raises(CheckpointExistsError, match="is being written"):
            engine.start(make_state())
        root.rename(tmp_path / "moved")  # the run is still alive, and nothing says where it thinks it is
        with build(tmp_path / "moved") as engine, pytest.raises(CheckpointExistsError) as refused:
            engine.start(make_state())
        told = str(refused.value)
        assert f"That run writes to {root}: if {tmp_path / 'moved'} is a copy of it, remove" in told
        assert told.endswith(str(tmp_path / "moved" / "owner.json"))


# What runs in a mount namespace of its own, after something has been mounted there.
START = """
import sys
from pathlib import Path
from hydra_ckpt import CheckpointExistsError
from tests.test_lease import build
from tests.test_zombies import make_state
with build(Path(sys.argv[1])) as engine:
    try:
        engine.start(make_state())
    except CheckpointExistsError as error:
        print("refused:", error)
"""
BOTH = """
import sys
from pathlib import Path
import pytest
from hydra_ckpt import CheckpointExistsError
from tests.test_lease import another_run, build, saves
from tests.test_zombies import make_state
root, other = map(Path, sys.argv[1:])
with another_run(root) as process:
    saves(process, 1)
    assert (other / "owner.json").exists()
    with build(other) as engine, pytest.raises(CheckpointExistsError, match="is being written by another run"):
        engine.start(make_state())
    saves(process, 2)
print("refused: samefile is", root.samefile(other))
"""


def mounted(mount: str, program: str, *places: Path) -> str:
    """What a program prints after a command has mounted something in a mount namespace of its own."""
    apart = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    tried = subprocess.run([*apart, mount], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {tried.stderr}")
    command = [*apart, f'{mount} && exec "$@"', "sh", sys.executable, "-c", program, *map(str, places)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100 * PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_live_run_keeps_its_directory_in_other_mount_namespaces(tmp_path: Path) -> None:
    root, other, copy = tmp_path / "a", tmp_path / "b", tmp_path / "copy"
    other.mkdir()
    with another_run(root) as process:
        saves(process, 1)
        bind = f"mount --bind {root} {other}"
        assert mounted(bind, START, other).startswith("refused:")
        # The path that the run names leads to a copy there.
        shutil.copytree(root, copy, symlinks=True)
        assert mounted(f"{bind} && mount --bind {copy} {root}", START, other).startswith("refused:")
        saves(process, 2)


@pytest.mark.parametrize(
    ("mount", "same"),
    [
        pytest.param("mount --bind {root} {other}", True, marks=pytest.mark.slow),
        ("mount -t overlay -o lowerdir={low},upperdir={root},workdir={work} none {other}", False),
    ],
)
def test_a_live_run_keeps_its_directory_under_another_mount(tmp_path: Path, mount: str, same: bool) -> None:
    places = {name: tmp_path / name for name in ("root", "other", "low", "work")}
    for place in places.values():
        place.mkdir()
    said = mounted(mount.format(**places), BOTH, places["root"], places["other"])
    assert said == f"refused: samefile is {same}\n"


class TakenOver(Files):
    """Another run takes the lease under another mount while this one looks: it removes what others have prepared."""

    def write_new(self, path: Path, data: bytes) -> None:
        super().write_new(path, data)
        path.unlink()


def test_a_file_that_was_removed_meanwhile_proves_nothing(tmp_path: Path) -> None:
    with another_run(tmp_path / "a") as process:
        saves(process, 1)
        shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
        owner = Owner.from_data(record_of(tmp_path / "b"))
        assert owner is not None
        assert not is_copy(TakenOver(), tmp_path / "b", owner)
        assert is_copy(Files(), tmp_path / "b", owner)


# -- sweeps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "other", "same"),
    [
        (("/new, job 0", "/new/0/checkpoints"), ("/old, job 0", "/old/0/checkpoints"), True),
        (("/new, job 1", "/new/1/checkpoints"), ("/old, job 0", "/old/0/checkpoints"), False),
        (("/new, job 1", "/new/shared"), ("/new, job 0", "/new/shared"), False),
        (("/new, job 0", "/shared"), ("/old, job 0", "/shared"), False),
        (("/new, job 0", "/new/0/checkpoints"), ("/old, job 0", ""), False),
        (("", "/new"), ("/old, job 0", "/old/0/checkpoints"), True),
    ],
)
def test_which_directories_belong_to_the_same_job(mine: tuple[str, str], other: tuple[str, str], same: bool) -> None:
    here = Owner.here()
    first, second = (replace(here, run=run, root=root) for run, root in (mine, other))
    assert belongs_to_same_job(first, second) is same


@pytest.mark.parametrize("how", ["moved", pytest.param("copied", marks=pytest.mark.slow)])
def test_a_sweep_continues_in_a_directory_that_was_moved_or_copied(tmp_path: Path, how: str) -> None:
    app = App(tmp_path / "app")
    assert app.sweep_over("lr=0.3,0.1", kill="0 5").returncode == -signal.SIGKILL
    place = app.root / "elsewhere"
    app.sweep.rename(place) if how == "moved" else shutil.copytree(app.sweep, place, symlinks=True)
    done = app.run("-m", "hydra.sweep.dir=elsewhere", "lr=0.3,0.1")
    assert done.returncode == 0, done.stderr
    assert app.runs == ["0 0", "0 4", "1 0"]
