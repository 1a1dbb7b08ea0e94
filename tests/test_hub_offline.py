"""`hydra-ckpt export`: from any checkpoint the same directory that the run would have written itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.errors import CheckpointExistsError, CheckpointNotFoundError, CorruptCheckpointError
from hydra_ckpt.hub.offline import export_checkpoint
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.testing import run_distributed
from tests.hub_models import logits, make
from tests.test_hub_out import shard, tensors_in, write_reference

transformers = pytest.importorskip("transformers")


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hydra_ckpt.cli", "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


FORMS: dict[str, dict[str, Any]] = {
    "inline": {"save_consolidated": "always"},
    "shards": {"save_consolidated": False},
    "distcp": {"model_save_format": "torch_save", "save_consolidated": False},
    "cast": {"save_consolidated": "always", "export_dtype": "bfloat16"},
    "cast-later": {"save_consolidated": False, "export_dtype": "bfloat16"},
}


def _save_each(root: Path) -> None:
    for name in ("mixtral", "llama"):
        model = make(name)
        if dist.is_initialized():
            shard(model)
        ema = torch.optim.swa_utils.AveragedModel(make(name)) if not dist.is_initialized() else None
        state = AppState(model, tokenizer=transformers.ByT5Tokenizer(extra_ids=0), extras={"ema": ema} if ema else {})
        for form, options in FORMS.items():
            reference = {"model_repo_id": str(root / "reference")} if name == "llama" and form != "inline" else {}
            config = CheckpointingConfig(checkpoint_dir=str(root / f"{name}-{form}"), **options, **reference)
            with config.build(0, 0, 0) as engine:
                engine.save(state, step=1).result()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    write_reference(root / "reference")
    run_distributed(_save_each, 2, root)
    return root


@pytest.mark.parametrize("form", ["shards", "distcp"])
def test_the_same_files_as_an_inline_export(saved: Path, tmp_path: Path, form: str) -> None:
    done = run(saved / f"mixtral-{form}" / "LATEST", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    inline = saved / "mixtral-inline" / "LATEST" / "model" / "consolidated"
    assert contents(tmp_path / "out") == contents(inline)


def test_the_run_s_own_type_and_files_are_kept(saved: Path, tmp_path: Path) -> None:
    for name in ("mixtral", "llama"):
        inline = saved / f"{name}-cast" / "LATEST" / "model" / "consolidated"
        for number, form in enumerate(("cast", "cast-later")):
            out = tmp_path / f"{name}{number}"
            export_checkpoint(Checkpoint.open(saved / f"{name}-{form}" / "LATEST"), out)
            assert contents(out) == contents(inline)
    assert (tmp_path / "llama1" / "model.safetensors.index.json").exists()


def test_types_and_sizes_of_choice(saved: Path, tmp_path: Path) -> None:
    done = run(saved / "mixtral-inline", tmp_path / "out", "--dtype", "bf16", "--max-shard-size", "20KB", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert len(made["files"]) > 3
    reference = make("mixtral").to(torch.bfloat16)
    reference.save_pretrained(tmp_path / "reference")
    found, expected = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "reference")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.dtype == torch.bfloat16
    assert torch.equal(logits("mixtral", opened.eval()), logits("mixtral", reference))


def test_an_average_of_the_weights_is_exported_as_the_model(tmp_path: Path) -> None:
    for name in ("mixtral", "llama"):
        model = make(name)
        ema = torch.optim.swa_utils.AveragedModel(model)
        with torch.no_grad():
            for parameter in ema.module.parameters():
                parameter.mul_(0.5)
        others = {"plain": torch.optim.SGD(ema.parameters()), "norm": torch.nn.BatchNorm1d(2)}
        state = AppState(model, extras={"ema": ema, **others})
        for mode in ("always", False):
            place = tmp_path / f"{name}-{mode}"
            with CheckpointingConfig(checkpoint_dir=str(place), save_consolidated=mode).build(0, 0, 0) as engine:
                checkpoint = engine.save(state, step=1).result()
            export_checkpoint(checkpoint, place / "out", part="ema")
            ema.module.save_pretrained(place / "reference")
            found, expected = tensors_in(place / "out"), tensors_in(place / "reference")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
            assert transformers.AutoModelForCausalLM.from_pretrained(place / "out")
            with pytest.raises(CheckpointNotFoundError, match=r"has no part 'plain' to export; it has model, ema$"):
                export_checkpoint(checkpoint, place / "none", part="plain")
            with pytest.raises(CheckpointNotFoundError, match=r"the extra 'norm' does not hold the model's tensors"):
                export_checkpoint(checkpoint, place / "none", part="norm")


def test_one_of_several_models(tmp_path: Path) -> None:
    state = AppState(
        {"student": make("llama"), "critic": torch.nn.Linear(2, 2)}, extras={"norm": torch.nn.BatchNorm1d(2)}
    )
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run")).build(0, 0, 0) as engine:
        checkpoint = engine.save(state, step=1).result()
    export_checkpoint(checkpoint, tmp_path / "student", part="student")
    assert torch.equal(
        logits("llama", transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()),
        logits("llama", make("llama")),
    )
    export_checkpoint(checkpoint, tmp_path / "critic", part="model/critic")
    assert tensors_in(tmp_path / "critic").keys() == {"weight", "bias"}
    with pytest.raises(CheckpointNotFoundError, match=r"has no part 'norm' to export; it has model/\w+, model/\w+$"):
        export_checkpoint(checkpoint, tmp_path / "none", part="norm")


def test_nothing_is_written_over_and_damage_is_found_first(saved: Path, tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 8)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run")).build(0, 0, 0) as engine:
        checkpoint = engine.save(AppState(model), step=1).result()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    with pytest.raises(CheckpointExistsError, match="full is there already"):
        export_checkpoint(checkpoint, full)
    assert run(tmp_path / "run", full).returncode == 2
    assert run(tmp_path / "run", tmp_path / "x", "--dtype", "int8").returncode == 2
    assert run(tmp_path / "run", tmp_path / "x", "--max-shard-size", "much").returncode == 2
    file = checkpoint.path / checkpoint.manifest.parts["model"].files[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpointError):
        export_checkpoint(checkpoint, tmp_path / "damaged")
    assert run(tmp_path / "run", tmp_path / "damaged").returncode == 1
    assert not (tmp_path / "damaged").exists()
    assert not list(tmp_path.glob(".damaged*"))
