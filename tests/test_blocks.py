"""Files of blocks of neighbouring shards: few writers each, however many ranks there are."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from hydra_ckpt import CheckpointError
from hydra_ckpt.files import Files
from hydra_ckpt.layout.blocks import BLOCK_SHARDS, block_of
from hydra_ckpt.layout.boxes import Box, Sharding
from hydra_ckpt.layout.plan import WritePlan, full_coverage
from hydra_ckpt.layout.replicas import ranks_per_file
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.saving.agreement import Agreement
from hydra_ckpt.saving.write_planning import make_plan, state_layout
from hydra_ckpt.state.local import LocalTensor, ShardPlacement
from hydra_ckpt.storage.write import create_own_files
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.testing import run_distributed
from tests.meshes import Run, place
from tests.test_layout import part, shardings


@given(shardings(), st.integers(1, 5))
def test_blocks_tile_a_tensor_and_hold_their_ranks_boxes(
    case: tuple[tuple[int, ...], list[Sharding]], limit: int
) -> None:
    shape, ranks = case
    if not ranks[0].order:
        return  # not sharded
    seen = np.zeros(shape, int)
    holders: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    boxes: dict[str, Box] = {}
    for sharding in ranks:
        block, box = block_of(sharding, shape, limit), sharding.box(shape)
        assert not box.numel or box.intersect(block.box) == box
        assert boxes.setdefault(block.key, block.box) == block.box
        holders[block.key].add(
            tuple(c for c, dim in zip(sharding.coordinate, sharding.dims, strict=True) if dim is not None)
        )
    for key, box in boxes.items():
        part(seen, box)[...] += 1
        assert len(holders[key]) <= limit
    assert (seen == 1).all()


# -- a large world -------------------------------------------------------------------------------------------------

SPECS = [
    TensorSpec(f"{layer}.{name}", "F32", shape)
    for layer in range(24)
    for name, shape in (("column", (512, 16)), ("row", (256, 32)), ("norm", (128,)), ("step", ()))
]
# Mesh dimensions are (replicate, shard, tensor parallel).
SPLITS: dict[str, tuple[int | None, ...]] = {"column": (None, 0, 0), "row": (None, 0, 1), "norm": (None, 0, None)}


def _held(mesh: tuple[int, int, int], here: tuple[int, ...]) -> list[LocalTensor]:
    """What a rank holds, as FSDP over tensor parallelism divides it."""
    found = []
    for spec in SPECS:
        dims = SPLITS.get(spec.name.split(".")[1])
        at = ShardPlacement(spec, Box.whole(spec.shape))
        if dims is not None:
            how = Sharding(mesh, here, dims, (False, dims[2] == 0, False))
            group = tuple(dim is None for dim in dims)
            at = ShardPlacement(
                spec, how.box(spec.shape), "mesh", how.replica, group, ranks_per_file=ranks_per_file(how), sharding=how
            )
        found.append(LocalTensor(at, torch.empty(0)))
    return found


def _plans(mesh: tuple[int, int, int]) -> list[WritePlan]:
    """Every rank's plan, each made from what that rank knows alone."""
    world = mesh[0] * mesh[1] * mesh[2]
    plans = []
    for rank, here in enumerate(product(*map(range, mesh))):
        items = _held(mesh, here)
        ranks_per_file = {("optim", item.spec.name): item.place.ranks_per_file for item in items}
        copies = {"": (rank, world), "mesh": (0, 1)}
        agreement = Agreement({"optim": tuple(SPECS)}, copies, rank == 0, "", ranks_per_file=ranks_per_file)
        layout = state_layout("optim", sum(spec.nbytes for spec in SPECS), world)
        plans.append(make_plan({"optim": items}, agreement, [layout], rank, world))
    return plans


@pytest.mark.parametrize("mesh", [(1, 256, 1), (4, 64, 2), (2, 33, 4), (16, 16, 4)], ids=str)
def test_few_ranks_write_to_a_file_and_each_byte_once(mesh: tuple[int, int, int]) -> None:
    plans = _plans(mesh)
    writers, filled = Counter[str](), Counter[str]()
    leaders: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for plan in plans:
        paths = [file.path for file in plan.all_files]
        writers.update({paths[piece.file] for piece in plan.pieces})
        leaders.update(paths[index] for index in plan.created)
        for piece in plan.pieces:
            filled[paths[piece.file]] += piece.region.nbytes
        for file in plan.all_files:
            assert sizes.setdefault(file.path, file.nbytes - len(file.header)) == file.nbytes - len(file.header)
    assert max(writers.values()) <= 2 * BLOCK_SHARDS
    assert len(leaders) > 1
    assert set(leaders.values()) == {1}
    assert set(leaders) | {file.path for file in plans[0].files} == set(sizes)
    assert dict(filled) == sizes
    total = sum(plan.coverage for plan in plans) % (1 << 64)
    assert total == full_coverage(plans[0].files)
    assert len({plan.fingerprint for plan in plans}) == 1
    busy = [plan.nbytes for plan in plans if plan.nbytes]
    if 512 % (mesh[1] * mesh[2]) == 0 and mesh[1] * mesh[2] <= 128:  # else shards have unequal sizes
        assert max(busy) / (sum(busy) / len(busy)) <= 1.05


def test_a_block_that_is_not_filled_does_not_cover() -> None:
    plans = _plans((1, 64, 1))
    total = sum(plan.coverage for plan in plans[:-1]) % (1 << 64)
    assert total != full_coverage(plans[0].files)


def test_a_file_that_its_leader_does_not_create_is_waited_for_no_longer_than_the_limit(tmp_path: Path) -> None:
    plan = _plans((1, 64, 1))[1]
    assert not plan.led
    (tmp_path / "optim").mkdir()
    with pytest.raises(CheckpointError, match="the first rank of its block has not created it"):
        create_own_files(Files(), tmp_path, plan, patience_s=0.05)


# -- real ranks ----------------------------------------------------------------------------------------------------

SAVED = (("fsdp4", 2), ("hsdp2x2", 1), ("fsdp2_tp2", 2), ("fsdp2_tp2", 1))
LOADED = ("one", "fsdp2", "tp2")


def _save(root: Path) -> None:
    logging.getLogger("hydra_ckpt").setLevel(logging.ERROR)
    for name, block in SAVED:
        here = place(name)
        with here.build(root / f"{name}-{block}", is_async=True) as engine:
            engine._saver._contents.outputs.block_shards = block
            for step in (1, 2):  # the second by the plan kept from the first
                engine.save(Run(here).state, step=step).result()
        dist.barrier()


def _load(root: Path) -> list[Any]:
    logging.getLogger("hydra_ckpt").setLevel(logging.ERROR)
    found: list[Any] = []
    for target in LOADED:
        here = place(target)
        if here.group is not None:
            with here.build(root / f"on {target}") as engine:
                for name, block in SAVED:
                    run = Run(here, trained=False)
                    run.fill("wrong")
                    report = engine.load(run.state, restore_from=str(root / f"{name}-{block}" / "LATEST"))
                    assert report is not None
                    found.append((run.wrong(), report.read_bytes - run.local_nbytes()))
        dist.barrier()
    return found


def test_what_blocks_hold_loads_exactly_on_other_meshes(tmp_path: Path) -> None:
    run_distributed(_save, 4, tmp_path, timeout_s=120)
    for name, block in SAVED:
        checkpoint = Checkpoint.open((tmp_path / f"{name}-{block}" / "LATEST").resolve())
        files = checkpoint.manifest.parts["optim"].files
        blocks = {file.rsplit("/")[-1].split("-00001-of")[0] for file in files if "optim-0-" in file}
        assert len(blocks) > 1, files
        assert not list(checkpoint.path.rglob("*.new"))
    for found in run_distributed(_load, 4, tmp_path, timeout_s=240):
        assert all(outcome == ([], 0) for outcome in found), found
