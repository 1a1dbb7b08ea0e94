"""Hub names: how transformers would name and lay out a model's tensors when saving it.

In memory a model may hold its weights in a different form than its files do: experts fused into one tensor, projections
split or joined, modules renamed. transformers keeps tables of these conversions and applies them to whole tensors. This
module applies them once to tensors without data, and describes the result as boxes of the model's tensors, which then
apply to every shard.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.hub.skeletons import skeleton
from hydra_ckpt.layout.aliases import SliceMapping, TensorMapping
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.state.model_map import ModelMap
from hydra_ckpt.state.tracing import Trace
from hydra_ckpt.state.wrappers import unwrap

log = logging.getLogger(__name__)


def is_transformers_model(model: nn.Module) -> bool:
    """Whether it is a transformers model; transformers is not imported for this."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(unwrap(model), transformers.PreTrainedModel)


def original_class(model: nn.Module) -> type[Any]:
    """The original class of a module; `fully_shard` replaces it with a new one."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


class Tables:
    """What transformers' tables hold for a model.

    Args:
        core: A transformers model, sharded or not.
    """

    def __init__(self, core: Any) -> None:
        self._core = core

    @cached_property
    def are_empty(self) -> bool:
        """Whether it and its sub-models have no entries: then its files hold its tensors as they are in memory."""
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        inside = [module for module in self._core.modules() if isinstance(module, PreTrainedModel)]
        keys = {key for module in inside for key in (original_class(module).__name__, module.config.model_type)}
        kept = getattr(self._core, "_weight_conversions", None)
        return not kept and all(get_checkpoint_conversion_mapping(key) is None for key in keys)  # type: ignore[no-untyped-call]

    @cached_property
    def skeleton(self) -> Any:
        """The model without data, with the class names and sub-models that the tables know."""
        kind = original_class(self._core)
        try:
            found = skeleton(kind, self._core.config)
        except Exception:
            log.debug("%s cannot be built on the meta device", kind.__name__, exc_info=True)
            return self._core
        conversions = getattr(self._core, "_weight_conversions", None)
        if conversions is not None:
            found._weight_conversions = conversions
        return found

    def exported(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All tensors of the model as `save_pretrained` writes them."""
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self.skeleton, tensors))

    def loaded(self, name: str, prefix: str, known: dict[str, bool]) -> str:
        """The model's own name for a tensor of a file that is stored as the model holds it.

        Args:
            name: The tensor's name in the file.
            prefix: The model's `base_model_prefix`.
            known: The model's names.
        """
        from transformers.core_model_loading import rename_source_key

        renamed, converter = rename_source_key(name, *self._entries, prefix, known)
        if converter is None and renamed in known:
            return str(renamed)
        # transformers also takes a name that needs no conversion as it is.
        return str(rename_source_key(name, [], [], prefix, known)[0])

    def targets(
        self, names: Collection[str], prefix: str, known: dict[str, bool]
    ) -> dict[str, tuple[str, str | None, int]]:
        """What loading turns tensors with these names into: two with the same result are the same tensor.

        Args:
            names: All names in a model's files.
            prefix: The model's `base_model_prefix`.
            known: The model's names.

        Returns:
            Name to three values: the model's tensor it becomes, or becomes part of; the converter; and its index among
            the tensors that this converter combines into the same one.
        """
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        entries = self._fresh_entries()  # some remember which names they have seen
        found: dict[str, tuple[str, str | None, int]] = {}
        counted: Counter[tuple[str, str | None]] = Counter()
        for name in sorted(names, key=dot_natural_key):
            target = rename_source_key(name, *entries, prefix, known)
            found[name] = (*target, counted[target])
            counted[target] += 1
        return found

    def converts(self, name: str) -> bool:
        """Whether loading computes something from a tensor of this name instead of taking it as it is."""
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(name, *self._entries)[1] is not None

    @cached_property
    def _entries(self) -> tuple[list[Any], list[Any]]:
        return self._fresh_entries()

    def _fresh_entries(self) -> tuple[list[Any], list[Any]]:
        """Renamings and converters for loading; some apply to all models."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        found = get_model_conversion_mapping(self._core if self.are_empty else self.skeleton)
        kinds = (WeightRenaming, WeightConverter)
        renamings, converters = ([entry for entry in found if isinstance(entry, kind)] for kind in kinds)
        return renamings, converters


def tables_of(model: nn.Module) -> Tables | None:
    """What the tables hold for a model; None if it is not a transformers model."""
    return Tables(unwrap(model)) if is_transformers_model(model) else None


def naming_of(
    mapped: ModelMap, model: nn.Module, specs: Sequence[TensorSpec], tables: Tables | None = None
) -> TensorMapping:
    """The names of these tensors in a live model's files: from its adapter, otherwise from transformers.

    Raises:
        CheckpointConfigError: See `hub_naming`.
        TopologyError: The adapter does not fit.
    """
    adapted = mapped.adapted
    return hub_naming(model, specs, tables) if adapted is None else adapted.completed(specs)


def hub_naming(model: nn.Module, specs: Sequence[TensorSpec], tables: Tables | None = None) -> TensorMapping:
    """The names and shapes under which `save_pretrained` would write a model's tensors.

    Args:
        model: Any model; one that is not a transformers model keeps its names.
        specs: All of its stored tensors, in order; tied ones once.
        tables: The result of `tables_of`, if already known.

    Raises:
        CheckpointConfigError: transformers computes new values when saving, so loading would not recognize the
            model's own.
    """
    tables = tables or tables_of(model)
    if tables is None:
        return TensorMapping.unchanged(specs)
    ignored = set(getattr(unwrap(model), "_keys_to_ignore_on_save", None) or ())
    kept = [spec for spec in specs if spec.name not in ignored]
    return TensorMapping.unchanged(kept) if tables.are_empty else _converted(tables, kept)


def _converted(tables: Tables, specs: Sequence[TensorSpec]) -> TensorMapping:
    traced = Trace(specs)
    with torch.no_grad(), traced:
        converted = tables.exported(dict(traced.sources))
    found = {name: traced.pieces_of(name, tensor) for name, tensor in converted.items()}
    aliases = [alias for pieces in found.values() for alias in pieces or ()]
    covered = {alias.source for alias in aliases}
    left = [spec for spec in specs if spec.name not in covered]
    if left:
        aliases += _as_in_memory(tables, left, [name for name, pieces in found.items() if pieces is None])
    shapes = {name: tuple(tensor.shape) for name, tensor in converted.items()}
    return TensorMapping.ordered(aliases, specs, shapes=shapes)


def _as_in_memory(tables: Tables, left: Sequence[TensorSpec], lost: Sequence[str]) -> list[SliceMapping]:
    """Tensors whose conversion permutes elements keep their names, if loading then takes them unchanged."""
    wrong = [spec.name for spec in left if tables.converts(spec.name)]
    if wrong:
        raise CheckpointConfigError(
            f"{type(tables.skeleton).__name__}: transformers computes new values for {', '.join(wrong)} when saving, "
            "which cannot be done on shards. Set checkpoint.save_consolidated=false, and export with save_pretrained"
        )
    log.warning(
        "transformers would write %s in a different form than the model holds them; the export has them as they are "
        "in memory, which transformers can open but other programs may not",
        ", ".join(spec.name for spec in left),
    )
    log.debug("not rearrangements: %s", lost)
    return [SliceMapping.same(spec) for spec in left]
