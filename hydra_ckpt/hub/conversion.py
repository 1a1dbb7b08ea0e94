"""Hub names: how transformers itself would name and lay out a model's tensors when saving it.

In memory a model may hold its weights otherwise than its files do: experts fused into one tensor, projections split
or joined, modules renamed. transformers keeps tables of these conversions and applies them to whole tensors. Here
they are applied once to tensors without data, and what comes out is read off as boxes of the model's tensors, which
then serve every shard of them.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.layout.aliases import Alias, Naming
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.grids import NoGridError, Walk, aliases_on_grid, aliases_through
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.state.model import unwrap
from hydra_ckpt.storage.dtypes import TORCH_DTYPE

log = logging.getLogger(__name__)


def is_transformers_model(model: nn.Module) -> bool:
    """Whether it is a transformers model; importing transformers is left to whoever made it."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(unwrap(model), transformers.PreTrainedModel)


def original_class(model: nn.Module) -> type[Any]:
    """The class a module was made of; `fully_shard` gives it one of its own."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def hub_naming(model: nn.Module, specs: Sequence[TensorSpec], skeleton: Any = None) -> Naming:
    """The names and shapes under which `save_pretrained` would write a model's tensors.

    Args:
        model: Any model; one that is not of transformers keeps its names.
        specs: All of its stored tensors, in order; tied ones once.
        skeleton: What `skeleton_of` gives for it, if that is there already.

    Raises:
        CheckpointConfigError: transformers computes new values on the way, and would take the model's own for these.
    """
    core = unwrap(model)
    if not is_transformers_model(core):
        return Naming.unchanged(specs)
    ignored = set(getattr(core, "_keys_to_ignore_on_save", None) or ())
    kept = [spec for spec in specs if spec.name not in ignored]
    traced = _Trace(kept)
    skeleton = skeleton_of(core) if skeleton is None else skeleton
    with torch.no_grad(), traced:
        converted = _reversed_conversion(skeleton, dict(traced.sources))
    found = {name: traced.pieces_of(name, tensor) for name, tensor in converted.items()}
    aliases = [alias for pieces in found.values() for alias in pieces or ()]
    covered = {alias.source for alias in aliases}
    left = [spec for spec in kept if spec.name not in covered]
    if left:
        aliases += _as_in_memory(skeleton, left, [name for name, pieces in found.items() if pieces is None])
    order = {spec.name: number for number, spec in enumerate(kept)}
    first = {alias.name: order[alias.source] for alias in reversed(aliases)}
    shapes = {alias.name: tuple(converted[alias.name].shape) for alias in aliases if alias.name in converted}
    finer = {alias.name: shapes[alias.name] for alias in aliases if shapes.get(alias.name, alias.shape) != alias.shape}
    return Naming(tuple(sorted(aliases, key=lambda alias: first[alias.name])), shapes=finer)


def _reversed_conversion(skeleton: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(skeleton, tensors))


def skeleton_of(core: Any) -> Any:
    """A transformers model without data: class names and sub-models as its tables know them, whatever is sharded."""
    from transformers.initialization import no_init_weights

    try:
        with no_init_weights(), torch.device("meta"):
            skeleton = original_class(core)(copy.deepcopy(core.config))
    except Exception:
        log.debug("%s cannot be built on the meta device", original_class(core).__name__, exc_info=True)
        return core
    conversions = getattr(core, "_weight_conversions", None)
    if conversions is not None:
        skeleton._weight_conversions = conversions
    return skeleton


def _as_in_memory(skeleton: Any, left: Sequence[TensorSpec], lost: Sequence[str]) -> list[Alias]:
    """Tensors whose conversion moves elements about keep their names, if loading then takes them as they are."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    wrong = [spec.name for spec in left if rename_source_key(spec.name, renamings, converters)[1] is not None]
    if wrong:
        raise CheckpointConfigError(
            f"{type(skeleton).__name__}: transformers computes new values for {', '.join(wrong)} when saving, which "
            "cannot be done on shards. Set checkpoint.save_consolidated=false, and export with save_pretrained"
        )
    log.warning(
        "transformers would write %s otherwise than the model holds them; the export has them as in memory, which "
        "transformers opens and other programs may not",
        ", ".join(spec.name for spec in left),
    )
    log.debug("not rearrangements: %s", lost)
    return [Alias.same(spec) for spec in left]


@dataclass
class _Joined:
    """A tensor made of others: the parts, and where each begins in it."""

    tensor: torch.Tensor
    parts: list[tuple[torch.Tensor, tuple[int, ...]]] = field(default_factory=list)


class _Trace(TorchFunctionMode):
    """Follows views of tensors without data. What would copy them only for their layout does nothing."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        super().__init__()
        self.sources = {
            spec.name: torch.empty(spec.shape, dtype=TORCH_DTYPE[spec.dtype], device="meta") for spec in specs
        }
        self._names = {_storage(tensor): spec for spec, tensor in zip(specs, self.sources.values(), strict=True)}
        self._joined: dict[int, _Joined] = {}
        self._reordered: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.Tensor.contiguous, torch.Tensor.clone, torch.clone):
            return args[0]
        out = func(*args, **(kwargs or {}))
        reshapes = func in (torch.Tensor.reshape, torch.reshape, torch.Tensor.flatten, torch.flatten)
        if reshapes and _storage(out) != _storage(args[0]):
            self._reordered[_storage(out)] = (out, args[0])
        if func in (torch.cat, torch.concat, torch.concatenate, torch.stack):
            self._record(out, *args, stacked=func is torch.stack, **(kwargs or {}))
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
        self._names[_storage(out)] = TensorSpec("", "U8", tuple(out.shape))

    def pieces_of(self, name: str, tensor: torch.Tensor) -> list[Alias] | None:
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
    ) -> list[Alias] | None:
        """The same for elements that are moved about, in a finer grid; None if there is none."""
        try:
            walks = [self._walk(part, tuple(part.shape), corner) for part, corner in parts]
            if all(walk.source.name for walk in walks):
                return aliases_on_grid(name, tuple(tensor.shape), walks)
            if len(walks) > 1:
                return None  # joined of joined ones
            joined = next(self._joined[key] for key in self._joined if walks[0].source is self._names[key])
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
        spec = self._names.get(_storage(view))
        if spec is None or not view.numel():
            raise NoGridError
        return Walk(spec, int(view.storage_offset()), tuple(view.shape), view.stride(), shape, corner)

    def _view(self, name: str, view: torch.Tensor, shape: tuple[int, ...], corner: tuple[int, ...]) -> Alias | None:
        spec = self._names.get(_storage(view))
        if spec is None or not spec.name or not view.numel():
            return None
        if view.shape == spec.shape and view.is_contiguous() and view.numel() == prod(spec.shape):
            return Alias(name, shape, corner, spec.name, Box.whole(spec.shape), tuple(range(view.dim())))
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
        return Alias(name, shape, corner, spec.name, Box(tuple(starts), tuple(sizes)), tuple(dims))


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
    return int(tensor.untyped_storage()._cdata)
