"""Grids: finer shapes in which elements that a conversion permutes within a tensor form boxes again.

Rotary weights whose rows are interleaved, projections whose gate and up rows alternate, kernels flattened into
matrices: in the tensors' own shapes such parts are not boxes. Cut both tensors' dimensions finely enough, say `(rows,
c)` into `(heads, 2, half, c)`, and they become a transposed box. So shards of them need no gathering either.

Example: an export has the rows 0, 2, 1, 3 of a tensor of 4 x 3. Walked through in the export's order, the source is
read in 2 steps of 3 elements (one row), each of 2 steps of 6 elements (two rows), each of 3 single elements. No box has
the rows 0 and 2 but not 1. In the grid 2 x 2 x 3 of both tensors, though, the export is all of the source, with the
first two dimensions swapped:

    >>> walk = Walk(TensorSpec("q", "F32", (4, 3)), 0, sizes=(2, 2, 3), strides=(3, 6, 1), shape=(4, 3), corner=(0, 0))
    >>> [alias] = aliases_on_grid("exported", (4, 3), [walk])
    >>> alias.shape, alias.grid, alias.dims
    ((2, 2, 3), (2, 2, 3), (1, 0, 2))

A rank that holds rows 1 and 2 of the source holds two boxes of that grid, which are two parts of the export:

    >>> for own, on_grid in flat_boxes((4, 3), alias.grid, Box((1, 0), (2, 3))):
    ...     print(own.offsets, "is", on_grid.offsets, "and goes to", alias.placed(on_grid).offsets)
    (1, 0) is (0, 1, 0) and goes to (1, 0, 0)
    (2, 0) is (1, 0, 0) and goes to (0, 1, 0)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from hydra_ckpt.layout.aliases import SliceMapping
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.specs import TensorSpec

Factor = tuple[int, int]


@dataclass(frozen=True)
class Walk:
    """A part of a tensor, and how its elements, in row-major order, are found in a source.

    Attributes:
        source: The tensor walked through.
        start: Its element where the walk begins.
        sizes: Steps of the walk, the outermost first.
        strides: Elements from step to step.
        shape: The part's shape.
        corner: Where in the tensor the part begins.
    """

    source: TensorSpec
    start: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    corner: tuple[int, ...]

    @property
    def factors(self) -> list[Factor]:
        """Sizes and strides, without those that make no step."""
        return [(size, stride) for size, stride in zip(self.sizes, self.strides, strict=True) if size > 1]


class NoGridError(ValueError):
    """No grid makes boxes of all parts."""


def aliases_on_grid(name: str, shape: tuple[int, ...], walks: Sequence[Walk]) -> list[SliceMapping]:
    """The aliases that a tensor consists of, in the coarsest grid in which all of them are boxes.

    Args:
        name: The tensor.
        shape: Its shape.
        walks: Its parts.

    Raises:
        NoGridError: Such a grid does not exist.
    """
    cuts: list[set[int]] = [{1} for _ in shape]
    while True:
        found = [_cut(walk, cuts) for walk in walks]
        finer = [set(known) for known in cuts]
        for walk, factors in zip(walks, found, strict=True):
            _note_cuts(walk, factors, finer)
        if finer == cuts:
            break
        cuts = finer
    grid = tuple(size for dim, length in enumerate(shape) for size in _divided(length, cuts[dim]))
    return [_alias(name, grid, cuts, walk, factors) for walk, factors in zip(walks, found, strict=True)]


def aliases_through(name: str, shape: tuple[int, ...], walk: Walk, parts: Sequence[Walk]) -> list[SliceMapping]:
    """The same for a tensor that is permuted after it was joined from others.

    Args:
        name: The tensor.
        shape: Its shape.
        walk: How it is found in the joined tensor.
        parts: The parts that it is joined from.

    Raises:
        NoGridError: Such a grid does not exist.
    """
    middle = walk.source
    while True:
        (outer,) = aliases_on_grid(name, shape, [walk])
        grid = outer.grid or walk.source.shape
        inner = aliases_on_grid(middle.name, grid, [_finer(part, middle.shape, grid) for part in parts])
        if inner[0].shape == grid:
            return [alias for part in inner for alias in _composed(outer, part)]
        walk = replace(walk, source=replace(middle, shape=inner[0].shape))


def _finer(part: Walk, shape: tuple[int, ...], grid: tuple[int, ...]) -> Walk:
    found = [box for _, box in flat_boxes(shape, grid, Box(part.corner, part.shape))]
    if len(found) != 1:
        raise NoGridError
    return replace(part, shape=found[0].sizes, corner=found[0].offsets)


def _composed(outer: SliceMapping, inner: SliceMapping) -> Iterator[SliceMapping]:
    """An alias of an alias's tensor."""
    found = outer.part(inner.placed(inner.box))
    source = None if found is None else inner.sought(found[0])
    if found is not None and source is not None:
        dims = tuple(None if dim is None else inner.dims[dim] for dim in outer.dims)
        yield SliceMapping(outer.name, outer.shape, found[1].offsets, inner.source, source[0], dims, inner.grid)


def flat_boxes(shape: tuple[int, ...], grid: tuple[int, ...], held: Box) -> Iterator[tuple[Box, Box]]:
    """A box of a tensor as boxes of a grid of it.

    Yields:
        A part of the box in the tensor's own shape, and the same part in the grid.
    """
    groups = _grouped(shape, grid)
    yield from _flat_boxes(groups, held, (), (), (), ())


def _flat_boxes(
    groups: list[tuple[int, ...]],
    held: Box,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    corner: tuple[int, ...],
    extent: tuple[int, ...],
) -> Iterator[tuple[Box, Box]]:
    dim = len(offsets)
    if dim == len(groups):
        yield Box(offsets, sizes), Box(corner, extent)
        return
    for start, size, starts, lengths in _ranges(groups[dim], held.offsets[dim], held.sizes[dim]):
        yield from _flat_boxes(groups, held, (*offsets, start), (*sizes, size), corner + starts, extent + lengths)


def _ranges(
    group: tuple[int, ...], start: int, size: int
) -> Iterator[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """A range of one dimension as boxes of the dimensions it is cut into: a beginning, whole ones, an end."""
    inner = prod(group[1:])
    if len(group) == 1 or size == group[0] * inner:
        if size:
            yield start, size, (start // inner, *(0 for _ in group[1:])), (size // inner, *group[1:])
        return
    stop = start + size
    first, last = -(-start // inner), stop // inner
    if first > last:  # within one
        for begin, length, starts, lengths in _ranges(group[1:], start % inner, size):
            yield start - start % inner + begin, length, (start // inner, *starts), (1, *lengths)
        return
    if start % inner:
        for begin, length, starts, lengths in _ranges(group[1:], start % inner, first * inner - start):
            yield (first - 1) * inner + begin, length, (first - 1, *starts), (1, *lengths)
    if last > first:
        yield first * inner, (last - first) * inner, (first, *(0 for _ in group[1:])), (last - first, *group[1:])
    if stop % inner:
        for begin, length, starts, lengths in _ranges(group[1:], 0, stop - last * inner):
            yield last * inner + begin, length, (last, *starts), (1, *lengths)


def _grouped(shape: tuple[int, ...], grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """For each dimension the grid's dimensions that it is cut into; each has at least one."""
    groups: list[tuple[int, ...]] = []
    position = 0
    for length in shape:
        stop = position + 1
        while prod(grid[position:stop]) < length:
            stop += 1
        groups.append(grid[position:stop])
        position = stop
    return groups


def _strides(shape: Sequence[int]) -> list[int]:
    return [prod(shape[dim + 1 :]) for dim in range(len(shape))]


def split(factors: list[Factor], position: int) -> list[Factor]:
    """Cut a walk so that one of its steps begins every `position` elements of it."""
    inner, found = 1, list[Factor]()
    for size, stride in reversed(factors):
        if inner < position < inner * size:
            ratio, rest = divmod(position, inner)
            if rest or size % ratio:
                raise NoGridError
            found += [(ratio, stride), (size // ratio, stride * ratio)]
        else:
            found.append((size, stride))
        inner *= size
    return found[::-1]


def split_by_stride(factors: list[Factor], stride: int) -> list[Factor]:
    """Cut a walk so that no step goes across a multiple of `stride` elements of the source but by whole ones."""
    found: list[Factor] = []
    for size, step in factors:
        if step < stride < step * size:
            ratio, rest = divmod(stride, step)
            if rest or size % ratio:
                raise NoGridError
            found += [(size // ratio, stride), (ratio, step)]
        else:
            found.append((size, step))
    return found


def _cut(walk: Walk, cuts: Sequence[set[int]]) -> list[Factor]:
    """The walk's steps, cut at the tensor's dimensions and their cuts, and at the source's."""
    factors = walk.factors
    for dim, inner in enumerate(_strides(walk.shape)):
        for cut in sorted(cuts[dim] | {walk.shape[dim]}):
            factors = split(factors, cut * inner)
    for stride in _strides(walk.source.shape):
        factors = split_by_stride(factors, stride)
    for _, stride in list(factors):
        factors = split_by_stride(factors, stride)
    return factors


def _note_cuts(walk: Walk, factors: Sequence[Factor], cuts: list[set[int]]) -> None:
    position = 1
    for size, _ in reversed(factors):
        for dim, inner in enumerate(_strides(walk.shape)):
            if inner <= position < inner * walk.shape[dim]:
                cuts[dim].add(position // inner)
        position *= size


def _divided(length: int, cuts: set[int]) -> list[int]:
    """The sizes that a dimension is cut into, the outermost first."""
    ordered = [*sorted(cuts), length]
    if any(outer % inner for inner, outer in pairwise(ordered)):
        raise NoGridError
    return [outer // inner for inner, outer in pairwise(ordered)][::-1]


def _alias(
    name: str, grid: tuple[int, ...], cuts: Sequence[set[int]], walk: Walk, factors: list[Factor]
) -> SliceMapping:
    corner: list[int] = []
    sizes: list[int] = []
    for start, length, cut in zip(walk.corner, walk.shape, cuts, strict=True):
        inner = max(cut)
        if start % inner or length % inner:
            raise NoGridError
        corner += [start // inner, *(0 for _ in range(len(cut) - 1))]
        sizes += _divided(length, cut)
    source_grid = _source_grid(walk.source.shape, [stride for _, stride in factors])
    strides = _strides(source_grid)
    offsets, rest = [], walk.start
    for stride in strides:
        start, rest = divmod(rest, stride)
        offsets.append(start)
    extent, dims = [1] * len(source_grid), list[int | None]()
    steps = iter(factors)
    for size in sizes:
        if size == 1:
            dims.append(None)
            continue
        length, stride = next(steps)
        dim = next(index for index, known in enumerate(strides) if known == stride and source_grid[index] > 1)
        if length != size or dim in dims or offsets[dim] + size > source_grid[dim]:
            raise NoGridError
        extent[dim] = size
        dims.append(dim)
    own = () if source_grid == walk.source.shape else source_grid
    return SliceMapping(
        name, grid, tuple(corner), walk.source.name, Box(tuple(offsets), tuple(extent)), tuple(dims), own
    )


def _source_grid(shape: tuple[int, ...], strides: Sequence[int]) -> tuple[int, ...]:
    grid: list[int] = []
    for length, inner in zip(shape, _strides(shape), strict=True):
        own = {1, *(stride // inner for stride in strides if inner < stride < inner * length)}
        grid += _divided(length, own)
    return tuple(grid)
