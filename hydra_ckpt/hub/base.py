"""Base models: loads a reference model's weights into a live model on any mesh; each rank reads only its slices."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.errors import (
    CheckpointConfigError,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    KeyMismatchError,
    counted,
)
from hydra_ckpt.hub.conversion import naming_of, tables_of
from hydra_ckpt.hub.matching import Matching
from hydra_ckpt.hub.materializing import initialize, materialize
from hydra_ckpt.hub.reference import Reference, find_reference
from hydra_ckpt.hub.weights import Dequantized, PickledWeights, ReadRequest, SafetensorsWeights, Weights
from hydra_ckpt.resolved import HubOptions
from hydra_ckpt.state.local import Exporter, Localizer
from hydra_ckpt.state.model_map import ModelMap
from hydra_ckpt.state.peft import is_peft_model
from hydra_ckpt.state.wrappers import unwrap
from hydra_ckpt.storage.memory import bytes_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseReport:
    """What a base load did.

    Attributes:
        path: The reference model's directory.
        skipped: Names that keep their initialization.
        unexpected: Names in the reference that the model does not have.
        read_bytes: Bytes this rank read.
    """

    path: Path
    skipped: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    read_bytes: int = 0


@dataclass
class _Fit:
    """How names of the reference and of the model correspond.

    Attributes:
        stored: A piece's export name to its name in the reference.
        missing: Names in the model with nothing to read.
        unexpected: Names in the reference that the model does not have.
        different: Name to how its shape differs.
        doubled: A piece's export name and a second name for it in the reference: the model ties tensors that the
            reference stores twice.
    """

    stored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: dict[str, str] = field(default_factory=dict)
    doubled: list[tuple[str, str]] = field(default_factory=list)


def load_base(
    model: nn.Module | list[nn.Module], options: HubOptions, channel: Channel, *, allow_pickle: bool
) -> BaseReport:
    """Collective: fill a model with the weights of its reference model.

    A model on the meta device is first moved to its device, and tensors that are not in the reference are initialized.
    Tensors keep the model's dtypes.

    Args:
        model: The model, or the parts of it that this rank holds.
        options: Which reference to load, and what to leave out.
        channel: To the other ranks.
        allow_pickle: Whether `.bin` files may be read.

    Raises:
        CheckpointConfigError: No reference is configured, or its weights are of a kind that may not or cannot be read.
        CheckpointNotFoundError: The reference, or one of its files, does not exist.
        KeyMismatchError: Names are missing, or shapes differ; lists all of them.
    """
    repo_id = options.repo_id
    if repo_id is None:
        raise CheckpointConfigError(
            "checkpoint.model_repo_id is not set: set it to the hub id or directory of the model to start from"
        )
    if any(is_peft_model(part) for part in (model if isinstance(model, list) else [model])):
        raise CheckpointConfigError(
            "load_base_model got a PeftModel, whose tensors have different names than those in the base model's "
            "files: load the base model first, then wrap it with peft.get_peft_model"
        )
    found = channel.coordinator_step("looking for the base model", lambda: _located(repo_id, options.cache_dir))
    reference = Reference(Path(found["directory"]), Path(found["root"]))
    error: Exception | None = None
    report = None
    try:
        parts = model if isinstance(model, list) else [model]
        loader = _Loader(parts, reference, options, allow_pickle)
        error = loader.mismatch()
    except Exception as failure:
        error = failure
    channel.raise_together(f"comparing {reference.directory} with the model", _known(error))
    try:
        report = loader.load()
    except Exception as failure:
        error = failure
    channel.raise_together(f"reading {reference.directory}", _known(error))
    assert report is not None  # if there was an error, raise_together has raised it
    return report


def _located(repo_id: str, cache_dir: Path) -> dict[str, str]:
    reference = find_reference(repo_id, cache_dir)
    return {"directory": str(reference.directory), "root": str(reference.root)}


def _known(error: Exception | None) -> Exception | None:
    if error is None or isinstance(error, CheckpointError):
        return error
    known = CheckpointError(f"{type(error).__name__}: {error}")
    known.__cause__ = error
    return known


class _Loader:
    """One base load on one rank."""

    def __init__(
        self, parts: Sequence[nn.Module], reference: Reference, options: HubOptions, allow_pickle: bool
    ) -> None:
        self._parts = [unwrap(part) for part in parts]
        self._reference = reference
        self._skip = options.skip_prefixes
        self._weights = _weights(reference, options.dequantize, allow_pickle)
        self._mapped = ModelMap.of(self._parts)
        self._specs = {spec.name: spec for spec in self._mapped.specs()}
        self._tables = tables_of(self._parts[0])
        self._naming = naming_of(self._mapped, self._parts[0], list(self._specs.values()), self._tables)
        self._fit = self._compare()

    def _compare(self) -> _Fit:
        fit = _Fit()
        specs = self._weights.specs
        match = Matching(self._parts[0], self._tables, self._naming, self._specs, self._mapped.aliases, specs)
        for name in specs:
            place = match(name)
            if place is None:
                fit.unexpected.append(name)
            elif place in fit.stored:
                chosen, other = (name, fit.stored[place]) if place == name else (fit.stored[place], name)
                fit.stored[place] = chosen
                fit.doubled.append((place, other))
            else:
                fit.stored[place] = name
        self._naming = match.naming
        optional = _optional(self._parts[0])
        for name in self._specs:
            aliases = self._naming.by_source.get(name, ())
            absent = not aliases or any(alias.name not in fit.stored for alias in aliases)
            if absent and not name.startswith(self._skip) and not optional.search(name):
                fit.missing.append(name)
        for alias in self._naming.aliases:
            stored = specs.get(fit.stored.get(alias.name, ""))
            shape = self._naming.shapes.get(alias.name, alias.shape)
            if stored is None or alias.source.startswith(self._skip):
                continue
            if stored.shape != shape:
                fit.different[alias.name] = f"{list(stored.shape)} in the reference, {list(shape)} in the model"
            elif _kind(stored.dtype) != _kind(self._specs[alias.source].dtype):
                fit.different[alias.name] = (
                    f"{stored.dtype} in the reference, {self._specs[alias.source].dtype} in the model"
                )
        return fit

    def mismatch(self) -> KeyMismatchError | None:
        """The error for everything that does not match, or None."""
        if not self._fit.missing and not self._fit.different:
            return None
        return KeyMismatchError(
            str(self._reference.directory),
            missing=self._fit.missing,
            mismatched=self._fit.different,
            unexpected=self._fit.unexpected if self._fit.missing else (),
            remedy="List the prefixes of names that should keep their initialization in "
            "checkpoint.skip_task_head_prefixes_for_base_model, or build the model from the reference's "
            "config.json.",
        )

    @torch.no_grad()
    def load(self) -> BaseReport:
        """Read, and initialize the rest."""
        loaded = {
            alias.source
            for alias in self._naming.aliases
            if alias.name in self._fit.stored and not alias.source.startswith(self._skip)
        }
        fresh = materialize(self._parts, self._mapped, loaded)
        chosen = [item for item in self._mapped.locals(Localizer()) if not item.spec.name.startswith(self._skip)]
        order = {name: number for number, name in enumerate(self._weights.specs)}
        named = chosen if self._naming.is_plain else Exporter(self._naming)(chosen)
        pieces = [item for item in named if item.spec.name in self._fit.stored]
        wanted = [
            ReadRequest(
                self._fit.stored[piece.spec.name],
                piece.box,
                piece.tensor,
                () if piece.spec.flat is None else piece.spec.shape,
            )
            for piece in pieces
        ]
        self._refuse_untied(wanted)
        total = self._weights.read(sorted(wanted, key=lambda item: order[item.name]))
        left = sorted(self._specs.keys() - loaded)
        if fresh:
            initialize(self._parts, self._mapped, fresh, loaded)
        if left:
            log.warning("%s: not taken from the base model: %s", self._reference.directory, ", ".join(left))
        log.info(
            "%s: %s of the model taken from the base model", self._reference.directory, counted(len(loaded), "tensor")
        )
        if self._fit.unexpected:
            log.info("not in the model, so not loaded: %s", ", ".join(self._fit.unexpected))
        return BaseReport(self._reference.directory, tuple(left), tuple(self._fit.unexpected), total)

    def _refuse_untied(self, wanted: Sequence[ReadRequest]) -> None:
        """Check that weights are equal that the model ties but the reference stores under two names."""
        others = {self._fit.stored[place]: other for place, other in self._fit.doubled}
        for item in wanted:
            other = others.get(item.name)
            if other is None:
                continue
            specs = self._weights.specs
            found = {
                name: torch.empty(item.into.shape, dtype=item.into.dtype, device="cpu") for name in (item.name, other)
            }
            if specs[other].shape == specs[item.name].shape:
                self._weights.read([replace(item, name=name, into=into) for name, into in found.items()])
            bits = [bytes_of(tensor) for tensor in found.values()]
            if specs[other].shape != specs[item.name].shape or bits[0] != bits[1]:
                remedy = "Build the model with tie_word_embeddings=False in its configuration, as transformers does"
                tied = other in self._mapped.aliases or item.name in self._mapped.aliases
                raise CheckpointConfigError(
                    f"{self._reference.directory}: {item.name} and {other} differ, and the model has one tensor for "
                    f"both. {remedy if tied else 'Remove one of them from the files'}"
                )


def _weights(reference: Reference, permitted: bool | None, allow_pickle: bool) -> Weights:
    if reference.weight_files:
        stored: Weights = SafetensorsWeights(reference)
    elif not reference.pickled:
        raise CheckpointNotFoundError(f"{reference.directory} holds no model weights (model.safetensors or its index)")
    elif not allow_pickle:
        raise CheckpointConfigError(
            f"{reference.directory} holds only pickled weights ({', '.join(reference.pickled)}). Set "
            "checkpoint.allow_legacy_pickle_restore=true to read the tensors in them, or convert them to safetensors"
        )
    else:
        stored = PickledWeights(reference)
    quantization = reference.config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise CorruptCheckpointError(reference.directory / "config.json", "its quantization_config is not a mapping")
    return Dequantized(stored, quantization, permitted)


def _kind(dtype: str) -> str:
    """The kind of a dtype's numbers: one kind is not converted to another."""
    if dtype.startswith(("F", "BF")):
        return "floating point"
    return "integer" if dtype.startswith(("I", "U")) else dtype


def _optional(model: nn.Module) -> re.Pattern[str]:
    """Names that transformers accepts as missing from files."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or "(?!)")
