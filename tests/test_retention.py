"""Which checkpoints stay: policies, pointers, readers; and what is never touched."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from hydra_ckpt import AppState, CheckpointConfigError, CheckpointError, CheckpointingConfig
from hydra_ckpt.files import Files
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.store.pointers import protected, remove_pointer
from hydra_ckpt.store.retention import _ANY_OF, _POLICIES, Context, policies, superfluous
from hydra_ckpt.testing.processes import PATIENCE
from tests.programs import Program

STATE = AppState(torch.nn.Linear(2, 1))


def save_steps(directory: Path, *steps: int, files: Files | None = None, **options: Any) -> None:
    """Save these steps in one run; the metric is the step's distance from 4."""
    config = CheckpointingConfig(checkpoint_dir=str(directory), on_conflict="set_aside", **options)
    with config.build(0, 0, 0) as engine:
        for step in steps:
            engine.save(STATE, step=step, metrics={"loss": abs(step - 4)}).result()
        engine.drain()


def steps_in(directory: Path) -> list[int]:
    return [item.step for item in scan(directory).checkpoints]


def kept(directory: Path, retention: dict[str, Any], now: float = 0.0, metric: str = "loss") -> list[int]:
    """The steps that policies keep, pointers apart."""
    catalog = scan(directory)
    leave = {item.name for item in superfluous(catalog, policies(retention, None), Context(metric, "min", now))}
    return [item.step for item in catalog.checkpoints if item.name not in leave]


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eight")
    save_steps(root, *range(1, 9))
    for pointer in ("LATEST", "BEST"):
        (root / pointer).unlink()
    return root


@pytest.mark.parametrize(
    ("retention", "steps"),
    [
        ({"newest": 2}, [7, 8]),
        ({"best": 3}, [3, 4, 5]),
        ({"every_n_steps": 3}, [3, 6]),
        ({"newest": 1, "best": 1, "every_n_steps": 5}, [4, 5, 8]),
        ({"any_of": [{"every_n_steps": 3}, {"every_n_steps": 5, "newest": 1}]}, [3, 5, 6, 8]),
        ({"newest": 99}, list(range(1, 9))),
        ({}, list(range(1, 9))),
    ],
)
def test_a_checkpoint_stays_if_any_policy_keeps_it(eight: Path, retention: dict[str, Any], steps: list[int]) -> None:
    assert kept(eight, retention) == steps


def test_age_is_counted_from_the_save(eight: Path) -> None:
    times = [item.manifest.created for item in scan(eight).checkpoints]
    assert kept(eight, {"younger_than_s": 10}, now=times[-1]) == [
        step for step, time in zip(range(1, 9), times, strict=True) if times[-1] - time < 10
    ]
    assert kept(eight, {"younger_than_s": 10}, now=times[-1] + 11) == []
    between = (times[4] + times[5]) / 2
    assert kept(eight, {"younger_than_s": 10}, now=between + 10) == [6, 7, 8]


@pytest.mark.parametrize(
    ("retention", "steps"),
    [
        ({"best": 1}, list(range(1, 9))),
        ({"any_of": [{"best": 1}, {"best": 2}]}, list(range(1, 9))),
        ({"newest": 2, "best": 2}, [7, 8]),
    ],
)
def test_best_says_nothing_while_no_checkpoint_has_its_metric(
    eight: Path, retention: dict[str, Any], steps: list[int]
) -> None:
    assert kept(eight, retention, metric="accuracy") == steps


def test_what_has_no_metric_yet_stays_until_one_has(tmp_path: Path) -> None:
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), retention={"best": 1})
    with config.build(0, 0, 0) as engine:
        for step in (1, 2, 3):
            engine.save(STATE, step=step).result()
        engine.drain()
        assert steps_in(tmp_path) == [1, 2, 3]
        engine.add_metrics(2, 0, {"loss": 1.0})
        engine.save(STATE, step=4, metrics={"loss": 2.0}).result()
        engine.drain()
    assert steps_in(tmp_path) == [2, 4]


@pytest.mark.parametrize("rule", ["newest", "best", "every_n_steps", "younger_than_s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 0, True, "3"])
def test_a_number_that_keeps_nothing_is_refused_by_name(rule: str, value: Any) -> None:
    for make in (lambda given: policies(given, None), lambda given: CheckpointingConfig(retention=given)):
        with pytest.raises(CheckpointConfigError, match=rf"checkpoint\.retention\.{rule}=.*is not valid; it takes"):
            make({rule: value})


@pytest.mark.parametrize(
    ("retention", "named"),
    [
        ({"latest": 3}, "retention.latest: there is no such rule; choose from newest, best, every_n_steps"),
        ({"younger_than_s": 0}, "retention.younger_than_s=0 is not valid"),
        ({"any_of": {"newest": 3}}, r"retention.any_of=.*it takes a list of mappings, such as \[{newest: 3}\]"),
        ({"any_of": [{"wrong": 3}]}, r"retention.any_of\[0\].wrong: there is no such rule"),
    ],
)
def test_a_wrong_rule_is_refused_by_name(retention: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointConfigError, match=named):
        CheckpointingConfig(retention=retention)


def test_the_rules_that_are_checked_are_those_there_are() -> None:
    with pytest.raises(CheckpointConfigError) as caught:
        CheckpointingConfig(retention={"latest": 3})
    assert str(caught.value).endswith(f"choose from {', '.join([*_POLICIES, _ANY_OF])}.")


def test_pointers_of_any_make_protect_what_they_lead_to(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, 5, 6)
    (tmp_path / "BEST").unlink()
    (tmp_path / "paper").symlink_to("epoch_0_step_1")
    (tmp_path / "weights").symlink_to(tmp_path / "epoch_0_step_2" / "model")  # absolute, and into it
    (tmp_path / "KEEP.txt").write_text("epoch_0_step_3\n")
    (tmp_path / "chain").symlink_to("paper")
    (tmp_path / "notes.txt").write_text("epoch_0_step_4 was a good one, but this is prose")
    (tmp_path / "elsewhere").symlink_to("/tmp")
    (tmp_path / "circle").symlink_to("circle")
    assert protected(tmp_path).names == {f"epoch_0_step_{step}" for step in (1, 2, 3, 6)}
    save_steps(tmp_path, 7, max_recent_checkpoints=1)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 7]  # 4 is BEST again
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("damage", ["text", "link", "pipe", "directory", "mine"])
def test_an_unreadable_pointer_does_not_stop_retention(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, 1, 2, 3)
    best = scan(tmp_path).pointed("BEST")
    assert best is not None
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), max_recent_checkpoints=1)
    with config.build(0, 0, 0) as engine:
        engine.start(STATE)
        if damage not in ("directory", "mine"):
            (tmp_path / "BEST").unlink()
        if damage == "text":
            (tmp_path / "BEST.txt").write_text("\0\0\0\0")
        elif damage == "link":
            (tmp_path / "BEST").symlink_to("/nowhere/at/all")
        elif damage == "pipe":
            os.mkfifo(tmp_path / "BEST.txt")
        elif damage == "directory":
            (tmp_path / "MINE.txt").mkdir()
        else:
            os.mkfifo(tmp_path / "MINE.txt")
        engine.save(STATE, step=4).result()
        engine.drain()
        # What BEST ought to lead to stays.
        assert steps_in(tmp_path) == [best.step, 4]
        assert ("MINE" if damage in ("directory", "mine") else "BEST") in caplog.text
    assert "could not be pruned" not in caplog.text


def test_a_directory_in_the_place_of_a_pointer_stays_and_the_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path / "run", 1, 4, 5)
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")  # follows links: LATEST and BEST are directories
    stands = {path: path.read_bytes() for name in ("LATEST", "BEST") for path in (copy / name).rglob("*.*")}
    config = CheckpointingConfig(checkpoint_dir=str(copy), retention={"best": 1})
    with config.build(0, 0, 0) as engine:
        report = engine.start(STATE)
        assert report is not None
        assert report.step == 5
        engine.save(STATE, step=6, metrics={"loss": 2.0}).result()
        engine.drain()
    assert steps_in(copy) == [4, 6]  # what BEST.txt and LATEST.txt lead to
    assert {path: path.read_bytes() for path in stands} == stands
    assert f"{copy / 'LATEST'} is a directory and not a link" in caplog.text
    assert [scan(copy).pointed(name).step for name in ("LATEST", "BEST")] == [6, 4]  # type: ignore[union-attr]
    remove_pointer(Files(), copy, "BEST")
    assert {path: path.read_bytes() for path in stands} == stands
    for name in ("LATEST", "BEST"):
        shutil.rmtree(copy / name)
    save_steps(copy, 7)
    assert (copy / "LATEST").readlink() == Path("epoch_0_step_7")
    assert (copy / "BEST").readlink() == Path("epoch_0_step_4")
    assert not list(copy.glob("*.txt"))


@pytest.mark.parametrize("target", ["x" * 300, "a/" * 2000])
@pytest.mark.parametrize("name", ["LATEST", "BEST"])
def test_a_pointer_whose_text_is_no_valid_path_leads_nowhere(tmp_path: Path, name: str, target: str) -> None:
    save_steps(tmp_path, 1, 4)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(target)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as engine:
        report = engine.start(STATE)
        assert report is not None
        assert report.step == 4
        engine.save(STATE, step=5, metrics={"loss": 0.0}).result()
        engine.drain()
    assert scan(tmp_path).pointed("LATEST").step == 5  # type: ignore[union-attr]
    remove_pointer(Files(), tmp_path, name)
    (tmp_path / name).symlink_to(target)
    remove_pointer(Files(), tmp_path, name)
    assert not (tmp_path / name).is_symlink()


READER = """
import sys
from pathlib import Path
from hydra_ckpt.store.readers import reading

with reading(Path(sys.argv[1])):
    print("reading", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def another_reader(checkpoint: Path) -> Iterator[Program]:
    command = [sys.executable, "-c", READER, str(checkpoint)]
    with Program(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        yield process
        process.kill()


def test_what_somebody_reads_is_not_pruned_until_they_are_done_or_dead(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    listing = sorted(path for path in tmp_path.rglob("*") if path.name != "owner.json")
    with another_reader(tmp_path / "epoch_0_step_1"):
        assert sorted(path for path in tmp_path.rglob("*") if path.name != "owner.json") == listing
        save_steps(tmp_path, 5, max_recent_checkpoints=1, retention={"newest": 1})
        assert 1 in steps_in(tmp_path)
        assert 2 not in steps_in(tmp_path)
    save_steps(tmp_path, 6, max_recent_checkpoints=1)
    assert 1 not in steps_in(tmp_path)


def test_load_holds_the_lease_while_it_reads(tmp_path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    class Slow:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, _: dict[str, Any]) -> None:
            reached.set()
            assert go_on.wait(30 * PATIENCE)

    slow = AppState(STATE.model, extras={"slow": Slow()})
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path / "own"), on_conflict="set_aside")
    with config.build(0, 0, 0) as writer:
        writer.save(slow, step=1).result()

    def read() -> None:
        with config.build(0, 0, 0) as engine:
            engine.load(slow)

    reader = threading.Thread(target=read)
    reader.start()
    assert reached.wait(30 * PATIENCE)
    save_steps(tmp_path / "own", 2, 3, restore_from=None, max_recent_checkpoints=1)
    assert 1 in steps_in(tmp_path / "own")
    go_on.set()
    reader.join()
    save_steps(tmp_path / "own", 4, max_recent_checkpoints=1)
    assert 1 not in steps_in(tmp_path / "own")


def test_foreign_directories_are_never_touched(tmp_path: Path) -> None:
    foreign = [tmp_path / "epoch_0_step_9.bak", tmp_path / "epoch_0_step_0", tmp_path / "tensorboard"]
    for path in foreign:
        path.mkdir()
        (path / "mine").write_text("mine")
    save_steps(tmp_path, 1, 2, 3, max_recent_checkpoints=1)
    save_steps(tmp_path, 5, max_recent_checkpoints=1)
    assert all((path / "mine").read_text() == "mine" for path in foreign)
    assert steps_in(tmp_path) == [3, 5]  # 3 is BEST


def test_deleting_does_not_hold_up_the_next_save(tmp_path: Path) -> None:
    gate = threading.Event()

    class SlowToDelete(Files):
        def remove_tree(self, path: Path) -> None:
            assert gate.wait(30 * PATIENCE)
            super().remove_tree(path)

    from hydra_ckpt.checkpointer import Checkpointer

    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), max_recent_checkpoints=1)
    engine = Checkpointer(config.resolve(), dp_rank=0, tp_rank=0, pp_rank=0, files=SlowToDelete())
    try:
        for step in (1, 2, 3, 4):
            assert engine.save(STATE, step=step).result(10 * PATIENCE).step == step
        engine.drain()
        assert steps_in(tmp_path) == [4]  # gone from sight at once
        assert len([path for path in tmp_path.iterdir() if ".deleting-" in path.name]) == 3
    finally:
        gate.set()
        engine.close()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("choice", "retention"),
    [
        ("all", None),
        ("newest", {"newest": 3}),
        ("best", {"newest": 2, "best": 2}),
        ("milestones", {"newest": 2, "best": 1, "every_n_steps": 1000}),
    ],
)
@pytest.mark.parametrize("option", ["default", "async", "every", "torch_save"])
def test_options_of_the_group(choice: str, retention: dict[str, int] | None, option: str) -> None:
    with initialize_config_module("hydra_ckpt.conf", version_base="1.3"):
        config = compose(overrides=[f"+checkpoint={option}", f"checkpoint/retention={choice}"])
        elsewhere = compose(
            overrides=[f"+checkpoint@train.saving={option}", f"checkpoint/retention@train.saving.retention={choice}"]
            if choice != "all"
            else [f"+checkpoint@train.saving={option}"]
        )
    assert instantiate(config.checkpoint).retention == retention
    assert list(elsewhere) == ["train"]
    assert instantiate(elsewhere.train.saving).retention == retention


def test_a_pointer_that_cannot_be_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "LATEST").symlink_to("../elsewhere")
    assert protected(tmp_path).lost == {"LATEST"}
    assert re.search(r"LATEST leads to .*, which is not a checkpoint", caplog.text)


def test_a_checkpoint_that_another_process_keeps_locked_is_named_and_not_set_aside(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    manifest = tmp_path / "epoch_0_step_2" / "manifest.json"
    with manifest.open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        engine = CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0)
        with engine, pytest.raises(CheckpointError, match=f"{manifest} has been locked by another process"):
            engine.start(STATE)
    assert steps_in(tmp_path) == [1, 2]
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as engine:
        report = engine.start(STATE)
        assert report is not None
        assert report.path.name == "epoch_0_step_2"
