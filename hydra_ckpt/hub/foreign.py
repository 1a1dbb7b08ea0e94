"""Exports from checkpoints of other tools: `dcp.save` directories, and accelerate's under FSDP2.

They say nothing of the model but its tensors' names. A reference model tells the rest: what transformers calls the
tensors, their element types, the configuration. No pickle is run: see `storage.pickled`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra_ckpt.config import hub_cache
from hydra_ckpt.errors import CheckpointNotFoundError, KeyMismatchError, some_of
from hydra_ckpt.hub.export import FLOATS, ModelExport, Wanted
from hydra_ckpt.hub.skeletons import configured, skeleton
from hydra_ckpt.hub.writing import Exported, Source, refuse_occupied, write_export
from hydra_ckpt.layout.aliases import Naming
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.resolved import HubOptions
from hydra_ckpt.state.model import ModelMap, canonical
from hydra_ckpt.storage.distcp import fetch_distcp
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.parts import WHOLE_TENSORS
from hydra_ckpt.storage.pickled import ACCELERATE_MODEL, INDEX, KeyPath, read_dcp_tensors
from hydra_ckpt.store import names

# Keys under which optimizers keep their state, in the state dicts of PyTorch and of DCP's helpers.
_OPTIMIZER_KEYS = {"state", "param_groups"}


@dataclass(frozen=True)
class _Model:
    """What a reference model tells.

    Attributes:
        core: The model without data.
        mapped: Its tensors.
    """

    core: Any
    mapped: ModelMap

    @classmethod
    def of(cls, base: str) -> _Model:
        core = skeleton(*configured(base, "--base"))
        core.tie_weights()
        return cls(core, ModelMap.of([core]))

    @property
    def names(self) -> set[str]:
        """All names of its tensors, those of tied ones too."""
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
        directory: What `dcp.save` or `Accelerator.save_state` has written.
        out: The directory to make; it must not exist, or be empty. A crash leaves nothing in its place.
        base: A transformers model of the same architecture, a directory or a hub id in the cache, of which names,
            element types, configuration and tokenizer are taken; None leaves names and types as they are stored.
        part: `model`, or the keys that lead to the tensors, such as `ema` or `app.ema`.
        dtype: Element type of floating-point tensors; None for the reference's, else the stored.
        max_file_bytes: Size at which a new file begins; None for the reference's files, else 5 GB.
        progress: Called with bytes written so far and in all.

    Raises:
        CheckpointExistsError: There is something at `out`.
        CheckpointNotFoundError: There is no such part, or no reference model.
        CheckpointConfigError: The reference model is none that transformers has a class for.
        KeyMismatchError: The tensors are not those of the reference model.
        CorruptCheckpointError: The index is damaged.
    """
    refuse_occupied(out)
    model = None if base is None else _Model.of(base)
    place = "" if (directory / INDEX).is_file() else ACCELERATE_MODEL.format(0)
    found = read_dcp_tensors(directory, place)
    tensors = _tensors(directory, found.tensors, part, None if model is None else model.names)
    small: Mapping[str, bytes] = {}
    if base is None or model is None:
        naming = Naming.unchanged(item.spec for item in tensors.values())
    else:
        tensors = _matched(directory, tensors, model.mapped)
        naming, small = _as_reference(model.core, base, tensors, dtype)
    source = Source(tensors, naming, "model", partial(fetch_distcp, directory, lengths=found.lengths), WHOLE_TENSORS)
    source = source if dtype is None else source.cast(dtype)
    return write_export(source, small, out, max_file_bytes=max_file_bytes, progress=progress)


def _tensors(
    directory: Path, stored: Mapping[KeyPath, StoredTensor], part: str, known: Collection[str] | None
) -> dict[str, StoredTensor]:
    """The tensors of one part by their names in the model."""
    prefix = _prefix(directory, stored, part, known)
    found = {}
    for path, item in stored.items():
        if path[:-1] == prefix:
            name = canonical(path[-1])
            found[name] = replace(item, spec=replace(item.spec, name=name))
    return found


def _prefix(
    directory: Path, stored: Mapping[KeyPath, StoredTensor], part: str, known: Collection[str] | None
) -> KeyPath:
    """The keys that lead to a part's tensors: of a model's those with most of its names, or with most tensors."""
    votes = Counter(path[:-1] for path in stored if known is None or canonical(path[-1]) in known)
    if part != names.MODEL:
        votes = Counter({prefix: count for prefix, count in votes.items() if ".".join(map(str, prefix)) == part})
    elif known is None:
        votes = Counter({prefix: count for prefix, count in votes.items() if not _is_optimizer(prefix)})
    if not votes:
        held = sorted({".".join(map(str, path[:-1])) for path in stored} - {""})
        raise CheckpointNotFoundError(
            f"{directory} has no tensors of {part!r}"
            + ("" if known is None else " that the reference model knows")
            + f"; it has tensors under {some_of(held)}. Name one of these with --part"
        )
    return min(votes, key=lambda prefix: (-votes[prefix], names.MODEL not in prefix, len(prefix), str(prefix)))


def _is_optimizer(prefix: KeyPath) -> bool:
    return bool(_OPTIMIZER_KEYS & set(map(str, prefix))) or any(str(key).startswith("optim") for key in prefix)


def _matched(directory: Path, tensors: Mapping[str, StoredTensor], mapped: ModelMap) -> dict[str, StoredTensor]:
    """The stored tensors of a model, under its names; a tied one is stored under any of them."""
    held = {mapped.aliases.get(name, name): item for name, item in tensors.items()}
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
            remedy="Name a model of the same architecture with --base, or none: then tensors keep their names.",
        )
    return found


def _as_reference(
    core: Any, base: str, tensors: Mapping[str, StoredTensor], dtype: str | None
) -> tuple[Naming, dict[str, bytes]]:
    """Names, element types, files and small files as a run would have exported them that began with the reference."""
    export = ModelExport(
        HubOptions(
            repo_id=base,
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
    core.to(TORCH_DTYPE[sizes.most_common(1)[0][0]])  # its configuration tells the element type
    naming = export.naming(core, specs, Wanted(**export.wanted(core)))
    return naming, export.assets(core, naming, "", has_tokenizer=False)
