"""What code that rearranges tensors does to each element, found out once on tensors without data.

Conversions between a model's own tensors and those of its files (transformers' tables, state-dict adapters) are
written for whole tensors. Run on tensors that have shapes and no memory, what they return are views: offsets and
strides show which box of which tensor each is. Read off once, that serves every shard, in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hydra_ckpt.layout.aliases import SliceMapping
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.grids import NoGridError, Walk, aliases_on_grid, aliases_through
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.dtypes import TORCH_DTYPE

_COPIES = frozenset({"contiguous", "clone", "to", "type", "float", "bfloat16", "half", "double", "cpu", "detach"})
_JOINS = (torch.cat, torch.concat, torch.concatenate, torch.stack)
_RESHAPES = (torch.Tensor.reshape, torch.reshape, torch.Tensor.flatten, torch.flatten)


@dataclass
class _Joined:
    """A tensor made of others: the parts, and where each begins in it."""

    tensor: torch.Tensor
    parts: list[tuple[torch.Tensor, tuple[int, ...]]] = field(default_factory=list)


class Trace(TorchFunctionMode):
    """Follows views, and tensors joined of views, while it is entered; copies and casts count as views.

    Args:
        specs: The tensors to follow.

    Attributes:
        sources: A tensor without memory for each, by name.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        super().__init__()
        self.sources = {
            spec.name: torch.empty(spec.shape, dtype=TORCH_DTYPE[spec.dtype], device="meta") for spec in specs
        }
        self._specs = {_storage(tensor): spec for spec, tensor in zip(specs, self.sources.values(), strict=True)}
        self._joined: dict[int, _Joined] = {}
        self._reordered: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._casts: dict[int, tuple[torch.Tensor, torch.dtype]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by PyTorch for every operation on tensors."""
        out = func(*args, **(kwargs or {}))
        if func in _JOINS:
            self._record(out, *args, stacked=func is torch.stack, **(kwargs or {}))
        elif getattr(func, "__name__", "") in _COPIES and isinstance(out, torch.Tensor):
            view = args[0].view_as(args[0])
            self._casts[id(view)] = (view, out.dtype)  # holding it keeps the identity from being given again
            return view
        elif func in _RESHAPES and _storage(out) != _storage(args[0]):
            self._reordered[_storage(out)] = (out, args[0])
        return out

    def _record(self, out: torch.Tensor, tensors: Sequence[torch.Tensor], dim: int = 0, *, stacked: bool) -> None:
        dim %= out.dim()
        joined, position = _Joined(out), 0
        for tensor in tensors:
            part = tensor.unsqueeze(dim) if stacked else tensor
            joined.parts.append((part, tuple(position if axis == dim else 0 for axis in range(out.dim()))))
            position += part.shape[dim]
        self._joined[_storage(out)] = joined
        # It may be moved about in turn; nothing but its shape is asked of this one.
        self._specs[_storage(out)] = TensorSpec("", "U8", tuple(out.shape))

    def dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """The element type that a result would have, had it not been kept a view."""
        found = self._casts.get(id(tensor))
        return tensor.dtype if found is None else found[1]

    def pieces_of(self, name: str, tensor: torch.Tensor) -> list[SliceMapping] | None:
        """What a converted tensor consists of; None if that cannot be said in boxes."""
        parts = [(tensor, (0,) * tensor.dim())]
        joined = self._joined.get(_storage(tensor))
        if joined is not None:
            if tensor.shape != joined.tensor.shape or tensor.stride() != joined.tensor.stride():
                return None
            parts = joined.parts
        found = [self._view(name, part, tuple(tensor.shape), corner) for part, corner in parts]
        views = [alias for alias in found if alias is not None]
        return views if len(views) == len(parts) else self._on_grid(name, tensor, parts)

    def _on_grid(
        self, name: str, tensor: torch.Tensor, parts: Sequence[tuple[torch.Tensor, tuple[int, ...]]]
    ) -> list[SliceMapping] | None:
        """The same for elements that are moved about, in a finer grid; None if there is none."""
        try:
            walks = [self._walk(part, tuple(part.shape), corner) for part, corner in parts]
            if all(walk.source.name for walk in walks):
                return aliases_on_grid(name, tuple(tensor.shape), walks)
            if len(walks) > 1:
                return None  # joined of joined ones
            joined = next(self._joined[key] for key in self._joined if walks[0].source is self._specs[key])
            inner = [self._walk(part, tuple(part.shape), corner) for part, corner in joined.parts]
            return aliases_through(name, tuple(tensor.shape), walks[0], inner)
        except NoGridError:
            return None

    def _walk(self, view: torch.Tensor, shape: tuple[int, ...], corner: tuple[int, ...]) -> Walk:
        if _storage(view) in self._reordered:
            out, source = self._reordered[_storage(view)]
            if view.numel() != out.numel() or not view.is_contiguous():
                raise NoGridError
            return self._walk(source, shape, corner)
        spec = self._specs.get(_storage(view))
        if spec is None or not view.numel():
            raise NoGridError
        return Walk(spec, int(view.storage_offset()), tuple(view.shape), view.stride(), shape, corner)

    def _view(
        self, name: str, view: torch.Tensor, shape: tuple[int, ...], corner: tuple[int, ...]
    ) -> SliceMapping | None:
        spec = self._specs.get(_storage(view))
        if spec is None or not spec.name:
            return None
        if view.shape == spec.shape and view.is_contiguous():
            return SliceMapping(name, shape, corner, spec.name, Box.whole(spec.shape), tuple(range(view.dim())))
        if not view.numel():
            return None
        strides = [prod(spec.shape[dim + 1 :]) for dim in range(len(spec.shape))]
        starts, rest = [], int(view.storage_offset())
        for stride in strides:
            start, rest = divmod(rest, stride)
            starts.append(start)
        sizes = [1] * len(strides)
        dims: list[int | None] = []
        for size, step in zip(view.shape, view.stride(), strict=True):
            dim = _dimension(size, step, spec.shape, strides, starts, dims) if size > 1 else None
            if dim is None and size > 1:
                return None
            if dim is not None:
                sizes[dim] = size
            dims.append(dim)
        return SliceMapping(name, shape, corner, spec.name, Box(tuple(starts), tuple(sizes)), tuple(dims))


def _dimension(
    size: int,
    step: int,
    shape: Sequence[int],
    strides: Sequence[int],
    starts: Sequence[int],
    taken: Sequence[int | None],
) -> int | None:
    """The source's dimension that a view walks along."""
    fitting = (
        dim
        for dim, stride in enumerate(strides)
        if stride == step and shape[dim] > 1 and dim not in taken and starts[dim] + size <= shape[dim]
    )
    return next(fitting, None)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - without memory there is no address to compare
