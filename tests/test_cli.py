"""The tool on real directories: what it shows, what it finds, and its exit codes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from hydra_ckpt import AppState, CheckpointingConfig, cli
from hydra_ckpt.storage import SafetensorsWriter
from hydra_ckpt.testing import run_distributed

REPOSITORY = Path(__file__).resolve().parents[1]
FIRST, SECOND, LAST = "epoch_0_step_10", "epoch_0_step_20", "epoch_1_step_30"


def save_some(root: Path, **options: Any) -> None:
    """Three checkpoints of a small run; metrics of the second arrive after its save."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    config = CheckpointingConfig(checkpoint_dir=str(root), **options)
    with config.build(0, 0, 0) as checkpointer:
        state = AppState(model, optimizer)
        checkpointer.start(state)
        for step, epoch in ((10, 0), (20, 0), (30, 1)):
            model(torch.randn(4, 64)).sum().backward()
            optimizer.step()
            checkpointer.save(state, step=step, epoch=epoch, metrics={"val_loss": 1.0 - step / 100})
        checkpointer.add_metrics(20, 0, {"val_loss": 0.25})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of each format, made once; tests get copies."""
    home = tmp_path_factory.mktemp("originals")
    made = {
        "consolidated": {"save_consolidated": "always"},
        "shards": {"save_consolidated": "never"},
        "torch_save": {"save_consolidated": "never", "model_save_format": "torch_save"},
    }
    for name, options in made.items():
        save_some(home / name / "checkpoints", **options)
    return {name: home / name for name in made}


@pytest.fixture
def run_dir(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A function that gives a fresh copy of a run directory."""

    def copy(name: str = "consolidated") -> Path:
        return Path(shutil.copytree(originals[name], tmp_path / name, symlinks=True))

    return copy


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The console script's own entry point, in this process."""

    def call(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["hydra-ckpt", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        code = exit_.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return call


def contents(root: Path) -> dict[str, tuple[int, bytes | str]]:
    """Everything below a directory, times of change included."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mtime_ns,
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "",
        )
        for path in root.rglob("*")
    }


def flip(path: Path, position: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data))


# --- list


@pytest.mark.parametrize("name", ["consolidated", "shards", "torch_save"])
def test_list_shows_a_whole_directory(name: str, run_dir: Callable[[str], Path], tool: Callable[..., Result]) -> None:
    run = run_dir(name)
    before = contents(run)
    result = tool("list", run)
    assert result.code == 0
    assert result.err == ""
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.startswith("epoch_")}
    assert list(lines) == [FIRST, SECOND, LAST]
    assert "val_loss 0.9" in lines[FIRST]
    assert "val_loss 0.25" in lines[SECOND]
    assert lines[SECOND].rstrip().endswith("BEST")
    assert lines[LAST].rstrip().endswith("LATEST")
    assert ("distcp" in lines[LAST]) == (name == "torch_save")
    assert ("yes" in lines[LAST]) == (name == "consolidated")
    assert contents(run) == before


def test_list_as_json(run_dir: Callable[..., Path], tool: Callable[..., Result]) -> None:
    root = run_dir() / "checkpoints"
    result = tool("list", root, "--json")
    assert result.code == 0
    assert result.data["directory"] == str(root)
    assert result.data["drafts"] == result.data["set_aside"] == result.data["deleting"] == []
    assert result.data["dangling"] == {}
    first, second, last = result.data["checkpoints"]
    assert (first["step"], first["epoch"], first["metrics"]) == (10, 0, {"val_loss": 0.9})
    assert (last["name"], last["step"], last["epoch"], last["world_size"]) == (LAST, 30, 1, 1)
    assert {name: part["format"] for name, part in last["parts"].items()} == {
        "model": "safetensors",
        "optim": "safetensors",
    }
    assert last["exports"] == {"model": "model/consolidated"}
    assert last["problem"] is None
    assert (first["pointers"], second["pointers"], last["pointers"]) == ([], ["BEST"], ["LATEST"])
    assert first["bytes"] == sum(
        path.stat().st_size for path in (root / FIRST).rglob("*") if path.is_file() and path.name != "manifest.json"
    )


def test_a_run_directory_its_checkpoints_and_one_checkpoint_are_all_understood(
    run_dir: Callable[..., Path], tool: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_dir()
    root = run / "checkpoints"
    everything = tool("list", root, "--json").data
    assert tool("list", run, "--json").data == everything
    monkeypatch.chdir(root)
    assert tool("list", ".", "--json").data == everything
    for one in (root / LAST, root / "LATEST"):
        [entry] = tool("list", one, "--json").data["checkpoints"]
        assert entry == everything["checkpoints"][2]


def test_pointers_of_the_user_s_own_are_shown(run_dir: Callable[..., Path], tool: Callable[..., Result]) -> None:
    root = run_dir() / "checkpoints"
    (root / "PAPER").symlink_to(FIRST)
    (root / "DEMO.txt").write_text(f"{FIRST}\n")
    entry = tool("list", root, "--json").data["checkpoints"][0]
    assert entry["pointers"] == ["DEMO", "PAPER"]


def test_list_says_what_is_damaged_and_continues(run_dir: Callable[..., Path], tool: Callable[..., Result]) -> None:
    root = run_dir() / "checkpoints"
    (root / FIRST / "optim" / "optim.safetensors").unlink()
    manifest = root / SECOND / "manifest.json"
    # Still JSON, so that only its digest tells.
    manifest.write_text(manifest.read_text().replace('"epoch"', '"epoca"'))
    result = tool("list", root)
    assert result.code == 1
    assert "optim.safetensors: the file is missing" in result.out
    assert str(manifest) in result.out
    data = tool("list", root, "--json").data
    problems = {entry["name"]: entry["problem"] for entry in data["checkpoints"]}
    assert "missing" in problems[FIRST]
    assert "digest" in problems[SECOND]
    assert problems[LAST] is None
    assert [entry["step"] for entry in data["checkpoints"]] == [10, 20, 30]


def test_list_says_where_a_pointer_leads_nowhere(run_dir: Callable[..., Path], tool: Callable[..., Result]) -> None:
    root = run_dir() / "checkpoints"
    shutil.rmtree(root / LAST)
    result = tool("list", root)
    assert result.code == 1
    assert f"LATEST leads to {LAST}, which does not exist" in result.out
    assert tool("list", root, "--json").data["dangling"] == {"LATEST": LAST}


def test_what_is_hidden_is_explained(run_dir: Callable[..., Path], tool: Callable[..., Result]) -> None:
    root = run_dir() / "checkpoints"
    for hidden in (".epoch_1_step_40.draft-0a", ".epoch_0_step_5.corrupt-0b", ".epoch_0_step_6.deleting-0c"):
        (root / hidden).mkdir()
    result = tool("list", root)
    assert result.code == 0, "leftovers are no damage: the next run sweeps them"
    assert ".epoch_1_step_40.draft-0a: being written, or left behind" in result.out
    data = tool("list", root, "--json").data
    assert data["drafts"] == [".epoch_1_step_40.draft-0a"]
    assert data["set_aside"] == [".epoch_0_step_5.corrupt-0b"]
    assert data["deleting"] == [".epoch_0_step_6.deleting-0c"]


def test_metrics_that_are_no_numbers_make_valid_json(tmp_path: Path, tool: Callable[..., Result]) -> None:
    model = nn.Linear(2, 2)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as checkpointer:
        checkpointer.save(AppState(model), step=1, metrics={"loss": float("nan")})
    out = tool("list", tmp_path, "--json").out
    assert "NaN" not in out
    assert json.loads(out)["checkpoints"][0]["metrics"] == {"loss": None}
    assert "loss nan" in tool("list", tmp_path).out


def test_list_imports_no_torch(run_dir: Callable[..., Path]) -> None:
    code = (
        "import sys; from hydra_ckpt import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'hydra'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "list", str(run_dir())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert LAST in done.stdout


# --- verify


@pytest.mark.parametrize("name", ["consolidated", "shards", "torch_save"])
def test_verify_passes_what_is_whole(name: str, run_dir: Callable[[str], Path], tool: Callable[..., Result]) -> None:
    run = run_dir(name)
    before = contents(run)
    result = tool("verify", run)
    assert result.code == 0
    assert [line.split(":")[0] for line in result.out.splitlines()] == [FIRST, SECOND, LAST]
    data = tool("verify", run, "--json").data
    assert data["whole"] is True
    listed = tool("list", run, "--json").data["checkpoints"]
    # Every byte of every file has been read, and nothing was read twice.
    assert [entry["read_bytes"] for entry in data["checkpoints"]] == [entry["bytes"] for entry in listed]
    assert contents(run) == before


# Kind of file: which format, where, and which byte is flipped (of as many kinds as there are places to flip one).
FLIPS = {
    "weights": ("consolidated", "model/consolidated/model.safetensors", -1),
    "header": ("consolidated", "model/consolidated/model.safetensors", 30),
    "header length": ("consolidated", "model/consolidated/model.safetensors", 1),
    "header padding": ("consolidated", "model/consolidated/model.safetensors", 4000),
    "optimizer": ("consolidated", "optim/optim.safetensors", 5000),
    "shard": ("shards", "model/shard-00001-of-00001.safetensors", -7),
    "shard header": ("shards", "model/shard-00001-of-00001.safetensors", 20),
    "distcp": ("torch_save", "model/__0_0.distcp", 700),
    "distcp metadata": ("torch_save", "optim/.metadata", 60),
    "progress of a rank": ("consolidated", "progress/rank-00000.safetensors", -3),
    "shared progress": ("consolidated", "progress/shared-00000.json", 12),
    "digests": ("consolidated", "digests/rank-00000.bin", -2),
    "digests' file names": ("consolidated", "digests/rank-00000.bin", 5),
    "manifest": ("consolidated", "manifest.json", 100),
    "end of the manifest": ("consolidated", "manifest.json", -5),
    "later metrics": ("consolidated", "metrics.json", 20),
}


@pytest.mark.parametrize("kind", FLIPS)
def test_verify_finds_a_flipped_bit(kind: str, run_dir: Callable[[str], Path], tool: Callable[..., Result]) -> None:
    form, file, position = FLIPS[kind]
    root = run_dir(form) / "checkpoints"
    flip(root / SECOND / file, position)
    result = tool("verify", root)
    assert result.code == 1
    assert str(root / SECOND / file) in result.out
    data = tool("verify", root, "--json").data
    assert data["whole"] is False
    assert [entry["whole"] for entry in data["checkpoints"]] == [True, False, True]
    assert file in {finding["file"] for finding in data["checkpoints"][1]["findings"]}
    # The damaged one alone, and its sound neighbour alone.
    assert tool("verify", root / SECOND).code == 1
    assert tool("verify", root / FIRST).code == 0


@pytest.mark.parametrize("name", ["consolidated", "shards", "torch_save"])
def test_no_bit_of_any_file_goes_unwatched(
    name: str, run_dir: Callable[[str], Path], tool: Callable[..., Result]
) -> None:
    checkpoint = run_dir(name) / "checkpoints" / SECOND
    draw = random.Random(name)
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        for _ in range(4):
            position, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
            flip(path, position, bit)
            assert tool("verify", checkpoint).code == 1, f"bit {bit} of byte {position} of {path}"
            flip(path, position, bit)
    assert tool("verify", checkpoint).code == 0


def test_a_finding_names_file_range_and_remedy(run_dir: Callable[..., Path], tool: Callable[..., Result]) -> None:
    root = run_dir() / "checkpoints"
    file = root / LAST / "model" / "consolidated" / "model.safetensors"
    position = 4096 + 1000
    flip(file, position)
    result = tool("verify", root)
    assert f"{LAST}: damaged, 1 finding\n" in result.out
    assert "Restore the checkpoint from a copy" in result.out
    assert f"restore_from=auto skips it; the newest intact one here is {SECOND}" in result.out
    [finding] = tool("verify", root, "--json").data["checkpoints"][2]["findings"]
    first, end = finding["byte_range"]
    assert first <= position < end
    assert f"bytes {first} to {end}" in result.out


def test_every_damage_is_found_not_only_the_first(run_dir: Callable[..., Path], tool: Callable[..., Result]) -> None:
    root = run_dir() / "checkpoints"
    flip(root / LAST / "model" / "consolidated" / "model.safetensors", -1)
    flip(root / LAST / "optim" / "optim.safetensors", -1)
    flip(root / LAST / "progress" / "shared-00000.json", -1)
    (root / LAST / "progress" / "rank-00000.safetensors").unlink()
    findings = tool("verify", root / LAST, "--json").data["checkpoints"][0]["findings"]
    assert sorted(finding["file"] for finding in findings) == [
        "model/consolidated/model.safetensors",
        "optim/optim.safetensors",
        "progress/rank-00000.safetensors",
        "progress/shared-00000.json",
    ]


def test_damaged_digests_do_not_hide_other_damage(run_dir: Callable[..., Path], tool: Callable[..., Result]) -> None:
    root = run_dir() / "checkpoints"
    flip(root / LAST / "digests" / "rank-00000.bin", -1)
    result = tool("verify", root / LAST)
    assert "verify_on_load=false" in result.out
    flip(root / LAST / "progress" / "shared-00000.json", -1)
    # Without digests for it, a header that contradicts its file is still seen.
    flip(root / LAST / "optim" / "optim.safetensors", 1)
    findings = tool("verify", root / LAST, "--json").data["checkpoints"][0]["findings"]
    assert [finding["file"] for finding in findings] == [
        "digests/rank-00000.bin",
        "progress/shared-00000.json",
        "optim/optim.safetensors",
    ]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_one_finding(
    change: int, run_dir: Callable[..., Path], tool: Callable[..., Result]
) -> None:
    file = run_dir() / "checkpoints" / LAST / "optim" / "optim.safetensors"
    os.truncate(file, file.stat().st_size + change)
    result = tool("verify", file.parents[1])
    assert result.code == 1
    assert result.out.count(str(file)) == 1
    assert "another size" in result.out


def test_a_link_in_place_of_a_file_is_not_followed(run_dir: Callable[..., Path], tool: Callable[..., Result]) -> None:
    file = run_dir() / "checkpoints" / LAST / "optim" / "optim.safetensors"
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")
    result = tool("verify", file.parents[1])
    assert result.code == 1
    assert "symbolic link" in result.out


def test_a_checkpoint_without_a_manifest_is_a_finding(
    run_dir: Callable[..., Path], tool: Callable[..., Result]
) -> None:
    root = run_dir() / "checkpoints"
    (root / LAST / "manifest.json").unlink()
    for target in (root, root / LAST):
        result = tool("verify", target)
        assert result.code == 1
        assert "holds no manifest.json" in result.out
    assert tool("list", root).code == 1


def test_damaged_metrics_leave_the_rest_usable(run_dir: Callable[..., Path], tool: Callable[..., Result]) -> None:
    root = run_dir() / "checkpoints"
    flip(root / SECOND / "metrics.json", 20)
    assert "Only metrics are affected" in tool("verify", root).out


def test_what_dcp_saved_through_the_writer_is_verified_too(tmp_path: Path, tool: Callable[..., Result]) -> None:
    state = {f"layer.{number}": torch.randn(1000) for number in range(4)}
    dcp.save(state, storage_writer=SafetensorsWriter(tmp_path / "mine", max_file_bytes=8000), no_dist=True)
    assert tool("verify", tmp_path / "mine").code == 0
    assert tool("list", tmp_path / "mine").code == 0
    index = tmp_path / "mine" / "state" / "model.safetensors.index.json"
    flip(index, -10)
    result = tool("verify", tmp_path / "mine")
    assert result.code == 1
    assert str(index) in result.out


def _save_on_two_ranks(root: Path) -> None:
    from tests.training import Run

    Run(root, "fsdp", {"save_consolidated": "always"}).train(3)


def test_a_checkpoint_of_several_ranks(tmp_path: Path, tool: Callable[..., Result]) -> None:
    run_distributed(_save_on_two_ranks, 2, tmp_path)
    assert tool("verify", tmp_path).code == 0
    [entry] = tool("list", tmp_path, "--json").data["checkpoints"]
    assert entry["world_size"] == 2
    for file in ("digests/rank-00001.bin", "progress/rank-00001.safetensors"):
        path = tmp_path / "epoch_0_step_3" / file
        flip(path, -1)
        assert str(path) in tool("verify", tmp_path).out
        flip(path, -1)


# --- misuse


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_a_directory_that_is_not_there_is_misuse(verb: str, tmp_path: Path, tool: Callable[..., Result]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "new" / ".epoch_0_step_1.draft-00").mkdir(parents=True)
    (tmp_path / "outputs" / "today" / ".hydra").mkdir(parents=True)  # a run of Hydra's that has nothing of ours
    for name, says in {
        "nowhere": "does not exist",
        "file": "is not a directory",
        "empty": "holds no checkpoints",
        "new": "holds no checkpoints",
        "outputs": "It is not a sweep either" if verb == "list" else "holds no checkpoints",
    }.items():
        result = tool(verb, tmp_path / name)
        assert result.code == 2
        assert result.out == ""
        [line] = result.err.splitlines()
        assert line.startswith("hydra-ckpt: ")
        assert says in line
        assert str(tmp_path / name) in line


@pytest.mark.parametrize("arguments", [["list"], ["verify"], ["lst", "."], ["list", ".", "--jsn"]])
def test_a_wrong_command_line_is_misuse(arguments: list[str], tool: Callable[..., Result]) -> None:
    result = tool(*arguments)
    assert result.code == 2
    assert "Usage" in result.err


def test_help_and_version(tool: Callable[..., Result]) -> None:
    import hydra_ckpt

    assert tool("--version").out == f"hydra-ckpt {hydra_ckpt.__version__}\n"
    shown = tool("--help")
    assert shown.code == 0
    assert {"list", "verify"} <= set(shown.out.split())
    for verb in ("list", "verify"):
        assert "--json" in tool(verb, "--help").out


def test_an_error_of_ours_ends_in_one_line_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hydra_ckpt.cli", "verify", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
