"""A checkpoint_dir of another system, or a URL, is refused by name, and nothing in it is touched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from typer.testing import CliRunner

from hydra_ckpt import AppState, CheckpointCallback, CheckpointConfigError, CheckpointingConfig
from hydra_ckpt.cli import app
from hydra_ckpt.storage import SafetensorsReader, SafetensorsWriter
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.store.strangers import strangers


def make_state() -> AppState:
    torch.manual_seed(0)
    return AppState(torch.nn.Linear(2, 2))


def theirs(path: Path) -> None:
    for part in ("model", "optim"):
        (path / part).mkdir(parents=True)
    save_file({"weight": torch.zeros(2, 2)}, path / "model" / "shard-00001-model-00001-of-00001.safetensors")
    (path / "config.yaml").write_text("a: 1\n")
    (path / "losses.json").write_text("{}")
    (path / "step_scheduler.pt").write_bytes(b"x")


def content(root: Path) -> dict[str, object]:
    return {
        str(path.relative_to(root)): path.readlink()
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else 0
        for path in root.rglob("*")
    }


def described(root: Path) -> list[str]:
    for step in (20, 40):
        theirs(root / f"epoch_0_step_{step}")
    (root / "LATEST").symlink_to("epoch_0_step_40")
    (root / "LOWEST_VAL").symlink_to("epoch_0_step_20")
    return ["epoch_0_step_20", "epoch_0_step_40"]


def other_names(root: Path) -> list[str]:
    theirs(root / "global_step_40")
    (root / "LATEST").symlink_to("global_step_40")
    return ["LATEST -> global_step_40"]


def texts(root: Path) -> list[str]:
    theirs(root / "global_step_40")
    (root / "BEST.txt").write_text("global_step_40\n")
    return ["BEST -> global_step_40"]


def elsewhere(root: Path) -> list[str]:
    theirs(root.parent / "other" / "step_1")
    (root / "LATEST").symlink_to(root.parent / "other" / "step_1")
    return ["LATEST -> ../other/step_1"]


@pytest.mark.parametrize("make", [described, other_names, texts, elsewhere])
def test_the_directory_of_another_system_is_refused_untouched(
    tmp_path: Path, make: Callable[[Path], list[str]]
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    named = make(root)
    before = content(tmp_path)
    config = CheckpointingConfig(checkpoint_dir=str(root), max_recent_checkpoints=1)
    with config.build(0, 0, 0) as engine:
        for attempt in (engine.start, engine.load, lambda state: engine.save(state, step=60).result()):
            with pytest.raises(CheckpointConfigError, match="another system") as caught:
                attempt(make_state())
            assert all(name in str(caught.value) for name in named)
    with CheckpointCallback(config) as callback, pytest.raises(CheckpointConfigError, match="restore_from=PATH"):
        callback.on_train_begin(make_state())
    for verb in (["repair"], ["prune", "--newest", "1", "--yes"]):
        CliRunner().invoke(app, [verb[0], str(root), *verb[1:]])
    assert content(tmp_path) == before


def test_a_mixed_directory_is_still_read_but_not_written(tmp_path: Path) -> None:
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as engine:
        engine.save(make_state(), step=1).result()
    theirs(tmp_path / "epoch_0_step_20")
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as engine:
        report = engine.load(make_state())
        assert report is not None
        assert report.step == 1
        with pytest.raises(CheckpointConfigError, match="epoch_0_step_20"):
            engine.save(make_state(), step=2)
    assert (tmp_path / "epoch_0_step_20" / "losses.json").exists()


def manifest_gone(path: Path) -> None:
    (path / "manifest.json").unlink()


def manifest_damaged(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\0" * 100)


def only_digests(path: Path) -> None:
    for below in path.iterdir():
        if below.name != "digests":
            shutil.rmtree(below) if below.is_dir() else below.unlink()


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize("damage", [manifest_gone, manifest_damaged, only_digests, emptied])
@pytest.mark.parametrize("form", ["safetensors", "torch_save"])
def test_our_own_damaged_checkpoints_are_set_aside_as_ever(
    tmp_path: Path, damage: Callable[[Path], None], form: str
) -> None:
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), model_save_format=form, save_consolidated="false")
    with config.build(0, 0, 0) as engine:
        for step in (1, 2):
            engine.save(make_state(), step=step).result()
    damage(tmp_path / "epoch_0_step_2")
    assert strangers(tmp_path) == []
    with config.build(0, 0, 0) as engine:
        report = engine.start(make_state())
        assert report is not None
        assert report.step == 1
        engine.save(make_state(), step=2).result()
    assert [item.step for item in scan(tmp_path).checkpoints] == [1, 2]
    assert len(list(tmp_path.glob(".epoch_0_step_2.corrupt-*"))) == 1


def test_what_is_no_checkpoint_of_anybody_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.txt").write_text("x")
    (tmp_path / "notes.txt").write_text("logs")
    (tmp_path / "mine").symlink_to("logs")
    (tmp_path / "LATEST").symlink_to("epoch_0_step_9")  # leads nowhere
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as engine:
        engine.save(make_state(), step=1).result()
    assert (tmp_path / "LATEST").readlink() == Path("epoch_0_step_1")


# -- URLs --------------------------------------------------------------------------------------------------------------

URLS = ["s3://bucket/run", "gs://b", "az://b/x", "abfs://c@a/x", "hf://a/b", "msc://p/x", "memory://x", "file:///tmp/x",
        "https://host/x", "S3://b/x", "simplecache::s3://b", "anything+else://x",
        "s3:bucket/x", "gs:bucket/x", "hdfs:x", "out/s3://b/x", "./s3://b", "out/s3:/b"]  # fmt: skip
KEYS = ["checkpoint_dir", "staging_dir", "restore_from", "model_repo_id", "model_cache_dir", "original_model_root_dir"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("url", URLS)
def test_a_url_is_refused_by_name(key: str, url: str) -> None:
    with pytest.raises(CheckpointConfigError, match=f"checkpoint.{key}=.*not supported"):
        CheckpointingConfig(**{key: url})


def test_a_url_made_a_path_is_refused_too() -> None:
    with pytest.raises(CheckpointConfigError, match="not supported"):
        CheckpointingConfig(checkpoint_dir=Path("s3://bucket/run"))


@pytest.mark.parametrize(
    "path",
    ["a/b", "/data/run:1/x", "C:/data", "~/runs", "org/model-1.0", "a:b", "run:1/x", "./s3:b/x", "a\udcff"],
)
def test_a_path_is_none(path: str) -> None:
    assert CheckpointingConfig(checkpoint_dir=path, restore_from=path, model_repo_id=path).checkpoint_dir == path


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "${oc.env:SCRATCH}/x", "a/${now}"])
def test_what_cannot_be_a_path_is_refused_by_name(key: str, path: str) -> None:
    with pytest.raises(CheckpointConfigError, match=f"checkpoint.{key}=.*it takes a path"):
        CheckpointingConfig(**{key: path})


@pytest.mark.parametrize("key", ["checkpoint_dir", "staging_dir", "model_cache_dir", "original_model_root_dir"])
def test_the_home_of_an_unknown_user_is_refused_by_name(key: str) -> None:
    with pytest.raises(CheckpointConfigError, match=f"checkpoint.{key}=.*~nouser is no home"):
        CheckpointingConfig(**{key: "~nouser/x"})


def test_urls_are_refused_wherever_they_would_become_local_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with CheckpointingConfig(checkpoint_dir="run").build(0, 0, 0) as engine:
        path = engine.save(make_state(), step=1).result().path
        with pytest.raises(CheckpointConfigError, match="restore_from=s3"):
            engine.load(make_state(), restore_from="s3://bucket/run")
    for kind in (SafetensorsWriter, SafetensorsReader):
        with pytest.raises(CheckpointConfigError, match="not supported"):
            kind("s3://bucket/run")
    with pytest.raises(CheckpointConfigError, match="not supported"):
        dcp.save({"a": torch.ones(1)}, checkpoint_id="s3://bucket/x", storage_writer=SafetensorsWriter("here"))
    for arguments in (["export", str(path), "s3://bucket/out"], ["list", "s3://bucket/run"]):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, CheckpointConfigError), arguments
    assert {item.name for item in tmp_path.iterdir()} == {"run"}
