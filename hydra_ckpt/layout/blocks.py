"""Blocks: files for neighbouring shards, so that few ranks write to each of them, however many ranks there are.

A tensor on more ranks than should write to one file is cut into boxes: what up to this many neighbours along one
dimension of the device mesh hold together. All boxes of the same neighbours fill separate files. Each rank computes
only those of its own block, from mesh and placements; it needs no information about the others.

Example: HSDP with 2 replicas of 64 shards, so 128 ranks, and a tensor of 640 rows, 10 for each shard. With at most 32
neighbours in a block, there are 64 / 32 = 2 blocks of 320 rows. The rank at (1, 40) is in the second one, with shards
32 to 63, together with the other replica of each; `x` stands for the replicated dimension:

    >>> rank = Sharding(mesh_shape=(2, 64), coordinate=(1, 40), dims=(None, 0), strided=(False, False))
    >>> block_of(rank, (640, 4), limit=32)
    Block(key='x.32-63', box=Box(offsets=(320, 0), sizes=(320, 4)), shards=32, first=False)

With 40 shards there would be 2 blocks of 20, rather than one of 32 and one of 8:

    >>> rank = Sharding(mesh_shape=(40,), coordinate=(39,), dims=(0,), strided=(False,))
    >>> block_of(rank, (640, 4), limit=32).key
    '20-39'
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from hydra_ckpt.layout.boxes import Box, Sharding
from hydra_ckpt.layout.file_layout import DEFAULT_FILE_BYTES, FileLayout, by_size, lay_out
from hydra_ckpt.layout.replicas import stretches
from hydra_ckpt.layout.specs import TensorSpec

# Neighbours that fill files together. Two replicas may share a file: then it has twice as many writers.
BLOCK_SHARDS = 32


@dataclass(frozen=True, slots=True)
class Member:
    """A tensor of which this rank holds a shard, perhaps an empty one.

    Attributes:
        spec: The whole tensor.
        sharding: How it is spread.
        replicas: How many ranks hold the same shard.
        leads: Whether this rank is the first of these.
        mesh: Identifies the device mesh.
    """

    spec: TensorSpec
    sharding: Sharding
    replicas: int
    leads: bool
    mesh: int


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbours on a device mesh, and what they hold of a tensor.

    Attributes:
        key: Equal on those ranks only: the coordinates along each mesh dimension, `x` for one that replicates.
        box: What they hold together; it contains a rank's own part.
        shards: Into how many shards it is cut.
        first: Whether this rank is the first of the neighbours.
    """

    key: str
    box: Box
    shards: int
    first: bool


@dataclass(frozen=True, slots=True)
class BlockFiles:
    """The files of one block.

    Attributes:
        files: Their layout; each tensor is a box of the whole one.
        boxes: Name to the tensor's whole shape and that box.
        leads: Whether this rank is the one that creates them.
    """

    files: tuple[FileLayout, ...]
    boxes: Mapping[str, tuple[tuple[int, ...], Box]]
    leads: bool


@lru_cache(maxsize=4096)
def block_of(sharding: Sharding, shape: tuple[int, ...], limit: int) -> Block:
    """The block of at most `limit` neighbours that a rank belongs to with a sharded tensor.

    Neighbours follow along the longest mesh dimension whose split is the last one of its tensor dimension: there
    neighbouring shards are adjacent, so that together they form a box.
    """
    last = {sharding.dims[mesh_dim]: mesh_dim for mesh_dim in sharding.order}
    along = max(last.values(), key=lambda mesh_dim: sharding.mesh_shape[mesh_dim])
    dim = sharding.dims[along]
    assert dim is not None  # `order` has only dimensions that split
    length, position = sharding.mesh_shape[along], sharding.coordinate[along]
    step = -(-length // -(-length // limit))
    start = position // step * step
    stop = min(start + step, length)
    first, end = (
        replace(sharding, coordinate=(*sharding.coordinate[:along], at, *sharding.coordinate[along + 1 :])).box(shape)
        for at in (start, stop - 1)
    )
    sizes = list(first.sizes)
    sizes[dim] = end.offsets[dim] + end.sizes[dim] - first.offsets[dim]
    coordinates = [
        "x" if split is None else str(at) for at, split in zip(sharding.coordinate, sharding.dims, strict=True)
    ]
    coordinates[along] = f"{start}-{stop - 1}"
    return Block(".".join(coordinates), Box(first.offsets, tuple(sizes)), stop - start, position == start)


def block_files(members: Iterable[Member], limit: int, directory: str, stem: str) -> list[BlockFiles]:
    """The files of the blocks that this rank belongs to.

    A block has about a file for each stretch that its replicas divide it into, so that two replicas share a file.

    Args:
        members: The tensors to lay out; equal, but for the coordinates, on all ranks of a block.
        limit: Neighbours in a block.
        directory: Directory for the files.
        stem: What their names begin with.
    """
    blocks: dict[str, list[tuple[Member, Block]]] = defaultdict(list)
    for member in members:
        block = block_of(member.sharding, member.spec.shape, limit)
        if block.box.numel:
            blocks[f"{stem}-{member.mesh}-{block.key}"].append((member, block))
    found = []
    for name, rows in blocks.items():
        specs = [TensorSpec(member.spec.name, member.spec.dtype, block.box.sizes) for member, block in rows]
        nbytes, whole = (sum(spec.nbytes for spec in every) for every in (specs, [row[0].spec for row in rows]))
        member, block = rows[0]
        files = stretches(member.replicas, nbytes // block.shards, whole)
        laid = lay_out(by_size(specs, min(-(-nbytes // files), DEFAULT_FILE_BYTES)), directory, name)
        boxes = {member.spec.name: (member.spec.shape, block.box) for member, block in rows}
        found.append(BlockFiles(tuple(laid), boxes, block.first and member.leads))
    return found
