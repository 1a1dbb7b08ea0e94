"""Saves through `dcp.save` whose plans DCP caches: every save is whole, and a failed one leaves nothing."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hydra_ckpt.files import Files
from hydra_ckpt.storage import PooledStager, SafetensorsReader, SafetensorsWriter
from hydra_ckpt.testing import FaultyFiles, run_distributed
from hydra_ckpt.testing.processes import PATIENCE


@pytest.fixture(autouse=True)
def _no_cached_plans() -> Iterator[None]:
    yield
    for cache in (
        SavePlanner._cached_save_plan,
        SavePlanner._cached_final_save_plan,
        SavePlanner._cached_all_plans,
        SavePlanner._cached_global_plan,
        SavePlanner._cached_metadata,
    ):
        cache.clear()


def caching() -> DefaultSavePlanner:
    return DefaultSavePlanner(enable_plan_caching=True)


def state(value: float, **more: Any) -> dict[str, Any]:
    """A sharded and a plain tensor, a value and nested ones; with a process group or without."""
    whole = torch.arange(15.0).view(5, 3) + value
    if dist.is_initialized():
        whole = distribute_tensor(whole, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
    return {"w": whole, "opt": {"steps": [torch.tensor(value), {"lr": value}]}, "n": int(value), **more}


def loaded(path: Path, **more: Any) -> dict[str, Any]:
    target = {**state(-1), **more}
    dcp.load(target, storage_reader=SafetensorsReader(path))
    return target


def assert_holds(path: Path, value: float) -> None:
    found, wanted = loaded(path), state(value)
    whole, expected = ((item.full_tensor() if dist.is_initialized() else item) for item in (found["w"], wanted["w"]))
    assert torch.equal(whole, expected)
    assert torch.equal(found["opt"]["steps"][0], torch.tensor(value))
    assert (found["n"], found["opt"]["steps"][1]) == (int(value), {"lr": value})


def failure(path: Path, **arguments: Any) -> str:
    with pytest.raises(CheckpointException) as caught:
        dcp.save(storage_writer=SafetensorsWriter(path), **arguments)
    return str(caught.value)


def failing(kind: str) -> FaultyFiles:
    return FaultyFiles(lambda operation: 28 if operation.kind == kind else None)


def _saves(root: Path) -> None:
    for number in range(3):  # a writer for each save
        dcp.save(state(number), storage_writer=SafetensorsWriter(root / f"new{number}"), planner=caching())
    one, other = SafetensorsWriter(root / "unused"), SafetensorsWriter(root / "unused", max_file_bytes=16)
    for number in range(3):  # two writers in turn, which lay files out differently
        dcp.save(state(number), checkpoint_id=root / f"one{number}", storage_writer=one, planner=caching())
        dcp.save(state(number + 10), checkpoint_id=root / f"other{number}", storage_writer=other, planner=caching())
    for number in range(3):
        assert_holds(root / f"new{number}", number)
        assert_holds(root / f"one{number}", number)
        assert_holds(root / f"other{number}", number + 10)
    assert len(list((root / "other2" / "state").glob("*.safetensors"))) > 1
    assert len(list((root / "one2" / "state").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("world", [1, 2])
def test_cached_plans_serve_new_writers_the_same_one_and_two_in_turn(tmp_path: Path, world: int) -> None:
    run_distributed(_saves, world, tmp_path)
    assert not list(tmp_path.glob(".*"))


def _changes(root: Path) -> None:
    """The plan of one rank changes, that of the other does not."""
    last = dist.get_rank() == dist.get_world_size() - 1
    for number, has_extra in enumerate([False, True, True, False]):
        extra = {"extra": torch.full((4,), float(number)), "note": (number, "x")} if has_extra and last else {}
        dcp.save(state(number, **extra), storage_writer=SafetensorsWriter(root / str(number)), planner=caching())
    for number, has_extra in enumerate([False, True, True, False]):
        assert_holds(root / str(number), number)
        if has_extra:
            found = loaded(root / str(number), extra=torch.zeros(4), note=None)
            assert torch.equal(found["extra"], torch.full((4,), float(number)))
            assert found["note"] == (number, "x")


@pytest.mark.parametrize("world", [1, 2])
def test_a_plan_that_changes_on_one_rank_is_planned_again(tmp_path: Path, world: int) -> None:
    run_distributed(_changes, world, tmp_path)


def _failures(root: Path) -> None:
    """A save fails while it is laid out, written and published, on the first rank and the last; the next is whole."""
    last = dist.get_world_size() - 1
    for number, (kind, rank) in enumerate((("allocate", 0), ("sync", 0), ("sync", last), ("rename", 0))):
        path = root / f"failed{number}"
        for _ in range(2):  # with plans of the first save in the cache, or of a save that failed
            files = failing(kind) if dist.get_rank() == rank else None
            writer = SafetensorsWriter(path, files=files)
            with pytest.raises(CheckpointException, match="Errno 28") as caught:
                dcp.save(state(number), storage_writer=writer, planner=caching())
            assert list(caught.value.failures) == [rank]
            writer.abandon()
        dist.barrier()
        dcp.save(state(number), storage_writer=SafetensorsWriter(path), planner=caching())
        assert_holds(path, number)
        dist.barrier()
        with pytest.raises(CheckpointException, match="exists already and is not empty"):
            dcp.save(state(9), storage_writer=SafetensorsWriter(path), planner=caching())


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_after_a_failed_one_is_whole(tmp_path: Path, world: int) -> None:
    run_distributed(_failures, world, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"failed{number}" for number in range(4)]


def _first_save_fails(root: Path) -> None:
    for kind in ("make_dir", "allocate"):
        with pytest.raises(CheckpointException, match="Errno 28"):
            dcp.save(state(1), storage_writer=SafetensorsWriter(root / "a", files=failing(kind)), planner=caching())
    dcp.save(state(2), storage_writer=SafetensorsWriter(root / "a"), planner=caching())
    assert_holds(root / "a", 2)


@pytest.mark.parametrize("world", [1, 2])
def test_plans_that_were_cached_by_a_first_save_that_failed_do_no_harm(tmp_path: Path, world: int) -> None:
    run_distributed(_first_save_fails, world, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def _another_writers_plan(root: Path) -> str:
    dcp.save(state(1), checkpoint_id=root / "theirs", planner=caching())
    try:
        dcp.save(state(2), storage_writer=SafetensorsWriter(root / "ours"), planner=caching())
    except CheckpointException as error:
        refusal = str(error)
    else:
        refusal = ""
    gc.collect()  # the writer, which the traceback held, takes its draft with it
    if refusal:
        return refusal

    class Own(DefaultSavePlanner):
        pass

    dcp.save(state(3), storage_writer=SafetensorsWriter(root / "own"), planner=Own(enable_plan_caching=True))
    assert_holds(root / "own", 3)
    return ""


def test_a_plan_cached_by_another_writer_is_refused_or_serves(tmp_path: Path) -> None:
    for error in run_distributed(_another_writers_plan, 2, tmp_path / "two"):
        assert "made by another storage writer" in error
        assert "class Planner(DefaultSavePlanner)" in error
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["theirs"]
    assert run_distributed(_another_writers_plan, 1, tmp_path / "one") == [""]


def test_an_element_type_that_the_cached_plan_does_not_know_is_refused(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=SafetensorsWriter(tmp_path / "a"), planner=caching())
    error = failure(tmp_path / "b", state_dict={"w": torch.ones(2, dtype=torch.bfloat16)}, planner=caching())
    assert "w: planned as F32, but the planner gave BF16" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_fewer_entries_than_planned_are_never_published(tmp_path: Path) -> None:
    class Drops(DefaultSavePlanner):
        def finish_plan(self, new_plan: SavePlan) -> SavePlan:
            return super().finish_plan(dataclasses.replace(new_plan, items=new_plan.items[:-1]))

    class Repeats(DefaultSavePlanner):
        def finish_plan(self, new_plan: SavePlan) -> SavePlan:
            return super().finish_plan(dataclasses.replace(new_plan, items=[*new_plan.items, new_plan.items[0]]))

    class Nothing(DefaultSavePlanner):
        def finish_plan(self, new_plan: SavePlan) -> SavePlan:
            return SavePlan([])

    saved = {"a": torch.ones(2), "n": 1, "z": torch.ones(3)}
    assert "1 part not written: z from [0]" in failure(tmp_path / "a", state_dict=saved, planner=Drops())
    assert "1 part not written: n" in failure(tmp_path / "a", state_dict={"z": saved["z"], "n": 1}, planner=Drops())
    assert "1 part written, but not planned: a" in failure(tmp_path / "a", state_dict=saved, planner=Repeats())
    assert "3 parts not written" in failure(tmp_path / "a", state_dict=saved, planner=Nothing())
    assert not list(tmp_path.iterdir())


def _in_the_background(root: Path) -> None:
    stager, group = PooledStager(), dist.new_group(backend="gloo")
    for number in range(3):
        live = state(number)
        writer = SafetensorsWriter(root / str(number))
        saving = dcp.async_save(
            live, storage_writer=writer, async_stager=stager, process_group=group, planner=caching()
        )
        live["w"].to_local().fill_(-5)
        saving.result()
    for number in range(3):
        assert_holds(root / str(number), number)


def test_cached_plans_serve_saves_in_the_background(tmp_path: Path) -> None:
    run_distributed(_in_the_background, 2, tmp_path)


class Gate(Files):
    """Holds a save up until it is released."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def allocate(self, path: Path, nbytes: int) -> None:
        if path.suffix == ".safetensors":
            self.reached.set()
            assert self.opened.wait(30 * PATIENCE)
        super().allocate(path, nbytes)


def test_two_saves_to_one_directory_at_a_time_do_not_mix(tmp_path: Path) -> None:
    gate, path = Gate(), tmp_path / "a"
    saving = dcp.async_save(
        state(1), storage_writer=SafetensorsWriter(path, files=gate), async_stager=PooledStager(), planner=caching()
    )
    assert gate.reached.wait(30 * PATIENCE)
    assert f"another thread saves to {path}" in failure(path, state_dict=state(2))
    gate.opened.set()
    saving.result(timeout=30 * PATIENCE)
    assert_holds(path, 1)
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


class Counter:
    """Has state, as DCP's protocol `Stateful` has it."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


def test_objects_with_state_are_saved_and_loaded(tmp_path: Path) -> None:
    model, counter = torch.nn.Linear(2, 3), Counter(5)
    for number in range(2):
        writer = SafetensorsWriter(tmp_path / str(number))
        dcp.save({"model": model, "counter": counter}, storage_writer=writer, planner=caching())
        with torch.no_grad():
            model.weight.add_(1)
        counter.value += 1
        other, blank = torch.nn.Linear(2, 3), Counter(0)
        dcp.load({"model": other, "counter": blank}, storage_reader=SafetensorsReader(tmp_path / str(number)))
        assert torch.equal(other.weight + 1, model.weight)
        assert blank.value == counter.value - 1
