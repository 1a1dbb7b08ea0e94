"""A checkpoint of a newer format is refused, never considered damaged, and nothing in it is changed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hydra_ckpt
from hydra_ckpt import (
    AppState,
    CheckpointCallback,
    CheckpointFormatError,
    CheckpointingConfig,
    CorruptCheckpointError,
    cli,
)
from hydra_ckpt.distributed.channel import error_from_data, error_to_data
from hydra_ckpt.storage import SafetensorsReader
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint, scan
from hydra_ckpt.store.manifest import FORMATS, read_manifest, read_sealed, seal
from hydra_ckpt.sweeps.summary import summarize
from hydra_ckpt.testing import run_distributed

NEWER = max(FORMATS) + 1


@dataclass
class Ended:
    """How the tool ended, and what it printed."""

    exit_code: int
    stdout: str
    output: str


def run(*arguments: str) -> Ended:
    """Call the tool as its console script does."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["hydra-ckpt", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    return Ended(int(ended.value.code or 0), out.getvalue(), out.getvalue() + err.getvalue())


def state() -> AppState:
    torch.manual_seed(0)
    return AppState(nn.Linear(2, 2))


def build(root: Path, **options: Any) -> Any:
    return CheckpointingConfig(checkpoint_dir=str(root), save_consolidated=False, **options).build(0, 0, 0)


def saved(root: Path, *steps: int) -> None:
    with build(root, restore_from=None) as engine:
        for step in steps:
            engine.save(state(), step=step, metrics={"loss": 1.0 / step}).result()


def make_newer(directory: Path, **changes: Any) -> Path:
    """What a later version may write: other fields, under the same seal."""
    body = {**read_sealed(directory / names.MANIFEST), "format": NEWER, "chapters": [1, 2], **changes}
    body.pop("parts", None)
    (directory / names.MANIFEST).write_bytes(seal(body))
    return directory


def everything(root: Path) -> dict[str, str]:
    """All there is below a directory, but for what a writer leaves of itself."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.name != names.OWNER:
            is_file = path.is_file() and not path.is_symlink()
            text = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else ""
            found[str(path.relative_to(root))] = str(path.readlink()) if path.is_symlink() else text
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1, 2 and 3, the last in a newer format; LATEST and BEST lead to it."""
    saved(tmp_path, 1, 2, 3)
    make_newer(tmp_path / "epoch_0_step_3")
    return tmp_path


def test_the_error_names_the_writer_and_the_remedy(root: Path) -> None:
    with pytest.raises(CheckpointFormatError, match=r"Install a newer hydra_ckpt") as refused:
        read_manifest(root / "epoch_0_step_3")
    assert (refused.value.format, refused.value.writer) == (NEWER, hydra_ckpt.__version__)
    assert f"written by hydra_ckpt {hydra_ckpt.__version__}" in str(refused.value)
    assert not isinstance(refused.value, CorruptCheckpointError)
    again = error_from_data(error_to_data(refused.value))
    assert (type(again), str(again), again.format) == (CheckpointFormatError, str(refused.value), NEWER)
    make_newer(root / "epoch_0_step_2", details={"hydra_ckpt": ["no", "text"]})
    with pytest.raises(CheckpointFormatError, match="written by a newer hydra_ckpt"):
        Checkpoint.open(root / "epoch_0_step_2")


@pytest.mark.parametrize("number", [None, "2", 0, -1, 1.0, True])
def test_a_format_that_is_no_number_is_damage(root: Path, number: Any) -> None:
    make_newer(root / "epoch_0_step_3", format=number)
    with pytest.raises(CorruptCheckpointError, match="its format is"):
        read_manifest(root / "epoch_0_step_3")


def test_a_changed_byte_is_damage_in_any_format(root: Path) -> None:
    path = root / "epoch_0_step_3" / names.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"step": 3', b'"step": 4'))
    with pytest.raises(CorruptCheckpointError):
        read_manifest(path.parent)


@pytest.mark.parametrize("selector", ["auto", "latest", "best", "epoch_0_step_3"])
def test_it_is_not_passed_over(root: Path, selector: str) -> None:
    before = everything(root)
    with build(root, restore_from=selector) as engine, pytest.raises(CheckpointFormatError, match="epoch_0_step_3"):
        engine.load(state())
    callback = CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(root), restore_from=selector))
    with pytest.raises(CheckpointFormatError), callback:
        callback.on_train_begin(state())
    assert everything(root) == before


@pytest.mark.parametrize("selector", ["auto", "latest"])
def test_the_newest_one_is_not_passed_over_where_the_pointer_leads_elsewhere(root: Path, selector: str) -> None:
    for pointer, target in (("LATEST", "epoch_0_step_2"), ("BEST", "epoch_0_step_1")):
        (root / pointer).unlink()
        (root / pointer).symlink_to(target)
    with build(root, restore_from=selector) as engine:
        with pytest.raises(CheckpointFormatError, match="epoch_0_step_3"):
            engine.load(state())
        assert engine.load(state(), "best", ["model"]).path.name == "epoch_0_step_1"
    (root / "LATEST").unlink()
    (root / "BEST").unlink()
    with build(root, restore_from=selector) as engine:
        for word in (selector, "best"):
            with pytest.raises(CheckpointFormatError, match="epoch_0_step_3"):
                engine.load(state(), word)


def _refused_on_all(root: Path) -> str:
    import torch.distributed as dist

    config = CheckpointingConfig(checkpoint_dir=str(root))
    with config.build(dist.get_rank(), 0, 0) as engine, pytest.raises(CheckpointFormatError) as refused:
        engine.load(state())
    return f"{refused.value.format} {refused.value.writer}"


def test_all_ranks_are_told(root: Path) -> None:
    assert run_distributed(_refused_on_all, 2, root) == [f"{NEWER} {hydra_ckpt.__version__}"] * 2


@pytest.mark.parametrize("conflict", ["raise", "set_aside"])
@pytest.mark.parametrize("selector", ["none", "epoch_0_step_2"])
def test_a_run_that_goes_back_before_it_is_refused(root: Path, conflict: str, selector: str) -> None:
    before = everything(root)
    config = CheckpointingConfig(checkpoint_dir=str(root), restore_from=selector, on_conflict=conflict)
    callback = CheckpointCallback(config)
    with pytest.raises(CheckpointFormatError, match="epoch_0_step_3"), callback:
        callback.on_train_begin(state())
    assert everything(root) == before


def test_a_run_continues_beside_an_earlier_one_and_leaves_it_alone(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    older = make_newer(tmp_path / "epoch_0_step_1")
    before = everything(older)
    with CheckpointCallback(
        CheckpointingConfig(checkpoint_dir=str(tmp_path), save_consolidated=False, max_recent_checkpoints=1),
        every_n_steps=1,
    ) as callback:
        report = callback.on_train_begin(state())
        assert report is not None
        assert (report.step, report.passed_over) == (3, {})
        for step in (4, 5):
            callback.on_step_end(step, metrics={"loss": 0.1 / step})
        callback.on_train_end()
    assert [item.step for item in scan(tmp_path).checkpoints] == [5]
    assert list(scan(tmp_path).newer) == ["epoch_0_step_1"]
    assert everything(older) == before


def test_a_run_s_start_neither_sweeps_its_draft_nor_moves_its_pointers(root: Path) -> None:
    draft = root / ".epoch_0_step_4.draft-0f"
    (root / "epoch_0_step_3").rename(draft)
    (root / "epoch_0_step_2" / names.TOKEN).touch()  # a crash came before its pointers were moved
    saved_draft = everything(draft)
    told = run("repair", str(root), "--dry-run").output.splitlines()
    assert told[0] == f"{draft.name}: left alone, a newer version wrote it"
    assert {line.split()[0] for line in told[1:]} == {"epoch_0_step_2/.token:", "LATEST", "BEST"}
    with build(root) as engine:
        engine.start(state())
    assert everything(draft) == saved_draft
    draft.rename(root / "epoch_0_step_3")
    for pointer in ("LATEST", "BEST"):
        (root / pointer).unlink()
        (root / pointer).symlink_to("epoch_0_step_3")
    (root / "epoch_0_step_2" / names.TOKEN).touch()
    before = everything(root)
    del before[f"epoch_0_step_2/{names.TOKEN}"]
    assert run("repair", str(root)).exit_code == 0
    assert everything(root) == before


# -- the tool ------------------------------------------------------------------------------------------------------


def test_the_tool_calls_it_newer_and_not_damaged(root: Path) -> None:
    newest = str(root / "epoch_0_step_3")
    for verb in ("list", "show", "verify", "export"):
        found = run(verb, newest, *([str(root / "out")] if verb == "export" else []))
        assert found.exit_code == 1, (verb, found.output)
        assert "Install a newer hydra_ckpt" in found.output
        assert "damaged:" not in found.output
        assert "Traceback" not in found.output
    for verb in ("list", "verify"):
        found = json.loads(run(verb, str(root), "--json").stdout)
        assert [item["newer_format"] for item in found["checkpoints"]] == [False, False, True]
        assert "newer format: " in run(verb, str(root)).output


def test_prune_and_repair_leave_it_alone(root: Path) -> None:
    before = everything(root / "epoch_0_step_3")
    assert run("repair", str(root)).exit_code == 0
    found = run("prune", str(root), "--newest", "1", "--yes")
    assert found.exit_code == 0
    assert "deleted: epoch_0_step_1" in found.output
    assert "kept: epoch_0_step_3, which is of a newer format" in found.output
    assert everything(root / "epoch_0_step_3") == before
    assert {pointer: str((root / pointer).readlink()) for pointer in ("LATEST", "BEST")} == {
        "LATEST": "epoch_0_step_3",
        "BEST": "epoch_0_step_3",
    }


def test_a_sweep_s_summary_says_that_it_leaves_it_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = tmp_path / "0"
    (job / ".hydra").mkdir(parents=True)
    saved(job / "checkpoints", 1)
    make_newer(job / "checkpoints" / "epoch_0_step_1")
    with caplog.at_level(logging.WARNING):
        assert summarize(tmp_path)["jobs"][0]["last"] is None
    assert "Install a newer hydra_ckpt" in caplog.text


def test_dcp_is_told_the_same(root: Path) -> None:
    with pytest.raises(CheckpointFormatError):
        SafetensorsReader(root / "epoch_0_step_3").read_metadata()
