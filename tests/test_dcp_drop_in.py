"""What DCP's own FileSystemWriter and FileSystemReader do for a state dict, our writer and reader do too, or refuse."""

from __future__ import annotations

import copy
import gc
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from hydra_ckpt import CheckpointExistsError, CheckpointingConfig
from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.storage import PooledStager, SafetensorsReader, SafetensorsWriter
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.memory import bytes_of
from hydra_ckpt.store.names import MANIFEST
from hydra_ckpt.testing import FaultyFiles, run_distributed
from tests.test_dcp import assert_same


def save(state: dict[str, Any], path: Path, **arguments: Any) -> None:
    dcp.save(state, storage_writer=SafetensorsWriter(path), **arguments)


def load(state: dict[str, Any], path: Path, **arguments: Any) -> dict[str, Any]:
    dcp.load(state, storage_reader=SafetensorsReader(path), **arguments)
    return state


def message(action: Any) -> str:
    with pytest.raises(CheckpointException) as caught:
        action()
    return str(caught.value)


# -- values and structure ------------------------------------------------------------------------------------------


def nested() -> dict[str, Any]:
    return {
        "model": {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)},
        "optim": {
            "state": {0: {"step": torch.tensor(3.0), "exp": torch.arange(4)}, 1: {"step": torch.tensor(4.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}],
        },
        "list": [torch.zeros(2), {"x": torch.ones(1), "y": [1, 2]}],
        "plain": [1, "two", None],
        "empty": {},
        "step": 7,
    }


def test_what_is_read_without_a_state_dict_is_what_torch_reads(tmp_path: Path) -> None:
    dcp.save(nested(), storage_writer=FileSystemWriter(tmp_path / "theirs"))
    save(nested(), tmp_path / "ours")
    for keys in (None, {"model"}, {"optim.state"}, {"optim.state.0", "step"}, "plain", {"model.a.weight"}):
        theirs = _load_state_dict_from_keys(keys, storage_reader=FileSystemReader(tmp_path / "theirs"))
        ours = _load_state_dict_from_keys(keys, storage_reader=SafetensorsReader(tmp_path / "ours"))
        assert_same(ours, theirs)
    assert ours  # the comparison was not of nothing
    everything = _load_state_dict_from_keys(storage_reader=SafetensorsReader(tmp_path / "ours"))
    assert_same(everything["optim"]["param_groups"], nested()["optim"]["param_groups"])


def test_metadata_is_what_torch_reads(tmp_path: Path) -> None:
    dcp.save(nested(), storage_writer=FileSystemWriter(tmp_path / "theirs"))
    writer = SafetensorsWriter(tmp_path / "ours")
    dcp.save(nested(), storage_writer=writer)
    theirs, reader = FileSystemReader(tmp_path / "theirs").read_metadata(), SafetensorsReader(tmp_path / "ours")
    ours = reader.read_metadata()
    assert ours.planner_data == theirs.planner_data
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for name, entry in theirs.state_dict_metadata.items():
        found = ours.state_dict_metadata[name]
        assert type(found) is type(entry)
        if isinstance(entry, TensorStorageMetadata):
            assert isinstance(found, TensorStorageMetadata)
            assert (found.size, found.properties.dtype) == (entry.size, entry.properties.dtype)
        else:
            assert isinstance(found, BytesStorageMetadata)
    assert ours.storage_meta is not None
    assert ours.storage_meta.load_id
    assert writer.checkpoint_id == reader.checkpoint_id == tmp_path / "ours"
    assert writer.storage_meta().save_id


def test_without_flattening_a_dict_with_tensors_is_one_value(tmp_path: Path) -> None:
    options = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
    save(nested(), tmp_path / "a", planner=DefaultSavePlanner(**options))
    assert_same(load(dict.fromkeys(nested()), tmp_path / "a", planner=DefaultLoadPlanner(**options)), nested())
    assert list((tmp_path / "a" / "objects").iterdir())
    assert not [path for path in (tmp_path / "a").rglob("*") if path.suffix in (".pt", ".distcp", ".pkl")]


def streams() -> dict[str, Any]:
    stream = io.BytesIO(b"\x00payload\xff")
    stream.seek(3)
    return {"stream": stream, "empty": io.BytesIO(), "pair": (torch.arange(3), io.BytesIO(b"in"), {"k": 1}), "n": 1}


def _streams(root: Path) -> None:
    save(streams(), root / "a")
    found = load(dict.fromkeys(streams()), root / "a")
    for one, other in zip(
        (found["stream"], found["empty"], found["pair"][1]),
        (streams()["stream"], streams()["empty"], streams()["pair"][1]),
        strict=True,
    ):
        assert type(one) is io.BytesIO
        assert (one.getvalue(), one.tell()) == (other.getvalue(), other.tell())
    assert torch.equal(found["pair"][0], torch.arange(3))
    assert found["pair"][2:] == ({"k": 1},)


@pytest.mark.parametrize("world", [1, 2])
def test_streams_and_tuples_with_tensors_come_back(tmp_path: Path, world: int) -> None:
    run_distributed(_streams, world, tmp_path)


def test_a_damaged_value_is_found(tmp_path: Path) -> None:
    save(streams(), tmp_path / "a")
    path = next((tmp_path / "a" / "objects").iterdir())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "are not those that were written" in message(lambda: load(dict.fromkeys(streams()), tmp_path / "a"))


def test_what_would_not_come_back_as_it_was_is_refused_by_name(tmp_path: Path) -> None:
    class Own:
        pass

    for value, text in (
        (Own(), "thing: a .*Own"),
        (torch.ones(2, 2).to_sparse(), "thing: .*layout sparse_coo"),
        (torch.empty(2, device="meta"), "thing: is on the meta device"),
        (torch.zeros(1, dtype=torch.complex128), r"thing: .*complex128"),
    ):
        with pytest.raises(CheckpointException, match=text):
            save({"thing": value, "fine": torch.ones(1)}, tmp_path / "a")
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    saved = {str(dtype): torch.arange(6).view(2, 3).to(torch.float32).to(dtype) for dtype in TORCH_DTYPE.values()}
    saved |= {
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "expanded": torch.ones(1).expand(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    stager = PooledStager()
    save(saved, tmp_path / "a")
    dcp.async_save(saved, storage_writer=SafetensorsWriter(tmp_path / "b"), async_stager=stager).result()
    for name in ("a", "b"):
        found = load(
            {key: torch.empty(value.shape, dtype=value.dtype) for key, value in saved.items()}, tmp_path / name
        )
        for key, value in saved.items():
            one, other = (item.detach().resolve_conj().resolve_neg().contiguous() for item in (found[key], value))
            assert bytes_of(one) == bytes_of(other), key


# -- planners ------------------------------------------------------------------------------------------------------


class Halves(DefaultSavePlanner):
    """Stores tensors in half precision, as DCP's own tests do it."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002 - DCP's name
        found = super().transform_object(write_item, object)
        return found if write_item.type == WriteItemType.BYTE_IO else found.double().float()


class Texts(DefaultSavePlanner):
    """Stores values as JSON of its own."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002 - DCP's name
        if write_item.type != WriteItemType.BYTE_IO:
            return super().transform_object(write_item, object)
        return io.BytesIO(json.dumps({"text": object}).encode())


class ReadsTexts(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = json.load(value)["text"]


def test_planners_that_make_something_else_of_data_get_it_back(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "n": 5}
    save(state, tmp_path / "same", planner=Halves())
    assert_same(load({"w": torch.zeros(2), "n": 0}, tmp_path / "same"), state)
    save(state, tmp_path / "own", planner=Texts())
    found = load({"w": torch.zeros(2), "n": 0}, tmp_path / "own", planner=ReadsTexts())
    assert_same(found, state)
    # Bytes from a file are not given to a planner that would unpickle them.
    assert "DefaultLoadPlanner would unpickle" in message(lambda: load({"n": 0}, tmp_path / "own"))


def test_a_partial_load_leaves_the_rest(tmp_path: Path) -> None:
    save({"a": torch.ones(2), "b": torch.ones(3), "n": 1}, tmp_path / "x")
    assert_same(load({"b": torch.zeros(3)}, tmp_path / "x"), {"b": torch.ones(3)})
    more = {"b": torch.zeros(3), "new": torch.full((2,), 7.0), "m": 9}
    assert "Missing key in checkpoint state_dict: m" in message(lambda: load(copy.deepcopy(more), tmp_path / "x"))
    found = load(copy.deepcopy(more), tmp_path / "x", planner=DefaultLoadPlanner(allow_partial_load=True))
    assert_same(found, {**more, "b": torch.ones(3)})
    assert "Size mismatch" in message(lambda: load({"b": torch.zeros(4)}, tmp_path / "x"))


# -- directories ---------------------------------------------------------------------------------------------------


def test_an_empty_directory_is_a_target_and_a_full_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save({"w": torch.ones(2)}, tmp_path / "empty")
    assert_same(load({"w": torch.zeros(2)}, tmp_path / "empty"), {"w": torch.ones(2)})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "full", "file", "link"):
        for overwrite in (False,) if name == "empty" else (False, True):
            writer = SafetensorsWriter(tmp_path / name, overwrite=overwrite)
            text = message(lambda writer=writer: dcp.save({"w": torch.zeros(1)}, storage_writer=writer))
            assert CheckpointExistsError.__name__ in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "link"]
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_overwriting_replaces_a_checkpoint_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save({"w": torch.ones(2)}, path)
    for kind in ("sync", "rename"):
        files = FaultyFiles(lambda operation, kind=kind: 5 if operation.kind == kind else None)
        failing = SafetensorsWriter(path, overwrite=True, files=files)
        assert "Errno 5" in message(lambda failing=failing: dcp.save({"w": torch.zeros(2)}, storage_writer=failing))
        assert_same(load({"w": torch.zeros(2)}, path), {"w": torch.ones(2)})
    renames = []

    def second_rename(operation: Any) -> int | None:
        renames.extend([operation] if operation.kind == "rename" else [])
        return 5 if operation.kind == "rename" and len(renames) == 2 else None

    failing = SafetensorsWriter(path, overwrite=True, files=FaultyFiles(second_rename))
    assert "Errno 5" in message(lambda: dcp.save({"w": torch.zeros(2)}, storage_writer=failing))
    assert_same(load({"w": torch.zeros(2)}, path), {"w": torch.ones(2)})
    dcp.save({"w": torch.full((2,), 3.0)}, storage_writer=SafetensorsWriter(path, overwrite=True))
    assert_same(load({"w": torch.zeros(2)}, path), {"w": torch.full((2,), 3.0)})
    assert [item.name for item in tmp_path.iterdir()] == ["x"]


def test_a_checkpoint_id_goes_before_the_path(tmp_path: Path) -> None:
    writer, reader = SafetensorsWriter(tmp_path / "unused"), SafetensorsReader(tmp_path / "unused")
    for number in range(2):
        dcp.save({"n": number}, checkpoint_id=tmp_path / str(number), storage_writer=writer)
        state = {"n": -1}
        dcp.load(state, checkpoint_id=str(tmp_path / str(number)), storage_reader=reader)
        assert state == {"n": number}


def test_a_failed_save_leaves_nothing_when_its_writer_is_gone(tmp_path: Path) -> None:
    class Fails(DefaultSavePlanner):
        def create_global_plan(self, all_plans: Any) -> Any:
            raise RuntimeError("no plan")

    assert "no plan" in message(lambda: save({"w": torch.ones(1)}, tmp_path / "a", planner=Fails()))
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_our_own_torch_save_checkpoints_name_the_way_to_read_them(tmp_path: Path) -> None:
    from hydra_ckpt import AppState

    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), model_save_format="torch_save")
    with config.build(0, 0, 0) as engine:
        checkpoint = engine.save(AppState(torch.nn.Linear(2, 2)), step=1).result()
    over = SafetensorsWriter(checkpoint.path, overwrite=True)
    assert "exists already" in message(lambda: dcp.save({"w": torch.ones(1)}, storage_writer=over))
    text = message(lambda: load({"weight": torch.zeros(2, 2)}, checkpoint.path))
    assert "load it with dcp.load(state_dict, checkpoint_id=" in text


# -- shards --------------------------------------------------------------------------------------------------------


def sharded(rank: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Tensors of all placements, and the whole ones."""
    line, plane = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    whole = {name: torch.arange(numel).float() for name, numel in (("odd", 5), ("one", 1), ("copies", 3))}
    whole |= {
        "columns": torch.arange(21.0).view(3, 7),
        "strided": torch.arange(6.0),
        "old": torch.arange(8.0).view(4, 2),
    }
    whole |= {"sub": torch.arange(4.0)}
    on_one = DeviceMesh("cpu", [1])
    local = whole["sub"] if rank == 1 else torch.empty(0)
    shard = LocalShard.from_tensor_and_offsets(whole["old"][2 * rank : 2 * rank + 2].clone(), [2 * rank, 0], rank)
    state = {
        "odd": distribute_tensor(whole["odd"], line, [Shard(0)]),
        "one": distribute_tensor(whole["one"], line, [Shard(0)]),
        "copies": distribute_tensor(whole["copies"], line, [Replicate()]),
        "columns": distribute_tensor(whole["columns"], line, [Shard(1)]),
        "strided": DTensor.from_local(
            whole["strided"][3 * rank : 3 * rank + 3].clone(),
            plane,
            [_StridedShard(0, split_factor=1), Shard(0)],
            run_check=False,
            shape=torch.Size([6]),
            stride=(1,),
        ),
        "sub": DTensor.from_local(local, on_one, [Shard(0)], run_check=False, shape=torch.Size([4]), stride=(1,)),
        "old": init_from_local_shards([shard], (4, 2)),
    }
    return state, whole


def _sharded(root: Path) -> None:
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    state, whole = sharded(rank)
    save(state, root / "a")
    save(state, root / "lowest", planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
    for name in ("a", "lowest"):
        assert_same(load({key: torch.zeros_like(value) for key, value in whole.items()}, root / name), whole)
        blank = {key: distribute_tensor(torch.zeros_like(value), mesh, [Shard(0)]) for key, value in whole.items()}
        found = load(blank, root / name)
        assert_same({key: value.full_tensor() for key, value in found.items()}, whole)
        into, _ = sharded(rank)
        for tensor in into.values():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.local_shards()[0].tensor
            local.zero_()
        load(into, root / name)
        assert torch.equal(into["old"].local_shards()[0].tensor, whole["old"][2 * rank : 2 * rank + 2])
        for key in into.keys() - {"old", "sub"}:
            assert torch.equal(into[key].full_tensor(), whole[key]), key
    with pytest.raises(CheckpointConfigError, match=r"state_dict\['x'\]\['old'\] is a ShardedTensor"):
        PooledStager().stage({"x": {"old": state.pop("old")}})
    staged = PooledStager().stage({"x": state})["x"]
    assert {key: value.placements for key, value in staged.items()} == {
        key: value.placements for key, value in state.items()
    }
    assert_same(staged, state)


def test_shards_of_every_kind_make_whole_tensors(tmp_path: Path) -> None:
    run_distributed(_sharded, 2, tmp_path)


def _from_one_rank(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    into = {"w": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(1)]), "n": 0}
    load(into, root / "one")
    assert torch.equal(into["w"].full_tensor(), torch.arange(15.0).view(5, 3))
    assert into["n"] == 3
    save({"w": into["w"], "n": 4}, root / "two")


def test_another_number_of_ranks_loads(tmp_path: Path) -> None:
    save({"w": torch.arange(15.0).view(5, 3), "n": 3}, tmp_path / "one")
    run_distributed(_from_one_rank, 2, tmp_path)
    found = load({"w": torch.zeros(5, 3), "n": 0}, tmp_path / "two")
    assert_same(found, {"w": torch.arange(15.0).view(5, 3), "n": 4})


def _in_a_process(root: Path) -> None:
    for number in range(2):
        saving = dcp.async_save(
            {"w": torch.full((3,), float(number)), "n": (number, "x")},
            storage_writer=SafetensorsWriter(root / str(number)),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        saving.result()
        found = load({"w": torch.zeros(3), "n": None}, root / str(number))
        assert_same(found, {"w": torch.full((3,), float(number)), "n": (number, "x")})


def test_saves_in_a_process_of_their_own(tmp_path: Path) -> None:
    run_distributed(_in_a_process, 1, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def _alone(root: Path) -> list[str]:
    """Some ranks load or save without the others."""
    rank = dist.get_rank()
    group = dist.new_group([1])
    if rank == 1:
        save({"a": torch.ones(3), "n": 1}, root / "group", process_group=group)
        found = load({"a": torch.zeros(3), "n": 0}, root / "group", process_group=group)
        assert_same(found, {"a": torch.ones(3), "n": 1})
    save({"a": torch.arange(1000.0)}, root / "all")
    dist.barrier()
    if rank == 0:
        path = next((root / "all" / "state").iterdir())
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # in the half that rank 1 would check, if it took part
        path.write_bytes(data)
    dist.barrier()
    return [message(lambda: load({"a": torch.zeros(1000)}, root / "all", no_dist=True)) if rank == 0 else ""]


def test_ranks_that_act_alone_check_everything(tmp_path: Path) -> None:
    errors, _ = run_distributed(_alone, 2, tmp_path)
    assert "are not those that were written" in errors[0]


def _without_collectives(root: Path) -> None:
    with pytest.raises(CheckpointConfigError, match="save with use_collectives=True"):
        save({"w": torch.ones(1)}, root / "a", use_collectives=False)


def test_saving_without_collectives_is_refused_at_once(tmp_path: Path) -> None:
    run_distributed(_without_collectives, 2, tmp_path)
    assert not list(tmp_path.iterdir())


# -- torch's Hugging Face writer -----------------------------------------------------------------------------------


def _hugging_face(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = {
        "odd": torch.arange(15.0).view(5, 3),
        "columns": torch.arange(21.0).view(3, 7),
        "tiny": torch.ones(1, 2),
        "plain": torch.tensor(2.5),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    placements = {"odd": [Shard(0)], "columns": [Shard(1)], "tiny": [Shard(0)]}
    state = {
        name: distribute_tensor(tensor, mesh, placements[name]) if name in placements else tensor
        for name, tensor in whole.items()
    }
    files = {name: 1 + number % 2 for number, name in enumerate(whole)}
    for name, options in (
        ("shards", {}),
        ("several", {"fqn_to_index_mapping": files}),
        ("whole", {"enable_consolidation": True}),
    ):
        writer = HuggingFaceStorageWriter(str(root / name), save_distributed=True, **options)
        if name == "whole":
            del state["plain"], whole["plain"]  # torch's consolidation writes zeros for a tensor without dimensions
        dcp.save(state, storage_writer=writer)
        for directory in (root / name, root / name / "sharded"):
            if directory.exists():
                blank = {key: torch.zeros_like(value) for key, value in whole.items()}
                assert_same(load(blank, directory), whole)
                blank["odd"] = distribute_tensor(torch.zeros(5, 3), mesh, [Shard(1)])
                assert torch.equal(load(blank, directory)["odd"].full_tensor(), whole["odd"])


def test_directories_of_torchs_hugging_face_writer_are_read(tmp_path: Path) -> None:
    run_distributed(_hugging_face, 2, tmp_path)
    assert len(list((tmp_path / "whole" / "sharded").iterdir())) == 2
    next((tmp_path / "shards").glob("shard-00001*")).unlink()
    text = message(lambda: load({"odd": torch.zeros(5, 3)}, tmp_path / "shards"))
    assert "CorruptCheckpointError" in text
    assert "a file is missing" in text
    found = _load_state_dict_from_keys(storage_reader=SafetensorsReader(tmp_path / "whole"))
    assert torch.equal(found["odd"], torch.arange(15.0).view(5, 3))


def test_a_file_of_torchs_writer_on_one_rank_is_read(tmp_path: Path) -> None:
    dcp.save({"a": torch.arange(4.0)}, storage_writer=HuggingFaceStorageWriter(str(tmp_path / "x")))
    assert_same(load({"a": torch.zeros(4)}, tmp_path / "x"), {"a": torch.arange(4.0)})
    path = next((tmp_path / "x").glob("*.safetensors"))
    path.write_bytes(path.read_bytes().replace(b"saved_offsets", b"saved_offsetz"))
    assert "DCP_SHARDING_INFO cannot be read" in message(lambda: load({"a": torch.zeros(4)}, tmp_path / "x"))


def test_a_manifest_marks_what_our_writer_publishes(tmp_path: Path) -> None:
    save(nested(), tmp_path / "a")
    names = {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert names == {MANIFEST, "objects.json", "planner_data.json", "state/model.safetensors", "digests/rank-00000.bin"}
