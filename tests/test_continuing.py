"""A run that began from a given checkpoint, and is started again with the same command."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hydra_ckpt import AppState, CheckpointCallback, CheckpointExistsError, CheckpointingConfig, CheckpointNotFoundError
from hydra_ckpt.store.manifest import read_sealed, seal
from hydra_ckpt.testing import run_distributed
from tests.sweep_app import REPOSITORY, App
from tests.test_launch import launcher

STARTED_AGAIN = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}


def make_state() -> AppState:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    return AppState(model, torch.optim.SGD(model.parameters(), lr=0.1))


def train(root: Path, steps: int, *, ends: bool = True, **settings: Any) -> int:
    """Train for some steps. Returns the step at which the run began."""
    config = CheckpointingConfig(checkpoint_dir=str(root), **settings)
    with CheckpointCallback(config, every_n_steps=1) as callback:
        report = callback.on_train_begin(make_state())
        first = report.step if report is not None else 0
        for step in range(first + 1, first + steps + 1):
            callback.on_step_end(step)
            callback.on_validation_end({"loss": abs(step - 6)})
        if ends:
            callback.on_train_end()
    return first


def published(root: Path) -> list[int]:
    return sorted(int(path.name.rpartition("_")[2]) for path in root.glob("epoch_*"))


def set_aside(root: Path) -> list[Path]:
    return list(root.glob(".epoch_*.aside-*"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of another run, at step 3."""
    train(tmp_path / "base", 3)
    return tmp_path / "base" / "epoch_0_step_3"


def test_a_run_continues_from_its_own_newest_checkpoint(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "run"
    assert train(root, 4, restore_from=str(base)) == 3
    with caplog.at_level(logging.INFO, "hydra_ckpt"):
        assert train(root, 2, restore_from=str(base)) == 7
    [line] = [message for message in caplog.messages if "this run began from" in message]
    assert str(base) in line
    assert str(root / "epoch_0_step_7") in line
    assert "another checkpoint.checkpoint_dir" in line
    assert "on_conflict=set_aside" in line
    assert train(root, 1, restore_from="auto") == 9
    details = json.loads((root / "epoch_0_step_10" / "manifest.json").read_text())["details"]
    assert details["begun_from"]["path"] == str(base)
    assert train(root, 1, restore_from=os.path.relpath(base)) == 10


def test_a_source_that_is_gone_is_not_needed(tmp_path: Path, base: Path) -> None:
    root, copy = tmp_path / "run", tmp_path / "copy"
    train(root, 2, restore_from=str(base))
    shutil.copytree(base, copy)
    shutil.rmtree(base.parent)
    assert train(root, 1, restore_from=str(base)) == 5
    assert train(root, 1, restore_from=str(copy)) == 6
    with pytest.raises(CheckpointNotFoundError, match="there is no such directory"):
        train(root, 1, restore_from=str(base), on_conflict="set_aside")
    with pytest.raises(CheckpointNotFoundError, match="there is no such directory"):
        train(root, 1, restore_from=str(tmp_path / "other"))
    assert published(root) == [4, 5, 6, 7]


def test_a_warm_start_continues_with_all_parts(tmp_path: Path, base: Path) -> None:
    root, only_model = tmp_path / "run", {"restore_from": str(base), "restore_parts": ["model"]}
    assert train(root, 2, **only_model) == 0
    assert train(root, 5, **only_model) == 2  # past the source's step too
    assert train(root, 1, **only_model) == 7


def test_only_a_launcher_continues_where_later_steps_may_be_set_aside(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, settings = tmp_path / "run", {"restore_from": str(base), "on_conflict": "set_aside"}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert train(root, 2, **settings) == 3
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(root, 2, **settings) == 5
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert train(root, 2, **settings) == 7
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # another job, which the scheduler has also started again
    assert train(root, 1, **settings) == 3
    monkeypatch.delenv("SLURM_JOB_ID")
    assert train(root, 1, **settings) == 3
    assert published(root) == [4]
    assert len(set_aside(root)) == 7


def test_another_source_is_another_run(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    train(root, 2, restore_from=str(base))
    other = base.with_name("epoch_0_step_2")
    with pytest.raises(CheckpointExistsError, match="starting at step 2"):
        train(root, 1, restore_from=str(other))
    for name, value in STARTED_AGAIN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CheckpointExistsError, match="starting at step 2"):
        train(root, 1, restore_from=str(other))


def test_a_pointer_that_has_moved_on_is_the_same_source_to_a_launcher(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, latest = tmp_path / "run", str(base.with_name("LATEST"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert train(root, 3, restore_from=latest) == 3
    train(base.parent, 2)
    with pytest.raises(CheckpointExistsError, match="starting at step 5"):
        train(root, 1, restore_from=latest)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(root, 1, restore_from=latest) == 6


@pytest.mark.parametrize(("selector", "begins"), [("epoch_0_step_4", 4), ("best", 6), ("none", 0)])
def test_a_run_that_went_back_is_not_sent_back_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selector: str, begins: int
) -> None:
    settings = {"restore_from": selector, "on_conflict": "set_aside"}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    train(tmp_path, 8)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # this job has not gone back yet
    assert train(tmp_path, 4, **settings) == begins
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert train(tmp_path, 1, **settings) == begins + 4
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert train(tmp_path, 1, **settings) == (6 if selector == "best" else begins)


def test_none_is_a_fresh_start_unless_a_launcher_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert train(tmp_path, 2, restore_from="none") == 0
    with pytest.raises(CheckpointExistsError, match="starting at step 0"):
        train(tmp_path, 1, restore_from="none")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(tmp_path, 1, restore_from="none") == 2


def test_damaged_checkpoints_are_skipped_down_to_the_source(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    train(root, 2, restore_from=str(base))
    for path in sorted(root.glob("epoch_0_step_5/**/*.safetensors")):
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert train(root, 1, restore_from=str(base)) == 4
    for manifest in root.glob("epoch_*/manifest.json"):
        next(manifest.parent.glob("**/*.safetensors")).unlink()
    assert train(root, 1, restore_from=str(base)) == 3
    assert published(root) == [4]


def test_a_load_that_names_its_checkpoint_gets_it(tmp_path: Path, base: Path) -> None:
    root = tmp_path / "run"
    train(root, 2, restore_from=str(base))
    with CheckpointingConfig(checkpoint_dir=str(root), restore_from=str(base)).build(0, 0, 0) as engine:
        assert engine.load(make_state(), restore_from="epoch_0_step_4", parts=["model"]).path.name == "epoch_0_step_4"
        assert engine.start(make_state()).step == 5
        assert engine.load(make_state(), parts=["model"]).path == base  # the run has begun


def test_a_checkpoint_of_another_tool(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    source = tmp_path / "theirs"
    dcp.save({"model": torch.nn.Linear(4, 1).state_dict()}, checkpoint_id=source, no_dist=True)
    settings = {"restore_from": str(source), "restore_parts": ["model"], "allow_legacy_pickle_restore": True}
    root = tmp_path / "run"
    assert train(root, 2, **settings) == 0
    assert train(root, 1, **settings) == 2
    shutil.rmtree(source)
    assert train(root, 1, **settings) == 3


def test_equal_models_of_another_tool_are_told_apart(tmp_path: Path) -> None:
    """An archive or an image may give all files the same time."""
    import torch.distributed.checkpoint as dcp

    for name in ("one", "other"):
        dcp.save({"model": torch.nn.Linear(4, 1).state_dict()}, checkpoint_id=tmp_path / name, no_dist=True)
        os.utime(tmp_path / name / ".metadata", (1e9, 1e9))
    settings = {"restore_parts": ["model"], "allow_legacy_pickle_restore": True}
    (tmp_path / "link").symlink_to("one")
    assert train(tmp_path / "run", 2, restore_from=str(tmp_path / "one"), **settings) == 0
    with pytest.raises(CheckpointExistsError):
        train(tmp_path / "run", 1, restore_from=str(tmp_path / "other"), **settings)
    assert train(tmp_path / "run", 1, restore_from=str(tmp_path / "link"), **settings) == 2


@pytest.mark.parametrize("path", ["/x\x1b[2J\nERROR forged", "x" * 10_000, 5], ids=["escapes", "long", "number"])
def test_an_origin_that_anyone_may_have_written(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture, path: Any
) -> None:
    root = tmp_path / "run"
    train(root, 1, restore_from=str(base))
    manifest = root / "epoch_0_step_4" / "manifest.json"
    body = read_sealed(manifest)
    body["details"]["begun_from"]["path"] = path
    manifest.chmod(0o644)
    manifest.write_bytes(seal({key: value for key, value in body.items() if not key.startswith("~")}))
    caplog.clear()
    if isinstance(path, str) and len(path) < 100:
        assert train(root, 1, restore_from=str(base)) == 4
        [line] = [message for message in caplog.messages if "this run began from" in message]
        assert r"/x\x1b[2J\nERROR forged" in line
        assert line.isprintable()
        return
    with pytest.raises(CheckpointExistsError):
        train(root, 1, restore_from=str(base))
    assert train(root, 1) == 4
    assert "begun_from" not in read_sealed(root / "epoch_0_step_5" / "manifest.json")["details"]


def start_on_each_rank(root: Path, base: Path) -> int:
    if dist.get_rank() == 0:
        os.environ |= STARTED_AGAIN  # only rank 0 decides
    settings = {"restore_from": str(base), "restore_parts": ["model"], "on_conflict": "set_aside"}
    return train(root, 1, **settings)


def test_all_ranks_decide_alike(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    settings = {"restore_from": str(base), "restore_parts": ["model"], "on_conflict": "set_aside"}
    assert train(tmp_path / "run", 2, **settings) == 0
    assert run_distributed(start_on_each_rank, 2, tmp_path / "run", base) == [2, 2]


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch.distributed as dist
sys.path.insert(0, {repository!r})
import hydra_ckpt
from tests.test_continuing import train
hydra_ckpt.init_process_group("gloo")
restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
first = train(Path("run"), 2, ends=False, restore_from="base/epoch_0_step_3", on_conflict="set_aside")
Path(f"began_{{restart}}_{{dist.get_rank()}}").write_text(str(first))
dist.barrier()
if restart == 0 and dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_torchrun_restarts_continue(tmp_path: Path, base: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(repository=str(REPOSITORY)))
    for start in range(2):  # the second one is by hand
        subprocess.run(
            [*launcher("static"), "script.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            check=True,
            timeout=100,
            capture_output=True,
        )
        began = {path.name: path.read_text() for path in tmp_path.glob("began_*")}
        assert began == {"began_0_0": "3", "began_0_1": "3", "began_1_0": "5", "began_1_1": "5"}
        assert len(set_aside(tmp_path / "run")) == 4 * start


def test_an_unfinished_job_continues(tmp_path: Path, base: Path) -> None:
    app = App(tmp_path / "app")
    settings = [f"checkpoint.restore_from={base}", "checkpoint.on_conflict=set_aside", "steps=8"]
    arguments = ["lr=0.1,0.2", *settings]
    app.sweep_over(*arguments, kill="1 7")
    assert app.runs == ["0 3", "1 3"]
    assert app.sweep_over(*arguments, "callbacks.checkpoint.every_n_steps=3").returncode == 0
    assert app.runs == ["0 8", "1 6"]  # the first has finished, and has nothing to do with other settings about saving
    (app.sweep / "1" / "hydra_ckpt_job.json").unlink()
    assert app.sweep_over(*arguments).returncode == 0
    assert app.runs == ["0 8", "1 3"]  # the settings are those of the first start again
