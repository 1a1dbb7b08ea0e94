"""A failure ends in one clear error of the tree, on every rank, and nothing that was published is lost."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from hydra_ckpt import (
    AppState,
    CheckpointCallback,
    CheckpointConfigError,
    Checkpointer,
    CheckpointError,
    CheckpointExistsError,
    CheckpointingConfig,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    KeyMismatchError,
    SaveFailedError,
    TopologyError,
)
from hydra_ckpt.distributed.channel import error_from_data, error_to_data
from hydra_ckpt.files import Files
from hydra_ckpt.storage.digests import Check
from hydra_ckpt.storage.verification import checks, findings
from hydra_ckpt.store.catalog import Checkpoint, scan
from hydra_ckpt.testing import FaultyFiles, Operation, run_distributed


def make_state(features: int = 5) -> AppState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(2, features)).square().mean().backward()
    optimizer.step()
    return AppState(model, optimizer)


def build(directory: Path, files: Files | None = None, **options: Any) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=str(directory), **options)
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Checkpointer(config.resolve(), dp_rank=rank, tp_rank=0, pp_rank=0, files=files)


def save(directory: Path, state: AppState, *steps: int, **options: Any) -> None:
    with build(directory, **options) as engine:
        for step in steps:
            engine.save(state, step=step, metrics={"loss": 10.0 / step}).result()


def verifies(checkpoint: Checkpoint) -> bool:
    manifest = checkpoint.manifest
    checkpoint.check_files()
    return not list(findings(checkpoint.path, checks(checkpoint.path, manifest.files, manifest.digests)))


def debris(directory: Path) -> list[str]:
    return [path.name for path in directory.glob(".epoch*")]


def latest(directory: Path) -> str | None:
    found = scan(directory).pointed("LATEST")
    return found.name if found else None


@contextlib.contextmanager
def damaged(path: Path, position: int | None = None) -> Iterator[None]:
    """A file with one bit flipped, in the middle if nothing is said."""
    data = path.read_bytes()
    position = len(data) // 2 if position is None else position
    path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    yield
    path.write_bytes(data)


# -- what is asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["a file in the way", "below a file", "read-only"])
def test_a_directory_that_cannot_be_written(tmp_path: Path, way: str) -> None:
    (tmp_path / "file").write_text("mine")
    directory = {"a file in the way": tmp_path / "file", "below a file": tmp_path / "file" / "deep"}.get(way)
    files = FaultyFiles(lambda _: errno.EROFS if way == "read-only" else None)
    with build(directory or tmp_path / "new", files) as engine:
        for begin in (lambda: engine.start(make_state()), lambda: engine.save(make_state(), step=1)):
            with pytest.raises(CheckpointConfigError, match=r"checkpoint_dir=.* cannot be written \(.*choose another"):
                begin()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_word_that_is_no_mode_is_refused_with_the_choices() -> None:
    with pytest.raises(CheckpointConfigError, match=r"save_consolidated='sometimes'.*every.*final.*false"):
        CheckpointingConfig(save_consolidated="sometimes")


def test_a_checkpoint_of_another_model_lists_all_that_differs_and_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, make_state(), 1)
    other = AppState(nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3), nn.Linear(3, 2)))
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    with build(tmp_path) as engine, pytest.raises(KeyMismatchError) as failure:
        engine.start(other)
    assert failure.value.missing == ["2.bias", "2.weight"]
    assert failure.value.unexpected == []
    assert failure.value.mismatched == {
        "0.weight": "F32 [3, 5] in the checkpoint, F32 [3, 6] in the model",
        "1.bias": "F32 [2] in the checkpoint, F32 [3] in the model",
        "1.weight": "F32 [2, 3] in the checkpoint, F32 [3] in the model",
    }
    assert all(torch.equal(before[name], tensor) for name, tensor in other.model.state_dict().items())
    half = AppState(make_state().model.half())
    with build(tmp_path) as engine, pytest.raises(KeyMismatchError, match=r"F32 .* in the checkpoint, F16"):
        engine.load(half)
    regrouped = make_state()
    regrouped.optimizer = torch.optim.SGD(regrouped.model[0].parameters(), lr=0.1)
    with build(tmp_path) as engine, pytest.raises(KeyMismatchError, match=r"unexpected \(2\): optimizer: 1\.bias"):
        engine.load(regrouped)


def test_an_unknown_restore_from_lists_what_there_is(tmp_path: Path) -> None:
    state = make_state()
    for selector in ("latest", "best", "epoch_0_step_7"):
        with (
            build(tmp_path, restore_from=selector) as engine,
            pytest.raises(CheckpointNotFoundError, match="holds no checkpoint"),
        ):
            engine.start(state)
    save(tmp_path / "run", state, 1, 2)
    (tmp_path / "run" / "epoch_0_step_3").mkdir()
    for selector in ("epoch_0_step_7", "lastest", str(tmp_path / "nowhere")):
        with (
            build(tmp_path / "run", restore_from=selector) as engine,
            pytest.raises(CheckpointNotFoundError, match="holds epoch_0_step_1, epoch_0_step_2; damaged: epoch_0_step"),
        ):
            engine.start(state)
    (tmp_path / "empty").mkdir()
    with (
        build(tmp_path / "run", restore_from=str(tmp_path / "empty")) as engine,
        pytest.raises(CheckpointNotFoundError, match="it is not a finished checkpoint"),
    ):
        engine.start(state)


# -- going back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore_from", ["epoch_0_step_2", "none"])
def test_going_back_is_refused_at_once_or_sets_aside(tmp_path: Path, restore_from: str) -> None:
    state = make_state()
    save(tmp_path, state, 1, 2, 4, 6)
    before = {path.name for path in tmp_path.iterdir()}
    with build(tmp_path, restore_from=restore_from) as engine:
        for begin in (engine.start, engine.load):
            with pytest.raises(CheckpointExistsError, match=r"later steps: .*epoch_0_step_4.*on_conflict=set_aside"):
                begin(state)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert latest(tmp_path) == "epoch_0_step_6"

    stay = [1, 2] if restore_from != "none" else []
    with build(tmp_path, restore_from=restore_from, on_conflict="set_aside") as engine:
        report = engine.start(state)
        assert (report.step if report else None) == (2 if stay else None)
        assert [item.step for item in scan(tmp_path).checkpoints] == stay
        # The pointers lead to what is left, or nowhere.
        assert latest(tmp_path) == ("epoch_0_step_2" if stay else None)
        best = scan(tmp_path).pointed("BEST")
        assert (best.step if best else None) == (2 if stay else None)
        assert all(path.exists() for path in tmp_path.iterdir() if path.name.isupper())
        engine.save(state, step=4, metrics={"loss": 99.0}).result()
    aside = [path for path in tmp_path.iterdir() if ".aside-" in path.name]
    assert len(aside) == (2 if stay else 4)
    assert all(verifies(Checkpoint.open(path)) for path in aside)  # hidden, not lost


def test_a_step_is_not_overwritten(tmp_path: Path) -> None:
    state = make_state()
    with build(tmp_path) as engine:
        engine.save(state, step=1).result()
        with pytest.raises(CheckpointExistsError, match="epoch_0_step_1 is already published"):
            engine.save(state, step=1)
        assert engine.save(state, step=2).result().step == 2


# -- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"model_save_format": "torch_save"}, {"save_consolidated": "always"}])
def test_a_flipped_bit_or_a_lost_byte_in_any_file_is_found(tmp_path: Path, options: dict[str, Any]) -> None:
    state = make_state()
    save(tmp_path, state, 1, **options)
    checkpoint = tmp_path / "epoch_0_step_1"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert len(files) >= 5
    with build(tmp_path) as engine:
        for path in files:
            for position in {0, path.stat().st_size // 2, path.stat().st_size - 1}:
                with damaged(path, position), pytest.raises(CorruptCheckpointError, match=path.name):
                    engine.load(state, restore_from="epoch_0_step_1")
            data = path.read_bytes()
            path.write_bytes(data[:-1])
            with pytest.raises(CorruptCheckpointError, match=path.name):
                engine.load(state, restore_from="epoch_0_step_1")
            path.rename(tmp_path / "gone")
            with pytest.raises((CorruptCheckpointError, CheckpointNotFoundError), match=path.name):
                engine.load(state, restore_from="epoch_0_step_1")
            (tmp_path / "gone").rename(path)
            path.write_bytes(data)
        assert engine.load(state, restore_from="epoch_0_step_1").step == 1


def test_automatic_resume_passes_over_damage_and_sets_it_aside_before_it_saves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_state()
    save(tmp_path, state, 1, 2, 3, 4, save_consolidated="always")
    weights = tmp_path / "epoch_0_step_4" / "model" / "consolidated" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x80
    weights.write_bytes(data)
    (tmp_path / "epoch_0_step_3" / "manifest.json").write_bytes(b"{}")
    with build(tmp_path) as engine:
        report = engine.load(state)  # only looks
        assert report.step == 2
        assert set(report.passed_over) == {"epoch_0_step_3", "epoch_0_step_4"}
        assert "the bytes are not those that were written" in report.passed_over["epoch_0_step_4"]
        assert not debris(tmp_path)
    assert "skipping the damaged checkpoint epoch_0_step_4" in caplog.text
    for selector in ("latest", "epoch_0_step_4", "epoch_0_step_3"):
        with build(tmp_path, restore_from=selector) as engine, pytest.raises(CorruptCheckpointError):
            engine.load(state)
    with build(tmp_path) as engine:
        assert engine.start(state).step == 2
        assert sorted(name.split(".corrupt-")[0] for name in debris(tmp_path)) == [
            ".epoch_0_step_3",
            ".epoch_0_step_4",
        ]
        assert latest(tmp_path) == "epoch_0_step_2"
        for step in (3, 4):
            assert verifies(engine.save(state, step=step).result())
    assert latest(tmp_path) == "epoch_0_step_4"


@pytest.mark.parametrize("parent", [".", ".."], ids=["checkpoints", "run"])
def test_a_directory_of_checkpoints_is_no_checkpoint(tmp_path: Path, parent: str) -> None:
    state = make_state()
    save(tmp_path / "checkpoints", state, 1)
    wanted = (tmp_path / "checkpoints" / parent).resolve()
    message = r"a directory with some in it; the latest is .*/epoch_0_step_1$"
    with (
        build(tmp_path / "other", restore_from=str(wanted)) as engine,
        pytest.raises(CheckpointNotFoundError, match=message),
    ):
        engine.load(state)


def test_a_damaged_name_is_damage_and_not_another_model(tmp_path: Path) -> None:
    state = make_state()
    save(tmp_path, state, 1, 2, save_consolidated="always")
    weights = tmp_path / "epoch_0_step_2" / "model" / "consolidated" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[data.index(b"weight")] ^= 1
    weights.write_bytes(data)
    with build(tmp_path) as engine:
        report = engine.load(state)
        assert report.step == 1
        assert "the bytes are not those that were written" in report.passed_over["epoch_0_step_2"]
    with build(tmp_path, restore_from="latest") as engine, pytest.raises(CorruptCheckpointError):
        engine.load(state)


def test_a_state_that_damage_has_overwritten_is_never_trained_on(tmp_path: Path) -> None:
    state = make_state()
    save(tmp_path, state, 1, 2, save_consolidated="always")
    before = {name: tensor.clone() for name, tensor in state.models[""][0].state_dict().items()}
    for step in (1, 2):
        [moments] = (tmp_path / f"epoch_0_step_{step}" / "optim").glob("*.safetensors")
        data = bytearray(moments.read_bytes())
        data[-1] ^= 1
        moments.write_bytes(data)
    with build(tmp_path) as engine, pytest.raises(CorruptCheckpointError, match="model and optimizer is undefined"):
        engine.load(state)  # not None: a fresh start would train on what the damaged ones left
    with (
        build(tmp_path, restore_from="latest") as engine,
        pytest.raises(CorruptCheckpointError, match="model and optimizer is undefined"),
    ):
        engine.load(state)
    # Damage that shows before anything is read leaves the live state alone.
    for step in (1, 2):
        [progress] = (tmp_path / f"epoch_0_step_{step}" / "progress").glob("shared-*.json")
        progress.write_bytes(progress.read_bytes().replace(b"{", b"[", 1))
    with torch.no_grad():
        for tensor in state.models[""][0].parameters():
            tensor.zero_()
    with build(tmp_path) as engine:
        assert engine.load(state) is None
    assert all(not tensor.any() for tensor in state.models[""][0].parameters())
    assert any(tensor.any() for tensor in before.values())


def test_every_byte_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state()
    save(tmp_path, state, 1, save_consolidated="always")
    compared: list[tuple[str, int]] = []
    compare = Check.compare

    def recording(self: Check, root: Path, data: memoryview) -> None:
        compared.append((self.file, self.region.offset))
        assert len(data) == self.region.nbytes
        compare(self, root, data)

    monkeypatch.setattr(Check, "compare", recording)
    with build(tmp_path) as engine:
        engine.load(state)
    assert len(compared) == len(set(compared))
    files = {file for file, _ in compared}
    checkpoint = tmp_path / "epoch_0_step_1"
    existing = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert files == existing - {"manifest.json"}


def test_latest_that_leads_to_damage_is_corrupt_and_not_missing(tmp_path: Path) -> None:
    state = make_state()
    save(tmp_path, state, 1, 2)
    with damaged(tmp_path / "epoch_0_step_2" / "manifest.json"):
        for selector in ("latest", "best"):
            with (
                build(tmp_path, restore_from=selector) as engine,
                pytest.raises(CorruptCheckpointError, match="step_2"),
            ):
                engine.load(state)


def test_damaged_metrics_are_left_out_and_the_checkpoint_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_state()
    with build(tmp_path) as engine:
        engine.save(state, step=1, metrics={"loss": 1.0}).result()
        engine.add_metrics(1, 0, {"loss": 0.5})
        engine.drain()
    with damaged(tmp_path / "epoch_0_step_1" / "metrics.json"), build(tmp_path) as engine:
        report = engine.load(state)
    assert report.metrics == {"loss": 1.0}
    assert "metrics of" in caplog.text


# -- two writers ---------------------------------------------------------------------------------------------------

WRITER = """
import sys, time
from pathlib import Path
from tests.test_errors import build, make_state

engine, state = build(Path(sys.argv[1])), make_state()
engine.start(state)
engine.save(state, step=1).result()
print("writing", flush=True)
time.sleep(120)
"""


@contextlib.contextmanager
def another_writer(directory: Path) -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", WRITER, str(directory)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.kill()


def test_a_second_live_writer_is_refused_and_a_killed_ones_lease_is_taken_over_at_once(tmp_path: Path) -> None:
    state = make_state()
    with another_writer(tmp_path) as process:
        expected = rf"host {socket.gethostname()}, process {process.pid}, last sign of life \d+ s ago"
        with build(tmp_path) as engine:
            with pytest.raises(CheckpointExistsError, match=expected):
                engine.start(state)
            with pytest.raises(CheckpointExistsError, match=expected):
                engine.save(state, step=2)
            assert engine.load(state).step == 1  # who only reads may
        os.kill(process.pid, signal.SIGKILL)
        began = time.monotonic()
        # Nobody has waited for it: it is dead, but its number is still taken.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with build(tmp_path) as engine:
            assert engine.start(state).step == 1
            assert engine.save(state, step=2).result().step == 2
        assert time.monotonic() - began < 10


def test_whoever_was_taken_for_dead_must_not_publish(tmp_path: Path) -> None:
    state = make_state()
    with build(tmp_path) as engine:
        engine.save(state, step=1).result()
        record = json.loads((tmp_path / "owner.json").read_text())
        other = {**record, "incarnation": "other", "host": "elsewhere", "released": False}
        (tmp_path / "owner.json").write_text(json.dumps(other))
        with pytest.raises(SaveFailedError, match="no longer held by this run but by host elsewhere"):
            engine.save(state, step=2).result()
        engine.add_metrics(1, 0, {"loss": 0.5})
    assert [item.step for item in scan(tmp_path).checkpoints] == [1]
    assert not scan(tmp_path).checkpoints[0].metrics
    assert not debris(tmp_path)


# -- peft ----------------------------------------------------------------------------------------------------------


def test_peft_and_other_models_are_not_mixed_up(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(nn.Linear(4, 4))
    adapted = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"]))
    for model, is_peft, message in ((plain, True, "not a PeftModel"), (adapted, False, "set checkpoint.is_peft=true")):
        with build(tmp_path, is_peft=is_peft) as engine, pytest.raises(CheckpointConfigError, match=message):
            engine.save(AppState(model), step=1).result()
    assert not debris(tmp_path)


# -- errors on their way -------------------------------------------------------------------------------------------


def test_errors_reach_other_processes_as_they_are() -> None:
    errors = [
        CheckpointError("plain"),
        CheckpointConfigError("two\nlines"),
        CheckpointNotFoundError("not there"),
        CheckpointExistsError("in the way"),
        CorruptCheckpointError("file", "is torn", byte_range=(3, 4), expected=1, found=2),
        KeyMismatchError("model", missing=["b", "a"], mismatched={"c": "shape"}, remedy="Load another."),
        SaveFailedError(3, {1: "disk full", 0: "late"}),
        TopologyError("mesh"),
    ]
    for error in errors:
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(again) is type(error)
            assert str(again) == str(error)
            assert vars(again) == vars(error)
        told = error_from_data(json.loads(json.dumps(error_to_data(error))), prefix="rank 1: ")
        assert type(told) is type(error)
        assert str(told) == f"rank 1: {error}"


# -- every rank ----------------------------------------------------------------------------------------------------


class Once:
    """An extra that cannot be stored on some ranks."""

    def __init__(self) -> None:
        self.value: Any = 1

    def state_dict(self) -> dict[str, Any]:
        return {"deep": [self.value]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["deep"][0]


def _attempt(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        action()
    except CheckpointError as error:
        return type(error).__name__, str(error)
    return "", ""


def _user_errors(root: Path) -> dict[str, tuple[str, str]]:
    rank, found = dist.get_rank(), {}
    state = make_state()

    def begin(directory: Path, state: AppState = state, **options: Any) -> Callable[[], None]:
        def attempt() -> None:
            with build(directory, **options) as engine:
                engine.start(state)

        return attempt

    run = root / "run"
    found["unwritable"] = _attempt(begin(root / "file" / "deep"))
    save(run, state, 1, 2)
    found["fine"] = _attempt(begin(run))
    found["other model"] = _attempt(begin(run, make_state(features=6)))
    # Only one rank has built another model.
    found["other model on one rank"] = _attempt(begin(run, make_state(features=5 + rank)))
    found["unknown"] = _attempt(begin(run, restore_from="epoch_9_step_9"))
    found["rollback"] = _attempt(begin(run, restore_from="epoch_0_step_1"))
    found["fresh start"] = _attempt(begin(run, restore_from="none"))
    found["second writer"] = _attempt(begin(root / "busy"))

    [weights] = (run / "epoch_0_step_2" / "optim").glob("*.safetensors")
    with damaged(weights, weights.stat().st_size - 1) if rank == 0 else contextlib.nullcontext():
        dist.barrier()
        found["flipped bit"] = _attempt(begin(run, restore_from="epoch_0_step_2"))
        dist.barrier()
    dist.barrier()
    if rank == 0:
        os.truncate(weights, weights.stat().st_size - 1)
    dist.barrier()
    found["truncated"] = _attempt(begin(run, restore_from="epoch_0_step_2"))
    found["peft"] = _attempt(begin(run, is_peft=True))

    extra = Once()
    state.extras["once"] = extra
    with build(root / "values") as engine:
        for step in (1, 2):  # the first save agrees on the layout, later ones do not talk before they write
            extra.value = object() if rank == 1 else 1
            found[f"value at save {step}"] = _attempt(lambda step=step: engine.save(state, step=step))
            extra.value = 1
            metrics = {"loss": 1, "other": 2} if rank == 0 else None
            found[f"metrics at save {step}"] = _attempt(lambda m=metrics, s=step: engine.save(state, step=s, metrics=m))
            engine.save(state, step=step).result()
        extra.value = object() if rank == 1 else 1
        found["value at the end"] = _attempt(lambda: engine.save(state, step=3, is_final=True))
        extra.value = 1
        engine.save(state, step=3, is_final=True).result()
        # What one rank saves must not get into the checkpoint of another step.
        found["unlike steps"] = _attempt(lambda: engine.save(state, step=4 + rank))
        found["unlike epochs"] = _attempt(lambda: engine.save(state, step=6, epoch=rank))
        engine.save(state, step=6).result()
    other = make_state(features=5 + rank)
    with build(root / "unlike") as engine:
        found["unlike models"] = _attempt(lambda: engine.save(other, step=1))
        found["after unlike models"] = _attempt(lambda: engine.save(make_state(), step=1))
    return found


EXPECTED = {
    "unwritable": ("CheckpointConfigError", "cannot be written"),
    "fine": ("", ""),
    "other model": ("KeyMismatchError", "0.weight: F32 [3, 5] in the checkpoint, F32 [3, 6] in the model"),
    "other model on one rank": ("KeyMismatchError", "0.weight: F32 [3, 5] in the checkpoint, F32 [3, 6] in the model"),
    "unknown": ("CheckpointNotFoundError", "holds epoch_0_step_1, epoch_0_step_2"),
    "rollback": ("CheckpointExistsError", "later steps: epoch_0_step_2"),
    "fresh start": ("CheckpointExistsError", "later steps: epoch_0_step_1, epoch_0_step_2"),
    "second writer": ("CheckpointExistsError", "is being written by another run: host "),
    "flipped bit": ("CorruptCheckpointError", "the bytes are not those that were written"),
    "truncated": ("CorruptCheckpointError", "the file has another size"),
    "peft": ("CheckpointConfigError", "not a PeftModel"),
    "value at save 1": ("CheckpointError", "extras.once.deep.0: a builtins.object"),
    "value at save 2": ("SaveFailedError", "extras.once.deep.0: a builtins.object"),
    "value at the end": ("SaveFailedError", "extras.once.deep.0: a builtins.object"),
    "metrics at save 1": ("CheckpointConfigError", "the metrics given are loss, other"),
    "metrics at save 2": ("SaveFailedError", "the metrics given are loss, other"),
    "unlike steps": (
        "SaveFailedError",
        "rank 1: CheckpointError: this rank is saving epoch_0_step_5, rank 0 is saving epoch_0_step_4",
    ),
    "unlike epochs": (
        "SaveFailedError",
        "rank 1: CheckpointError: this rank is saving epoch_1_step_6, rank 0 is saving epoch_0_step_6",
    ),
    "unlike models": ("TopologyError", "of ranks 0 and 1, only on rank 1: model: 0.weight F32 [3, 6]"),
    "after unlike models": ("", ""),
}


def test_every_rank_ends_in_the_same_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with another_writer(tmp_path / "busy"):
        results = run_distributed(_user_errors, 2, tmp_path)
    for rank, found in enumerate(results):
        assert found.keys() == EXPECTED.keys()
        for what, (kind, text) in EXPECTED.items():
            assert found[what][0] == kind, (rank, what, found[what])
            assert text in found[what][1], (rank, what, found[what])
    assert not debris(tmp_path / "values")
    assert [item.step for item in scan(tmp_path / "values").checkpoints] == [1, 2, 3, 6]


def _unlike_settings(root: Path) -> dict[str, tuple[str, str]]:
    rank, found = dist.get_rank(), {}

    def begin(**options: Any) -> Callable[[], None]:
        def attempt() -> None:
            with CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(root / "run"), **options)) as callback:
                callback.on_train_begin(make_state())

        return attempt

    found["off on one"] = _attempt(begin(enabled=rank != 1))
    found["off on rank 0"] = _attempt(begin(enabled=rank != 0))
    formats = ["safetensors", "torch_save", "safetensors"]
    found["formats"] = _attempt(begin(model_save_format=formats[rank], save_consolidated=False, is_async=rank == 2))
    found["places of their own"] = _attempt(begin(staging_dir=str(root / f"staging{rank}")))
    found["off"] = _attempt(begin(enabled=False))
    return found


def test_ranks_that_are_configured_differently_are_told_so_by_key_on_all_ranks(tmp_path: Path) -> None:
    for found in run_distributed(_unlike_settings, 3, tmp_path):
        assert found["places of their own"] == found["off"] == ("", "")
        assert found["off on one"][0] == found["off on rank 0"][0] == found["formats"][0] == "CheckpointConfigError"
        assert "checkpoint.enabled: true on ranks 0, 2, false on rank 1" in found["off on one"][1]
        assert "checkpoint.enabled: false on rank 0, true on ranks 1, 2" in found["off on rank 0"][1]
        assert (
            'checkpoint.model_save_format: "safetensors" on ranks 0, 2, "torch_save" on rank 1' in found["formats"][1]
        )
        assert "checkpoint.is_async: false on ranks 0, 1, true on rank 2" in found["formats"][1]


# -- a disk that fails ---------------------------------------------------------------------------------------------


class Disk(FaultyFiles):
    """Counts operations while armed, and fails the one told, or all from there on."""

    def __init__(self) -> None:
        super().__init__(self._judge)
        self.kinds: list[str] = []
        self.fail_at: int | None = None
        self.stays_broken = False
        self.error = errno.ENOSPC

    def arm(self, fail_at: int | None, *, error: int = errno.ENOSPC, stays_broken: bool = False) -> None:
        self.kinds, self.fail_at, self.error, self.stays_broken = [], fail_at, error, stays_broken

    def disarm(self) -> None:
        self.arm(None)

    def _judge(self, operation: Operation) -> int | None:
        self.kinds.append(operation.kind)
        number = len(self.kinds) - 1
        hit = self.fail_at is not None and (number == self.fail_at or (self.stays_broken and number > self.fail_at))
        return self.error if hit else None


def _sharded_state() -> AppState:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    fully_shard(model, mesh=mesh)
    # Cut along its inner dimension: written run by run.
    model.register_parameter("inner", nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh, [Shard(1)])))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 5)).sum().backward()
    model.inner.grad = torch.ones_like(model.inner)
    optimizer.step()
    return AppState(model, optimizer)


class Faults:
    """One rank after the other fails at one operation after the other."""

    def __init__(self, root: Path) -> None:
        self.root, self.rank, self.disk = root, dist.get_rank(), Disk()
        self.state = _sharded_state()
        self.seen: Counter[str] = Counter()

    def gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def count(self, action: Callable[[], Any]) -> list[list[str]]:
        """The operations of an action on each rank."""
        self.disk.arm(None)
        action()
        return self.gathered(self.disk.kinds)

    def attempt(self, step: int, broken: int, fail_at: int, action: Callable[[], Any], **how: Any) -> str:
        """Try something with a fault; returns its kind, or nothing where it succeeded all the same."""
        if self.rank == broken:
            self.disk.arm(fail_at, **how)
        try:
            action()
            failed = None
        except SaveFailedError as error:
            failed = error
        kind = self.disk.kinds[fail_at] if self.rank == broken and len(self.disk.kinds) > fail_at else ""
        self.disk.disarm()
        kind = max(self.gathered(kind))
        outcomes = self.gathered(failed and (failed.step, failed.causes, str(failed)))
        assert all(outcome == outcomes[0] for outcome in outcomes), outcomes
        if failed is None:
            return ""
        assert failed.step == step
        assert list(failed.causes) == [broken], failed.causes
        assert f"rank {broken}: OSError: [Errno" in str(failed)
        assert f"saving step {step} failed" in str(failed)
        self.seen[kind] += 1
        return kind


def _faulty_saves(root: Path) -> dict[str, Any]:
    faults = Faults(root)
    state, survived = faults.state, Counter[str]()
    with build(root, faults.disk, save_consolidated="always", is_async=True) as engine:
        engine.save(state, step=1).result()
        counted = faults.count(lambda: engine.save(state, step=2).result())
        step = 3
        for broken, kinds in enumerate(counted):
            for fail_at, kind in enumerate(kinds):
                before = latest(root)
                how = {"error": errno.EIO if fail_at % 2 else errno.ENOSPC}
                failed = faults.attempt(
                    step, broken, fail_at, lambda s=step: engine.save(state, step=s).result(), **how
                )
                if failed:
                    assert latest(root) == before, (broken, fail_at, kind)
                    assert not (root / f"epoch_0_step_{step}").exists()
                    assert not debris(root), (broken, fail_at, kind)
                    step += fail_at % 2  # the same step may be tried again, or a later one
                else:
                    survived[kind] += 1
                    assert verifies(Checkpoint.open(root / f"epoch_0_step_{step}"))
                    step += 1
                dist.barrier()
                engine.save(state, step=step).result()
                assert latest(root) == f"epoch_0_step_{step}"
                dist.barrier()
                step += 1
    return {"counted": counted, "failed": faults.seen, "survived": survived, "step": step}


def test_a_disk_that_fails_anywhere_in_a_save_loses_nothing(tmp_path: Path) -> None:
    one, other = run_distributed(_faulty_saves, 2, tmp_path)
    assert one == other
    kinds = {kind for kinds in one["counted"] for kind in kinds}
    assert kinds >= {"make_dir", "allocate", "write_at", "write_runs", "sync", "sync_dir", "rename", "symlink"}
    assert set(one["failed"]) >= kinds - {"symlink", "replace", "unlink"}
    # Once it is published, pointers that cannot be moved do not take it back.
    assert set(one["survived"]) <= {"symlink", "replace", "unlink", "sync_dir"}
    assert all(verifies(item) for item in scan(tmp_path).checkpoints)


def _faulty_exports(root: Path) -> dict[str, Any]:
    faults = Faults(root)
    state = faults.state
    with build(root, faults.disk) as engine:
        engine.save(state, step=1).result()
        counted = faults.count(lambda: engine.save(state, step=1, is_final=True).result())
        step = 2
        for broken, kinds in enumerate(counted):
            for fail_at, kind in enumerate(kinds):
                engine.save(state, step=step).result()
                export = lambda s=step: engine.save(state, step=s, is_final=True).result()  # noqa: E731
                failed = faults.attempt(step, broken, fail_at, export)
                where = (broken, fail_at, kind)
                assert not debris(root), where
                assert verifies(Checkpoint.open(root / f"epoch_0_step_{step}")), where
                dist.barrier()
                if failed:
                    export()
                assert Checkpoint.open(root / f"epoch_0_step_{step}").manifest.exports, where
                dist.barrier()
                step += 1
    return {"counted": counted, "failed": faults.seen}


def test_a_disk_that_fails_anywhere_in_an_added_export_spoils_nothing(tmp_path: Path) -> None:
    one, other = run_distributed(_faulty_exports, 2, tmp_path)
    assert one == other
    assert set(one["failed"]) >= {"make_dir", "allocate", "write_at", "sync", "sync_dir", "rename"}
    checkpoints = scan(tmp_path).checkpoints
    assert len(checkpoints) == 1 + sum(map(len, one["counted"]))
    assert all(verifies(item) and item.manifest.exports for item in checkpoints)


def test_a_disk_that_is_gone_leaves_debris_that_the_next_run_sweeps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, disk = make_state(), Disk()
    with build(tmp_path, disk) as engine:
        engine.save(state, step=1).result()
        for number, fail_at in enumerate((3, 8, 12, 20), start=2):
            disk.arm(fail_at, error=errno.EIO, stays_broken=True)
            with pytest.raises(SaveFailedError):
                engine.save(state, step=number)
            disk.disarm()
            assert latest(tmp_path) == "epoch_0_step_1"
        assert "could not be removed; the next start removes them" in caplog.text
        assert debris(tmp_path)
        assert engine.save(state, step=9).result().step == 9
    with build(tmp_path) as engine:
        assert engine.start(state).step == 9
    assert not debris(tmp_path)


def test_pruning_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = make_state()
    broken = [True]
    files = FaultyFiles(lambda operation: errno.EIO if broken[0] and ".deleting-" in str(operation) else None)
    with build(tmp_path, files, max_recent_checkpoints=1) as engine, caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            engine.save(state, step=step).result()
        engine.drain()
        broken[0] = False
        engine.save(state, step=4).result()
    assert "could not be pruned" in caplog.text
    assert [item.step for item in scan(tmp_path).checkpoints] == [4]
