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
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.layout.aliases import Alias, Naming
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.state.model import ModelMap, unwrap
from hydra_ckpt.state.tracing import Trace

log = logging.getLogger(__name__)


def is_transformers_model(model: nn.Module) -> bool:
    """Whether it is a transformers model; importing transformers is left to whoever made it."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(unwrap(model), transformers.PreTrainedModel)


def original_class(model: nn.Module) -> type[Any]:
    """The class a module was made of; `fully_shard` gives it one of its own."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def naming_of(mapped: ModelMap, model: nn.Module, specs: Sequence[TensorSpec], skeleton: Any = None) -> Naming:
    """How the files of a live model call these tensors of it: as its adapter says, else as transformers would.

    Raises:
        CheckpointConfigError: See `hub_naming`.
        TopologyError: The adapter does not fit.
    """
    adapted = mapped.adapted
    return hub_naming(model, specs, skeleton) if adapted is None else adapted.completed(specs)


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
    traced = Trace(kept)
    skeleton = skeleton_of(core) if skeleton is None else skeleton
    with torch.no_grad(), traced:
        converted = _reversed_conversion(skeleton, dict(traced.sources))
    found = {name: traced.pieces_of(name, tensor) for name, tensor in converted.items()}
    aliases = [alias for pieces in found.values() for alias in pieces or ()]
    covered = {alias.source for alias in aliases}
    left = [spec for spec in kept if spec.name not in covered]
    if left:
        aliases += _as_in_memory(skeleton, left, [name for name, pieces in found.items() if pieces is None])
    shapes = {name: tuple(tensor.shape) for name, tensor in converted.items()}
    return Naming.ordered(aliases, kept, shapes=shapes)


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
