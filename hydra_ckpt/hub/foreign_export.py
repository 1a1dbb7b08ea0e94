"""Exports from checkpoints of other tools: `dcp.save` directories, and accelerate's under FSDP2.

They contain nothing about the model except the names of its tensors. A reference model provides the rest: the names
that transformers uses, dtypes, the configuration. No pickle is run: see `storage.dcp_index`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra_ckpt.config import hub_cache
from hydra_ckpt.errors import CheckpointConfigError, CheckpointNotFoundError, KeyMismatchError, counted, some_of
from hydra_ckpt.hub.model_export import FLOATS, ModelExport, ReferenceHints
from hydra_ckpt.hub.skeletons import configured, skeleton
from hydra_ckpt.hub.writing import Exported, Source, refuse_occupied, write_export
from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.resolved import HubOptions
from hydra_ckpt.state.model_map import ModelMap
from hydra_ckpt.state.wrappers import canonical
from hydra_ckpt.storage.dcp_index import INDEX, KeyPath, ambiguous, dotted, model_prefix
from hydra_ckpt.storage.distcp import are_same, fetch_distcp
from hydra_ckpt.storage.dtypes import TORCH_DTYPE, check_name
from hydra_ckpt.storage.file_parts import WHOLE_TENSORS
from hydra_ckpt.storage.pickled import ACCELERATE_MODEL, read_dcp
from hydra_ckpt.store import names

log = logging.getLogger(__name__)

# Keys under which optimizers keep their state, in the state dicts of PyTorch and of DCP's helpers.
_OPTIMIZER_KEYS = {"state", "param_groups"}


@dataclass(frozen=True)
class _Model:
    """What a reference model provides.

    Attributes:
        name: A directory, or a hub id.
        core: The model without data.
        mapped: Its tensors.
    """

    name: str
    core: Any
    mapped: ModelMap

    @classmethod
    def of(cls, base: str) -> _Model:
        core = skeleton(*configured(base, "--base"))
        core.tie_weights()
        return cls(base, core, ModelMap.of([core]))

    @property
    def names(self) -> set[str]:
        """All names of its tensors, including those of tied ones."""
        return {*(slot.name for slot in self.mapped.slots), *self.mapped.aliases}


def export_foreign(
    directory: Path,
    out: Path,
    *,
    base: str | None,
    part: str = names.MODEL,
    dtype: str | None = None,
    max_file_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a Hugging Face directory from a checkpoint of another tool, tensor by tensor.

    Args:
        directory: A directory written by `dcp.save` or `Accelerator.save_state`.
        out: The directory to create; it must not exist, or must be empty. A crash leaves nothing in its place.
        base: A transformers model of the same architecture, a directory or a hub id in the cache, which provides names,
            dtypes, configuration and tokenizer; None keeps the stored names and dtypes.
        part: `model`, or the keys that lead to the tensors, such as `ema` or `app.ema`.
        dtype: Dtype of floating-point tensors; None for the reference's, otherwise the stored one.
        max_file_bytes: Size at which a new file begins; None for the reference's files, otherwise 5 GB.
        progress: Called with the bytes written so far and in total.

    Raises:
        CheckpointExistsError: `out` exists and is not empty.
        CheckpointNotFoundError: The part or the reference model does not exist.
        CheckpointConfigError: transformers has no class for the reference model.
        KeyMismatchError: The tensors do not match the reference model's.
        CorruptCheckpointError: The index is damaged.
    """
    refuse_occupied(out)
    model = None if base is None else _Model.of(base)
    place = "" if (directory / INDEX).is_file() else ACCELERATE_MODEL.format(0)
    found = read_dcp(directory, place, values=False)
    tensors = _tensors(directory, found.tensors, part, None if model is None else model.names)
    small: Mapping[str, bytes] = {}
    if model is None:
        naming = TensorMapping.unchanged(item.spec for item in tensors.values())
    else:
        tensors = _matched(directory, tensors, model.mapped, found.lengths)
        naming, small = _as_reference(model, tensors, dtype)
    source = Source(tensors, naming, "model", partial(fetch_distcp, directory, lengths=found.lengths), WHOLE_TENSORS)
    source = source if dtype is None else source.cast(dtype)
    return write_export(source, small, out, max_file_bytes=max_file_bytes, progress=progress)


def _tensors(
    directory: Path, stored: Mapping[KeyPath, StoredTensor], part: str, known: Collection[str] | None
) -> dict[str, StoredTensor]:
    """The tensors of one part by their names in the model, or by their stored names if the model is unknown."""
    prefix = _prefix(directory, stored, part, known)
    found: dict[str, StoredTensor] = {}
    left: Counter[str] = Counter()
    for path, item in stored.items():
        if path[: len(prefix)] != prefix or (not prefix and _is_optimizer(path[:-1])):
            left[str(path[0])] += 1
            continue
        name = dotted(path[len(prefix) :])
        name = name if known is None else canonical(name)
        if name in found:
            raise CheckpointConfigError(f"{directory} holds two tensors named {name}; choose one part with --part")
        check_name(name)
        found[name] = replace(item, spec=replace(item.spec, name=name))
    if left:
        log.warning("not exported: %s", ", ".join(f"{key} ({counted(n, 'tensor')})" for key, n in sorted(left.items())))
    return found


def _prefix(
    directory: Path, stored: Mapping[KeyPath, StoredTensor], part: str, known: Collection[str] | None
) -> KeyPath:
    """The keys that lead to a part's tensors; empty for everything but optimizer state, if no key is `model`."""
    prefixes = {path[:depth] for path in stored for depth in range(len(path))}
    if part != names.MODEL:
        prefixes = {prefix for prefix in prefixes if prefix and dotted(prefix) == part}
    elif known is None:
        models = [prefix for prefix in prefixes if prefix and prefix[-1] == names.MODEL and not _is_optimizer(prefix)]
        outer = min(map(len, models), default=0)
        prefixes = {prefix for prefix in models if len(prefix) == outer}
        if len(prefixes) > 1:
            raise ambiguous(directory, prefixes, "Name one with --part")
        return next(iter(prefixes), _common(stored))
    votes = Counter(
        path[:depth]
        for path in stored
        for depth in range(len(path))
        if path[:depth] in prefixes and (known is None or canonical(dotted(path[depth:])) in known)
    )
    if not votes:
        held = sorted({dotted(path[:-1]) for path in stored} - {""})
        raise CheckpointNotFoundError(
            f"{directory} has no tensors of {part!r}"
            + ("" if known is None else " that the reference model knows")
            + f"; it has tensors under {some_of(held)}. Name one of these with --part"
        )
    return model_prefix(directory, votes, "Name one with --part")


def _common(stored: Collection[KeyPath]) -> KeyPath:
    """The one key that contains everything except optimizer state; empty if there are several."""
    firsts = {path[:-1][:1] for path in stored if not _is_optimizer(path[:-1])}
    return firsts.pop() if len(firsts) == 1 else ()


def _is_optimizer(prefix: KeyPath) -> bool:
    return bool(_OPTIMIZER_KEYS & set(map(str, prefix))) or any(str(key).startswith("optim") for key in prefix)


def _matched(
    directory: Path,
    tensors: Mapping[str, StoredTensor],
    mapped: ModelMap,
    lengths: Mapping[tuple[str, int], int],
) -> dict[str, StoredTensor]:
    """The stored tensors of a model, under its names; a tied one is stored under any of them."""
    held: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        own = mapped.aliases.get(name, name)
        if own in held and not are_same(directory, held[own], stored, lengths):
            raise CheckpointConfigError(
                f"{directory}: {own} and {name} differ, and the reference model has one tensor for both. Name a model "
                "with tie_word_embeddings=false in its config.json with --base"
            )
        held.setdefault(own, stored)
    found: dict[str, StoredTensor] = {}
    missing, different = [], {}
    for spec in mapped.specs():
        item = held.pop(spec.name, None)
        if item is None:
            missing.append(spec.name)
        elif item.spec.shape != spec.shape:
            different[spec.name] = f"{list(item.spec.shape)} stored, {list(spec.shape)} in the reference model"
        else:
            found[spec.name] = replace(item, spec=replace(item.spec, name=spec.name))
    unexpected = sorted(held)
    if missing or different or unexpected:
        raise KeyMismatchError(
            str(directory),
            missing=missing,
            unexpected=unexpected,
            mismatched=different,
            remedy="Name a model of the same architecture with --base, or leave --base out: then tensors keep their "
            "names.",
        )
    return found


def _as_reference(
    model: _Model, tensors: Mapping[str, StoredTensor], dtype: str | None
) -> tuple[TensorMapping, dict[str, bytes]]:
    """Names, dtypes, files and small files as exported by a run that started from the reference."""
    export = ModelExport(
        HubOptions(
            repo_id=model.name,
            cache_dir=Path(hub_cache()),
            dequantize=None,
            original_model_root_dir=None,
            skip_prefixes=(),
            v4_compatible=False,
            diffusers_compatible=False,
            export_dtype=dtype,
            model_card=False,
        ),
        required=True,
    )
    specs = [item.spec for item in tensors.values()]
    sizes: Counter[str] = Counter()
    for spec in specs:
        sizes[spec.dtype] += spec.nbytes if spec.dtype in FLOATS.values() else 0
    for most, _ in sizes.most_common(1):
        if most in FLOATS.values():
            model.core.to(TORCH_DTYPE[most])  # the exported configuration records this dtype
    naming = export.naming(model.core, specs, ReferenceHints(**export.wanted(model.core)))
    return naming, export.assets(model.core, naming, "", has_tokenizer=False)
