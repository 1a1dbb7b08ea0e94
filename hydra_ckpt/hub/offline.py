"""Exports made later, from any of our checkpoints: the same files that the run itself would have written."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

from hydra_ckpt.errors import CheckpointConfigError, CheckpointNotFoundError
from hydra_ckpt.hub.assets import json_bytes
from hydra_ckpt.hub.writing import Exported, Source, refuse_occupied, write_export
from hydra_ckpt.layout.aliases import SliceMapping, TensorMapping
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.storage.file_parts import open_part
from hydra_ckpt.storage.ledger import Ledger
from hydra_ckpt.storage.merge import BLOCK_BYTES
from hydra_ckpt.storage.naming import decode_naming
from hydra_ckpt.storage.read import fetch
from hydra_ckpt.storage.verification import checks, findings, read_small
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.manifest import PartRecord
from hydra_ckpt.store.parts import is_export, models_in


def export_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    part: str = names.MODEL,
    dtype: str | None = None,
    max_file_bytes: int | None = None,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a Hugging Face directory from a checkpoint, in bounded memory.

    Args:
        checkpoint: Any of our checkpoints; its model in shards, consolidated, or in `.distcp` files (read tensor by
            tensor).
        out: The directory to create; it must not exist, or must be empty. A crash leaves nothing in its place.
        part: `model`, the name of one of several models, or of an extra that holds tensors under the model's names
            (an average of the weights).
        dtype: Dtype of floating-point tensors; None for what the run would have exported.
        max_file_bytes: Size at which a new file begins; None for the run's own files.
        verify: Whether to compare the checkpoint's bytes with their digests.
        progress: Called with the bytes written so far and in total.

    Raises:
        CheckpointExistsError: `out` exists and is not empty.
        CheckpointNotFoundError: The checkpoint has no such part.
        CorruptCheckpointError: The checkpoint is damaged.
    """
    refuse_occupied(out)
    manifest = checkpoint.manifest
    ledger = Ledger(checks(checkpoint.path, manifest.files, manifest.digests)) if verify else None
    source, model = _source(checkpoint, part, ledger)
    source = source if dtype is None else source.cast(dtype)
    if max_file_bytes is not None and source.stem == names.ADAPTER:
        raise CheckpointConfigError(
            f"{model} is an adapter, which peft reads from one file: leave out --max-shard-size"
        )
    small = _small_files(checkpoint, model, dtype)
    rest = (lambda: None) if ledger is None else partial(_verify_rest, checkpoint, source, ledger)
    return write_export(source, small, out, max_file_bytes=max_file_bytes, check=rest, progress=progress)


def _verify_rest(checkpoint: Checkpoint, source: Source, ledger: Ledger) -> None:
    """Compare the digests that cover bytes not all read; the export is not visible yet."""
    read = {chunk.file for item in source.tensors.values() for chunk in item.chunks}
    for error in findings(checkpoint.path, [check for check in ledger.left(ledger.done()) if check.file in read]):
        raise error


def models_of(checkpoint: Checkpoint) -> list[str]:
    """The parts of a checkpoint that hold models or their adapters."""
    return models_in(checkpoint.manifest.parts)


def find_model(models: Sequence[str], part: str) -> str | None:
    """The model of this name, with or without `model/`; None if there is none."""
    return next((name for name in models if part in (name, name.removeprefix(f"{names.MODEL}/"))), None)


def _source(checkpoint: Checkpoint, part: str, ledger: Ledger | None) -> tuple[Source, str]:
    """The part to read, and the model whose small files go with it."""
    parts = checkpoint.manifest.parts
    models = models_of(checkpoint)
    named = find_model(models, part)
    if named is not None:
        return _model(checkpoint, named, ledger), named
    averages: list[str] = []
    if len(models) == 1 and names.EXTRAS in parts:
        source = _model(checkpoint, models[0], ledger)
        naming = _stored_naming(checkpoint, models[0]) or source.naming
        extras: defaultdict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name, item in open_part(checkpoint, names.EXTRAS).tensors.items():
            extras[name.split(":")[0]][name] = item
        if part in extras:
            tensors = _average(naming, part, extras[part])
            read = partial(fetch, checkpoint.path, ledger=ledger)
            return Source(tensors, naming, source.stem, read, BLOCK_BYTES), models[0]
        averages = sorted(name for name, extra in extras.items() if _is_average(naming, name, extra))
    known = [*models, *averages]
    none = "it holds no model, as directories of SafetensorsWriter; export a checkpoint of a run"
    has = f"it has {', '.join(known)}" if known else none
    raise CheckpointNotFoundError(f"{checkpoint.path} has no part {part!r} to export; {has}")


def _is_average(naming: TensorMapping, part: str, extra: Mapping[str, StoredTensor]) -> bool:
    try:
        _average(naming, part, extra)
    except CheckpointNotFoundError:
        return False
    return True


def _average(naming: TensorMapping, part: str, extra: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors, by the model's names, of an extra that holds the model's tensors under one prefix."""
    sizes = {name: sum(alias.box.numel for alias in aliases) for name, aliases in naming.by_source.items()}
    ends = (
        {held.removesuffix(name) for held in extra if held.endswith((f".{name}", f":{name}"))}
        for name in sorted(sizes, key=len, reverse=True)  # a long name is unlikely to be the end of another one
    )
    prefixes = next(filter(None, ends), set())

    def lacking(prefix: str) -> list[str]:
        held = {name: extra[prefix + name] for name in sizes if prefix + name in extra}
        return [name for name, size in sizes.items() if name not in held or prod(held[name].spec.shape) != size]

    best = min(sorted(prefixes, key=len), key=lambda prefix: len(lacking(prefix)), default="")
    if missing := lacking(best):
        raise CheckpointNotFoundError(
            f"the extra {part!r} lacks these tensors of the model, or has them in other shapes, and an export needs "
            f"all of them: {', '.join(missing)}"
        )
    return {name: extra[best + name] for name in sizes}


def _model(checkpoint: Checkpoint, model: str, ledger: Ledger | None) -> Source:
    part = open_part(checkpoint, model, ledger)
    record = checkpoint.manifest.parts[model]
    whole = _is_whole(record)
    naming = None if whole else _stored_naming(checkpoint, model)
    if naming is None:
        own = {item.spec.name: item.chunks[0].file for item in part.tensors.values()} if whole else {}
        naming = TensorMapping(tuple(SliceMapping.same(item.spec) for item in part.tensors.values()), files=own)
    stem = Path(record.files[0]).name.split("-00001-of-")[0].removesuffix(".safetensors") if whole else "model"
    return Source(part.tensors, naming, stem, part.read, part.block_bytes)


def _is_whole(record: PartRecord) -> bool:
    """Whether a part is stored in the files of an export, under the export's names."""
    return is_export(record.files)


def _stored_naming(checkpoint: Checkpoint, model: str) -> TensorMapping | None:
    name = f"{model}/{names.NAMING}"
    record = checkpoint.manifest.files.get(name)
    if record is None:
        return None
    return decode_naming(checkpoint.path / name, read_small(checkpoint.path, name, record))


def _small_files(checkpoint: Checkpoint, model: str, dtype: str | None) -> dict[str, bytes]:
    """The configuration and tokenizer files, by name."""
    found: dict[str, bytes] = {}
    for place in (f"{model}/{names.CONSOLIDATED}/", f"{model}/{names.ASSETS}/"):
        for name, record in checkpoint.manifest.files.items():
            if name.startswith(place) and record.xxh3 is not None and not name.endswith(".safetensors.index.json"):
                found.setdefault(name.removeprefix(place), read_small(checkpoint.path, name, record))
    for name in ("config.json", "config.v5.json") if dtype is not None else ():
        if name in found:
            body = dict(json.loads(found[name]))
            found[name] = json_bytes({**body, "torch_dtype" if "torch_dtype" in body else "dtype": dtype})
    return found
