"""Our writer, reader and stager, used through `torch.distributed.checkpoint`."""

from __future__ import annotations

import copy
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hydra_ckpt import AppState, CheckpointExistsError, CheckpointingConfig, CheckpointNotFoundError
from hydra_ckpt.errors import CheckpointConfigError, CorruptCheckpointError
from hydra_ckpt.files import Files
from hydra_ckpt.storage import PooledStager, SafetensorsReader, SafetensorsWriter
from hydra_ckpt.storage.pool import BufferPool
from hydra_ckpt.testing import FaultyFiles, run_distributed
from hydra_ckpt.testing.processes import PATIENCE


def make_run(seed: int, *, shard: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    if shard:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (1 + seed))
    for _ in range(2):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments}


VALUES: dict[str, Any] = {
    "step": 7,
    "loss": math.nan,
    "name": "run ü",
    "nothing": None,
    "flag": True,
    "pair": (1, 2.5),
    "bytes": b"\0\xff",
    "shape": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
}


def assert_same(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert type(one) is type(other), path
        assert len(one) == len(other), path
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{path}.{number}")
    elif isinstance(one, DTensor):
        assert one.placements == other.placements, path
        assert_same(one.to_local(), other.to_local(), path)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    else:
        assert type(one) is type(other), path
        assert one == other or (one != one and other != other), (path, one, other)  # noqa: PLR0124 - a NaN


def _round_trip(root: Path) -> dict[str, tuple[Any, ...]]:
    rank = dist.get_rank()
    run = make_run(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = distribute_tensor(torch.arange(21.0).view(3, 7), mesh, [Shard(1)])
    copies = distribute_tensor(torch.arange(5), mesh, [Replicate()])
    rest = {"columns": columns, "copies": copies, "values": dict(VALUES), "none": torch.empty(0, 3)}
    saved = {**state_of(*run), **rest}
    expected = copy.deepcopy(saved)
    dcp.save(saved, storage_writer=SafetensorsWriter(root / "sync"))

    # Copied, then changed: what is saved is what was there at the call.
    group, stager = dist.new_group(backend="gloo"), PooledStager()
    saving = dcp.async_save(
        saved, storage_writer=SafetensorsWriter(root / "async"), async_stager=stager, process_group=group
    )
    with torch.no_grad():
        for parameter in run[0].parameters():
            parameter.fill_(99.0)
        columns.to_local().fill_(-1.0)
    saving.result()
    stager.close()
    dist.barrier()
    small = SafetensorsWriter(root / "several", max_file_bytes=128)
    dcp.save(expected, storage_writer=small)

    for name in ("sync", "async", "several"):
        fresh = make_run(2)
        blank = {
            "columns": distribute_tensor(torch.zeros(3, 7), mesh, [Shard(0)]),  # another cut than it was saved with
            "copies": torch.zeros(5, dtype=torch.int64),
            "values": dict.fromkeys(VALUES, 0),
            "none": torch.empty(0, 3),
        }
        loaded = {**state_of(*fresh), **blank}
        dcp.load(loaded, storage_reader=SafetensorsReader(root / name))
        assert_same(
            {key: loaded[key] for key in ("model", "optim")}, {key: expected[key] for key in ("model", "optim")}
        )
        assert torch.equal(loaded["columns"].full_tensor(), torch.arange(21.0).view(3, 7))
        assert torch.equal(loaded["copies"], torch.arange(5))
        assert_same(loaded["values"], VALUES)
        set_state_dict(*fresh, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
        assert_same(state_of(*fresh), {key: expected[key] for key in ("model", "optim")})

    # What must not work says so on every rank, and leaves what is there.
    outcomes = {"existing": _failure(lambda: dcp.save(expected, storage_writer=SafetensorsWriter(root / "sync")))}
    dist.barrier()
    weights = next((root / "sync" / "state").glob("*.safetensors"))
    if rank == 0:
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    dist.barrier()
    outcomes["flipped"] = _failure(lambda: dcp.load(expected, storage_reader=SafetensorsReader(root / "sync")))
    outcomes["unchecked"] = _failure(
        lambda: dcp.load(expected, storage_reader=SafetensorsReader(root / "sync", verify=False))
    )
    outcomes["nowhere"] = _failure(lambda: dcp.load(expected, storage_reader=SafetensorsReader(root / "nowhere")))
    headless = root / "headless"
    if rank == 0:
        headless.mkdir()
        (headless / "model.safetensors").write_bytes(b"\xff" * 100)
    dist.barrier()
    outcomes["headless"] = _failure(lambda: dcp.load(expected, storage_reader=SafetensorsReader(headless)))
    files = FaultyFiles(
        lambda operation: 28 if rank == dist.get_world_size() - 1 and operation.kind == "sync" else None
    )
    writer = SafetensorsWriter(root / "full", files=files)
    outcomes["full"] = _failure(lambda: dcp.save(saved, storage_writer=writer))
    files._fails = lambda _: None
    dist.barrier()
    dcp.save(saved, storage_writer=writer)  # the same writer again: it cleans up behind itself
    return outcomes


def _failure(action: Any) -> tuple[Any, ...]:
    try:
        action()
    except CheckpointException as error:
        return tuple(sorted({type(cause[0]).__name__ for cause in error.failures.values()}))
    return ()


@pytest.mark.parametrize("world", [1, 2])
def test_state_dicts_go_through_dcp_and_back(tmp_path: Path, world: int) -> None:
    for outcomes in run_distributed(_round_trip, world, tmp_path):
        assert outcomes == {
            "existing": (CheckpointExistsError.__name__,),
            "flipped": (CorruptCheckpointError.__name__,),
            "unchecked": (),
            "headless": (CorruptCheckpointError.__name__,),
            "nowhere": (CheckpointNotFoundError.__name__,),
            "full": (OSError.__name__,),
        }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["async", "full", "headless", "several", "sync"]
    # Final files of whole tensors: anything that reads safetensors reads them.
    found = {}
    for path in (tmp_path / "several" / "state").glob("*.safetensors"):
        found.update(load_file(path))
    assert len(list((tmp_path / "several" / "state").glob("*.safetensors"))) > 3
    assert (tmp_path / "several" / "state" / "model.safetensors.index.json").exists()
    assert torch.equal(found["columns"], torch.arange(21.0).view(3, 7))
    assert found["model.0.weight"].shape == (7, 5)
    assert not list(tmp_path.rglob("*.distcp"))
    assert not list(tmp_path.rglob(".metadata"))


# -- without a process group ---------------------------------------------------------------------------------------


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(12.0).view(3, 4)}
    seen = []

    class Watching(Files):
        def sync_dir(self, path: Path) -> None:
            seen.append((tmp_path / "new").exists())
            super().sync_dir(path)

    dcp.save(tensors, storage_writer=SafetensorsWriter(tmp_path / "new", files=Watching()))
    assert seen[:-1] == [False] * (len(seen) - 1)
    assert seen[-1]  # the last one flushes the name itself
    for kind in ("allocate", "write_at", "sync", "rename"):
        files = FaultyFiles(lambda operation, kind=kind: 5 if operation.kind == kind else None)
        writer = SafetensorsWriter(tmp_path / "failed", files=files)
        with pytest.raises(CheckpointException, match="Errno 5"):
            dcp.save(tensors, storage_writer=writer)
        assert not (tmp_path / "failed").exists()
        writer.abandon()
        assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_json_and_tensors_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match=r"made: a _thread\.lock"):
        dcp.save({"made": threading.Lock()}, storage_writer=SafetensorsWriter(tmp_path / "a"))
    with pytest.raises(CheckpointException, match=r"cannot store elements of torch\.complex128"):
        dcp.save({"wide": torch.zeros(2, dtype=torch.complex128)}, storage_writer=SafetensorsWriter(tmp_path / "b"))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    with pytest.raises((CheckpointConfigError, CheckpointException), match="use_collectives=True"):
        dcp.save({"w": torch.ones(1)}, storage_writer=SafetensorsWriter(tmp_path / "c"), use_collectives=False)


def test_any_directory_of_safetensors_files_can_be_read(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(4, 6), "b.bias": torch.arange(3, dtype=torch.int8), "c": torch.tensor(2.5)}
    save_file({"a.weight": tensors["a.weight"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({key: tensors[key] for key in ("b.bias", "c")}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text("{}")
    loaded = {key: torch.zeros_like(value) for key, value in tensors.items()}
    dcp.load(loaded, storage_reader=SafetensorsReader(tmp_path))
    assert_same(loaded, tensors)
    turned = {"a.weight": torch.zeros(6, 4).t()}  # only a part of it, into memory of another order
    dcp.load(turned, storage_reader=SafetensorsReader(tmp_path))
    assert torch.equal(turned["a.weight"], tensors["a.weight"])
    with pytest.raises(CheckpointException, match="missing"):
        dcp.load({"missing": torch.zeros(1)}, storage_reader=SafetensorsReader(tmp_path))


def test_our_exports_are_such_directories(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), save_consolidated="always")
    with config.build(0, 0, 0) as engine:
        checkpoint = engine.save(AppState(model), step=1).result()
    loaded = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    dcp.load(loaded, storage_reader=SafetensorsReader(checkpoint.path / "model" / "consolidated"))
    assert_same(loaded, dict(model.state_dict()))


def test_our_torch_save_checkpoints_load_with_plain_dcp(tmp_path: Path) -> None:
    model, optimizer = make_run(0, shard=False)
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), model_save_format="torch_save")
    with config.build(0, 0, 0) as engine:
        checkpoint = engine.save(AppState(model, optimizer), step=1).result()
    loaded = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    dcp.load(loaded, checkpoint_id=checkpoint.path / "model")
    assert_same(loaded, dict(model.state_dict()))
    moments = {"0.weight:exp_avg": torch.zeros(7, 5)}
    dcp.load(moments, checkpoint_id=checkpoint.path / "optim")
    assert torch.equal(moments["0.weight:exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


# -- staging -------------------------------------------------------------------------------------------------------


def _address(staged: dict[str, Any]) -> int:
    return staged["w"].untyped_storage().data_ptr()


def test_buffers_are_used_again_but_never_while_somebody_looks(tmp_path: Path) -> None:
    stager = PooledStager()
    live = {"w": torch.zeros(1000), "array": np.zeros(3), "list": [torch.ones(2), {"x": torch.ones(1)}]}
    first = stager.stage(live)
    live["w"].fill_(1)
    live["array"][:] = 1
    live["list"][0].fill_(7)
    second = stager.stage(live)
    assert _address(first) != _address(second)
    assert not first["w"].any()
    assert not first["array"].any()
    assert first["list"][0].tolist() == [1, 1]
    assert (second["w"] == 1).all()
    address = _address(first)
    del first
    third = stager.stage(live)
    assert _address(third) == address
    grown = stager.stage({"w": torch.zeros(100_000)})
    assert _address(grown) not in (address, _address(second))
    del second, third, grown
    stager.close()
    assert stager.stage(live)["w"].sum() == 1000


def test_a_pool_lends_a_buffer_to_one_at_a_time() -> None:
    pool = BufferPool()
    pool.prewarm(100)
    one, other = pool.take(80), pool.take(80)
    assert one is not other
    assert one.nbytes >= 100
    assert not pool.holds(80)
    pool.give_back(one)
    assert pool.holds(80)
    assert not pool.holds(10_000)
    assert pool.take(100) is one
    assert pool.take(10_000).nbytes >= 10_000


def test_a_buffer_keeps_its_views_for_tensors_of_the_same_layout() -> None:
    pool = BufferPool()
    buffer = pool.take(256)
    tensors = dict(enumerate([torch.arange(4), torch.ones(3, 2, dtype=torch.bfloat16), torch.tensor(True)]))
    first = buffer.slots(pool.layout(tensors))
    assert buffer.slots(pool.layout({key: tensor.clone() for key, tensor in tensors.items()})) is first
    for key, tensor in tensors.items():
        target = first.targets[key]
        assert (target.dtype, target.shape) == (tensor.dtype, tensor.shape)
        target.copy_(tensor)
        assert bytes(first.views[key]) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    other = buffer.slots(pool.layout({key: tensors[key] for key in (0, 1)}))
    assert other is not first
    assert [target.shape for target in other.targets.values()] == [torch.Size([4]), torch.Size([3, 2])]


class Gate(Files):
    """Lets a save continue only when it is released."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def allocate(self, path: Path, nbytes: int) -> None:
        assert self.opened.wait(30 * PATIENCE)
        super().allocate(path, nbytes)


def test_saves_that_overlap_each_write_what_was_staged_for_them(tmp_path: Path) -> None:
    stager, live, futures, gates = PooledStager(), {"w": torch.zeros(500)}, [], []
    for number in range(3):
        live["w"].fill_(number)
        gates.append(Gate())
        writer = SafetensorsWriter(tmp_path / str(number), files=gates[-1])
        futures.append(dcp.async_save(live, storage_writer=writer, async_stager=stager))
    live["w"].fill_(-1)
    assert not any(future.done() for future in futures)
    for gate, future in zip(reversed(gates), reversed(futures), strict=True):
        gate.opened.set()
        future.result(timeout=30 * PATIENCE)
    for number in range(3):
        loaded = {"w": torch.zeros(500)}
        dcp.load(loaded, storage_reader=SafetensorsReader(tmp_path / str(number)))
        assert (loaded["w"] == number).all()
    # All is written: a later save finds a buffer that is warm.
    deadline = time.monotonic() + 10 * PATIENCE
    while len(stager._pool._free) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    known = {buffer._memory.data_ptr() for buffer in stager._pool._free}
    assert _address(stager.stage(live)) in known
