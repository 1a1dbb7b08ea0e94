"""Grids: elements that are permuted within a tensor are boxes of finer shapes, for shards of any size."""

from __future__ import annotations

from math import prod

import pytest
import torch

from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.grids import NoGridError, Walk, aliases_on_grid, flat_boxes
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.memory import narrow, view_as


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(prod(shape)).reshape(shape)


MOVES = {
    "heads interleaved": (numbered(24, 5), lambda t: t.view(3, 2, 4, 5).transpose(1, 2), (24, 5)),
    "a part interleaved": (numbered(24, 5), lambda t: t[8:16].view(2, 2, 2, 5).transpose(1, 2), (8, 5)),
    "a kernel flattened": (numbered(6, 4, 2, 3), lambda t: t.view(6, 24), (6, 24)),
    "columns interleaved": (numbered(4, 12), lambda t: t.view(4, 2, 6).transpose(1, 2), (4, 12)),
    "a vector interleaved": (numbered(12), lambda t: t.view(3, 2, 2).transpose(1, 2), (12,)),
    "a dimension of one": (numbered(4, 1, 6), lambda t: t.view(2, 2, 6).transpose(0, 1), (4, 6)),
}


@pytest.mark.parametrize(("move", "dim"), [(move, dim) for move in MOVES for dim in range(MOVES[move][0].dim())])
def test_shards_of_any_size_make_up_the_moved_tensor(move: str, dim: int) -> None:
    source, view, shape = MOVES[move]
    moved = view(source)
    spec = TensorSpec("source", "I64", tuple(source.shape))
    walk = Walk(spec, int(moved.storage_offset()), tuple(moved.shape), moved.stride(), shape, (0,) * len(shape))
    aliases = aliases_on_grid("moved", shape, [walk])
    assert TensorMapping.from_data(TensorMapping(tuple(aliases), shapes={"moved": shape}).to_data()).aliases == tuple(
        aliases
    )
    for step in range(1, source.shape[dim] + 1):
        found = torch.full(shape, -1)
        for start in range(0, source.shape[dim], step):
            offsets, sizes = [0] * source.dim(), list(source.shape)
            offsets[dim], sizes[dim] = start, min(step, source.shape[dim] - start)
            held = Box(tuple(offsets), tuple(sizes))
            for alias in aliases:
                for flat, box in flat_boxes(spec.shape, alias.grid or spec.shape, held):
                    part = alias.part(box)
                    if part is not None:
                        local = narrow(source, flat).view(box.sizes)
                        target = narrow(found.view(aliases[0].shape), part[1])
                        target.copy_(view_as(alias, local, part[0].within(box)))
        assert torch.equal(found, moved.reshape(shape)), step


def test_what_is_a_box_in_no_grid_is_refused() -> None:
    source = TensorSpec("source", "I64", (6,))
    with pytest.raises(NoGridError):  # overlapping windows
        aliases_on_grid("moved", (4, 3), [Walk(source, 0, (4, 3), (1, 1), (4, 3), (0, 0))])
    with pytest.raises(NoGridError):  # steps of 2 and 3
        aliases_on_grid("moved", (2, 2), [Walk(source, 0, (2, 2), (3, 2), (2, 2), (0, 0))])
