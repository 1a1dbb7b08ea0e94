"""Ranks that are arranged differently than those that saved, and ranks that do not fit together."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from hydra_ckpt import AppState, CheckpointError, CheckpointingConfig, resumable
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.testing import run_distributed
from hydra_ckpt.testing.processes import PATIENCE
from tests.meshes import MESHES, Place, Run, local, place

# -- random numbers ------------------------------------------------------------------------------------------------


def _numbers() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def _seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _random_numbers(root: Path) -> dict[str, Any]:
    """Save on DDP with another state on each rank; what each mesh draws after loading, and what it reports."""
    places = {name: place(name) for name in ("ddp2", "fsdp2", "tp2", "fsdp2_tp2")}
    found: dict[str, Any] = {}
    model = nn.BatchNorm1d(3)
    if places["ddp2"].group is not None:
        _seed(7 + dist.get_rank())
        model.running_mean.fill_(dist.get_rank())
        with places["ddp2"].build(root) as engine:
            engine.save(AppState(model), step=5).result()
        found["saved"] = _numbers()
    dist.barrier()
    for name, here in places.items():
        if here.group is not None:
            for attempt in ("first", "again"):
                _seed(99 + dist.get_rank())
                model.running_mean.fill_(77)
                with here.build(root) as engine:
                    report = engine.load(AppState(model))
                assert report is not None
                found[f"{name} {attempt}"] = (_numbers(), report.rederived, model.running_mean[0].item())
                found[f"{name} notes"] = report.notes
    return found


def test_random_numbers_go_on_with_the_same_places_and_are_derived_otherwise(tmp_path: Path) -> None:
    *_, third, fourth = results = run_distributed(_random_numbers, 4, tmp_path)
    for rank, found in enumerate((third, fourth), start=2):
        # FSDP's two ranks see the data that DDP's two saw: exact, buffers too.
        for name in ("ddp2 first", "ddp2 again", "fsdp2 first"):
            assert found[name] == (found["saved"], (), float(rank))
        for name in ("tp2", "fsdp2_tp2"):
            numbers, rederived, mean = found[f"{name} first"]
            assert set(rederived) == {"rng", "buffers"}
            assert mean == 2.0  # the coordinator's
            assert numbers not in (third["saved"], fourth["saved"])
            assert found[f"{name} again"] == found[f"{name} first"]
            assert any("derived from step, data-parallel rank" in note for note in found[f"{name} notes"])
    assert third["saved"] != fourth["saved"]
    # Tensor-parallel peers draw the same numbers, data-parallel ranks others.
    assert third["tp2 first"] == fourth["tp2 first"]
    four = [found["fsdp2_tp2 first"][0] for found in results]
    assert four[0] == four[1]
    assert four[2] == four[3]
    assert four[0] != four[2]


def _unplaced(root: Path) -> tuple[float, ...]:
    with CheckpointingConfig(checkpoint_dir=str(root)).build(0, 0, 0) as engine:
        engine.load(AppState(nn.Linear(2, 2)))
    return _numbers()


def test_ranks_that_were_all_given_the_same_place_still_draw_different_numbers(tmp_path: Path) -> None:
    with CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as engine:
        engine.save(AppState(nn.Linear(2, 2)), step=1).result()
    one, other = run_distributed(_unplaced, 2, tmp_path)
    assert one != other


# -- data ----------------------------------------------------------------------------------------------------------

SAMPLES = 48


class OwnPlace:
    """A loader that only knows its own rank's place, as most do."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def _loader(here: Place) -> Any:
    replicate, shard, _ = MESHES[here.name][0]
    loader = DataLoader(range(SAMPLES), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    return resumable(loader, seed=1, rank=here.ranks[0], world_size=replicate * shard)


def _stream(root: Path, names: list[str]) -> dict[str, Any]:
    """One epoch, three batches on each mesh in turn, the last one to its end: the samples seen on each."""
    seen: dict[str, Any] = {}
    for number, here in enumerate([place(name) for name in names]):
        if here.group is not None:
            loader = _loader(here)
            before = str(root / names[number - 1] / "LATEST") if number else "none"
            with here.build(root / here.name, restore_from=before) as engine:
                report = engine.load(AppState(nn.Linear(2, 2), dataloader=loader))
                samples = []
                for count, batch in enumerate(loader, start=1):
                    samples += batch.tolist()
                    if count == 3 and number < len(names) - 1:
                        break
                if number < len(names) - 1:
                    engine.save(AppState(nn.Linear(2, 2), dataloader=loader), step=number + 1).result()
            seen[here.name] = (samples, () if report is None else report.rederived)
        dist.barrier()
    return seen


def test_a_stream_continues_over_other_meshes_with_no_sample_repeated_or_skipped(tmp_path: Path) -> None:
    names = ["fsdp4", "tp2", "fsdp2_tp2", "one"]
    results = run_distributed(_stream, 4, tmp_path, names)
    consumed = []
    for name in names:
        replicate, shard, tp = MESHES[name][0]
        members = [found[name] for found in results if name in found]
        assert len(members) == replicate * shard * tp
        for peers in (members[start : start + tp] for start in range(0, len(members), tp)):
            assert all(peer[0] == peers[0][0] for peer in peers)
            consumed += peers[0][0]
        assert all("dataloader" not in rederived for _, rederived in members)
    assert sorted(consumed) == list(range(SAMPLES))


def _own_places(root: Path) -> dict[str, Any]:
    found = {}
    places = {name: place(name) for name in ("fsdp2_tp2", "fsdp2", "fsdp4")}
    with places["fsdp2_tp2"].build(root) as engine:
        data_rank = places["fsdp2_tp2"].ranks[0]
        engine.save(AppState(nn.Linear(2, 2), dataloader=OwnPlace(10 + data_rank)), step=1).result()
    for name, here in places.items():
        if here.group is not None:
            loader = OwnPlace(-1)
            with here.build(root) as engine:
                report = engine.load(AppState(nn.Linear(2, 2), dataloader=loader))
            assert report is not None
            found[name] = (loader.position, "dataloader" in report.loaded, " ".join(report.notes))
    return found


def test_a_loader_that_knows_one_rank_s_place_continues_where_the_data_is_divided_alike_and_otherwise_begins_again(
    tmp_path: Path,
) -> None:
    results = run_distributed(_own_places, 4, tmp_path)
    assert [found["fsdp2_tp2"][:2] for found in results] == [(10, True), (10, True), (11, True), (11, True)]
    # The two data-parallel ranks continue where their counterparts were, whatever rank those had.
    assert [found["fsdp2"][:2] for found in results[2:]] == [(10, True), (11, True)]
    for found in results:
        assert found["fsdp4"][:2] == (-1, False)
        notes = found["fsdp4"][2]
        assert (
            "starts from the beginning: its state belongs to one of 2 data-parallel ranks, and this run has 4" in notes
        )


# -- ranks that differ ---------------------------------------------------------------------------------------------


class Tensors:
    """An extra that holds what it is told to."""

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {"x": torch.zeros(3)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.held

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.held = state


def _error(action: Any) -> tuple[str, str]:
    try:
        action()
    except CheckpointError as error:
        return type(error).__name__, str(error)
    return "", ""


def _layouts(root: Path, is_async: bool) -> dict[str, Any]:
    """Layouts that change after the first save: on one rank, on all, and back."""
    rank, found, extra = dist.get_rank(), {}, Tensors()
    model = nn.Linear(3, 2)
    state = AppState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), extras={"e": extra})
    one, two = {"x": torch.zeros(3)}, {"x": torch.zeros(4), "y": torch.ones(1)}
    config = CheckpointingConfig(checkpoint_dir=str(root), is_async=is_async, consolidation_timeout_minutes=1)
    began = time.monotonic()
    with config.build(rank, 0, 0) as engine:

        def save(step: int) -> None:
            engine.save(state, step=step).result()

        save(1)
        extra.held = two if rank == 1 else one  # a new layout, on one rank only
        found["one rank"] = _error(lambda: save(2))
        extra.held = two
        save(3)
        extra.held = two if rank == 1 else one  # both layouts are known
        found["known layouts"] = _error(lambda: save(4))
        extra.held = {"x": torch.zeros(3 + rank)}
        found["every rank"] = _error(lambda: save(5))
        extra.held = one
        save(6)
        # One rank cannot take its state apart, while another has a new layout.
        extra.held = {"x": object()} if rank == 1 else {"z": torch.zeros(9)}  # type: ignore[dict-item]
        found["unlike troubles"] = _error(lambda: save(7))
        for step in range(8, 20):  # an extra that grows with every save
            extra.held = {"x": torch.zeros(step)}
            save(step)
        found["remembered"] = len(engine._saver._contents._settled)
    found["seconds"] = time.monotonic() - began
    return found


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_layout_that_changes_on_one_rank_is_refused_on_all_and_later_saves_work(
    tmp_path: Path, is_async: bool
) -> None:
    results = run_distributed(_layouts, 3, tmp_path, is_async)
    for found in results:
        assert found["one rank"] == results[0]["one rank"]
        kind, text = found["one rank"]
        assert kind == "TopologyError"
        assert "of ranks 0 and 1, only on rank 0: extras.e.x F32 [3]" in text
        assert "of ranks 0 and 1, only on rank 1: extras.e.x F32 [4]" in text
        assert "of ranks 0 and 1, only on rank 1: extras.e.y F32 [1]" in text
        assert found["known layouts"][0] == "TopologyError"
        # All ranks that differ are listed.
        assert "only on rank 1: extras.e.x F32 [4]" in found["every rank"][1]
        assert "only on rank 2: extras.e.x F32 [5]" in found["every rank"][1]
        assert "extras.e.x: a builtins.object can be stored neither" in found["unlike troubles"][1]
        assert found["remembered"] <= 4
    assert [item.step for item in scan(tmp_path).checkpoints] == [1, 3, 6, *range(8, 20)]
    assert not list(tmp_path.glob(".epoch*"))


def _elsewhere(root: Path) -> dict[str, Any]:
    """Models of rank 3 that differ, and a checkpoint of another architecture, on a sharded model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, found = dist.get_rank(), {}
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp_shard",))

    def sharded(*layers: nn.Module) -> nn.Module:
        return fully_shard(nn.Sequential(*layers), mesh=mesh)

    model = sharded(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    config = CheckpointingConfig(checkpoint_dir=str(root))
    with config.build(rank, 0, 0) as engine:
        engine.save(AppState(model), step=1).result()
        other = sharded(nn.Linear(5, 4), nn.Linear(4, 2, bias=False).to(torch.bfloat16), nn.Linear(2, 2))
        before = {name: p.to_local().clone() for name, p in other.named_parameters()}
        found["load"] = _error(lambda: engine.load(AppState(other)))
        found["changed"] = [n for n, p in other.named_parameters() if not torch.equal(p.to_local(), before[n])]
    with CheckpointingConfig(checkpoint_dir=str(root / "other")).build(rank, 0, 0) as engine:
        unlike = nn.Linear(3, 3 + rank // 2, dtype=torch.float64 if rank == 1 else torch.float32)
        found["save"] = _error(lambda: engine.save(AppState(unlike), step=1))
    return found


def test_what_does_not_fit_is_listed_whole_on_all_ranks_before_anything_is_changed(tmp_path: Path) -> None:
    results = run_distributed(_elsewhere, 4, tmp_path)
    for found in results:
        assert found["changed"] == []
        kind, text = found["load"]
        assert kind == "KeyMismatchError"
        for line in (
            "0.weight: F32 [3, 5] in the checkpoint, F32 [4, 5] in the model",
            "0.bias: F32 [3] in the checkpoint, F32 [4] in the model",
            "1.weight: F32 [3] in the checkpoint, BF16 [2, 4] in the model",
            "2.weight: F32 [2, 3] in the checkpoint, F32 [2, 2] in the model",
            "unexpected (1): 1.bias",
        ):
            assert line in text
        kind, text = found["save"]
        assert kind == "TopologyError"
        assert "only on rank 1: model: weight F64 [3, 3]" in text
        assert "only on rank 2: model: weight F32 [4, 3]" in text
    assert not list((tmp_path / "other").glob("*epoch*"))


def _absent(root: Path) -> tuple[tuple[str, str], tuple[str, str]]:
    """One rank does not come to a save."""
    rank = dist.get_rank()
    state = AppState(nn.Linear(2, 2))
    config = CheckpointingConfig(checkpoint_dir=str(root), consolidation_timeout_minutes=0.05)
    with config.build(rank, 0, 0) as engine:
        engine.save(state, step=1).result()
        alone = _error(lambda: engine.save(state, step=2)) if rank == 0 else ("", "")
        dist.barrier()
        return alone, _error(lambda: None)


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_the_limit(tmp_path: Path) -> None:
    (alone, _), _ = run_distributed(_absent, 2, tmp_path)
    assert alone[0] == "CheckpointError"
    assert "every rank must make the same calls" in alone[1]
    assert [item.step for item in scan(tmp_path).checkpoints] == [1]


def _drift(root: Path, name: str, step: int) -> list[str]:
    """Replicas of which the last one has other values in one tensor; what is logged."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hydra_ckpt").addHandler(handler)
    here = place(name)
    run = Run(here)
    with here.build(root / name, is_async=True) as engine:
        engine.save(run.state, step=step).result()
        assert not [text for text in messages if "replicas" in text]
        if dist.get_rank() == dist.get_world_size() - 1:
            with torch.no_grad():
                for tensor in (run.parameters["up.weight"], run.parameters["embed.weight"]):
                    local(tensor).add_(1)
        for later in (1, 2):
            engine.save(run.state, step=step + later).result()
    return messages


@pytest.mark.parametrize(("name", "ranks"), [("ddp2", (0, 1)), ("hsdp2x2", (1, 3))])
def test_replicas_that_have_drifted_apart_are_warned_about_once_with_names(
    tmp_path: Path, name: str, ranks: tuple[int, int]
) -> None:
    first, *others = run_distributed(_drift, ranks[1] + 1, tmp_path, name, 7)
    [message] = [text for text in first if "replicas" in text]
    assert f"ranks {ranks[0]} and {ranks[1]} are replicas and hold different values in 2 of the " in message
    assert "model: up.weight" in message
    assert "model: embed.weight" in message
    assert not [text for messages in others for text in messages if "replicas" in text]


class Stubborn:
    """A tokenizer that cannot be saved when it is told so, and something that cannot be stored."""

    def __init__(self) -> None:
        self.fails = False

    def save_pretrained(self, directory: Any) -> None:
        if self.fails:
            raise OSError("no room for the vocabulary")

    def state_dict(self) -> dict[str, Any]:
        return {"x": object() if self.fails else 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


def _alone(root: Path) -> dict[str, Any]:
    """What only one rank meets in a save: the others hear of it at once, and later saves work."""
    rank, found = dist.get_rank(), {}
    extra, model = Stubborn(), nn.Linear(3, 2)
    state = AppState(model, extras={"stubborn": extra})
    began = time.monotonic()
    with CheckpointingConfig(checkpoint_dir=str(root)).build(rank, 0, 0) as engine:
        engine.save(state, step=1).result()
        extra.fails = rank == 1
        found["export"] = _error(lambda: engine.save(state, step=1, is_final=True))
        extra.fails = False
        engine.save(state, step=1, is_final=True).result()
        broken = AppState(model, extras={"stubborn": extra}, tokenizer=Stubborn())
        broken.tokenizer.fails = True
        found["tokenizer"] = _error(lambda: engine.save(broken, step=2))
        engine.save(state, step=2).result()
    with CheckpointingConfig(checkpoint_dir=str(root / "other")).build(rank, 0, 0) as engine:
        found["tokenizer at the first save"] = _error(lambda: engine.save(broken, step=1))
        engine.save(state, step=1).result()
    found["seconds"] = time.monotonic() - began
    return found


def test_what_only_one_rank_meets_is_told_to_all_without_waiting(tmp_path: Path) -> None:
    for found in run_distributed(_alone, 2, tmp_path):
        assert found["export"][0] == "SaveFailedError"
        assert "rank 1: CheckpointError: extras.stubborn.x: a builtins.object" in found["export"][1]
        assert "no room for the vocabulary" in found["tokenizer"][1]
        assert "no room for the vocabulary" in found["tokenizer at the first save"][1]
    assert [item.step for item in scan(tmp_path).checkpoints] == [1, 2]
    assert scan(tmp_path).checkpoints[0].manifest.exports


# -- a file system that shows things late --------------------------------------------------------------------------


def _late(root: Path, appears: bool) -> tuple[tuple[str, str], float]:
    """Load a checkpoint that rank 1 does not see when rank 0 does.

    Each process finds the directory below its own working directory, as hosts do below their own mounts.
    """
    rank = dist.get_rank()
    here = root / f"host-{rank}"
    here.mkdir()
    os.chdir(here)
    model = nn.Linear(2, 2)
    if rank == 0:
        (here / "run").symlink_to(root / "run")
    elif appears:
        threading.Timer(1.0, lambda: (here / "run").symlink_to(root / "run")).start()
    config = CheckpointingConfig(checkpoint_dir="/proc/self/cwd/run", consolidation_timeout_minutes=0.05 * PATIENCE)
    with config.build(rank, 0, 0) as engine:
        error = _error(lambda: engine.load(AppState(model)))
    return error, model.weight[0, 0].item()


@pytest.mark.parametrize("appears", [True, False])
def test_a_checkpoint_that_another_host_sees_late_is_waited_for_no_longer_than_the_limit(
    tmp_path: Path, appears: bool
) -> None:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, 3.0)
    with CheckpointingConfig(checkpoint_dir=str(tmp_path / "run")).build(0, 0, 0) as engine:
        engine.save(AppState(model), step=1).result()
    for (kind, text), value in run_distributed(_late, 2, tmp_path, appears):
        assert kind == ("" if appears else "CheckpointNotFoundError")
        assert (value == 3.0) == appears
        assert appears or ("holds no manifest.json" in text and "must be one directory shared by all hosts" in text)
