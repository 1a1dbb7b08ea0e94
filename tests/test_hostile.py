"""Checkpoint directories that somebody else has made: loading them ends in one of our errors or in a correct load.

Accidental damage fails its digest. Here the digests are right: the attacker has computed them.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hydra_ckpt import AppState, CheckpointError, CheckpointingConfig, CorruptCheckpointError
from hydra_ckpt.storage.verification import checks, findings
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.manifest import seal

NAME = "epoch_0_step_1"


def make_state() -> AppState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return AppState(model, optimizer, extras={"ema": nn.Linear(2, 2)})


@dataclass
class Victim:
    """A directory with one checkpoint, and a file outside that nobody may read or change."""

    root: Path

    @property
    def checkpoint(self) -> Path:
        return self.root / "run" / NAME

    def manifest(self) -> dict[str, Any]:
        body = json.loads((self.checkpoint / "manifest.json").read_text())
        del body["~xxh3"]
        return dict(body)

    def write_manifest(self, body: dict[str, Any]) -> None:
        (self.checkpoint / "manifest.json").write_bytes(seal(body))

    def write_listed(self, name: str, data: bytes) -> None:
        """Change a file, and what the manifest says of it."""
        (self.checkpoint / name).write_bytes(data)
        body = self.manifest()
        body["files"][name].update(bytes=len(data), xxh3=xxhash.xxh3_64_hexdigest(data))
        self.write_manifest(body)

    def attack(self) -> str:
        """Verify and load it in every way; returns how it ended."""
        before = {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file() and not path.is_symlink()}
        endings = [self._load("auto"), self._load(NAME), self._verify()]
        after = {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file() and not path.is_symlink()}
        assert after == before
        assert not (self.root / "ran").exists(), "code from the checkpoint was run"
        return " ".join(endings)

    def _load(self, selector: str) -> str:
        state = make_state()
        config = CheckpointingConfig(checkpoint_dir=str(self.root / "run"), restore_from=selector)
        with config.build(0, 0, 0) as engine:
            try:
                report = engine.load(state)
            except CheckpointError as error:
                return type(error).__name__
        return "nothing" if report is None else "loaded"

    def _verify(self) -> str:
        try:
            checkpoint = Checkpoint.open(self.checkpoint)
            checkpoint.check_files()
            manifest = checkpoint.manifest
            found = list(findings(checkpoint.path, checks(checkpoint.path, manifest.files, manifest.digests)))
        except CheckpointError as error:
            return type(error).__name__
        return "damaged" if found else "whole"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    with CheckpointingConfig(checkpoint_dir=str(root / "run"), save_consolidated="always").build(0, 0, 0) as engine:
        engine.save(make_state(), step=1, metrics={"loss": 1.0}).result()
    (root / "secret").write_bytes(b"do not look")
    return root


@pytest.fixture
def victims(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Victim]:
    def fresh() -> Victim:
        root = tmp_path_factory.mktemp("victim")
        shutil.copytree(template, root, symlinks=True, dirs_exist_ok=True)
        return Victim(root)

    return fresh


def test_the_victim_is_sound_before_it_is_attacked(victims: Callable[[], Victim]) -> None:
    victim = victims()
    assert victim.attack() == "loaded loaded whole"
    victim.write_manifest(victim.manifest())  # sealing again what was there changes nothing
    assert victim.attack() == "loaded loaded whole"


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a tree of JSON."""
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield from places(value, (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    tree = copy.deepcopy(tree)
    home = tree
    for key in path[:-1]:
        home = home[key]
    home[path[-1]] = value
    return tree


NAMES = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["../secret", "/etc/passwd", "../../secret", "a\0b", "", ".", "x" * 5000, "manifest.json", "~"]),
)

LIES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2**31, 2**62, 2**63, 2**64, 10**15, 1e308, -0.0]),
    st.floats(allow_nan=False),
    NAMES,
    st.lists(st.integers(-5, 5), max_size=3),
    st.dictionaries(st.sampled_from(["~", "bytes", "xxh3", "tensor", "x"]), st.integers(-2, 2) | st.text(max_size=3)),
    st.recursive(st.none(), lambda inner: st.lists(inner, min_size=1, max_size=1), max_leaves=30),
)

fuzzed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@fuzzed
@given(data=st.data())
def test_a_manifest_that_lies_anywhere(victims: Callable[[], Victim], data: st.DataObject) -> None:
    victim = victims()
    body = victim.manifest()
    path = data.draw(st.sampled_from([place for place in places(body) if place]))
    lie = data.draw(LIES)
    victim.write_manifest(replaced(body, path, lie))
    victim.attack()
    shutil.rmtree(victim.root)


@fuzzed
@given(data=st.data())
def test_a_name_in_the_manifest_that_lies(victims: Callable[[], Victim], data: st.DataObject) -> None:
    victim = victims()
    body = victim.manifest()
    home = data.draw(st.sampled_from(["files", "parts", "exports", "metrics", ""]))
    inside = body[home] or body if home else body
    old = data.draw(st.sampled_from(sorted(inside)))
    inside[data.draw(NAMES)] = inside.pop(old)
    victim.write_manifest(body)
    victim.attack()
    shutil.rmtree(victim.root)


@fuzzed
@given(data=st.data())
def test_progress_that_lies_anywhere(victims: Callable[[], Victim], data: st.DataObject) -> None:
    victim = victims()
    [name] = [name for name in victim.manifest()["files"] if name.startswith("progress/shared")]
    body = json.loads((victim.checkpoint / name).read_text())
    path = data.draw(st.sampled_from(sorted(places(body), key=str)))
    victim.write_listed(name, json.dumps(replaced(body, path, data.draw(LIES))).encode())
    victim.attack()
    shutil.rmtree(victim.root)


@fuzzed
@given(data=st.data())
def test_files_of_other_bytes_with_right_digests(victims: Callable[[], Victim], data: st.DataObject) -> None:
    victim = victims()
    small = sorted(name for name, entry in victim.manifest()["files"].items() if entry["xxh3"] is not None)
    name = data.draw(st.sampled_from(small))
    body = bytearray((victim.checkpoint / name).read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "noise"]))
    position = data.draw(st.integers(0, max(len(body) - 1, 0)))
    if kind == "flip" and body:
        body[position] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del body[position:]
    elif kind == "grow":
        body[position:position] = data.draw(st.binary(min_size=1, max_size=60))
    else:
        body[:] = data.draw(st.binary(max_size=200))
    victim.write_listed(name, bytes(body))
    victim.attack()
    shutil.rmtree(victim.root)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_pickles_are_never_opened(victims: Callable[[], Victim]) -> None:
    victim = victims()
    bomb = pickle.dumps(Bomb(victim.root / "ran"))
    for name in sorted(victim.manifest()["files"]):
        again = victims()
        again.write_listed(name, pickle.dumps(Bomb(again.root / "ran")))
        endings = again.attack()
        # A small file that nothing is read from may hold anything; whatever is read must not be loaded.
        assert "loaded" not in endings or name.split("/")[-1].endswith((".json", ".txt")), (name, endings)
    (victim.checkpoint / ".metadata").write_bytes(bomb)
    (victim.checkpoint / "model" / ".metadata").write_bytes(bomb)
    assert victim.attack() == "loaded loaded whole"


def test_a_foreign_directory_of_pickles_is_refused(tmp_path: Path) -> None:
    for name in (".metadata", "__0_0.distcp", "pytorch_model.bin", "random_states_0.pkl"):
        (tmp_path / "foreign").mkdir(exist_ok=True)
        (tmp_path / "foreign" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"))
    with config.build(0, 0, 0) as engine, pytest.raises(CheckpointError):
        engine.load(make_state(), restore_from=str(tmp_path / "foreign"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model", "progress", "digests"])
def test_a_directory_that_is_a_link_is_not_followed(victims: Callable[[], Victim], name: str) -> None:
    victim = victims()
    (victim.checkpoint / name).rename(victim.root / "moved")
    (victim.checkpoint / name).symlink_to(victim.root / "moved")
    assert "loaded" not in victim.attack().split()
    for link in [path for path in (victim.root / "moved").rglob("*") if path.is_file()]:
        again = victims()
        inside = again.checkpoint / name / link.relative_to(victim.root / "moved")
        shutil.copy(inside, again.root / "elsewhere")
        inside.unlink()
        inside.symlink_to(again.root / "elsewhere")
        assert "CorruptCheckpointError" in again.attack(), link


def test_a_manifest_of_gigantic_promises_costs_no_memory(victims: Callable[[], Victim]) -> None:
    victim = victims()
    body = victim.manifest()
    for entry in body["files"].values():
        entry["bytes"] = 10**15
    victim.write_manifest(body)
    assert victim.attack() == "nothing CorruptCheckpointError CorruptCheckpointError"
    with pytest.raises(CorruptCheckpointError):
        checkpoint = Checkpoint.open(victim.checkpoint)
        checks(checkpoint.path, checkpoint.manifest.files, checkpoint.manifest.digests)


def test_a_header_of_a_hundred_megabytes_is_refused_before_it_is_parsed(victims: Callable[[], Victim]) -> None:
    victim = victims()
    [weights] = (victim.checkpoint / "model" / "consolidated").glob("*.safetensors")
    name = weights.relative_to(victim.checkpoint).as_posix()
    size = 120 << 20
    with weights.open("wb") as file:
        file.write(size.to_bytes(8, "little") + b"{")
        file.truncate(size + 64)
    body = victim.manifest()
    body["files"][name]["bytes"] = size + 64
    victim.write_manifest(body)
    assert "loaded" not in victim.attack().split()
