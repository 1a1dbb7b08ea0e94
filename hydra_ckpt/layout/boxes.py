"""Boxes: which part of a global tensor a rank holds, and which bytes of a file that is.

Example: `w` has 6 x 4 fp32 numbers, and a mesh of 2 ranks splits its rows. Rank 1 holds rows 3 to 5. If the tensor's
bytes begin at byte 4096 of a file, these rows are one run of 48 bytes from byte 4096 + 3 * 16 = 4144 on:

    >>> rank_1 = Sharding(mesh_shape=(2,), coordinate=(1,), dims=(0,), strided=(False,))
    >>> rank_1.box((6, 4))
    Box(offsets=(3, 0), sizes=(3, 4))
    >>> list(regions(rank_1.box((6, 4)), (6, 4), itemsize=4, base=4096))
    [ByteRuns(offset=4144, run=48, count=1, stride=0)]

If the columns are split instead, rank 1 holds columns 2 and 3: six runs of 8 bytes, one every 16 bytes, the first at
byte 4096 + 2 * 4 = 4104. That is still one region:

    >>> columns = Sharding(mesh_shape=(2,), coordinate=(1,), dims=(1,), strided=(False,))
    >>> list(regions(columns.box((6, 4)), (6, 4), itemsize=4, base=4096))
    [ByteRuns(offset=4104, run=8, count=6, stride=16)]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from hydra_ckpt.errors import TopologyError


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned part of a tensor: `sizes` elements starting at `offsets`, one number per dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """The box that is all of a tensor of this shape."""
        return cls((0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    def rows(self, start: int, stop: int) -> Box:
        """The part between two rows of the first dimension, counted from this box's own first row."""
        return Box((self.offsets[0] + start, *self.offsets[1:]), (stop - start, *self.sizes[1:]))

    def intersect(self, other: Box) -> Box | None:
        """The common part, or None if there is no common element."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return None if any(size <= 0 for size in sizes) else Box(starts, sizes)

    def within(self, outer: Box) -> Box:
        """This box in coordinates that start at `outer`'s corner."""
        return Box(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.sizes)


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is spread over a device mesh, seen from one rank.

    Attributes:
        mesh_shape: Ranks along each mesh dimension.
        coordinate: This rank's position in the mesh.
        dims: For each mesh dimension the tensor dimension it splits, or None if it replicates.
        strided: For each mesh dimension whether its split comes after those of the mesh dimensions to its right
            (`_StridedShard` of PyTorch: FSDP applied to a tensor that TP had already split).
    """

    mesh_shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    dims: tuple[int | None, ...]
    strided: tuple[bool, ...]

    def box(self, shape: tuple[int, ...]) -> Box:
        """The rank's own part of a tensor of this global shape; possibly empty."""
        offsets, sizes = [0] * len(shape), list(shape)
        for mesh_dim in self.order:
            dim = self.dims[mesh_dim]
            assert dim is not None  # see `order`
            if not 0 <= dim < len(shape):
                raise TopologyError(f"a tensor of shape {list(shape)} cannot be sharded along dimension {dim}")
            start, size = chunk(sizes[dim], self.mesh_shape[mesh_dim], self.coordinate[mesh_dim])
            offsets[dim] += start
            sizes[dim] = size
        return Box(tuple(offsets), tuple(sizes))

    @property
    def order(self) -> list[int]:
        """The mesh dimensions that split the tensor, in the order in which they do."""
        splitting = [mesh_dim for mesh_dim, dim in enumerate(self.dims) if dim is not None]
        return sorted(splitting, key=lambda mesh_dim: self.strided[mesh_dim])

    @property
    def shards(self) -> int:
        """Into how many boxes the tensor is cut, empty ones counted."""
        return prod(self.mesh_shape[mesh_dim] for mesh_dim in self.order)

    @property
    def replica(self) -> tuple[int, int]:
        """This rank's index among the ranks of the mesh that hold the same box, and their number."""
        index, count = 0, 1
        for size, position, dim in zip(self.mesh_shape, self.coordinate, self.dims, strict=True):
            if dim is None:
                index, count = index * size + position, count * size
        return index, count


def chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    """Start and size of one part as `torch.chunk` cuts them: equal parts of ceil(length / parts), the last short."""
    step = -(-length // parts)
    start = min(index * step, length)
    return start, min(step, length - start)


@dataclass(frozen=True, slots=True)
class ByteRuns:
    """`count` runs of `run` bytes in a file, the first at `offset`, one every `stride` bytes."""

    offset: int
    run: int
    count: int = 1
    stride: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in all runs together."""
        return self.run * self.count

    @property
    def end(self) -> int:
        """First byte after the last run."""
        return self.offset + (self.count - 1) * self.stride + self.run


def regions(box: Box, shape: tuple[int, ...], itemsize: int, base: int = 0) -> Iterator[ByteRuns]:
    """The bytes of a box of a row-major tensor that starts at `base`, in the box's own row-major order."""
    if box.numel == 0:
        return
    if box.sizes[1:] == shape[1:]:  # whole rows: by far the most frequent case, and fast
        row = itemsize * prod(shape[1:])
        rows, first = (box.sizes[0], box.offsets[0]) if shape else (1, 0)
        yield ByteRuns(base + first * row, rows * row)
        return
    strides = [itemsize] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    # From the innermost dimension outwards: as long as a dimension is whole, its runs join into one.
    split = len(shape) - 1
    while split > 0 and box.sizes[split] == shape[split]:
        split -= 1
    run = box.sizes[split] * strides[split]
    start = base + sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
    outer = split - 1
    # Then one strided level, joined with the dimensions around it as long as they are whole.
    level = outer
    while level > 0 and box.sizes[level] == shape[level]:
        level -= 1
    count = prod(box.sizes[max(level, 0) : max(split, 0)])
    stride = strides[outer] if count > 1 else 0
    for index in product(*(range(box.sizes[dim]) for dim in range(max(level, 0)))):
        shift = sum(i * strides[dim] for dim, i in enumerate(index))
        yield ByteRuns(start + shift, run, count, stride)
