"""Small promises at the edges of a run: settings that no shell has expanded, closed Checkpointers, odd neighbours."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydra_ckpt import (
    CheckpointCallback,
    CheckpointConfigError,
    CheckpointError,
    CheckpointingConfig,
    CheckpointNotFoundError,
)
from hydra_ckpt.checkpointer import Checkpointer
from hydra_ckpt.files import Files
from hydra_ckpt.store.catalog import scan
from tests.test_lease import build, record_of
from tests.test_zombies import make_state

# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["$SCRATCH/x", "$SCRATCH", "data/$USER/run", "/data/$USER", " $SCRATCH/x"])
@pytest.mark.parametrize("setting", ["checkpoint_dir", "staging_dir", "restore_from"])
def test_a_variable_that_no_shell_has_expanded_is_refused_with_a_remedy(setting: str, place: str) -> None:
    with pytest.raises(CheckpointConfigError, match=rf"checkpoint\.{setting}=.* write \$\{{oc\.env:(SCRATCH|USER)\}}"):
        CheckpointingConfig(**{setting: place}).resolve()


def test_a_directory_that_is_called_like_a_variable_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "$SCRATCH").mkdir()
    for place in (tmp_path / "$SCRATCH" / "run", tmp_path / "cost_in_$", tmp_path / "a$b"):
        with build(place) as engine:
            engine.save(make_state(), step=1).result()
        assert (place / "epoch_0_step_1").is_dir()


def test_a_home_directory_is_expanded_also_in_restore_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with build(Path("~/run")) as engine:
        engine.save(make_state(), step=1).result()
    with build(tmp_path / "other", restore_from="~/run/epoch_0_step_1") as engine:
        assert engine.start(make_state()).step == 1


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "~nobody-of-this-name/x"])
def test_a_checkpoint_that_cannot_exist_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with build(tmp_path, restore_from=name) as engine, pytest.raises(CheckpointNotFoundError) as refused:
        engine.start(make_state())
    assert f"restore_from={name[:20]}" in str(refused.value)
    assert len(str(refused.value)) < 2000
    with build(tmp_path) as engine, pytest.raises(CheckpointNotFoundError):
        engine.load(make_state(), restore_from="a\0b")


# -- after the end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.load(make_state()),
        lambda engine: engine.prepare(make_state()),
        lambda engine: engine.on_rank_0("a question", lambda: 1),
        lambda engine: engine.save(make_state(), step=2),
        lambda engine: engine.start(make_state()),
        lambda engine: engine.settle(),
        lambda engine: engine.meet(),
        lambda engine: engine.recheck(make_state(), 1, 0),
        lambda engine: engine.load_base_model(make_state().model),
    ],
    ids=["load", "prepare", "on_rank_0", "save", "start", "settle", "meet", "recheck", "load_base_model"],
)
def test_nothing_can_be_asked_of_a_closed_checkpointer(tmp_path: Path, call: Callable[[Checkpointer], Any]) -> None:
    with build(tmp_path) as engine:
        engine.save(make_state(), step=1).result()
    with pytest.raises(CheckpointError, match="the Checkpointer is closed; build a new one"):
        call(engine)


class Failing(Files):
    """A disk that fails when a save is to be published."""

    def rename(self, source: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(("stops", "told"), [(True, "stops without its last checkpoint"), (False, "continues")])
def test_the_log_says_whether_training_continues_after_a_failed_save(
    tmp_path: Path, stops: bool, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), on_save_failure="warn")
    engine = Checkpointer(config.resolve(), dp_rank=0, tp_rank=0, pp_rank=0, files=Failing())
    with engine, caplog.at_level(logging.WARNING):
        engine.save(make_state(), step=1, skippable=not stops)
    found = [line for line in caplog.messages if "training" in line]
    assert len(found) == 1
    assert told in found[0]


def test_a_run_that_is_stopped_and_cannot_save_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), on_save_failure="warn")
    engine = Checkpointer(config.resolve(), dp_rank=0, tp_rank=0, pp_rank=0, files=Failing())
    with CheckpointCallback(config, checkpointer=engine, max_run_time_s=1e-3) as callback:
        callback.on_train_begin(make_state())
        step = 0
        while not callback.should_stop:
            step += 1
            callback.on_step_end(step)
        callback.on_train_end()
    assert "training stops without its last checkpoint" in caplog.text
    assert "training continues" not in caplog.text


# -- odd neighbours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["empty", "copy", "of another run"])
def test_a_run_whose_directory_was_replaced_fails_by_name_and_touches_nothing(tmp_path: Path, other: str) -> None:
    root, moved = tmp_path / "run", tmp_path / "moved"
    with build(tmp_path / "another") as engine:
        engine.save(make_state(), step=7).result()
    with build(root) as engine:
        engine.save(make_state(), step=1).result()
        root.rename(moved)
        if other == "empty":
            root.mkdir()
        else:
            shutil.copytree(moved if other == "copy" else tmp_path / "another", root, symlinks=True)
        before = sorted(root.rglob("*"))
        record = record_of(root) if other != "empty" else None
        with pytest.raises(CheckpointError, match="is not the directory that this run began in"):
            engine.save(make_state(), step=2).result()
        if other == "empty":
            root.rmdir()
            moved.rename(root)
            assert engine.save(make_state(), step=3).result().step == 3  # it was moved back
    if other != "empty":
        assert sorted(root.rglob("*")) == before
        assert record_of(root) == record


def test_a_run_whose_directory_is_gone_still_says_so(tmp_path: Path) -> None:
    with build(tmp_path / "run") as engine:
        engine.save(make_state(), step=1).result()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(CheckpointError, match="is gone: it was removed or renamed"):
            engine.save(make_state(), step=2).result()


def test_what_was_left_of_taking_the_lease_is_removed(tmp_path: Path) -> None:
    with build(tmp_path) as engine:
        engine.save(make_state(), step=1).result()
    left = [tmp_path / f".owner.json.after-{'ab' * 6}", tmp_path / f".owner.json.{'cd' * 6}"]
    for path in left:
        path.write_text("{}")
    with build(tmp_path) as engine:
        engine.start(make_state())
        assert not any(path.exists() for path in left)


def test_a_complete_draft_beside_a_link_with_its_name_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with build(tmp_path) as engine:
        for step in (1, 2):
            engine.save(make_state(), step=step).result()
    draft = tmp_path / f".epoch_0_step_1.draft-{'ab' * 6}"
    (tmp_path / "epoch_0_step_1").rename(draft)
    (tmp_path / "epoch_0_step_1").symlink_to("/archive/that/is/not/mounted")
    with build(tmp_path) as engine:
        assert engine.start(make_state()).step == 2
        engine.save(make_state(), step=3).result()
    assert "is complete, but a symbolic link has its name" in caplog.text
    assert draft.is_dir()
    assert (tmp_path / "epoch_0_step_1").is_symlink()
    assert [item.step for item in scan(tmp_path).checkpoints] == [2, 3]


def test_a_save_whose_name_a_dangling_link_has_is_refused_by_name(tmp_path: Path) -> None:
    with build(tmp_path) as engine:
        engine.start(make_state())
        (tmp_path / "epoch_0_step_1").symlink_to("nowhere")
        with pytest.raises(CheckpointError, match="epoch_0_step_1 already exists and is not overwritten"):
            engine.save(make_state(), step=1).result()


def test_an_added_export_is_counted_apart_from_the_saves(tmp_path: Path) -> None:
    state = make_state()
    with build(tmp_path) as engine:
        for step in (1, 2):
            engine.save(state, step=step).result()
        engine.save(state, step=2, is_final=True).result()
        assert (engine.stats.saves, engine.stats.exports_added) == (2, 1)
