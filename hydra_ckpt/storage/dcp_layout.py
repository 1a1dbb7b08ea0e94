"""DCP's plans and metadata of tensors as file layouts, and checks that everything was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, TensorProperties
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, counted
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.file_layout import FileLayout, by_size, lay_out
from hydra_ckpt.layout.plan import WritePlan, fill_files, full_coverage
from hydra_ckpt.layout.replicas import WriteShare
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.dtypes import check_name, safetensors_dtype

STATE = "state"
_SHOWN = 5

# An entry of the state dict and which part of it; None for a value that is not a tensor.
Part = tuple[str, Box | None]
# A file of digests, its size in bytes, and its own digest.
Sidecar = tuple[str, int, str]


@dataclass(frozen=True)
class Written:
    """What a rank reports of an item that it wrote.

    Attributes:
        token: The token of the draft that it was written to.
        sidecar: File, size and digest of the rank's digests.
        box: Which part of the tensor; None for a value.
        value: An encoded value; None for a tensor.
        tensors: Names of the tensors that the value refers to.
        own_files: Files that hold such tensors of this rank, with their sizes in bytes.
    """

    token: str
    sidecar: Sidecar
    box: Box | None = None
    value: Any = None
    tensors: tuple[str, ...] = ()
    own_files: tuple[tuple[str, int], ...] = ()


def share_of(item: WriteItem) -> WriteShare | None:
    """A write item as the share of a tensor; None for a value.

    Raises:
        CheckpointConfigError: Files cannot hold such a tensor.
    """
    data = item.tensor_data
    return None if data is None else _share(item.index.fqn, data.properties, data.size, data.chunk)


def shares_in(metadata: Metadata) -> Iterator[WriteShare]:
    """Every chunk of every tensor that DCP's metadata lists."""
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, BytesStorageMetadata):
            yield from (_share(name, entry.properties, entry.size, chunk) for chunk in entry.chunks)


def _share(name: str, properties: TensorProperties, size: Sequence[int], chunk: ChunkStorageMetadata) -> WriteShare:
    check_name(name)
    if properties.layout != torch.strided:
        kind = str(properties.layout).removeprefix("torch.")
        raise CheckpointConfigError(f"{name}: tensors of the layout {kind} cannot be stored; save a dense one")
    spec = TensorSpec(name, safetensors_dtype(name, properties.dtype), tuple(size))
    box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
    return WriteShare(spec, box, 0, box.sizes[0] if box.sizes else 1)


def lay_out_shares(shares: Iterable[WriteShare], max_file_bytes: int) -> tuple[FileLayout, ...]:
    """The files of whole tensors that all ranks' shares fill.

    Raises:
        CheckpointError: The shares do not cover every tensor exactly once.
    """
    shares = list(shares)
    specs: dict[str, TensorSpec] = {}
    for share in shares:
        known = specs.setdefault(share.spec.name, share.spec)
        if known != share.spec:
            raise CheckpointError(
                f"{known.name}: the ranks disagree about it: {known.dtype} {list(known.shape)} and "
                f"{share.spec.dtype} {list(share.spec.shape)}; nothing was written"
            )
    groups = by_size(specs.values(), max_file_bytes)
    files = tuple(lay_out(groups, STATE, "model")) if groups else ()
    if plan_of(files, (), dict(enumerate(shares))).coverage != full_coverage(files):
        raise CheckpointError(
            "the shards of the state dict do not cover every tensor exactly once; nothing was written"
        )
    return files


def plan_of(
    files: tuple[FileLayout, ...],
    own_files: tuple[FileLayout, ...],
    shares: Mapping[int, WriteShare],
    own_shares: Mapping[int, WriteShare] | None = None,
) -> WritePlan:
    """A plan that puts shares into shared files, and others into files of this rank."""
    own_shares = own_shares or {}
    pieces = (*fill_files(files, shares), *fill_files(own_files, own_shares, len(files)))
    return WritePlan(files, own_files, {**shares, **own_shares}, pieces, "")


def check_planned(plan: WritePlan) -> None:
    """Check that every share has a place for all of it in the plan's files.

    Raises:
        CheckpointError: One has not: a cached plan no longer fits what the other ranks save.
    """
    known = {spec.name: spec for file in plan.all_files for spec in file.tensors}
    placed: Counter[int] = Counter()
    for piece in plan.pieces:
        placed[piece.share] += piece.region.nbytes
    for key, share in plan.shares.items():
        if known.get(share.spec.name) != share.spec or placed[key] != share.nbytes:
            raise CheckpointError(
                f"{share.spec.name}: the planner's cached plan has it as {share.spec.dtype} {list(share.spec.shape)}, "
                "which is not what rank 0 plans; nothing is published"
            )


def check_complete(metadata: Metadata, results: Iterable[WriteResult], token: str) -> None:
    """Check that exactly what the metadata lists was written, entry by entry and chunk by chunk, in this save.

    Raises:
        CheckpointError: Something is missing, was written twice or to another draft, or is not listed.
    """
    expected = Counter(_parts(metadata))
    written: Counter[Part] = Counter()
    for result in results:
        report = result.storage_data
        if not isinstance(report, Written) or report.token != token:
            raise CheckpointError(f"{result.index.fqn}: a rank wrote it in another save; nothing is published")
        written[result.index.fqn, report.box] += 1
    for problem, parts in (("not written", expected - written), ("written, but not planned", written - expected)):
        if parts:
            shown = ", ".join(map(_text, list(parts)[:_SHOWN])) + (", ..." if len(parts) > _SHOWN else "")
            raise CheckpointError(f"{counted(parts.total(), 'part')} {problem}: {shown}; nothing is published")


def _parts(metadata: Metadata) -> Iterator[Part]:
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            yield name, None
    for share in shares_in(metadata):
        yield share.spec.name, share.box


def _text(part: Part) -> str:
    name, box = part
    return name if box is None else f"{name} from {list(box.offsets)}"
