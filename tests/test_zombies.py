"""A run that was presumed dead wakes up after another has taken over: nothing it still does costs a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hydra_ckpt import AppState, Checkpointer, CheckpointingConfig
from hydra_ckpt.storage.verification import checks, findings
from hydra_ckpt.store.catalog import scan
from tests.pausing import wait_until_stopped
from tests.programs import Program

# It stops inside the file layer: after the last check of the lease, before the change itself.
ZOMBIE = """
import signal, sys, threading
from pathlib import Path
from hydra_ckpt import CheckpointError, CheckpointingConfig
from hydra_ckpt.checkpointer import Checkpointer
from hydra_ckpt.files import Files
from tests.test_zombies import make_state

root, where = Path(sys.argv[1]), sys.argv[2]
armed = False
woke_up = threading.Event()

def stop(matches):
    global armed
    if armed and matches:
        armed = False
        print("stops", flush=True)
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread goes no further
        woke_up.set()

class Stopping(Files):
    def rename(self, source, target):
        stop(where == "before_publishing" and ".draft-" in source.name)
        stop(where == "before_retiring" and ".deleting-" in target.name)
        super().rename(source, target)
        stop(where == "after_publishing" and ".draft-" in source.name)
        stop(where == "after_retiring" and ".deleting-" in target.name)
    def replace(self, source, target):
        stop(where == f"before_replacing_{target.name}")
        super().replace(source, target)
    def symlink(self, text, path):
        stop(where == f"before_linking_{path.name.split('.')[1]}")
        super().symlink(text, path)
    def unlink(self, path):
        stop(where == "before_removing_the_token" and path.name == ".token")
        super().unlink(path)
    def remove_tree(self, path):
        stop(where == "before_deleting" and ".deleting-" in path.name)
        super().remove_tree(path)

config = CheckpointingConfig(checkpoint_dir=str(root), max_recent_checkpoints=1, best_metric_key="loss")
engine = Checkpointer(config.resolve(), dp_rank=0, tp_rank=0, pp_rank=0, files=Stopping())
state = make_state()
engine.start(state)
engine.save(state, step=1, metrics={"loss": 5.0}).result()
engine.drain()
armed = True
outcomes = []
def attempt(what, do):
    try:
        do()
        outcomes.append(f"{what}: done")
    except CheckpointError as error:
        outcomes.append(f"{what}: {error}")

attempt("save 2", lambda: engine.save(state, step=2, metrics={"loss": 0.1}).result())
if "retiring" in where or "deleting" in where:
    woke_up.wait(60)  # another thread does that, after the save has been answered
attempt("metrics", lambda: (engine.add_metrics(2, 0, {"loss": 0.01}), engine.drain()))
attempt("export", lambda: engine.save(state, step=2, is_final=True).result())
attempt("save 9", lambda: engine.save(state, step=9).result())
attempt("close", engine.close)
print("\\n".join(outcomes), flush=True)
"""

STOPS = [
    "before_publishing",
    "after_publishing",
    "before_linking_LATEST",
    "before_replacing_LATEST",
    "before_replacing_BEST",
    "before_removing_the_token",
    "before_retiring",
    "after_retiring",
    "before_deleting",
    "before_replacing_metrics.json",
]


def make_state() -> AppState:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return AppState(model, optimizer)


def heir(root: Path, **options: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=str(root), best_metric_key="loss", **options)
    return config.build(0, 0, 0)


class Zombie:
    """A run in a process of its own that stops itself at a chosen operation."""

    def __init__(self, root: Path, where: str) -> None:
        self._root = root
        command = [sys.executable, "-c", ZOMBIE, str(root), where]
        self._process = Program(
            command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Zombie:
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said == "stops\n", self._process.communicate()
        wait_until_stopped(self._process.pid)
        # Stands for all the ways in which a live run is taken for dead.
        record = json.loads((self._root / "owner.json").read_text())
        (self._root / "owner.json").write_text(json.dumps({**record, "released": True}))
        return self

    def resumes(self) -> str:
        os.kill(self._process.pid, signal.SIGCONT)
        outcome, log = self._process.communicate(timeout=60)
        assert self._process.returncode == 0, log
        return outcome

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def contents(root: Path) -> dict[str, dict[str, float]]:
    """The published checkpoints, all of which verify, with their metrics."""
    catalog = scan(root)
    assert not catalog.damaged
    for item in catalog.checkpoints:
        item.check_files()
        assert not list(findings(item.path, checks(item.path, item.manifest.files, item.manifest.digests)))
    return {item.name: item.metrics for item in catalog.checkpoints}


def pointed(root: Path, pointer: str) -> int | None:
    found = scan(root).pointed(pointer)
    return found.step if found is not None else None


@pytest.mark.parametrize("where", STOPS)
def test_what_a_zombie_still_does_costs_the_heir_nothing(tmp_path: Path, where: str) -> None:
    state = make_state()
    with Zombie(tmp_path, where) as zombie, heir(tmp_path) as engine:
        assert engine.start(state).step == 2
        engine.save(state, step=3, metrics={"loss": 3.0}).result()
        engine.add_metrics(2, 0, {"loss": 7.0})
        engine.add_metrics(3, 0, {"loss": 0.05})
        engine.drain()
        before = contents(tmp_path)
        outcome = zombie.resumes()
        assert "save 9: " in outcome
        assert "save 9: done" not in outcome
        assert pointed(tmp_path, "LATEST") == 3  # not even for a moment
        assert pointed(tmp_path, "BEST") == 3
        engine.save(state, step=4, metrics={"loss": 4.0}).result()
        engine.drain()
        assert contents(tmp_path) == {**before, "epoch_0_step_4": {"loss": 4.0}}
        assert pointed(tmp_path, "LATEST") == 4
        assert pointed(tmp_path, "BEST") == 3
    with heir(tmp_path) as engine:
        assert engine.start(state).step == 4
    assert not list(tmp_path.glob(".*"))


def test_a_zombie_in_the_middle_of_close_does_not_release_the_heir_s_lease(tmp_path: Path) -> None:
    with Zombie(tmp_path, "before_replacing_owner.json") as zombie, heir(tmp_path) as engine:
        assert engine.start(make_state()).step == 9
        record = (tmp_path / "owner.json").read_text()
        assert "close: done" in zombie.resumes()
        assert (tmp_path / "owner.json").read_text() == record
        assert engine.save(make_state(), step=10).result().step == 10


def test_a_zombie_that_adds_an_export_does_not_touch_the_heir_s(tmp_path: Path) -> None:
    state = make_state()
    with Zombie(tmp_path, "before_replacing_manifest.json") as zombie, heir(tmp_path) as engine:
        assert engine.start(state).step == 2
        exported = engine.save(state, step=2, is_final=True).result()
        manifest = (exported.path / "manifest.json").read_bytes()
        assert "export: saving step 2 failed" in zombie.resumes()
        assert (exported.path / "manifest.json").read_bytes() == manifest
        assert contents(tmp_path)
        assert scan(tmp_path).find(exported.name).manifest.exports  # type: ignore[union-attr]


@pytest.mark.parametrize("where", ["after_publishing", "before_replacing_LATEST", "before_retiring"])
def test_a_zombie_does_not_touch_an_heir_that_went_back(tmp_path: Path, where: str) -> None:
    state = make_state()
    with (
        Zombie(tmp_path, where) as zombie,
        heir(tmp_path, restore_from="epoch_0_step_1", on_conflict="set_aside") as engine,
    ):
        assert engine.start(state).step == 1
        assert pointed(tmp_path, "LATEST") == 1
        engine.save(state, step=2, metrics={"loss": 8.0}).result()
        before = contents(tmp_path)
        zombie.resumes()
        assert pointed(tmp_path, "LATEST") == 2
        engine.save(state, step=3, metrics={"loss": 9.0}).result()
        assert contents(tmp_path) == {**before, "epoch_0_step_3": {"loss": 9.0}}


def test_what_a_zombie_retired_is_put_back_by_whoever_comes_after_the_heir(tmp_path: Path) -> None:
    state = make_state()
    with Zombie(tmp_path, "before_retiring") as zombie:
        with heir(tmp_path) as engine:
            engine.start(state)
            engine.save(state, step=3).result()
        zombie.resumes()
    assert "epoch_0_step_1" not in contents(tmp_path)
    with heir(tmp_path) as engine:
        engine.start(state)
    assert list(contents(tmp_path)) == ["epoch_0_step_1", "epoch_0_step_2", "epoch_0_step_3"]


def test_what_a_zombie_retired_is_put_back_when_the_heir_ends(tmp_path: Path) -> None:
    state = make_state()
    with Zombie(tmp_path, "before_retiring") as zombie, heir(tmp_path) as engine:
        engine.start(state)
        zombie.resumes()
        assert list(contents(tmp_path)) == ["epoch_0_step_2"]
    assert list(contents(tmp_path)) == ["epoch_0_step_1", "epoch_0_step_2"]


def test_latest_never_goes_back_within_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = make_state()
    with heir(tmp_path) as engine:
        for step in (10, 5):
            engine.save(state, step=step).result()
        assert pointed(tmp_path, "LATEST") == 10
        assert "LATEST stays at step 10" in caplog.text
        engine.save(state, step=11).result()
    with heir(tmp_path, restore_from=None) as engine:
        engine.save(state, step=7).result()  # without a load: nothing says that this run goes back
        assert pointed(tmp_path, "LATEST") == 11
    with heir(tmp_path, restore_from="epoch_0_step_5", on_conflict="set_aside") as engine:
        assert engine.start(state).step == 5
        assert pointed(tmp_path, "LATEST") == 5
        engine.save(state, step=6).result()
        assert pointed(tmp_path, "LATEST") == 6


@pytest.mark.parametrize("name", [".BEST_notes.md", ".LATEST.bak", ".owner.json.mine", ".metrics.json.txt"])
def test_a_user_s_hidden_files_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / ".LATEST.0123456789ab").symlink_to("epoch_0_step_1")
    with heir(tmp_path) as engine:
        engine.start(make_state())
    assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / ".LATEST.0123456789ab").is_symlink()
