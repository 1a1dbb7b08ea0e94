"""Pipes, links and broken files in place of small files: nothing hangs, and only one checkpoint counts as damaged."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hydra_ckpt import (
    AppState,
    CheckpointConfigError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointingConfig,
    CorruptCheckpointError,
)
from hydra_ckpt.cli import app
from hydra_ckpt.errors import printable
from hydra_ckpt.files import Files
from hydra_ckpt.hub.reference import find_reference
from hydra_ckpt.jobs.yaml_text import parse_config, parse_yaml
from hydra_ckpt.loading.changes import saved_config
from hydra_ckpt.resolved import KeepOptions
from hydra_ckpt.storage.torch_file import read_tensor
from hydra_ckpt.store.catalog import Checkpoint, scan
from hydra_ckpt.store.directory import Directory
from hydra_ckpt.store.manifest import seal
from hydra_ckpt.store.small_files import read_small_file
from hydra_ckpt.sweeps.record import RECORD, read_record
from hydra_ckpt.testing import FaultyFiles
from hydra_ckpt.testing.processes import PATIENCE

pytestmark = pytest.mark.timeout(120 * PATIENCE)
NEWEST = "epoch_0_step_3"


def make_state() -> AppState:
    torch.manual_seed(0)
    return AppState(torch.nn.Linear(2, 2))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    with CheckpointingConfig(checkpoint_dir=str(root)).build(0, 0, 0) as engine:
        for step in (1, 2, 3):
            engine.save(make_state(), step=step, metrics={"loss": 4.0 - step}).result()
            engine.add_metrics(step, 0, {"acc": 0.5})
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "run", symlinks=True)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(5 << 30)


def sealed(body: dict[str, Any]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(seal(body)) and None  # type: ignore[func-returns-value]


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None  # type: ignore[func-returns-value]


DEEP = "[" * 100_000 + "]" * 100_000
BROKEN: dict[str, Callable[[Path], None]] = {
    "pipe": pipe,
    "device": device,
    "directory": directory,
    "sparse": sparse,
    "deep": text('{"a": ' + DEEP + "}"),
    "surrogate": text('{"a": "\\ud800",\n "~xxh3": "0123456789abcdef"\n}\n'),
    "not sealed": text('{"metrics": {"loss": 1}}'),
}
WRONG_METRICS: dict[str, Callable[[Path], None]] = {
    "text": sealed({"metrics": {"loss": "low"}}),
    "401 digits": sealed({"metrics": {"loss": 10**400}}),
    "null": sealed({"metrics": {"loss": None}}),
    "nested": sealed({"metrics": {"loss": {"a": 1}}}),
    "a list": sealed({"metrics": ["loss"]}),
    "none": sealed({"other": 1}),
}


def a_run_goes_on(root: Path, resumed: int, kept: list[int]) -> None:
    state = make_state()
    config = CheckpointingConfig(checkpoint_dir=str(root), retention={"newest": 1, "best": 1}, best_metric_key="loss")
    with config.build(0, 0, 0) as engine:
        report = engine.start(state)
        assert report is not None
        assert report.step == resumed
        engine.save(state, step=9, metrics={"loss": 9.0}).result()
        engine.drain()
    assert [item.step for item in scan(root).checkpoints] == kept


def the_tool_answers(root: Path) -> None:
    verbs = (["list"], ["list", "--json"], ["show"], ["verify"], ["prune", "--newest", "1"], ["repair", "--dry-run"])
    for verb in verbs:
        result = CliRunner().invoke(app, [verb[0], str(root), *verb[1:]])
        assert result.exception is None or isinstance(result.exception, SystemExit | CheckpointError), verb


@pytest.mark.parametrize("kind", BROKEN)
def test_a_manifest_that_is_no_file_of_ours_is_damage_of_one_directory(root: Path, kind: str) -> None:
    BROKEN[kind](root / NEWEST / "manifest.json")
    the_tool_answers(root)
    a_run_goes_on(root, 2, [2, 9])
    [aside] = root.glob(f".{NEWEST}.corrupt-*")
    assert os.path.lexists(aside / "manifest.json")


@pytest.mark.parametrize("kind", [*BROKEN, *WRONG_METRICS])
def test_metrics_that_are_none_are_left_out(root: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    {**BROKEN, **WRONG_METRICS}[kind](root / NEWEST / "metrics.json")
    assert Checkpoint.open(root / NEWEST).metrics == {"loss": 1.0}
    the_tool_answers(root)
    a_run_goes_on(root, 3, [3, 9])
    assert "are left out" in caplog.text


@pytest.mark.parametrize("key", ["step", "epoch", "world_size", "created"])
@pytest.mark.parametrize("value", [10**400, "1", -1, 1.5e308])
def test_numbers_that_are_none_are_damage(root: Path, key: str, value: object) -> None:
    body = json.loads((root / NEWEST / "manifest.json").read_text())
    del body["~xxh3"]
    (root / NEWEST / "manifest.json").write_bytes(seal({**body, key: value}))
    assert NEWEST in scan(root).damaged
    the_tool_answers(root)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("key", ["details", "topology"])
def test_what_is_nested_too_deeply_to_be_printed_is_damage(root: Path, key: str) -> None:
    body = json.loads((root / NEWEST / "manifest.json").read_text())
    del body["~xxh3"]
    body[key] = {**body[key], "deep": nested(300)}
    (root / NEWEST / "manifest.json").write_bytes(seal(body))
    assert NEWEST in scan(root).damaged
    the_tool_answers(root)


def stuck(kind: str, name: str) -> FaultyFiles:
    return FaultyFiles(lambda operation: 13 if operation.kind == kind and name in str(operation.path) else None)


def test_leftovers_that_cannot_be_removed_do_not_keep_a_run_from_starting(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / ".epoch_0_step_7.draft-0123456789ab").mkdir()
    directory = Directory(root, stuck("remove_tree", "draft"), KeepOptions("loss", "min", None, None), None)
    directory.open(None)
    directory.close()
    assert "cannot be removed" in caplog.text


@pytest.mark.parametrize("name", [".owner.json.0123456789ab", ".LATEST.0123456789ab", ".metrics.json.0123456789ab"])
def test_a_prepared_file_that_cannot_be_removed_does_not_keep_a_run_from_starting(
    root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (root / name).write_text("x")
    directory = Directory(root, stuck("unlink", name), KeepOptions("loss", "min", None, None), None)
    directory.open(None)
    directory.close()
    assert f"{name}, left by a run that died, cannot be removed" in caplog.text
    (root / name).unlink()
    (root / name).mkdir()  # no run of ours makes one
    a_run_goes_on(root, 3, [3, 9])
    assert (root / name).is_dir()


@pytest.mark.parametrize("answer", ["rename", "read"])
def test_a_late_retirement_that_cannot_be_undone_stays_and_stops_nothing(
    root: Path, answer: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = root / f".epoch_0_step_2.deleting-{'0' * 12}{'1' * 12}"
    (root / "epoch_0_step_2").rename(late)
    read, inode = os.read, (late / "manifest.json").stat().st_ino

    def failing(descriptor: int, count: int) -> bytes:
        if answer == "read" and os.fstat(descriptor).st_ino == inode:
            raise OSError(5, "Input/output error")
        return read(descriptor, count)

    monkeypatch.setattr(os, "read", failing)
    files = stuck("rename", late.name) if answer == "rename" else Files()
    directory = Directory(root, files, KeepOptions("loss", "min", None, None), None)
    directory.open(None)
    directory.close()
    assert late.is_dir()
    assert ("it stays retired" if answer == "rename" else "is left alone") in caplog.text


def test_an_owner_that_is_a_link_is_replaced_and_what_it_leads_to_is_not(root: Path, tmp_path: Path) -> None:
    record = (root / "owner.json").read_text()
    (root / "owner.json").rename(tmp_path / "elsewhere.json")
    (root / "owner.json").symlink_to(tmp_path / "elsewhere.json")
    a_run_goes_on(root, 3, [3, 9])
    assert not (root / "owner.json").is_symlink()
    assert (tmp_path / "elsewhere.json").read_text() == record


def test_an_owner_that_is_a_directory_is_refused_by_name_until_it_is_removed(root: Path) -> None:
    (root / "owner.json").unlink()
    (root / "owner.json").mkdir()
    before = sorted(root.iterdir())
    directory = Directory(root, Files(), KeepOptions("loss", "min", None, None), None)
    with pytest.raises(CheckpointExistsError, match=r"owner\.json is a directory.*Remove the directory"):
        directory.open(None)
    assert sorted(root.iterdir()) == before
    (root / "owner.json").rmdir()
    a_run_goes_on(root, 3, [3, 9])


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("x" * 300)])
def test_an_owner_that_is_a_pipe_or_leads_nowhere_is_replaced(root: Path, make: Callable[[Path], None]) -> None:
    (root / "owner.json").unlink()
    make(root / "owner.json")
    a_run_goes_on(root, 3, [3, 9])
    assert (root / "owner.json").is_file()


def test_a_record_that_the_disk_does_not_give_may_be_a_live_run_s(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, inode = os.read, (root / "owner.json").stat().st_ino

    def failing(descriptor: int, count: int) -> bytes:
        if os.fstat(descriptor).st_ino == inode:
            raise OSError(5, "Input/output error")
        return read(descriptor, count)

    monkeypatch.setattr(os, "read", failing)
    directory = Directory(root, Files(), KeepOptions("loss", "min", None, None), None)
    with pytest.raises(CheckpointConfigError, match="Input/output error"):
        directory.open(None)
    the_tool_answers(root)


def test_one_checkpoint_that_cannot_be_renamed_does_not_keep_the_others(root: Path) -> None:
    files = FaultyFiles(
        lambda operation: 13 if operation.kind == "rename" and "step_1" in str(operation.path) else None
    )
    directory = Directory(root, files, KeepOptions("loss", "min", max_recent=1, retention=None), None)
    directory.open(None)
    try:
        with pytest.raises(OSError, match="Permission denied"):
            directory.prune()
    finally:
        directory.close()
    assert [item.step for item in scan(root).checkpoints] == [1, 3]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_checkpoint_that_may_not_be_opened_is_kept_and_the_others_go(root: Path) -> None:
    (root / "epoch_0_step_1" / "manifest.json").chmod(0)
    a_run_goes_on(root, 3, [3, 9])


def test_a_checkpoint_that_is_read_only_is_pruned_like_others(root: Path) -> None:
    (root / "epoch_0_step_1" / "manifest.json").chmod(0o444)
    a_run_goes_on(root, 3, [3, 9])


@pytest.mark.parametrize("name", ["owner.json", "LATEST.txt", "BEST.txt", "notes.txt", "PAPER.txt"])
def test_a_pipe_beside_the_checkpoints_keeps_nobody_waiting(root: Path, name: str) -> None:
    (root / name.removesuffix(".txt")).unlink(missing_ok=True)
    pipe(root / name)
    the_tool_answers(root)
    a_run_goes_on(root, 3, [3, 9])


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_disk_that_fails_on_the_newest_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    read, inode = os.read, (root / NEWEST / "manifest.json").stat().st_ino

    def failing(descriptor: int, count: int) -> bytes:
        if os.fstat(descriptor).st_ino == inode:
            raise error
        return read(descriptor, count)

    monkeypatch.setattr(os, "read", failing)
    assert "cannot be read" in scan(root).damaged[NEWEST]
    the_tool_answers(root)
    a_run_goes_on(root, 2, [2, 9])


def test_a_disk_that_fails_in_the_weights_of_the_newest_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    inodes = {path.stat().st_ino for path in (root / NEWEST).rglob("*.safetensors")}

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        if os.fstat(descriptor).st_ino in inodes:
            raise OSError(5, "Input/output error")
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    a_run_goes_on(root, 2, [2, 9])


def test_a_process_without_descriptors_calls_nothing_damaged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="Too many open files"):
        read_small_file(root / NEWEST / "manifest.json", 100)


def test_configurations_that_are_no_files_are_not_read(root: Path) -> None:
    config = root / NEWEST / "config"
    config.mkdir(exist_ok=True)
    for name in ("config.yaml", "hydra.yaml"):
        pipe(config / name)
    assert saved_config(root / NEWEST) is None
    result = CliRunner().invoke(app, ["show", str(root / NEWEST)])
    assert result.exit_code == 0, result.output
    pipe(root / RECORD)
    assert read_record(root) is None
    (root / RECORD).unlink()
    (root / RECORD).write_text(json.dumps({"state": "running", "checkpoint_dir": 5, "overrides": []}))
    assert read_record(root) is None


def test_yaml_is_read_within_limits() -> None:
    levels = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert parse_config("\n".join(levels)) is None
    assert parse_config("a: &x 1\nb: *x") is None
    assert parse_yaml("[" * 200 + "]" * 200) is None
    assert parse_yaml("x" * (2 << 20)) is None
    assert parse_config("a: &unused 1\nb: {c: [1, 2]}") == {"a": 1, "b": {"c": [1, 2]}}
    assert parse_yaml("- a=1\n- b=2") == ["a=1", "b=2"]
    assert parse_yaml("a: " + "9" * 5000) is None


def test_a_checkpoint_dir_that_is_a_link_is_fine(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    a_run_goes_on(tmp_path / "link", 3, [3, 9])


def test_links_of_the_hub_cache_are_followed_and_others_are_not(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    for name in ("refs", "blobs", "snapshots/abc"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "blobs" / "1").write_text('{"model_type": "x"}')
    (repository / "snapshots" / "abc" / "config.json").symlink_to("../../blobs/1")
    (tmp_path / "secret").write_text("{}")
    (repository / "snapshots" / "abc" / "other.json").symlink_to(tmp_path / "secret")
    reference = find_reference("a/b", tmp_path)
    assert reference.config == {"model_type": "x"}
    with pytest.raises(CorruptCheckpointError, match="leads out"):
        reference.json("other.json")
    (repository / "refs" / "main").write_text("../../..")
    with pytest.raises(CorruptCheckpointError, match="does not name a snapshot"):
        find_reference("a/b", tmp_path)


# -- .distcp pieces ----------------------------------------------------------------------------------------------------


def saved(tensor: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


KINDS = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint16, torch.float8_e4m3fn, torch.complex64]


@pytest.mark.parametrize("dtype", KINDS)
def test_a_piece_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    for tensor in (torch.arange(12).view(3, 4), torch.ones(4, 6).t(), torch.zeros(0, 3), torch.tensor(3)):
        data = saved(tensor.to(dtype))
        found, expected = read_tensor(bytearray(data)), torch.load(io.BytesIO(data), weights_only=True)
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert bytes(found.untyped_storage()) == bytes(expected.untyped_storage())  # type: ignore[call-overload]


class Asks:
    """What a pickle asks to be called."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.asked = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.asked


def rewritten(data: bytes, change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", kind) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return file.getvalue()


def bombs() -> Iterator[tuple[str, bytes]]:
    small = saved(torch.zeros(4))
    yield "compressed", rewritten(small, lambda n, b: bytes(1 << 24) if n.endswith("/0") else b, zipfile.ZIP_DEFLATED)
    asks = pickle.dumps(Asks(bytearray, 1 << 40), protocol=2)
    yield "asks for memory", rewritten(small, lambda n, b: asks if n.endswith("pkl") else b)
    yield (
        "calls something",
        rewritten(small, lambda n, b: pickle.dumps(Asks(os.mkdir, "/nowhere")) if n.endswith("pkl") else b),
    )
    yield "beyond its memory", rewritten(small, lambda n, b: b[:4] if n.endswith("/0") else b)
    yield "a list", rewritten(small, lambda n, b: pickle.dumps([1], 2) if n.endswith("pkl") else b)
    yield "no archive", pickle.dumps(Asks(bytearray, 1 << 40))
    yield "cut off", small[: len(small) // 2]
    yield "empty", b""


@pytest.mark.parametrize(("kind", "data"), list(bombs()), ids=lambda item: item if isinstance(item, str) else "")
def test_a_piece_that_is_a_bomb_is_refused(kind: str, data: bytes) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the caller makes one kind of it
        read_tensor(bytearray(data))
    assert not isinstance(caught.value, MemoryError | FileNotFoundError), kind


def test_a_bomb_in_a_checkpoint_is_damage(tmp_path: Path) -> None:
    state = make_state()
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), model_save_format="torch_save", verify_on_load=False)
    with config.build(0, 0, 0) as engine:
        path = engine.save(state, step=1).result().path
        [piece] = (path / "model").glob("*.distcp")
        piece.write_bytes(b"\0" * piece.stat().st_size)
        with pytest.raises(CorruptCheckpointError, match=r"\.distcp.*cannot be read"):
            engine.load(make_state(), restore_from="epoch_0_step_1")


# -- terminals ---------------------------------------------------------------------------------------------------------

NASTY = "\x1b]0;owned\x07\x1b[2Jred\x9b31m\u202eevil"


def test_what_would_steer_a_terminal_is_shown_as_an_escape() -> None:
    assert printable(NASTY).isprintable()
    assert printable("a b\nc é") == "a b\nc é"
    assert printable(printable(NASTY)) == printable(NASTY)
    assert printable("\ud800") == "\\ud800"
    assert str(CheckpointConfigError(NASTY)).isprintable()


def test_the_tool_prints_no_escape_sequences(root: Path, tmp_path: Path) -> None:
    body = json.loads((root / NEWEST / "manifest.json").read_text())
    del body["~xxh3"]
    body["metrics"] = {NASTY: 1.0}
    body["details"] = {**body["details"], "host": NASTY, "deciding_metric": NASTY}
    (root / NEWEST / "manifest.json").write_bytes(seal(body))
    (root / (NASTY + "x")).symlink_to(NEWEST)
    (root / "epoch_0_step_1" / "metrics.json").write_text(NASTY)
    (root / os.fsdecode(b"\xff\xfe")).symlink_to(NEWEST)
    for verb in (["list"], ["show"], ["verify"], ["prune", "--newest", "1"], ["list", "--json"], ["show", "--json"]):
        result = CliRunner().invoke(app, [verb[0], str(root), *verb[1:]])
        assert all(letter.isprintable() or letter == "\n" for letter in result.output), (verb, result.output)
        assert isinstance(result.exception, SystemExit | None), verb


# -- what is not ours stays --------------------------------------------------------------------------------------------


def test_a_start_removes_its_own_leftovers_and_nothing_else(root: Path) -> None:
    mine = [".BEST_notes.md", ".LATEST", ".LATEST.bak", ".BEST.txt.old", ".owner.json.swp", ".BEST.0123"]
    ours = [".BEST.0123456789ab", ".LATEST.txt.0123456789ab", ".owner.json.0123456789ab"]
    for name in (*mine, *ours):
        (root / name).write_text("x")
    for name in (".notes.draft-2", ".paper.deleting-1"):
        (root / name).mkdir()
        (root / name / "text").write_text("x")
    a_run_goes_on(root, 3, [3, 9])
    assert all((root / name).exists() for name in (*mine, ".notes.draft-2/text", ".paper.deleting-1/text"))
    assert not any((root / name).exists() for name in ours)


def test_a_token_that_is_a_directory_is_left_alone(root: Path) -> None:
    (root / NEWEST / ".token").mkdir()
    a_run_goes_on(root, 3, [3, 9])


def test_latest_is_looked_for_again_while_a_run_prunes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), max_recent_checkpoints=1)
    reader = CheckpointingConfig(checkpoint_dir=str(tmp_path), restore_from="latest")
    done, steps = threading.Event(), []
    with config.build(0, 0, 0) as engine, reader.build(0, 0, 0) as other:
        engine.save(make_state(), step=1).result()

        def write() -> None:
            for step in range(2, 40):
                engine.save(make_state(), step=step).result()
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        while not done.is_set():
            report = other.load(make_state(), parts=["model"])
            assert report is not None
            steps.append(report.step)
        writer.join()
    assert len(steps) > 1, sys.version
