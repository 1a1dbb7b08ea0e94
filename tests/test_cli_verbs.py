"""show, diff, prune and repair on real directories."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.store.owner import read_owner
from hydra_ckpt.store.readers import reading
from tests.test_cli import FIRST, LAST, SECOND, Result, contents, originals, run_dir, tool

__all__ = ["originals", "run_dir", "tool"]  # fixtures

Tool = Callable[..., Result]
Dirs = Callable[[str], Path]


def published(directory: Path) -> list[str]:
    return [item.name for item in scan(directory / "checkpoints").checkpoints]


# -- show ----------------------------------------------------------------------------------------------------------


def test_show_tells_what_a_checkpoint_holds_and_what_is_damaged(run_dir: Dirs, tool: Tool) -> None:
    run = run_dir("consolidated")
    before = contents(run)
    shown = tool("show", run)
    assert shown.code == 0
    for text in (LAST, "step", "30, epoch 1", "LATEST", "val_loss 0.7", "1 safetensors file", "model/consolidated"):
        assert text in shown.out
    data = json.loads(tool("show", run / "checkpoints" / SECOND, "--json").out)
    assert (data["step"], data["pointers"], data["metrics"]) == (20, ["BEST"], {"val_loss": 0.25})
    assert data["parts"].keys() == {"model", "optim"}
    assert data["details"]["optimizers"] == ["AdamW"]
    assert contents(run) == before
    refused = tool("show", run, "--command")
    assert refused.code == 2
    assert "it was not written by a Hydra application" in refused.err
    next((run / "checkpoints" / LAST / "model").rglob("*.safetensors")).unlink()
    damaged = tool("show", run)
    assert damaged.code == 1
    assert "the file is missing" in damaged.out


# -- diff ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["shards", "torch_save"])
def test_the_same_state_is_the_same_in_every_format(other: str, run_dir: Dirs, tool: Tool) -> None:
    one, two = run_dir("consolidated"), run_dir(other)
    result = tool("diff", one, two)
    assert (result.code, result.out.strip()) == (0, "no tensor differs"), result.out


def save(directory: Path, **tensors: torch.Tensor) -> Path:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor.clone())  # tied tensors are saved once
    with CheckpointingConfig(checkpoint_dir=str(directory)).build(0, 0, 0) as engine:
        return engine.save(AppState(model), step=1).result().path


def test_diff_lists_what_differs_bit_by_bit(tmp_path: Path, tool: Tool) -> None:
    nan = float("nan")
    base = torch.tensor([[0.0, 1.0], [2.0, nan]])
    one = save(tmp_path / "a", same=base, zero=torch.zeros(3), big=base, nan=base, kind=base, shape=base, gone=base)
    two = save(
        tmp_path / "b",
        same=base,
        zero=torch.tensor([0.0, -0.0, 0.0]),
        big=base + torch.tensor([[0.0, 0.5], [-4.0, 0.0]]),
        nan=torch.tensor([[0.0, nan], [2.5, nan]]),
        kind=base.bfloat16(),
        shape=base.reshape(4),
        new=base,
    )
    result = tool("diff", one, two, "--json")
    assert result.code == 1
    found = {item.pop("name"): item for item in json.loads(result.out)["tensors"]}
    assert found.keys() == {"zero", "big", "nan", "kind", "shape", "gone", "new"}
    assert (found["zero"]["elements"], found["zero"]["largest"]) == (1, 0.0)
    assert (found["big"]["elements"], found["big"]["largest"]) == (2, 4.0)
    assert (found["nan"]["elements"], found["nan"]["largest"]) == (2, None)
    assert (found["kind"]["first"], found["kind"]["second"]) == ("F32 [2, 2]", "BF16 [2, 2]")
    assert (found["shape"]["second"], found["gone"]["second"], found["new"]["first"]) == ("F32 [4]", None, None)
    shown = tool("diff", one, two)
    assert "big" in shown.out
    assert "same " in shown.out


def test_json_of_all_verbs_has_the_same_keys_for_the_same_things(run_dir: Dirs, tool: Tool) -> None:
    run = run_dir("consolidated")
    root = run / "checkpoints"

    def data(*arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(tool(*arguments, "--json").out)
        assert found["version"] == 1
        return found

    data("diff", root / FIRST, root / LAST)
    data("repair", run, "--dry-run")
    listed, verified, pruned = data("list", run), data("verify", run), data("prune", run, "--newest", "1")
    assert listed["directory"] == verified["directory"] == pruned["directory"] == str(root)
    shown = data("show", root / FIRST)
    [entry] = [item for item in listed["checkpoints"] if item["name"] == FIRST]
    same = entry.keys() & shown.keys()
    assert same == entry.keys()
    assert {key: entry[key] for key in same} == {key: shown[key] for key in same}
    [gone] = pruned["checkpoints"]
    assert gone.items() <= shown.items()
    [checked] = [item for item in verified["checkpoints"] if item["name"] == FIRST]
    assert {key: checked[key] for key in ("name", "path", "step")}.items() <= shown.items()


# -- prune ---------------------------------------------------------------------------------------------------------


def test_prune_only_tells_until_it_is_told_to(run_dir: Dirs, tool: Tool) -> None:
    run = run_dir("shards")
    before = contents(run)
    told = tool("prune", run, "--newest", "1")
    assert told.code == 0
    assert f"would be deleted: {FIRST}" in told.out
    assert SECOND not in told.out  # BEST leads to it
    assert contents(run) == before
    owner = read_owner(run / "checkpoints")
    done = json.loads(tool("prune", run, "--newest", "1", "--yes", "--json").out)
    assert [item["name"] for item in done["checkpoints"]] == [FIRST]
    assert published(run) == [SECOND, LAST]
    assert not list((run / "checkpoints").glob(".*"))
    assert owner is not None
    assert read_owner(run / "checkpoints")[0].released
    assert tool("list", run).code == 0


@pytest.mark.parametrize(
    ("rules", "stay"),
    [
        (["--best", "1", "--mode", "max"], [FIRST, SECOND, LAST]),  # 0.9 is the largest; the others are pointed to
        (["--every-n-steps", "20"], [SECOND, LAST]),
        (["--younger-than-s", "1000"], [FIRST, SECOND, LAST]),
        (["--newest", "1", "--every-n-steps", "10"], [FIRST, SECOND, LAST]),
    ],
)
def test_prune_keeps_what_any_rule_keeps(rules: list[str], stay: list[str], run_dir: Dirs, tool: Tool) -> None:
    run = run_dir("shards")
    assert tool("prune", run, *rules, "--yes").code == 0
    assert published(run) == stay


def test_prune_leaves_what_is_read_and_does_nothing_beside_a_run(run_dir: Dirs, tool: Tool) -> None:
    run = run_dir("shards")
    with reading(run / "checkpoints" / FIRST):
        assert tool("prune", run, "--newest", "1", "--yes").code == 0
    assert published(run) == [FIRST, SECOND, LAST]
    model = nn.Linear(2, 2)
    with CheckpointingConfig(checkpoint_dir=str(run / "checkpoints")).build(0, 0, 0) as engine:
        engine._position.open()
        for verb in (["prune", run, "--newest", "1", "--yes"], ["repair", run]):
            refused = tool(*verb)
            assert refused.code == 2
            assert "is being written by another run" in refused.err
        assert AppState(model).model is model
    assert published(run) == [FIRST, SECOND, LAST]
    for wrong in ([], ["--newest", "0"], ["--newest", "1", "--mode", "upward"]):
        assert tool("prune", run, *wrong).code == 2


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (["--best", "3", "--metric", "ac"], "no checkpoint in .* has a finite metric 'ac'.* with --metric: val_loss$"),
        (["--newest", "1", "--best", "3", "--metric", "ac"], "--best: no checkpoint"),
        (["--younger-than-s", "nan"], "younger_than_s=nan is not valid; it takes a positive number"),
        (["--younger-than-s", "inf", "--newest", "1"], "younger_than_s=inf is not valid"),
        (["--younger-than-s", "-1"], "younger_than_s=-1.0 is not valid"),
        (["--newest", "0"], "newest=0 is not valid; it takes a whole number of at least 1"),
    ],
)
def test_prune_refuses_rules_that_cannot_tell_what_stays(
    rules: list[str], said: str, run_dir: Dirs, tool: Tool
) -> None:
    run = run_dir("shards")
    before = contents(run)
    refused = tool("prune", run, *rules, "--yes")
    assert refused.code == 2
    assert re.search(said, refused.err.strip()), refused.err
    assert contents(run) == before


def test_prune_by_best_without_any_metric_is_refused(tmp_path: Path, tool: Tool) -> None:
    save(tmp_path, weight=torch.ones(2))
    refused = tool("prune", tmp_path, "--best", "1", "--yes")
    assert refused.code == 2
    assert "none has any metric; leave out --best" in refused.err


# -- repair --------------------------------------------------------------------------------------------------------


def _crashed(run: Path) -> dict[str, Any]:
    root = run / "checkpoints"
    whole = root / names.hidden_name(LAST, "draft")
    (root / LAST).rename(whole)
    torn = root / names.hidden_name("epoch_1_step_40", "draft")
    shutil.copytree(whole, torn)
    (torn / names.MANIFEST).unlink()
    gone = root / names.hidden_name(FIRST, "deleting")
    (root / FIRST).rename(gone)
    return {"whole": whole.name, "torn": torn.name, "gone": gone.name}


def test_repair_rolls_whole_drafts_forward_and_sweeps_the_rest(run_dir: Dirs, tool: Tool) -> None:
    run = run_dir("shards")
    made = _crashed(run)
    before = contents(run)
    told = tool("repair", run, "--dry-run")
    assert told.code == 0
    assert sorted(told.out.splitlines()) == sorted(
        [
            f"{made['whole']}: would be published",
            f"{made['torn']}: would be removed",
            f"{made['gone']}: would be removed",
        ]
    )
    assert contents(run) == before
    (run / "checkpoints" / "BEST").unlink()
    (run / "checkpoints" / "BEST").symlink_to(FIRST)
    done = json.loads(tool("repair", run, "--json").out)
    assert f"BEST leads to {SECOND}" in done["actions"]
    assert published(run) == [SECOND, LAST]
    assert not list((run / "checkpoints").glob(".*"))
    assert (run / "checkpoints" / "LATEST").resolve().name == LAST
    assert tool("verify", run).code == 0
    assert tool("repair", run).out.strip() == "nothing to do"


def test_repair_reports_small_files_too(run_dir: Dirs, tool: Tool) -> None:
    run = run_dir("shards")
    root = run / "checkpoints"
    left = [f".LATEST.{names.nonce()}", f".metrics.json.{names.nonce()}"]
    (root / left[0]).symlink_to(LAST)
    (root / left[1]).write_text("{")
    (root / ".BEST_notes.md").write_text("mine")
    (root / LAST / names.TOKEN).write_text("token")
    (root / "LATEST").unlink()
    (root / "LATEST").symlink_to(FIRST)
    (root / "BEST").unlink()
    (root / "BEST").symlink_to("epoch_9_step_9")
    before = contents(run)
    told = tool("repair", run, "--dry-run").out
    for name in left:
        assert f"{name}: would be removed, the rest of an interrupted replacement" in told
    assert f"{LAST}/{names.TOKEN}: would be removed" in told
    assert "BEST would be moved: it leads to epoch_9_step_9, which does not exist" in told
    assert contents(run) == before
    done = tool("repair", run).out
    for name in left:
        assert f"{name}: removed" in done
    assert f"LATEST leads to {LAST}" in done
    assert f"BEST leads to {SECOND}" in done
    assert [path.name for path in root.glob(".*")] == [".BEST_notes.md"]
    assert tool("repair", run).out.strip() == "nothing to do"
