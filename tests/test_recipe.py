"""The training application: its settings, its parts, its command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hydra_ckpt.errors import CheckpointConfigError, TopologyError
from hydra_ckpt.recipe.data import load_windows
from hydra_ckpt.recipe.mesh import plan_parallelism
from hydra_ckpt.recipe.model import build_model
from hydra_ckpt.recipe.optimization import build_optimizer, build_schedule
from hydra_ckpt.recipe.settings import DataSettings, MeshSettings, Settings, read_settings
from hydra_ckpt.recipe.tokenizer import byte_tokenizer
from tests.programs import run

if TYPE_CHECKING:
    from omegaconf import DictConfig

REPOSITORY = Path(__file__).resolve().parents[1]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("hydra_ckpt.conf", version_base="1.3"):
        return compose("hydra_ckpt_train", overrides=list(overrides))


def settings(*overrides: str) -> Settings:
    return read_settings(composed(*overrides))


# --- settings


def test_the_defaults_are_valid() -> None:
    assert settings().trainer.max_steps == 200
    assert composed().callbacks.checkpoint.every_n_steps == 50


@pytest.mark.parametrize("option", ["llama_tiny", "llama_small", "mixtral_tiny"])
def test_every_model_has_between_one_and_five_million_parameters(option: str) -> None:
    model = build_model(settings(f"hydra_ckpt_model={option}").model, seed=0)
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.max_steps=many", r"trainer\.max_steps: Value 'many'"),
        ("trainer.max_steps=0", r"trainer\.max_steps=0 must be at least 1"),
        ("trainer.mixed_precision=fp16", r"trainer\.mixed_precision=fp16 is not one of: no, bf16"),
        ("trainer.tracker=nowhere", "one of: null, tensorboard"),
        ("trainer.batch_size=6 mesh.pp=2", r"pipeline\.microbatches=4 does not divide trainer\.batch_size=6"),
        ("model.tie_word_embeddings=true mesh.pp=2", r"mesh\.pp=2: model\.tie_word_embeddings=true"),
        ("data.seq_len=4096", r"longer than model\.max_position_embeddings"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(override: str, says: str) -> None:
    with pytest.raises(CheckpointConfigError, match=says):
        settings(*override.split())


# --- data


def data_settings(**changes: Any) -> DataSettings:
    return replace(DataSettings(path=None, max_bytes=100_000, seq_len=100, val_fraction=0.1), **changes)


def test_the_standard_library_is_the_default_text() -> None:
    train, validation = load_windows(data_settings())
    assert (len(train), len(validation)) == (900, 100)
    first = bytes((train[0] - 3).tolist())
    assert first == (Path(sysconfig.get_path("stdlib")) / "__future__.py").read_bytes()[:100]


def test_token_ids_are_the_tokenizer_s(tmp_path: Path) -> None:
    text = "def größe(x):\n\treturn x  # <pad>"
    (tmp_path / "text").write_text(text * 10, encoding="utf-8")
    length = len(text.encode())
    train, _ = load_windows(data_settings(path=str(tmp_path), seq_len=length))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "tokenizer")):
        assert tokenizer.decode(train[0].tolist()) == text
        plain = text.replace("<pad>", "pad")
        assert tokenizer(plain, add_special_tokens=False).input_ids == [byte + 3 for byte in plain.encode()]


def test_a_directory_is_read_in_order_without_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, content in {"b/c": b"C" * 5, "z": b"Z" * 5, "a": b"A" * 5, ".hidden": b"H", "binary": b"\0"}.items():
        (tmp_path / name).write_bytes(content)
    train, validation = load_windows(data_settings(path=str(tmp_path), seq_len=7))
    windows = [bytes((windows[i] - 3).tolist()) for windows in (train, validation) for i in range(len(windows))]
    assert windows == [b"AAAAA\n\n", b"ZZZZZ\n\n", b"CCCCC\n\n"]


def test_text_that_is_missing_or_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointConfigError, match=r"data\.path=.*nowhere"):
        load_windows(data_settings(path=str(tmp_path / "nowhere")))
    (tmp_path / "short").write_text("x")
    with pytest.raises(CheckpointConfigError, match="3 bytes of text: too few"):
        load_windows(data_settings(path=str(tmp_path / "short")))


# --- mesh


def mesh(**sizes: int) -> MeshSettings:
    return MeshSettings(**{"dp_replicate": 1, "dp_shard": -1, "tp": 1, "pp": 1, "ep": 1, **sizes})


@pytest.mark.parametrize(
    ("sizes", "world_size", "expected"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 4, (1, 4, 1)),
        ({"dp_replicate": 2}, 8, (2, 4, 1)),
        ({"dp_replicate": -1, "dp_shard": 1}, 4, (4, 1, 1)),
        ({"tp": 2}, 8, (1, 4, 2)),
        ({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, 8, (2, 2, 2)),
        ({"pp": 2}, 4, (1, 2, 1)),
    ],
)
def test_meshes_are_filled(sizes: dict[str, int], world_size: int, expected: tuple[int, int, int]) -> None:
    plan = plan_parallelism(mesh(**sizes), world_size, settings().model)
    assert (plan.dp_replicate, plan.dp_shard, plan.tp) == expected
    ranks = [plan.data_rank(rank) for rank in range(world_size)]
    assert set(ranks) == set(range(plan.data_ranks))
    assert all(ranks.count(rank) == plan.tp * plan.pp for rank in ranks)


def test_experts_are_spread_evenly() -> None:
    model = settings("hydra_ckpt_model=mixtral_tiny").model
    plan = plan_parallelism(mesh(ep=2), 4, model)
    assert [plan.place(rank) for rank in range(4)] == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    assert (plan.dp_shard, plan.ep) == (2, 2)
    assert [plan.data_rank(rank) for rank in range(4)] == [0, 0, 1, 1]
    with pytest.raises(TopologyError, match=r"mesh\.ep=3 does not divide model\.num_local_experts=4"):
        plan_parallelism(mesh(ep=3), 3, model)
    with pytest.raises(TopologyError, match=r"mesh\.tp=2: model\.architecture=mixtral has mesh\.ep here"):
        plan_parallelism(mesh(tp=2), 2, model)


@pytest.mark.parametrize(
    ("sizes", "world_size", "says"),
    [
        ({"dp_shard": 3}, 2, r"mesh\.dp_shard=3.*a mesh of 3 ranks, but 2 run"),
        ({"tp": 2}, 3, r"3 ranks cannot be divided by 2 to fill mesh\.dp_shard"),
        ({"tp": -1}, 2, "only one dimension"),
        ({"tp": 0}, 2, r"mesh\.tp=0"),
        ({"pp": 2, "tp": 2}, 4, r"mesh\.tp=2.*: this recipe combines mesh\.pp with mesh\.dp_shard only"),
        ({"ep": -1, "dp_shard": 1}, 2, r"mesh\.ep=2: model\.architecture=llama has mesh\.tp and mesh\.pp here"),
        ({"tp": 4}, 4, r"mesh\.tp=4 does not divide model\.num_attention_heads=6"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes: dict[str, int], world_size: int, says: str) -> None:
    with pytest.raises(TopologyError, match=says):
        plan_parallelism(mesh(**sizes), world_size, settings().model)


# --- model and optimizer


def test_initial_weights_follow_the_seed_and_nothing_else() -> None:
    before = torch.get_rng_state()
    one, same, other = (build_model(settings().model, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_the_learning_rate_warms_up_and_falls(schedule: str, end: float) -> None:
    chosen = replace(settings().optimizer, schedule=schedule, warmup_steps=4, lr=1.0)
    optimizer = build_optimizer([torch.nn.Linear(1, 1)], chosen)
    scheduler = build_schedule(optimizer, chosen, max_steps=20)
    rates = []
    for _ in range(21):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[20] == pytest.approx(end)


# --- the command line


def command(*arguments: str, cwd: Path, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return run([*launcher, "-m", "hydra_ckpt.recipe", *arguments], cwd=cwd, env=environment)


def test_the_configuration_can_be_printed(tmp_path: Path) -> None:
    result = command("--cfg", "job", "checkpoint=async", "run_name=x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "is_async: true" in result.stdout
    assert "hidden_size: 192" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_search_path_can_be_printed(tmp_path: Path) -> None:
    result = command("--info", "searchpath", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| hydra_ckpt |" in result.stdout


def test_composing_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from hydra_ckpt.recipe import __main__ as recipe\n"
        "sys.argv = ['train', '--cfg', 'all']\n"
        "recipe.main()\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


# --- from start to end

SMALL = (
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "data.max_bytes=20000",
    "data.seq_len=64",
    "optimizer.schedule=constant",
    "trainer.grad_accumulation=2",
    "trainer.num_workers=2",
    "trainer.validate_every=2",
    "trainer.validate_batches=2",
    "trainer.log_every=1",
    "callbacks.checkpoint.every_n_steps=2",
)


def trained(*arguments: str, cwd: Path, ranks: int = 0) -> str:
    result = command(*arguments, *SMALL, cwd=cwd, ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "LATEST" / "model" / "consolidated" / "model.safetensors")


def losses(output: str) -> dict[str, str]:
    """Step and kind of loss to its value as logged."""
    return {f"{step} {kind}": loss for step, kind, loss in re.findall(r"step +(\d+)/\d+  (\w+) ([\d.]+)", output)}


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (0, ()),
        pytest.param(2, ("mesh.dp_shard=2",), marks=pytest.mark.slow),
        pytest.param(2, ("mesh.dp_shard=1", "mesh.dp_replicate=2"), marks=pytest.mark.slow),
        pytest.param(2, ("mesh.tp=2",), marks=pytest.mark.slow),
    ],
    ids=["one", "fsdp2", "ddp", "tp"],
)
def test_the_same_command_continues_exactly(ranks: int, options: tuple[str, ...], tmp_path: Path) -> None:
    whole = trained("run_name=whole", "trainer.max_steps=8", *options, cwd=tmp_path, ranks=ranks)
    trained("run_name=parts", "trainer.max_steps=4", "checkpoint=async", *options, cwd=tmp_path, ranks=ranks)
    rest = trained("run_name=parts", "trainer.max_steps=8", "checkpoint=async", *options, cwd=tmp_path, ranks=ranks)

    assert losses(rest).keys() == {f"{step} loss" for step in range(5, 9)} | {"6 val_loss", "8 val_loss"}
    assert losses(rest).items() <= losses(whole).items()
    one, other = (weights(tmp_path / "outputs" / "hydra_ckpt" / name) for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ranks_share_one_timestamped_run_directory(tmp_path: Path) -> None:
    output = trained("trainer.max_steps=2", cwd=tmp_path, ranks=2)
    (run,) = (tmp_path / "outputs" / "hydra_ckpt").glob("*/*")
    written = {".hydra", "checkpoints", "hydra_ckpt_job.json", "hydra_ckpt_train.log"}
    assert {path.name for path in run.iterdir()} == written
    assert output.count("step 1/2  loss") == 1


def test_a_sweep_runs_its_jobs_after_each_other(tmp_path: Path) -> None:
    trained("-m", "run_name=sweep", "checkpoint.is_async=true,false", "trainer.max_steps=2", cwd=tmp_path)
    sweep = tmp_path / "multirun" / "hydra_ckpt" / "sweep"
    one, other = (weights(sweep / job) for job in "01")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_sweep_under_torchrun(tmp_path: Path) -> None:
    trained("-m", "seed=0,1", "trainer.max_steps=2", cwd=tmp_path, ranks=2)
    assert len(list(tmp_path.glob("multirun/hydra_ckpt/*/*/[01]/checkpoints/LATEST"))) == 2


@pytest.mark.slow
def test_switched_off_it_trains_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    output = trained(
        "run_name=off", "checkpoint=off", "trainer.max_steps=2", "trainer.tracker=tensorboard", cwd=tmp_path
    )
    assert "2 steps in" in output
    run = tmp_path / "outputs" / "hydra_ckpt" / "off"
    assert not (run / "checkpoints").exists()
    assert list((run / "hydra_ckpt").glob("events.*"))


# --- pretrained models and adapters


def _recipe(tmp_path: Path, ranks: int, *overrides: str) -> Path:
    """Run the application on a model made smaller still; where its newest checkpoint holds the model."""
    small = ("model.hidden_size=48", "model.num_attention_heads=4", "model.intermediate_size=64", "data.seq_len=32")
    short = ("data.max_bytes=100000", "trainer.batch_size=2", "trainer.max_steps=2", "trainer.validate_every=0")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "hydra_ckpt.recipe", *small, *short, *overrides]
    done = run(command, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    name = next(item.removeprefix("run_name=") for item in overrides if item.startswith("run_name="))
    return tmp_path / "outputs/hydra_ckpt" / name / "checkpoints/LATEST/model/consolidated"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_pretrained_model_is_trained_whole_and_by_an_adapter(tmp_path: Path, ranks: int) -> None:
    base = _recipe(tmp_path, 1, "run_name=base")
    still = "optimizer.lr=0.0"
    again = _recipe(tmp_path, ranks, "run_name=again", f"model.pretrained={base}", still, "optimizer.weight_decay=0")
    found, expected = load_file(again / "model.safetensors"), load_file(base / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    lora = _recipe(tmp_path, ranks, "run_name=lora", "experiment=hydra_ckpt_lora", f"model.pretrained={base}")
    assert all("lora_" in name for name in load_file(lora / "adapter_model.safetensors"))


def test_an_adapter_is_not_split_by_tensor_parallelism() -> None:
    with pytest.raises(CheckpointConfigError, match=r"mesh\.tp=2: this recipe does not split adapters"):
        settings("experiment=hydra_ckpt_lora", "mesh.tp=2")
