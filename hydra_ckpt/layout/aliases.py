"""Aliases: the elements of a model's tensors under other names and in other shapes, as exports have them.

A tensor of the model may be several tensors of an export (experts fused in memory), a part of one (projections split
in memory), or one whose dimensions are in another order. Each alias is one box of one tensor and its position in the
other, so it applies to shards as it does to whole tensors, and in both directions.

Example: in memory `gate_up` has 4 x 3 elements; the export has its rows 0 and 1 as `gate` and 2 and 3 as `up`. A rank
that holds rows 1 and 2 has the second row of `gate` and the first of `up`:

    >>> gate = SliceMapping("gate", (2, 3), (0, 0), "gate_up", Box((0, 0), (2, 3)), dims=(0, 1))
    >>> up = SliceMapping("up", (2, 3), (0, 0), "gate_up", Box((2, 0), (2, 3)), dims=(0, 1))
    >>> held = Box((1, 0), (2, 3))
    >>> for alias in (gate, up):
    ...     inner, placed = alias.part(held)
    ...     print("row", inner.offsets[0], "of gate_up is row", placed.offsets[0], "of", alias.name)
    row 1 of gate_up is row 1 of gate
    row 2 of gate_up is row 0 of up

Loading goes the other way: the first row of `up` is found in row 2 of `gate_up`.

    >>> up.sought(Box((0, 0), (1, 3)))[0]
    Box(offsets=(2, 0), sizes=(1, 3))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any

from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.specs import ITEMSIZE, TensorSpec


@dataclass(frozen=True, slots=True)
class SliceMapping:
    """A box of a tensor as (a part of) another one.

    Attributes:
        name: The other tensor.
        shape: Its global shape, or a finer grid of it if the box cannot be expressed in the tensor's own dimensions
            (see `grids`).
        corner: Where in it the box begins.
        source: The tensor the elements belong to.
        box: Which of its elements.
        dims: For each dimension of the other tensor, the corresponding dimension of the source; None for one of a
            single element.
        grid: The grid of the source that the box is given in; empty for the source's own shape.
    """

    name: str
    shape: tuple[int, ...]
    corner: tuple[int, ...]
    source: str
    box: Box
    dims: tuple[int | None, ...]
    grid: tuple[int, ...] = ()

    @classmethod
    def same(cls, spec: TensorSpec, name: str | None = None) -> SliceMapping:
        """A whole tensor as it is, under this name or its own."""
        whole = Box.whole(spec.shape)
        return cls(name or spec.name, spec.shape, whole.offsets, spec.name, whole, tuple(range(len(spec.shape))))

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the other tensor, dimensions in their order: a change of name at most."""
        return not self.grid and self.dims == tuple(range(len(self.shape))) and self.box == Box.whole(self.shape)

    def part(self, held: Box) -> tuple[Box, Box] | None:
        """The elements of the alias that are in a box of the source.

        Returns:
            Their box in the source and their box in the other tensor; None if there are none.
        """
        inner = self.box.intersect(held)
        return None if inner is None else (inner, self.placed(inner))

    def placed(self, inner: Box) -> Box:
        """A box of the source, within this alias, as a box of the other tensor."""
        offsets = tuple(
            start if dim is None else start + inner.offsets[dim] - self.box.offsets[dim]
            for start, dim in zip(self.corner, self.dims, strict=True)
        )
        return Box(offsets, tuple(1 if dim is None else inner.sizes[dim] for dim in self.dims))

    def onto(self, theirs: SliceMapping, shape: tuple[int, ...]) -> SliceMapping | None:
        """The elements that two tensors give to the same one, as a part of the other's source; None if there are none.

        Args:
            theirs: What the other tensor gives.
            shape: The other tensor's.
        """
        common = self.placed(self.box).intersect(theirs.placed(theirs.box))
        ours, place = (None, None) if common is None else (self.sought(common), theirs.sought(common))
        if ours is None or place is None:
            return None
        same = {dim: self.dims[position] for position, dim in enumerate(theirs.dims) if dim is not None}
        dims = tuple(same.get(dim) for dim in range(len(shape)))
        return SliceMapping(theirs.source, shape, place[0].offsets, self.source, ours[0], dims, self.grid)

    def sought(self, wanted: Box) -> tuple[Box, Box] | None:
        """The elements of the alias that are in a box of the other tensor.

        Returns:
            Their box in the source and their box in the other tensor; None if there are none.
        """
        common = self.placed(self.box).intersect(wanted)
        if common is None:
            return None
        offsets, sizes = list(self.box.offsets), [1] * len(self.box.sizes)
        for position, dim in enumerate(self.dims):
            if dim is not None:
                offsets[dim] += common.offsets[position] - self.corner[position]
                sizes[dim] = common.sizes[position]
        return Box(tuple(offsets), tuple(sizes)), common


@dataclass(frozen=True)
class TensorMapping:
    """The names, layout and element types of a model's tensors in an export.

    Attributes:
        aliases: In the order of the files; all pieces of one tensor follow each other.
        dtypes: Element types by exported name, where they are not the source's.
        files: A text by exported name, equal for those of one file; empty if files are cut by size.
        shapes: Shapes by exported name, if the aliases give a finer grid of them.
    """

    aliases: tuple[SliceMapping, ...]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def unchanged(cls, specs: Iterable[TensorSpec]) -> TensorMapping:
        """Every tensor under its own name."""
        return cls(tuple(SliceMapping.same(spec) for spec in specs))

    @classmethod
    def ordered(
        cls,
        aliases: Iterable[SliceMapping],
        specs: Iterable[TensorSpec],
        dtypes: Mapping[str, str] = MappingProxyType({}),
        shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> TensorMapping:
        """Aliases in the order of the tensors they are taken from, all pieces of one exported tensor together.

        Args:
            aliases: In any order.
            specs: The tensors they are taken from.
            dtypes: Element types by exported name, where they are not the source's.
            shapes: Shapes by exported name.
        """
        aliases = list(aliases)
        order = {spec.name: number for number, spec in enumerate(specs)}
        first = {alias.name: order[alias.source] for alias in reversed(aliases)}
        finer = {a.name: shapes[a.name] for a in aliases if shapes.get(a.name, a.shape) != a.shape}
        return cls(tuple(sorted(aliases, key=lambda alias: first[alias.name])), dtypes, shapes=finer)

    def completed(self, specs: Sequence[TensorSpec]) -> TensorMapping:
        """The same for these tensors only; tensors without an alias keep their names."""
        known = {spec.name for spec in specs}
        aliases = [alias for alias in self.aliases if alias.source in known]
        aliases += [SliceMapping.same(spec) for spec in specs if spec.name not in self.by_source]
        return TensorMapping.ordered(aliases, specs, self.dtypes, self.shapes)

    def onto(self, other: TensorMapping, specs: Mapping[str, TensorSpec]) -> TensorMapping:
        """From this one's tensors to those of another naming, by the exported tensors that both are parts of.

        Args:
            other: How other tensors are exported.
            specs: These tensors by name.
        """
        found = []
        for alias in self.aliases:
            for theirs in other.by_name.get(alias.name, ()):
                fits = alias.shape == theirs.shape and not theirs.grid
                piece = alias.onto(theirs, specs[theirs.source].shape) if fits else None
                if piece is not None:
                    found.append(piece)
        return TensorMapping(tuple(found))

    @cached_property
    def by_source(self) -> Mapping[str, Sequence[SliceMapping]]:
        """Aliases by the tensor they are taken from."""
        found: dict[str, list[SliceMapping]] = defaultdict(list)
        for alias in self.aliases:
            found[alias.source].append(alias)
        return found

    @cached_property
    def by_name(self) -> Mapping[str, Sequence[SliceMapping]]:
        """Aliases by the exported tensor they are part of."""
        found: dict[str, list[SliceMapping]] = defaultdict(list)
        for alias in self.aliases:
            found[alias.name].append(alias)
        return found

    @cached_property
    def is_plain(self) -> bool:
        """Whether the export holds the model's tensors exactly as they are."""
        return not self.dtypes and all(alias.is_whole and alias.name == alias.source for alias in self.aliases)

    def keeps(self, specs: Iterable[TensorSpec]) -> bool:
        """Whether every element of these tensors is in the export bit for bit, so that it can be read back."""
        return all(
            sum({(alias.grid, alias.box): alias.box.numel for alias in self.by_source.get(spec.name, ())}.values())
            == prod(spec.shape)
            and all(self.dtypes.get(alias.name, spec.dtype) == spec.dtype for alias in self.by_source[spec.name])
            for spec in specs
        )

    def specs(self, sources: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The exported tensors, in order."""
        dtypes = {spec.name: spec.dtype for spec in sources}
        found = {alias.name: self.spec(alias, dtypes[alias.source]) for alias in self.aliases}
        return tuple(found.values())

    def spec(self, alias: SliceMapping, dtype: str) -> TensorSpec:
        """The exported tensor that an alias is part of, its source being of this element type."""
        return TensorSpec(alias.name, self.dtypes.get(alias.name, dtype), alias.shape, self.shapes.get(alias.name))

    def to_data(self) -> dict[str, Any]:
        """As plain data, for a file."""
        rows = [
            [a.name, list(a.shape), list(a.corner), a.source, list(a.box.offsets), list(a.box.sizes), list(a.dims)]
            + ([list(a.grid)] if a.grid else [])
            for a in self.aliases
        ]
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"aliases": rows, "dtypes": dict(self.dtypes), "files": dict(self.files), "shapes": shapes}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> TensorMapping:
        """What `to_data` returned.

        Raises:
            ValueError: It is invalid.
        """
        try:
            aliases = tuple(
                SliceMapping(
                    str(name),
                    _ints(shape),
                    _ints(corner),
                    str(source),
                    Box(_ints(offsets), _ints(sizes)),
                    _dims(dims),
                    _ints(grid[0]) if grid else (),
                )
                for name, shape, corner, source, offsets, sizes, dims, *grid in data["aliases"]
            )
            shapes = {str(name): _ints(shape) for name, shape in data.get("shapes", {}).items()}
            dtypes = {str(name): str(dtype) for name, dtype in data["dtypes"].items()}
            files = {str(name): str(file) for name, file in data["files"].items()}
            unknown = set(dtypes.values()) - set(ITEMSIZE)
            if unknown:
                raise ValueError(f"element types {sorted(unknown)}")
            for alias in aliases:
                _check(alias, shapes.get(alias.name, alias.shape))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(repr(error)) from None
        return cls(aliases, dtypes, files, shapes)


def _ints(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _dims(values: Iterable[Any]) -> tuple[int | None, ...]:
    return tuple(None if value is None else int(value) for value in values)


def _check(alias: SliceMapping, shape: tuple[int, ...]) -> None:
    ranks = {len(alias.shape), len(alias.corner), len(alias.dims)}
    used = [dim for dim in alias.dims if dim is not None]
    numbers = (*alias.shape, *alias.corner, *alias.box.offsets, *alias.box.sizes, *used)
    lengths = {len(alias.box.offsets), len(alias.box.sizes), len(alias.grid or alias.box.sizes)}
    negative = any(number < 0 for number in (*numbers, *alias.grid, *shape))
    if len(ranks) != 1 or len(lengths) != 1 or negative or prod(shape) != prod(alias.shape):
        raise ValueError(f"{alias.name}: an invalid alias of {alias.source}")
    placed = alias.placed(alias.box)
    inside = all(a + n <= m for a, n, m in zip(placed.offsets, placed.sizes, alias.shape, strict=True))
    if len(set(used)) != len(used) or not inside or placed.numel != alias.box.numel:
        raise ValueError(f"{alias.name}: an alias of {alias.source} that does not fit")
