"""Every small box, range and division of work, not a sample: most boxes drawn at random are empty or simple."""

from __future__ import annotations

import doctest
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_ckpt.layout import plan, replicas
from hydra_ckpt.layout.aliases import SliceMapping, TensorMapping
from hydra_ckpt.layout.boxes import Box, ByteRuns, Sharding, regions
from hydra_ckpt.layout.file_layout import FileLayout, by_file, by_size, index_json, lay_out
from hydra_ckpt.layout.plan import WritePlan, cells, fill_files, full_coverage
from hydra_ckpt.layout.replicas import LocalShard, shares, stretches
from hydra_ckpt.layout.specs import TensorSpec

# All shapes of up to three dimensions, and enough with four that two strided levels lie outside of the innermost runs.
SHAPES = [
    *(shape for ndim in range(4) for shape in product((0, 1, 2, 3), repeat=ndim)),
    *product((1, 2), repeat=4),
    (2, 3, 2, 3),
    (3, 2, 3, 2),
]


def boxes_of(shape: tuple[int, ...]) -> Iterator[Box]:
    """Every box of a shape, empty ones included."""
    ranges = [[(start, size) for start in range(n + 1) for size in range(n - start + 1)] for n in shape]
    for choice in product(*ranges):
        yield Box(tuple(start for start, _ in choice), tuple(size for _, size in choice))


def bytes_in(region: ByteRuns) -> Iterator[int]:
    for index in range(region.count):
        start = region.offset + index * region.stride
        yield from range(start, start + region.run)


def bytes_of(box: Box, shape: tuple[int, ...], itemsize: int, base: int) -> list[int]:
    """The positions of a box's bytes, by NumPy's own indexing."""
    positions = np.arange(math.prod(shape) * itemsize).reshape(*shape, itemsize) + base
    slices = tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))
    return positions[(*slices, ...)].reshape(-1).tolist()


def test_the_regions_of_every_small_box_are_its_bytes_in_order() -> None:
    strided = 0
    for shape in SHAPES:
        for box in boxes_of(shape):
            found = list(regions(box, shape, 2, base=5))
            expected = bytes_of(box, shape, 2, 5)
            assert [byte for region in found for byte in bytes_in(region)] == expected, (box, shape)
            assert sum(region.nbytes for region in found) == len(expected)
            assert max((region.end for region in found), default=0) == max(expected, default=-1) + 1
            strided += len(found) > 1
    assert strided > 500


def test_every_two_small_boxes_have_the_elements_in_common_that_they_have() -> None:
    for shape in ((3,), (2, 3)):
        for one, other in product(boxes_of(shape), repeat=2):
            numbers = {box: set(bytes_of(box, shape, 1, 0)) for box in (one, other)}
            common = one.intersect(other)
            assert (set() if common is None else set(bytes_of(common, shape, 1, 0))) == numbers[one] & numbers[other]


@pytest.mark.parametrize("name", ["aliases", "blocks", "boxes", "file_layout", "grids", "plan", "replicas", "specs"])
def test_the_examples_in_the_docstrings_are_right(name: str) -> None:
    module = import_module(f"hydra_ckpt.layout.{name}")
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0


def test_every_module_has_an_example() -> None:
    for path in Path(plan.__file__).parent.glob("*.py"):
        assert path.name == "__init__.py" or ">>> " in path.read_text(), f"{path.name}: a worked example is missing"


# -- divisions of work ---------------------------------------------------------------------------------------------


def test_every_small_division_writes_each_row_once_and_evenly() -> None:
    for count, (first, second) in product(range(1, 10), product(range(8), repeat=2)):
        specs = [TensorSpec("a", "F32", (first, 2)), TensorSpec("b", "BF16", (second, 3))]
        rows: Counter[tuple[str, int]] = Counter()
        for rank in range(count):
            held = [LocalShard(spec, Box.whole(spec.shape), (rank, count)) for spec in specs]
            for position, share in shares(held).items():
                assert share.box == held[position].box.rows(share.start, share.stop)
                rows.update((share.spec.name, row) for row in range(share.start, share.stop))
        assert set(rows.values()) <= {1}
        assert rows.total() == first + second


def test_how_many_replicas_write() -> None:
    mib, gib = 1 << 20, 1 << 30
    # (replicas, bytes held, bytes of the whole tensors) to writers
    assert stretches(8, 1, 1) == 8  # as many as are on a node always do
    assert stretches(9, 1, 1) == 8
    assert stretches(100, 8 * 64 * mib, 8 * 64 * mib) == 8
    assert stretches(100, 9 * 64 * mib, 9 * 64 * mib) == 9  # 64 MiB of a file for each
    assert stretches(100, 100 * gib, 100 * gib) == 100
    assert stretches(512, gib, 16 * gib) == 256  # the other 15 parts have writers too: 4 MiB for each
    assert stretches(512, 64 * mib, 512 * 64 * mib) == 64  # but never less than 1 MiB
    assert (8, mib, 64 * mib) == (replicas._ALWAYS, replicas._LEAST_BYTES, replicas._FILE_STRETCH_BYTES)


def test_writers_are_spread_over_the_replicas() -> None:
    spec = TensorSpec("a", "U8", (64, 1))
    writers = [rank for rank in range(20) if shares([LocalShard(spec, Box.whole(spec.shape), (rank, 20))])]
    assert writers == [0, 2, 5, 7, 10, 12, 15, 17]  # 8 of 20, every 2.5th


def test_what_replicas_may_not_divide_is_written_by_the_first() -> None:
    spec = TensorSpec("buffer", "F32", (6,))
    for rank in range(3):
        held = LocalShard(spec, Box.whole((6,)), (rank, 3), divisible=False)
        assert [(s.start, s.stop) for s in shares([held]).values()] == ([(0, 6)] if rank == 0 else [])


def test_the_number_of_writers_of_a_sharded_file() -> None:
    def ranks_per_file(mesh: tuple[int, ...], dims: tuple[int | None, ...]) -> int:
        return replicas.ranks_per_file(Sharding(mesh, (0,) * len(mesh), dims, (False,) * len(mesh)))

    assert ranks_per_file((4, 16), (None, 0)) == 64
    assert ranks_per_file((32, 16), (None, 0)) == 16 * 8
    assert ranks_per_file((2, 16), (1, 0)) == 32
    assert ranks_per_file((4, 16), (None, None)) == 1  # not sharded


# -- files ---------------------------------------------------------------------------------------------------------


def test_files_are_numbered_by_the_names_of_the_reference_not_by_first_use() -> None:
    specs = [TensorSpec(name, "F32", (1,)) for name in ("early", "unknown", "late")]
    groups = by_file(specs, {"early": "model-00002.safetensors", "late": "model-00001.safetensors"})
    assert [[spec.name for spec in group] for group in groups] == [["late"], ["early", "unknown"]]


def test_a_group_is_full_at_exactly_its_limit() -> None:
    specs = [TensorSpec(name, "U8", (size,)) for name, size in (("a", 6), ("b", 4), ("c", 1), ("d", 20), ("e", 0))]
    assert ["".join(spec.name for spec in group) for group in by_size(specs, 10)] == ["ab", "c", "d", "e"]


def test_tensors_of_whole_pages_come_before_others_of_the_same_width() -> None:
    specs = [TensorSpec(*row) for row in (("odd", "F32", (3,)), ("page", "F32", (1024,)), ("wide", "I64", (1,)))]
    [file] = lay_out([specs], "model", "model")
    assert [spec.name for spec in file.tensors] == ["wide", "page", "odd"]
    assert file.offsets == {"wide": 4096, "page": 4104, "odd": 8200}


def test_the_index_is_sorted_and_has_the_size_of_the_tensors() -> None:
    layouts = lay_out([[TensorSpec("b", "F32", (2,))], [TensorSpec("a", "BF16", (3,))]], "model", "model")
    index = index_json(layouts).decode()
    assert index.index('"a": "model-00002-of-00002') < index.index('"b": "model-00001-of-00002')
    assert '"total_size": 14' in index
    assert index.endswith("}\n")


# -- plans ---------------------------------------------------------------------------------------------------------


def test_cells_keep_to_the_grid_and_strided_ones_to_whole_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CELL_BYTES", 8)
    for offset, run in product(range(20), range(1, 30)):
        found = list(cells(ByteRuns(offset, run)))
        assert [byte for cell in found for byte in bytes_in(cell)] == list(range(offset, offset + run))
        assert all(cell.nbytes <= 8 and cell.offset // 8 == (cell.end - 1) // 8 for cell in found)
        assert all(cell.end % 8 == 0 for cell in found[:-1])
    for run, count in product(range(1, 20), range(2, 12)):
        region = ByteRuns(3, run, count, 25)
        found = list(cells(region))
        assert [byte for cell in found for byte in bytes_in(cell)] == list(bytes_in(region))
        assert all(cell.run == run and cell.count <= max(8 // run, 1) for cell in found)
        assert all((cell.stride > 0) == (cell.count > 1) for cell in found)


def test_shards_along_any_dimension_cover_a_file_once_and_with_one_missing_or_twice_they_do_not() -> None:
    for shape, parts in product([(5,), (4, 6), (3, 2, 5), (2, 3, 2, 3)], (2, 3)):
        spec = TensorSpec("a", "BF16", shape)
        layouts = lay_out([[spec]], "model", "model")
        for dim in range(len(shape)):
            ranks = [Sharding((parts,), (rank,), (dim,), (False,)) for rank in range(parts)]
            held = [shares([LocalShard(spec, rank.box(shape))]) for rank in ranks]
            plans = [WritePlan(tuple(layouts), (), mine, tuple(fill_files(layouts, mine)), "") for mine in held]
            assert sum(each.coverage for each in plans) % (1 << 64) == full_coverage(layouts), (shape, dim)
            for each in plans:
                others = sum(other.coverage for other in plans if other is not each)
                if each.nbytes:
                    assert others % (1 << 64) != full_coverage(layouts)
                    assert (others + 2 * each.coverage) % (1 << 64) != full_coverage(layouts)


def test_coverage_of_a_block_s_file_is_zero_in_sum_only_if_it_is_filled() -> None:
    spec = TensorSpec("a", "U8", (10,))
    [file] = lay_out([[spec]], "model", "shard-block")
    begin = len(file.header)

    def coverage(led: bool, *ranges: tuple[int, int]) -> int:
        pieces = tuple(plan.WriteItem(0, ByteRuns(begin + a, b - a), 0, 0) for a, b in ranges)
        return WritePlan((), (), {}, pieces, "", block_files=(file,), led=frozenset({0} if led else ())).coverage

    def total(*coverages: int) -> int:
        return sum(coverages) % (1 << 64)

    assert total(coverage(True, (0, 4)), coverage(False, (4, 10))) == 0
    assert total(coverage(True, (4, 10)), coverage(False, (0, 4))) == 0
    for ranges in [((0, 4), (5, 10)), ((0, 4), (3, 10)), ((0, 4), (4, 9)), ((1, 4), (4, 10))]:
        assert total(coverage(True, ranges[0]), coverage(False, ranges[1])) != 0


def test_own_files_need_no_proof_and_count_in_the_bytes() -> None:
    spec = TensorSpec("a", "U8", (10,))
    layouts = lay_out([[spec]], "model", "model")
    mine = shares([LocalShard(spec, Box.whole((10,)))])
    own = WritePlan((), tuple(layouts), mine, tuple(fill_files(layouts, mine)), "")
    assert (own.coverage, own.nbytes, own.created) == (0, 10, [0])
    files = tuple(layouts)
    both = WritePlan(files, files, mine, own.pieces, "", block_files=files * 2, led=frozenset({1}))
    assert both.created == [1, 3]
    assert both.all_files == files * 4
    assert both.coverage == (full_coverage(layouts) - full_block(layouts[0])) % (1 << 64)


def full_block(file: FileLayout) -> int:
    return plan._boundary_sum(plan._seed(file.path), plan._data_region(file))


def test_a_fingerprint_differs_for_every_field_and_every_order() -> None:
    base = [TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "F32", (2,))]
    others = [
        [TensorSpec("c", "F32", (2, 3)), base[1]],
        [TensorSpec("a", "I32", (2, 3)), base[1]],
        [TensorSpec("a", "F32", (3, 2)), base[1]],
        base[::-1],
        base[:1],
    ]
    seen = {plan.fingerprint(plan.describe(specs)) for specs in [base, *others]}
    assert len(seen) == 6
    assert plan.fingerprint(["ab", "c"]) != plan.fingerprint(["a", "bc"])


# -- names ---------------------------------------------------------------------------------------------------------

SPECS = [TensorSpec(name, "F32", (2, 3)) for name in ("a", "b", "c")]


def alias_of(name: str, source: str, row: int) -> SliceMapping:
    """The first or second row of a tensor of two as a row of another."""
    return SliceMapping(name, (2, 3), (row, 0), source, Box((row, 0), (1, 3)), (0, 1))


def test_the_pieces_of_a_joined_tensor_follow_each_other_where_its_first_source_is() -> None:
    given = [alias_of("joined", "c", 1), SliceMapping.same(SPECS[1]), alias_of("joined", "a", 0)]
    found = TensorMapping.ordered(given, SPECS)
    assert [(alias.name, alias.source) for alias in found.aliases] == [("b", "b"), ("joined", "c"), ("joined", "a")]
    assert [spec.name for spec in found.specs(SPECS)] == ["b", "joined"]
    found = TensorMapping.ordered(given[::-1], SPECS)
    assert [(alias.name, alias.source) for alias in found.aliases] == [("joined", "a"), ("joined", "c"), ("b", "b")]


def test_a_naming_is_completed_with_the_tensors_that_have_none() -> None:
    found = TensorMapping((alias_of("joined", "c", 1), alias_of("joined", "a", 0)), {"joined": "BF16"}).completed(
        SPECS[:2]
    )
    assert [(alias.name, alias.source) for alias in found.aliases] == [("joined", "a"), ("b", "b")]
    assert found.dtypes == {"joined": "BF16"}


def test_a_naming_keeps_a_tensor_only_if_all_of_it_is_there_bit_for_bit() -> None:
    whole = TensorMapping((alias_of("x", "a", 0), alias_of("y", "a", 1)))
    assert whole.keeps(SPECS[:1])
    assert not whole.keeps(SPECS[:2])
    assert not TensorMapping(whole.aliases[:1]).keeps(SPECS[:1])
    assert not TensorMapping((whole.aliases[0],) * 2).keeps(SPECS[:1])  # the same row twice is not both
    assert not TensorMapping(whole.aliases, {"y": "BF16"}).keeps(SPECS[:1])
    assert TensorMapping(whole.aliases, {"y": "F32"}).keeps(SPECS[:1])


def test_what_is_plain() -> None:
    assert TensorMapping.unchanged(SPECS).is_plain
    assert not TensorMapping((SliceMapping.same(SPECS[0], "other"),)).is_plain
    assert not TensorMapping((SliceMapping.same(SPECS[0]),), {"a": "BF16"}).is_plain
    assert not TensorMapping((alias_of("a", "a", 0),)).is_plain


def test_an_alias_and_its_way_back_agree_on_every_box() -> None:
    transposed = SliceMapping("t", (3, 2), (0, 0), "a", Box((0, 1), (2, 2)), (1, 0))
    indexed = SliceMapping("i", (1, 3), (0, 0), "a", Box((1, 0), (1, 3)), (None, 1))
    for alias, held in product((transposed, indexed, alias_of("r", "a", 1)), boxes_of((2, 3))):
        part, common = alias.part(held), alias.box.intersect(held)
        assert (part is None) == (common is None)
        if part is not None:
            assert part[0] == common
            assert part[0].numel == part[1].numel
            assert alias.sought(part[1]) == (part[0], part[1])


def test_tensors_of_two_models_correspond_by_the_export_that_both_have() -> None:
    """One model has the export's `x` (4 x 3) as two tensors of two rows, the other as three rows and one."""
    two = TensorMapping(
        tuple(SliceMapping("x", (4, 3), (2 * n, 0), f"h{n}", Box((0, 0), (2, 3)), (0, 1)) for n in range(2))
    )
    rows = TensorMapping(
        (
            SliceMapping("x", (4, 3), (0, 0), "top", Box((0, 0), (3, 3)), (0, 1)),
            SliceMapping("x", (4, 3), (3, 0), "last", Box((0, 0), (1, 3)), (0, 1)),
        )
    )
    specs = {f"h{n}": TensorSpec(f"h{n}", "F32", (2, 3)) for n in range(2)}
    specs |= {"top": TensorSpec("top", "F32", (3, 3)), "last": TensorSpec("last", "F32", (1, 3))}
    found = two.onto(rows, specs)
    assert [(a.source, a.box.offsets[0], a.box.sizes[0], a.name, a.corner[0]) for a in found.aliases] == [
        ("h0", 0, 2, "top", 0),
        ("h1", 0, 1, "top", 2),
        ("h1", 1, 1, "last", 0),
    ]
    assert [a.shape for a in found.aliases] == [(3, 3), (3, 3), (1, 3)]
    assert two.onto(TensorMapping.unchanged(SPECS), specs).aliases == ()


def valid() -> dict[str, Any]:
    return TensorMapping(
        (alias_of("x", "a", 0), alias_of("x", "b", 1)), {"x": "BF16"}, {"x": "f"}, {"x": (6,)}
    ).to_data()


def test_a_naming_survives_its_file() -> None:
    assert TensorMapping.from_data(json.loads(json.dumps(valid()))).to_data() == valid()
    on_grid = replace(alias_of("x", "a", 0), grid=(2, 3))
    assert TensorMapping.from_data(json.loads(json.dumps(TensorMapping((on_grid,)).to_data()))).aliases == (on_grid,)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (1, [2]),  # fewer dimensions than the corner has
        (1, [1, 3]),  # the piece does not fit in
        (1, [-2, -3]),
        (2, [2, 0]),  # begins outside
        (2, [0, -1]),
        (4, [0]),
        (4, [-1, 0]),
        (5, [2, 3]),  # more elements than the place has
        (5, [1, -3]),
        (6, [0, 0]),  # a dimension twice
        (6, [0, -1]),
        (6, [0, None]),  # a dimension is lost
        (6, [0, 7]),
        (6, [0]),
    ],
)
def test_a_naming_that_does_not_fit_is_invalid(column: int, value: list[Any]) -> None:
    data = valid()
    data["aliases"][1][column] = value
    with pytest.raises(ValueError, match=r"."):
        TensorMapping.from_data(data)


def test_a_dimension_may_not_be_used_twice_even_if_the_sizes_fit() -> None:
    piece = ["x", [2, 3], [0, 0], "a", [0, 0], [1, 1], [0, 0]]
    with pytest.raises(ValueError, match="does not fit"):
        TensorMapping.from_data({"aliases": [piece], "dtypes": {}, "files": {}})
    assert TensorMapping.from_data({"aliases": [[*piece[:-1], [0, 1]]], "dtypes": {}, "files": {}}).aliases


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtypes", {"x": "F33"}), ("shapes", {"x": [5]}), ("shapes", {"x": [-6]}), ("files", []), ("aliases", [["x"]])],
)
def test_a_naming_of_the_wrong_kind_is_invalid(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        TensorMapping.from_data({**valid(), key: value})
    with pytest.raises(ValueError, match=r"."):
        TensorMapping.from_data({name: item for name, item in valid().items() if name != "dtypes"})
