"""`hydra-ckpt export` makes, from any checkpoint, the directory that the run itself would have written."""

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
from hydra_ckpt.storage.compare import compare
from hydra_ckpt.store.catalog import Checkpoint, scan
from hydra_ckpt.testing import run_distributed
from tests.hub_models import logits, make
from tests.programs import run
from tests.test_hub_out import shard, tensors_in, write_reference

transformers = pytest.importorskip("transformers")


def export(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hydra_ckpt.cli", "export", *map(str, arguments)]
    return run(command)


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
    done = export(saved / f"mixtral-{form}" / "LATEST", tmp_path / "out")
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
    done = export(saved / "mixtral-inline", tmp_path / "out", "--dtype", "bf16", "--max-shard-size", "20KB", "--json")
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
            with pytest.raises(CheckpointNotFoundError, match=r"the extra 'norm' lacks these tensors of the"):
                export_checkpoint(checkpoint, place / "none", part="norm")


class Shadow:
    """An average of parameters, by name."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.values = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "count": torch.tensor(1)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = dict(state["values"])


def _stage(place: Path) -> None:
    """Save a model of two layers, one on each of two pipeline stages."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    part = torch.nn.ModuleDict({str(rank): torch.nn.Linear(2, 2)})
    with CheckpointingConfig(checkpoint_dir=str(place), save_consolidated="always").build(0, 0, rank) as engine:
        engine.save(AppState(part, extras={"ema": Shadow(part)}), step=1).result()


def test_an_average_over_pipeline_stages(tmp_path: Path) -> None:
    run_distributed(_stage, 2, tmp_path / "stages")
    [staged] = scan(tmp_path / "stages").checkpoints
    export_checkpoint(staged, tmp_path / "ema", part="ema")
    export_checkpoint(staged, tmp_path / "model")
    average, model = tensors_in(tmp_path / "ema"), tensors_in(tmp_path / "model")
    assert average.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(torch.equal(tensor, 2 * model[name]) for name, tensor in average.items())
    # One process that resumes from it holds the same, under the same names.
    whole = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in "01"})
    state = AppState(whole, extras={"ema": Shadow(whole)})
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "one"), save_consolidated="always").build(0, 0, 0) as engine:
        engine.load(state, restore_from=str(staged.path))
        one = engine.save(state, step=2).result()
    assert [item.name for item in compare(staged, one)] == ["1/ema:count"]  # each stage had its own


def test_an_extra_that_lacks_a_buffer_is_told_which(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("a", torch.zeros(1, dtype=torch.int64))
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run")).build(0, 0, 0) as engine:
        checkpoint = engine.save(AppState(model, extras={"ema": Shadow(model)}), step=1).result()
    with pytest.raises(CheckpointNotFoundError, match=r"an export needs all of them: a$"):
        export_checkpoint(checkpoint, tmp_path / "out", part="ema")


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
    with pytest.raises(CheckpointExistsError, match="full already exists"):
        export_checkpoint(checkpoint, full)
    assert export(tmp_path / "run", full).returncode == 2
    assert export(tmp_path / "run", tmp_path / "x", "--dtype", "int8").returncode == 2
    assert export(tmp_path / "run", tmp_path / "x", "--max-shard-size", "much").returncode == 2
    file = checkpoint.path / checkpoint.manifest.parts["model"].files[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpointError):
        export_checkpoint(checkpoint, tmp_path / "damaged")
    assert export(tmp_path / "run", tmp_path / "damaged").returncode == 1
    assert not (tmp_path / "damaged").exists()
    assert not list(tmp_path.glob(".damaged*"))
