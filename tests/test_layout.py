"""The arithmetic of layouts: boxes, byte ranges, shares and files, against plain NumPy and the real safetensors."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from hydra_ckpt.errors import CorruptCheckpointError, TopologyError
from hydra_ckpt.files import Files
from hydra_ckpt.layout.boxes import Box, ByteRuns, Sharding, chunk, regions
from hydra_ckpt.layout.file_layout import DATA_ALIGNMENT, FileLayout, by_size, file_names, index_json, lay_out
from hydra_ckpt.layout.plan import CELL_BYTES, WriteItem, WritePlan, fill_files, full_coverage, reads
from hydra_ckpt.layout.replicas import LocalShard, WriteShare, shares
from hydra_ckpt.layout.specs import ITEMSIZE, TensorSpec
from hydra_ckpt.state.local import Localizer
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.header import BOXES_KEY, encode_boxes, read_header, read_tensors
from hydra_ckpt.storage.memory import bytes_of
from hydra_ckpt.storage.read import Fetch, fetch
from hydra_ckpt.storage.write import create_files, write_plan
from hydra_ckpt.testing import run_distributed

SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)
EMPTY_TOO = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = [draw(st.integers(0, size)) for size in shape]
    sizes = [draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True)]
    return Box(tuple(offsets), tuple(sizes))


@st.composite
def tensors_with_box(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = draw(EMPTY_TOO)
    return shape, draw(boxes_in(shape))


def part(array: np.ndarray, box: Box) -> np.ndarray:
    # The ellipsis makes it a view even of a scalar.
    return array[(*(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True)), ...)]


def bytes_in(region: ByteRuns) -> Iterator[int]:
    for index in range(region.count):
        start = region.offset + index * region.stride
        yield from range(start, start + region.run)


# -- boxes and byte ranges -----------------------------------------------------------------------------------------


@given(tensors_with_box(), st.sampled_from([1, 2, 4, 8]), st.integers(0, 99))
def test_regions_are_the_boxs_bytes_in_row_major_order(
    tensor: tuple[tuple[int, ...], Box], itemsize: int, base: int
) -> None:
    shape, box = tensor
    places = np.arange(math.prod(shape) * itemsize).reshape(*shape, itemsize) + base
    expected = part(places, box).reshape(-1).tolist()
    found = [byte for region in regions(box, shape, itemsize, base) for byte in bytes_in(region)]
    assert found == expected


@given(tensors_with_box())
def test_a_box_needs_as_few_regions_as_its_outer_dimensions_allow(tensor: tuple[tuple[int, ...], Box]) -> None:
    shape, box = tensor
    found = list(regions(box, shape, 4))
    # One strided level is free; only what lies outside it takes a region for each row.
    assert len(found) <= max(math.prod(box.sizes[:-2]), 1)
    if box == Box.whole(shape) and box.numel:
        assert found == [ByteRuns(0, box.numel * 4)]


@given(tensors_with_box(), st.data())
def test_intersect_and_within_speak_of_the_same_elements(tensor: tuple[tuple[int, ...], Box], data: Any) -> None:
    shape, box = tensor
    other = data.draw(boxes_in(shape))
    values = np.arange(math.prod(shape)).reshape(shape)
    common = box.intersect(other)
    inside = np.intersect1d(part(values, box), part(values, other))
    if common is None:
        assert inside.size == 0
        return
    assert np.array_equal(np.sort(part(values, common), axis=None), inside)
    assert np.array_equal(part(part(values, box), common.within(box)), part(values, common))


@given(st.integers(0, 50), st.integers(1, 12))
def test_chunk_cuts_like_torch(length: int, parts: int) -> None:
    pieces = [chunk(length, parts, index) for index in range(parts)]
    expected = [len(piece) for piece in torch.arange(length).chunk(parts)] if length else []
    assert [size for _, size in pieces if size] == [size for size in expected if size]
    assert sum(size for _, size in pieces) == length


# -- shardings -----------------------------------------------------------------------------------------------------


@st.composite
def shardings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Sharding]]:
    """A shape and the shardings of all ranks of a mesh."""
    shape = draw(st.lists(st.integers(0, 14), min_size=1, max_size=3).map(tuple))
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    dims = tuple(draw(st.one_of(st.none(), st.integers(0, len(shape) - 1))) for _ in mesh)
    strided = tuple(draw(st.booleans()) if dim is not None else False for dim in dims)
    return shape, [Sharding(mesh, place, dims, strided) for place in product(*map(range, mesh))]


@given(shardings())
def test_the_boxes_of_all_ranks_tile_the_tensor_once_for_each_replica(
    case: tuple[tuple[int, ...], list[Sharding]],
) -> None:
    shape, ranks = case
    seen = np.zeros(shape, int)
    holders: dict[Box, list[int]] = {}
    for sharding in ranks:
        box = sharding.box(shape)
        part(seen, box)[...] += 1
        if box.numel:
            holders.setdefault(box, []).append(sharding.replica[0])
    assert (seen == ranks[0].replica[1]).all()
    for indices in holders.values():
        assert sorted(indices) == list(range(ranks[0].replica[1]))


@pytest.mark.parametrize("length", [7, 9, 13])
def test_fsdp_after_tp_cuts_tps_part_and_not_the_whole(length: int) -> None:
    ranks = [Sharding((4, 2), (dp, tp), (0, 0), (True, False)) for dp in range(4) for tp in range(2)]
    found = [sharding.box((length, 3)) for sharding in ranks]
    seen = np.zeros((length, 3), int)
    for box in found:
        part(seen, box)[...] += 1
    assert (seen == 1).all()
    for tp, rows in enumerate(np.array_split(np.arange(length), [-(-length // 2)])):
        mine = [box for sharding, box in zip(ranks, found, strict=True) if sharding.coordinate[1] == tp and box.numel]
        assert [row for box in mine for row in range(box.offsets[0], box.offsets[0] + box.sizes[0])] == rows.tolist()


def test_a_dimension_that_does_not_exist_is_a_topology_error() -> None:
    with pytest.raises(TopologyError, match="dimension 1"):
        Sharding((2,), (0,), (1,), (False,)).box((4,))


def _boxes_of_a_real_model() -> int:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    checked = 0
    for rows, columns in product((7, 9, 13), (7, 9, 13)):
        for style in (ColwiseParallel(), RowwiseParallel()):
            model = nn.Sequential(nn.Linear(columns, rows))
            whole = {}
            for name, parameter in model.named_parameters():
                parameter.data = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
                whole[name] = parameter.detach().numpy().copy()
            parallelize_module(model, mesh["tp"], {"0": style})
            fully_shard(model, mesh=mesh["dp"])
            for name, parameter in model.named_parameters():
                item = Localizer()(name, parameter)
                # Values, not only shapes: the box must be the very part that lies here.
                assert np.array_equal(item.tensor.numpy(), part(whole[name], item.box)), (name, rows, columns)
                checked += 1
    return checked


@pytest.mark.slow
def test_boxes_are_what_fsdp2_and_tensor_parallelism_really_hold() -> None:
    assert run_distributed(_boxes_of_a_real_model, 8) == [36] * 8


# -- who writes what -----------------------------------------------------------------------------------------------


@st.composite
def replicated(draw: st.DrawFn) -> tuple[list[tuple[TensorSpec, Box, bool]], int]:
    items = []
    for number in range(draw(st.integers(1, 6))):
        spec = TensorSpec(f"t{number}", draw(st.sampled_from(sorted(ITEMSIZE))), draw(EMPTY_TOO))
        items.append((spec, draw(boxes_in(spec.shape)), draw(st.booleans())))
    return items, draw(st.integers(1, 5))


@given(replicated())
def test_the_shares_of_replicas_tile_what_they_hold(case: tuple[list[tuple[TensorSpec, Box, bool]], int]) -> None:
    items, count = case
    seen = {spec.name: np.zeros(spec.shape, int) for spec, _, _ in items}
    written, named = [], Counter[str]()
    for index in range(count):
        holdings = [LocalShard(spec, box, (index, count), "group", divisible) for spec, box, divisible in items]
        mine = shares(holdings)
        for position, share in mine.items():
            part(seen[share.spec.name], share.box)[...] += 1
            held = holdings[position].box
            assert share.box == (held.rows(share.start, share.stop) if held.sizes else held)
        named.update(share.spec.name for share in mine.values())
        written.append(sum(share.nbytes for position, share in mine.items() if items[position][2]))
    for spec, box, _ in items:
        expected = np.zeros(spec.shape, int)
        part(expected, box)[...] = 1
        assert np.array_equal(seen[spec.name], expected)
        if not spec.nbytes:
            assert named[spec.name] == 1  # it has no bytes, but is to be found again
    divisible = [(spec, box) for spec, box, divides in items if divides and box.numel]
    total = sum(box.numel * spec.itemsize for spec, box in divisible)
    row = max((box.numel * spec.itemsize // (box.sizes or (1,))[0] for spec, box in divisible), default=0)
    assert max(written) <= total / count + row


# -- files ---------------------------------------------------------------------------------------------------------


@st.composite
def spec_lists(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(sorted(ITEMSIZE))) -> list[TensorSpec]:
    chosen = draw(st.lists(st.tuples(st.sampled_from(dtypes), EMPTY_TOO), min_size=1, max_size=8))
    return [TensorSpec(f"layer.{number}.wéight", dtype, shape) for number, (dtype, shape) in enumerate(chosen)]


@given(spec_lists(), st.integers(1, 400))
def test_by_size_keeps_order_and_limit(specs: list[TensorSpec], limit: int) -> None:
    groups = by_size(specs, limit)
    assert [spec for group in groups for spec in group] == specs
    for group in groups:
        filled = [spec for spec in group if spec.nbytes]
        assert sum(spec.nbytes for spec in group) <= limit or len(filled) == 1


@given(spec_lists())
def test_every_tensor_starts_at_a_multiple_of_its_element_size(specs: list[TensorSpec]) -> None:
    [file] = lay_out([specs], "model", "model")
    assert len(file.header) % DATA_ALIGNMENT == 0
    for spec in file.tensors:
        assert file.offsets[spec.name] % spec.itemsize == 0
    assert file.nbytes == len(file.header) + sum(spec.nbytes for spec in specs)


def _whole_plan(files: list[FileLayout], specs: list[TensorSpec]) -> WritePlan:
    mine = {
        position: WriteShare(spec, Box.whole(spec.shape), 0, (spec.shape or (1,))[0])
        for position, spec in enumerate(specs)
        if spec.nbytes
    }
    return WritePlan(tuple(files), (), mine, tuple(fill_files(files, mine)), "")


# safetensors' own reader does not know these.
READABLE = tuple(sorted(set(ITEMSIZE) - {"F8_E4M3FNUZ", "F8_E5M2FNUZ"}))


@given(spec_lists(READABLE), st.integers(1, 300), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_real_safetensors_library_reads_what_we_lay_out(
    tmp_path_factory: pytest.TempPathFactory, specs: list[TensorSpec], limit: int, random: Any
) -> None:
    root = tmp_path_factory.mktemp("files")
    files = lay_out(by_size(specs, limit), "model", "model")
    (root / "model").mkdir()
    plan = _whole_plan(files, specs)
    data = {position: random.randbytes(share.nbytes) for position, share in plan.shares.items()}
    create_files(Files(), root, plan)
    write_plan(Files(), root, plan, {position: memoryview(value) for position, value in data.items()})
    index = json.loads(index_json(files))
    assert sorted({file.path for file in files}) == sorted(f"model/{name}" for name in file_names("model", len(files)))
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in specs)
    for position, spec in enumerate(specs):
        with safe_open(root / "model" / index["weight_map"][spec.name], framework="pt") as reader:
            found = reader.get_tensor(spec.name)
            assert reader.metadata() == {"format": "pt"}
        assert (found.dtype, tuple(found.shape)) == (TORCH_DTYPE[spec.dtype], spec.shape)
        assert bytes(bytes_of(found)) == data.get(position, b"")
    again = read_tensors(root, [file.path for file in files])
    assert [again[spec.name].spec for spec in specs] == specs


@given(spec_lists(("F32", "BF16", "U8")), st.integers(1, 3), st.data())
def test_coverage_is_full_exactly_where_every_byte_is_written_once(
    specs: list[TensorSpec], world: int, data: Any
) -> None:
    files = lay_out(by_size(specs, 100), "model", "model")
    plans = []
    for rank in range(world):
        mine = shares([LocalShard(spec, Box.whole(spec.shape), (rank, world), "group") for spec in specs])
        plans.append(WritePlan(tuple(files), (), mine, tuple(fill_files(files, mine)), ""))
    full = full_coverage(files)
    assert sum(plan.coverage for plan in plans) % (1 << 64) == full
    pieces = [piece for plan in plans for piece in plan.pieces]
    if not pieces:
        return
    broken: WriteItem = data.draw(st.sampled_from(pieces))
    others = [piece for piece in pieces if piece is not broken]
    moved = replace(broken, region=replace(broken.region, offset=broken.region.offset + 1))
    short = replace(broken, region=replace(broken.region, run=broken.region.run - 1))
    for wrong in (others, [*pieces, broken], [*others, moved], [*others, short]):
        assert WritePlan(tuple(files), (), {}, tuple(wrong), "").coverage != full


def test_pieces_keep_to_the_grid_of_digests() -> None:
    spec = TensorSpec("wide", "U8", (3, CELL_BYTES))
    files = lay_out([[spec]], "model", "model")
    whole = {0: WriteShare(spec, Box.whole(spec.shape), 0, 3)}
    pieces = list(fill_files(files, whole))
    assert all(piece.region.nbytes <= CELL_BYTES for piece in pieces)
    assert all(piece.region.end % CELL_BYTES == 0 for piece in pieces[:-1])
    assert [piece.start for piece in pieces] == [0, *np.cumsum([piece.region.nbytes for piece in pieces])[:-1].tolist()]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_shards_written_by_one_mesh_are_read_as_boxes_of_another(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """A tensor cut into shard files is fetched, box by box, as any other mesh cuts it."""
    root = tmp_path_factory.mktemp("shards")
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple))
    values = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
    spec = TensorSpec("w", "I32", shape)

    def cut() -> list[Box]:
        dim, parts = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 4))
        return [Sharding((parts,), (index,), (dim,), (False,)).box(shape) for index in range(parts)]

    names = []
    for number, box in enumerate(cut()):
        if not box.numel:
            continue
        local = TensorSpec("w", "I32", box.sizes)
        file = FileLayout(f"{number}.safetensors", (local,), {BOXES_KEY: encode_boxes({"w": (shape, box)})})
        body = np.ascontiguousarray(part(values.numpy(), box)).tobytes()
        (root / file.path).write_bytes(file.header + body)
        names.append(file.path)
    [stored] = read_tensors(root, names).values()
    assert stored.spec == spec
    for box in cut():
        into = torch.full(box.sizes, -1, dtype=torch.int32)
        assert fetch(root, [Fetch(stored, box, into)]) == box.numel * 4
        assert np.array_equal(into.numpy(), part(values.numpy(), box))
        assert sum(read.box.numel for read in reads(stored, box)) == box.numel


# -- headers nobody should trust -----------------------------------------------------------------------------------

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def _file(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def _entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**GOOD["a"], **changes}}


MALFORMED = {
    "empty": b"",
    "shorter than its length field": b"\x10\0\0",
    "header beyond the file": _file(GOOD, b"\0" * 8, length=10_000),
    "header of 2**63 bytes": _file(GOOD, b"\0" * 8, length=1 << 63),
    "header above the limit": _file(b" " * 100_000_001),
    "truncated values": _file(GOOD, b"\0" * 7),
    "too many bytes": _file(GOOD, b"\0" * 9),
    "not JSON": _file(b"\x80\x04pickle", b"\0" * 8),
    "not UTF-8": _file(b'{"\xff": 1}'),
    "torn JSON": _file(b'{"a": {"dtype": "F32"'),
    "nested too deeply": _file(b"[" * 200_000),
    "endless number": _file(b'{"a": ' + b"9" * 5000 + b"}"),
    "a list": _file([]),
    "an entry that is a list": _file({"a": []}),
    "an entry without dtype": _file({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "an entry with more": _file(_entry(extra=1), b"\0" * 8),
    "a key twice": _file(b'{"a":' + json.dumps(GOOD["a"]).encode() + b',"a":' + json.dumps(GOOD["a"]).encode() + b"}"),
    "unknown dtype": _file(_entry(dtype="F3"), b"\0" * 8),
    "dtype that is a list": _file(_entry(dtype=["F32"]), b"\0" * 8),
    "dtype that lies": _file(_entry(dtype="F64"), b"\0" * 8),
    "shape that lies": _file(_entry(shape=[3]), b"\0" * 8),
    "negative shape": _file(_entry(shape=[-1, -2]), b"\0" * 8),
    "fractional shape": _file(_entry(shape=[2.0]), b"\0" * 8),
    "boolean shape": _file(_entry(shape=[2, True]), b"\0" * 8),
    "huge shape": _file(_entry(shape=[1 << 62]), b"\0" * 8),
    "shape that overflows": _file(_entry(shape=[1 << 61, 1 << 61, 0], data_offsets=[0, 8]), b"\0" * 8),
    "too many dimensions": _file(_entry(shape=[1] * 100 + [2]), b"\0" * 8),
    "negative offsets": _file(_entry(data_offsets=[-8, 0]), b"\0" * 8),
    "offsets backwards": _file(_entry(shape=[0], data_offsets=[8, 0]), b"\0" * 8),
    "offsets beyond the file": _file(_entry(data_offsets=[8, 16]), b"\0" * 8),
    "one offset": _file(_entry(data_offsets=[8]), b"\0" * 8),
    "overlap": _file({**GOOD, "b": {**GOOD["a"], "data_offsets": [4, 12]}}, b"\0" * 12),
    "hole": _file({**GOOD, "b": {**GOOD["a"], "data_offsets": [12, 20]}}, b"\0" * 20),
    "hole at the start": _file(_entry(data_offsets=[4, 12]), b"\0" * 12),
    "metadata that is a list": _file({"__metadata__": [], **GOOD}, b"\0" * 8),
    "metadata of numbers": _file({"__metadata__": {"step": 1}, **GOOD}, b"\0" * 8),
    "boxes that are not JSON": _file({"__metadata__": {BOXES_KEY: "{"}, **GOOD}, b"\0" * 8),
    "boxes that are a list": _file({"__metadata__": {BOXES_KEY: "[]"}, **GOOD}, b"\0" * 8),
    "boxes without the tensor": _file({"__metadata__": {BOXES_KEY: "{}"}, **GOOD}, b"\0" * 8),
    "a box outside": _file({"__metadata__": {BOXES_KEY: '{"a": [[3], [2]]}'}, **GOOD}, b"\0" * 8),
    "a negative box": _file({"__metadata__": {BOXES_KEY: '{"a": [[3], [-1]]}'}, **GOOD}, b"\0" * 8),
    "a box of other rank": _file({"__metadata__": {BOXES_KEY: '{"a": [[3, 3], [0, 0]]}'}, **GOOD}, b"\0" * 8),
}


def test_the_header_that_the_others_are_made_from_is_good(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(_file(GOOD, b"\0" * 8))
    [stored] = read_tensors(tmp_path, ["x.safetensors"]).values()
    assert stored.spec == TensorSpec("a", "F32", (2,))


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_corrupt(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"x\.safetensors"):
        read_tensors(tmp_path, ["x.safetensors"])


@given(st.binary(max_size=80))
def test_random_bytes_after_a_length_are_corrupt_or_describe_nothing(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes
) -> None:
    root = tmp_path_factory.mktemp("noise")
    (root / "x").write_bytes(_file(b"{" + noise))
    try:
        found, _ = read_header(root, "x")
    except CorruptCheckpointError:
        return
    assert not any(stored.spec.nbytes for stored in found)


@given(st.integers(0, 200), st.integers(1, 255))
def test_a_changed_byte_in_a_header_never_misplaces_a_tensor(
    tmp_path_factory: pytest.TempPathFactory, position: int, change: int
) -> None:
    """Whatever the header says then, it is refused or still describes exactly the bytes that are there."""
    root = tmp_path_factory.mktemp("flip")
    data = bytearray(_file({**GOOD, "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}}, b"\0" * 11))
    data[position % len(data)] ^= change
    (root / "x").write_bytes(data)
    try:
        found, _ = read_header(root, "x")
    except CorruptCheckpointError:
        return
    assert sum(stored.spec.nbytes for stored in found) == len(data) - found[0].chunks[0].offset


def _leads_elsewhere(root: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    outside = root / "outside.safetensors"
    outside.write_bytes(_file(GOOD, b"\0" * 8))
    inside = root / "ckpt"
    (inside / "deep").mkdir(parents=True)
    yield "../outside.safetensors", lambda: None
    yield "deep/../../outside.safetensors", lambda: None
    yield str(outside), lambda: None
    yield "", lambda: None
    yield "nul\0", lambda: None
    yield "link.safetensors", lambda: (inside / "link.safetensors").symlink_to(outside)
    yield "dir/outside.safetensors", lambda: (inside / "dir").symlink_to(root)
    yield "gone.safetensors", lambda: None
    yield "dangling.safetensors", lambda: (inside / "dangling.safetensors").symlink_to("nowhere")
    yield "deep", lambda: None
    yield "pipe", lambda: os.mkfifo(inside / "pipe")


def test_a_name_that_leads_elsewhere_is_corrupt(tmp_path: Path) -> None:
    for name, prepare in _leads_elsewhere(tmp_path):
        prepare()
        with pytest.raises(CorruptCheckpointError):
            read_header(tmp_path / "ckpt", name)


def test_two_files_that_disagree_about_a_tensor_are_corrupt(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(_file(GOOD, b"\0" * 8))
    (tmp_path / "same").write_bytes(_file(GOOD, b"\0" * 8))
    (tmp_path / "other").write_bytes(_file(_entry(dtype="I32"), b"\0" * 8))
    for second in ("same", "other"):
        with pytest.raises(CorruptCheckpointError, match="one too"):
            read_tensors(tmp_path, ["one", second])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(0, 5), st.integers(1, 3)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_shards_that_overlap_are_corrupt(
    tmp_path_factory: pytest.TempPathFactory, corners: list[tuple[int, int, int, int]]
) -> None:
    root = tmp_path_factory.mktemp("shards")
    boxes = [Box((top, left), (rows, columns)) for top, rows, left, columns in corners]
    seen = np.zeros((8, 8), int)
    for number, box in enumerate(boxes):
        part(seen, box)[...] += 1
        metadata = {BOXES_KEY: encode_boxes({"w": ((8, 8), box)})}
        file = FileLayout(str(number), (TensorSpec("w", "U8", box.sizes),), metadata)
        (root / file.path).write_bytes(file.header + bytes(box.numel))
    names = [str(number) for number in range(len(boxes))]
    if (seen > 1).any():
        with pytest.raises(CorruptCheckpointError, match="do not match"):
            read_tensors(root, names)
    else:
        found = read_tensors(root, names)
        assert [chunk.box for stored in found.values() for chunk in stored.chunks] == boxes
