"""`hydra-ckpt export` of checkpoints of other tools equals `save_pretrained`, and no pickle is run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.errors import (
    CheckpointConfigError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    KeyMismatchError,
)
from hydra_ckpt.hub.foreign_export import export_foreign
from hydra_ckpt.storage import header
from hydra_ckpt.testing import run_distributed
from tests.hub_models import MODELS, logits, make
from tests.programs import run

# One of each kind of difference: none, tied weights, experts fused in memory, other prefixes and nested models.
KINDS = ["llama", "qwen3", "mixtral", "llava"]


def _save(root: Path, accelerate: bool) -> None:
    """What a loop with FSDP2 saves: model and optimizer, by plain DCP or as accelerate lays them out."""
    for name in KINDS:
        model = make(name)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        sum(parameter.sum() for parameter in model.parameters()).backward()
        optimizer.step()
        weights, moments = get_state_dict(model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if accelerate:
                (root / name / "pytorch_model_fsdp_0").mkdir(parents=True, exist_ok=True)
                dcp.save({"model": weights}, checkpoint_id=root / name / "pytorch_model_fsdp_0")
            else:
                average = {key: tensor * 2 for key, tensor in weights.items()}
                state = {"model": weights, "optim": moments, "ema": average, "step": 3}
                dcp.save({"app": state}, checkpoint_id=root / name)


def _export(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hydra_ckpt.cli", "export", *map(str, arguments)]
    return run(command)


def _check(export: Path, name: str, reference: Path) -> None:
    model = make(name)
    model.save_pretrained(reference)
    found, wanted = load_file(export / "model.safetensors"), load_file(reference / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (export, reference))
    assert ours == theirs
    opened = type(MODELS[name]()).from_pretrained(export, local_files_only=True).eval()
    assert torch.equal(logits(name, opened), logits(name, model))


@pytest.mark.parametrize("accelerate", [False, True])
def test_a_checkpoint_of_another_tool_becomes_what_save_pretrained_writes(tmp_path: Path, accelerate: bool) -> None:
    run_distributed(_save, 2, tmp_path / "theirs", accelerate)
    for name in KINDS:
        make(name).save_pretrained(tmp_path / "base" / name)
        export_foreign(tmp_path / "theirs" / name, tmp_path / "out" / name, base=str(tmp_path / "base" / name))
        _check(tmp_path / "out" / name, name, tmp_path / "reference" / name)


@pytest.mark.slow
def test_the_tool_takes_types_files_and_parts_by_option(tmp_path: Path) -> None:
    run_distributed(_save, 2, tmp_path / "theirs", False)
    make("llama").bfloat16().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    theirs = tmp_path / "theirs" / "llama"
    done = _export(theirs, tmp_path / "out", "--base", tmp_path / "base", "--json")
    assert done.returncode == 0, done.stderr
    # Types and files are the base model's.
    files = {path.name for path in (tmp_path / "base").glob("*.safetensors")}
    assert set(json.loads(done.stdout)["files"]) == files
    assert len(files) > 1
    opened = type(MODELS["llama"]()).from_pretrained(tmp_path / "out", local_files_only=True)
    assert opened.dtype == torch.bfloat16
    assert torch.equal(opened.lm_head.weight, make("llama").lm_head.weight.bfloat16())
    # Another part, whole, in the type it is asked for.
    options = ("--part", "app.ema", "--dtype", "fp16", "--max-shard-size", "5GB")
    done = _export(theirs, tmp_path / "average", "--base", tmp_path / "base", *options)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "average" / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], (make("llama").lm_head.weight * 2).half())
    assert json.loads((tmp_path / "average" / "config.json").read_text())["dtype"] == "float16"
    done = _export(theirs, tmp_path / "none", "--part", "nothing")
    assert done.returncode == 2
    assert "app.ema" in done.stderr
    assert not (tmp_path / "none").exists()
    done = _export(theirs, tmp_path / "none", "--merge")
    assert done.returncode == 2
    assert "no adapter" in done.stderr


def test_without_a_model_like_it_tensors_keep_their_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"weights": weights, "optim": moments}, checkpoint_id=tmp_path / "theirs")
    made = export_foreign(tmp_path / "theirs", tmp_path / "out", base=None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == list(made.files) == ["model.safetensors"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def _plain(root: Path, state: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=root)
    return root


WEIGHTS = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
OTHERS = {name: tensor * 7 + 5 for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"model": WEIGHTS, "ema": {**OTHERS, "updates": torch.ones(1)}}, WEIGHTS),
        ({"model": {"model": WEIGHTS}, "ema": {"model": OTHERS}}, {f"model.{key}": t for key, t in WEIGHTS.items()}),
        (
            {"encoder": WEIGHTS, "decoder": OTHERS, "optimizer": {"state": {"0": {"exp_avg": torch.ones(2)}}}},
            {f"encoder.{k}": t for k, t in WEIGHTS.items()} | {f"decoder.{k}": t for k, t in OTHERS.items()},
        ),
        (
            {"model": {"layers": {"0": WEIGHTS}, "head": torch.ones(1)}},
            {"layers.0." + k: t for k, t in WEIGHTS.items()} | {"head": torch.ones(1)},
        ),
        (
            {"module.weight": torch.ones(3), "weight": torch.zeros(3)},
            {"module.weight": torch.ones(3), "weight": torch.zeros(3)},
        ),
    ],
)
def test_nothing_of_a_model_is_left_out_and_nothing_else_is_taken_for_it(
    tmp_path: Path, state: dict[str, Any], expected: dict[str, torch.Tensor]
) -> None:
    export_foreign(_plain(tmp_path / "theirs", state), tmp_path / "out", base=None)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_copies_of_a_model_are_told_apart_or_refused(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    weights = make("llama").state_dict()
    other = {name: tensor * 2 for name, tensor in weights.items()}
    averaged = _plain(tmp_path / "averaged", {"net": weights, "ema": other})
    export_foreign(averaged, tmp_path / "out", base=str(tmp_path / "base"))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], weights["lm_head.weight"])
    both = _plain(tmp_path / "both", {"left": weights, "right": other})
    with pytest.raises(CheckpointConfigError, match=r"left, right.*--part"):
        export_foreign(both, tmp_path / "none", base=str(tmp_path / "base"))
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), allow_legacy_pickle_restore=True)
    with config.build(0, 0, 0) as engine:
        fresh = make("llama")
        engine.load(AppState(fresh), restore_from=str(averaged))
        assert torch.equal(fresh.lm_head.weight, weights["lm_head.weight"])
        with pytest.raises(CheckpointConfigError, match="left, right"):
            engine.load(AppState(fresh), restore_from=str(both))


def test_weights_that_only_the_base_model_ties_are_refused(tmp_path: Path) -> None:
    make("qwen3").save_pretrained(tmp_path / "base")
    weights = {name: tensor.clone() for name, tensor in make("qwen3").state_dict().items()}
    weights["lm_head.weight"] += 1
    theirs = _plain(tmp_path / "theirs", {"model": weights})
    with pytest.raises(CheckpointConfigError, match=r"embed_tokens.weight and lm_head.weight differ"):
        export_foreign(theirs, tmp_path / "out", base=str(tmp_path / "base"))
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), allow_legacy_pickle_restore=True)
    with config.build(0, 0, 0) as engine, pytest.raises(CheckpointConfigError, match=r"lm_head.weight differ"):
        engine.load(AppState(make("qwen3")), restore_from=str(theirs))


def test_a_model_of_another_shape_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    weights = make("llama").state_dict()
    weights["lm_head.weight"] = torch.ones(7, 32)
    del weights["model.norm.weight"]
    theirs = _plain(tmp_path / "theirs", {"model": {**weights, "value_head.weight": torch.ones(2)}})
    with pytest.raises(KeyMismatchError) as failure:
        export_foreign(theirs, tmp_path / "out", base=str(tmp_path / "base"))
    assert all(
        text in str(failure.value)
        for text in ("lm_head.weight", "[7, 32]", "model.norm.weight", "value_head.weight", "--base")
    )
    with pytest.raises(CheckpointNotFoundError, match=r"elsewhere is not on this machine.*--base"):
        export_foreign(theirs, tmp_path / "out", base="org/elsewhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "theirs"]


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pieces_larger_than_one_read_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a": torch.arange(3000), "empty": torch.ones(0, 4)}
    theirs = _plain(tmp_path / "theirs", {"model": weights})
    monkeypatch.setattr(header, "READ_BYTES", 1000)
    export_foreign(theirs, tmp_path / "out", base=None)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("what", ["length", "offset", "shape", "path"])
def test_an_index_that_promises_what_is_not_there_is_refused(tmp_path: Path, what: str) -> None:
    theirs = _plain(tmp_path / "theirs", {"model": {"a": torch.ones(3)}})
    index = theirs / ".metadata"
    found: Any = pickle.loads(index.read_bytes())
    [place], [entry] = found.storage_data.values(), found.state_dict_metadata.values()
    if what == "shape":
        entry.size, entry.chunks[0].sizes = torch.Size([1 << 40]), torch.Size([1 << 40])
    elif what == "path":
        place.relative_path = "../../outside.distcp"
    else:
        setattr(place, what, 1 << 50)
    index.write_bytes(pickle.dumps(found))
    with pytest.raises(CorruptCheckpointError, match=r"distcp|\.metadata|leads out"):
        export_foreign(theirs, tmp_path / "out", base=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


class _Patches:
    """A pickle that would change a class of Python's own when it is read: names, a state, and no call."""

    DATA = b"\x80\x04cpathlib\nPosixPath\nN}\x8c\x04_str\x8c\x04/etcs\x86b0"


def test_an_index_that_would_change_classes_changes_nothing(tmp_path: Path) -> None:
    theirs = _plain(tmp_path / "theirs", {"model": {"a": torch.ones(3)}})
    index = theirs / ".metadata"
    index.write_bytes(_Patches.DATA + index.read_bytes()[2:])
    before = dict(vars(type(tmp_path)))
    with pytest.raises(CorruptCheckpointError, match=r"\.metadata"):
        export_foreign(theirs, tmp_path / "out", base=None)
    assert dict(vars(type(tmp_path))) == before
    assert str(tmp_path / "x") == f"{tmp_path}/x"


@pytest.mark.parametrize("where", ["key", "size", "offset", "file", "path"])
def test_an_index_that_would_take_for_ever_is_refused(tmp_path: Path, where: str) -> None:
    theirs = _plain(tmp_path / "theirs", {"model": {"a": torch.ones(3)}})
    index = theirs / ".metadata"
    nest: Any = ()
    for _ in range(100):  # which has 2 ** 100 ends
        nest = (nest, nest)
    found: Any = pickle.loads(index.read_bytes())
    [entry], [place] = found.state_dict_metadata.values(), found.storage_data.values()
    if where == "size":
        entry.size = nest
    elif where == "offset":
        place.offset = nest
    elif where == "file":
        place.relative_path, place.transform_descriptors = nest, ["zstd"]
    elif where == "path":
        found.planner_data["model.a"] = nest
    # Python could not even make a dictionary with such a key: {nest: None}.
    key = b"\x80\x04})" + b"q\x00h\x00\x86" * 100 + b"Ns."
    index.write_bytes(key if where == "key" else pickle.dumps(found))
    with pytest.raises(CorruptCheckpointError, match=r"\.metadata"):
        export_foreign(theirs, tmp_path / "out", base=None)


def test_pieces_that_overlap_are_refused(tmp_path: Path) -> None:
    theirs = _plain(tmp_path / "theirs", {"model": {"a": torch.ones(4)}})
    index = theirs / ".metadata"
    found: Any = pickle.loads(index.read_bytes())
    [entry], [(key, place)] = found.state_dict_metadata.values(), found.storage_data.items()
    entry.chunks = [type(entry.chunks[0])(torch.Size([at]), torch.Size([2])) for at in (0, 1)]
    found.storage_data = {type(key)("model.a", torch.Size([at]), None): place for at in (0, 1)}
    index.write_bytes(pickle.dumps(found))
    with pytest.raises(CorruptCheckpointError, match="do not match"):
        export_foreign(theirs, tmp_path / "out", base=None)


@pytest.mark.parametrize("where", ["index", "planner_data", "number"])
def test_an_index_that_would_run_code_is_refused(tmp_path: Path, where: str) -> None:
    theirs = _plain(tmp_path / "theirs", {"model": {"a": torch.ones(3)}})
    index = theirs / ".metadata"
    found: Any = pickle.loads(index.read_bytes())
    if where == "index":
        found = _Runs(tmp_path / "ran")
    elif where == "planner_data":
        found.planner_data["model.a"] = ("model", _Runs(tmp_path / "ran"))
    else:
        found = 5
    index.write_bytes(pickle.dumps(found))
    with pytest.raises(CorruptCheckpointError, match=r"\.metadata"):
        export_foreign(theirs, tmp_path / "out", base=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_tensors_that_are_none_are_refused(tmp_path: Path) -> None:
    theirs = _plain(tmp_path / "theirs", {"model": {"a": torch.ones(300)}})
    file = next(theirs.glob("*.distcp"))
    file.write_bytes(pickle.dumps(_Runs(tmp_path / "ran")).ljust(file.stat().st_size, b"."))
    with pytest.raises(CorruptCheckpointError, match="distcp"):
        export_foreign(theirs, tmp_path / "out", base=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
