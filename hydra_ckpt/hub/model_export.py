"""How an export is made: names and layout from transformers, dtypes and files as requested."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hydra_ckpt.errors import CheckpointConfigError, CheckpointNotFoundError
from hydra_ckpt.hub.assets import (
    adapter_assets,
    derives_generation,
    json_bytes,
    model_assets,
    reference_assets,
)
from hydra_ckpt.hub.card import SaveInfo, model_card
from hydra_ckpt.hub.conversion import hub_naming, is_transformers_model, tables_of
from hydra_ckpt.hub.matching import Matching
from hydra_ckpt.hub.reference import Reference, at, find_reference
from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.resolved import HubOptions
from hydra_ckpt.state.peft import is_peft_model, refuse_adapters
from hydra_ckpt.state.wrappers import unwrap

log = logging.getLogger(__name__)

_GENERATION = "generation_config.json"
FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class ReferenceHints:
    """What an export takes from a reference model; plain data, so that rank 0 can send it to the other ranks.

    Attributes:
        dtypes: Dtype by tensor.
        files: File by tensor; empty for a single file.
    """

    dtypes: Mapping[str, str]
    files: Mapping[str, str]


class ModelExport:
    """How the models of a run are exported.

    Args:
        options: The configured options.
        required: Whether exports will be written; if not, a model that cannot be exported is not an error.
    """

    def __init__(self, options: HubOptions, *, required: bool) -> None:
        self._options = options
        self._required = required

    def wanted(self, model: nn.Module) -> dict[str, Any]:
        """Coordinator only: what the reference model specifies, as plain data; see `ReferenceHints`.

        Raises:
            CheckpointNotFoundError: The configured reference does not exist.
        """
        reference = self._reference(model)
        if reference is None:
            return {"dtypes": {}, "files": {}}
        stored = reference.tensors(complete=False)
        packed = sorted(name for name, item in stored.items() if item.spec.dtype.startswith(("F8", "F4")))
        integer = sorted(name for name, item in stored.items() if item.spec.dtype not in FLOATS.values())
        quantized = integer if reference.config.get("quantization_config") else packed
        if quantized:
            log.warning(
                "the reference model %s is quantized (%s, ...); for these tensors the export keeps the dtypes of "
                "training",
                reference.directory,
                quantized[0],
            )
        return {"dtypes": {name: item.spec.dtype for name, item in stored.items()}, "files": dict(reference.file_map)}

    def naming(
        self,
        model: nn.Module,
        specs: Sequence[TensorSpec],
        wanted: ReferenceHints,
        adapted: TensorMapping | None = None,
    ) -> TensorMapping:
        """Names, layout and dtypes of an export.

        Args:
            model: The model.
            specs: Its tensors.
            wanted: What the reference specifies.
            adapted: What the model's adapter specifies, if it has one; its dtypes take precedence.

        Raises:
            CheckpointConfigError: transformers stores the model in a form that shards cannot be converted to.
        """
        try:
            refuse_adapters(model)
            found = hub_naming(model, specs) if adapted is None else adapted.completed(specs)
        except CheckpointConfigError as error:
            if self._required:
                raise
            log.warning("%s", error)
            found = TensorMapping.unchanged(specs)
        wanted = _translated(wanted, model, found, specs)
        dtypes = {spec.name: self._dtype(spec, wanted) for spec in found.specs(specs)}
        own = {spec.name: spec.dtype for spec in found.specs(specs)}
        changed = {name: dtype for name, dtype in dtypes.items() if dtype != own[name]}
        changed.update(found.dtypes)
        return replace(found, dtypes=changed, files={name: wanted.files[name] for name in own if name in wanted.files})

    def _dtype(self, spec: TensorSpec, wanted: ReferenceHints) -> str:
        """The dtype to export; only floating point changes, and only to floating point."""
        asked = self._options.export_dtype
        found = wanted.dtypes.get(spec.name, spec.dtype) if asked is None else FLOATS[asked]
        return found if {found, spec.dtype} <= set(FLOATS.values()) else spec.dtype

    def card(self, model: nn.Module, made: SaveInfo) -> dict[str, bytes]:
        """Coordinator only: the model card, if configured."""
        if not self._options.model_card:
            return {}
        core = unwrap(model)
        inner = core.get_base_model() if is_peft_model(core) else core  # type: ignore[operator]
        known = getattr(getattr(inner, "config", None), "_name_or_path", None)
        return {"README.md": model_card(core, made, self._options.repo_id or known)}

    def assets(self, model: nn.Module, naming: TensorMapping, adapter: str, *, has_tokenizer: bool) -> dict[str, bytes]:
        """Coordinator only: the small files of a model's export by name.

        Args:
            model: The model.
            naming: How it is exported.
            adapter: Its adapter that is exported; empty for the model itself.
            has_tokenizer: Whether there is a live tokenizer.

        Raises:
            CheckpointConfigError: The original configuration is required, but does not exist.
        """
        if adapter:
            return adapter_assets(model, adapter)
        found = model_assets(model, _main_dtype(naming))
        original = self._options.original_model_root_dir
        if original is not None and not original.is_dir():
            raise CheckpointConfigError(f"checkpoint.original_model_root_dir={original} is not a directory")
        reference = self._reference(model) if original is None else at(original)
        if self._options.v4_compatible and is_transformers_model(model):
            found.update(self._version_4(reference, found["config.json"]))
        if reference is not None:
            beside = reference_assets(reference, with_tokenizer=not has_tokenizer)
            found = {**beside, **found}
            if reference.has(_GENERATION) and derives_generation(model):
                found[_GENERATION] = reference.read(_GENERATION)
        return found

    def _version_4(self, reference: Reference | None, current: bytes) -> dict[str, bytes]:
        if reference is None or not reference.has("config.json"):
            raise CheckpointConfigError(
                "checkpoint.v4_compatible=true exports the original config.json, but there is none: point "
                "checkpoint.model_repo_id or checkpoint.original_model_root_dir to a directory that has it"
            )
        original = {key: value for key, value in reference.config.items() if key != "quantization_config"}
        return {"config.json": json_bytes(original), "config.v5.json": current}

    def _reference(self, model: nn.Module) -> Reference | None:
        named = self._options.repo_id
        if named is not None:
            return find_reference(named, self._options.cache_dir)
        path = getattr(getattr(unwrap(model), "config", None), "_name_or_path", None)
        if not isinstance(path, str) or not path:
            return None
        try:
            return find_reference(path, self._options.cache_dir)
        except CheckpointNotFoundError:
            return None  # the model records its origin, but that no longer exists


def _translated(
    wanted: ReferenceHints, model: nn.Module, naming: TensorMapping, specs: Sequence[TensorSpec]
) -> ReferenceHints:
    """What a reference specifies, by the export's names; its own may differ, for example without a head."""
    exported = naming.by_name
    if wanted.dtypes.keys() <= exported.keys() or exported.keys() <= wanted.dtypes.keys():
        return wanted
    match = Matching(unwrap(model), tables_of(model), naming, {spec.name: spec for spec in specs}, {}, wanted.dtypes)
    places = {name: place for name in wanted.dtypes if (place := match(name)) is not None and place in exported}
    files = {places[name]: file for name, file in wanted.files.items() if name in places}
    return ReferenceHints({place: wanted.dtypes[name] for name, place in places.items()}, files)


def _main_dtype(naming: TensorMapping) -> str | None:
    """The most common new dtype among values that change theirs, as config.json spells it; None if none does."""
    sizes: dict[str, int] = {}
    for alias in naming.aliases:
        dtype = naming.dtypes.get(alias.name)
        if dtype is not None:
            sizes[dtype] = sizes.get(dtype, 0) + alias.box.numel
    spelled = {dtype: name for name, dtype in FLOATS.items()}
    return spelled[max(sizes, key=lambda dtype: sizes[dtype])] if sizes else None
