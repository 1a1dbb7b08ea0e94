"""`model_save_format=torch_save`: PyTorch's own `.distcp` files, written by its `FileSystemWriter`.

The ranks do not plan through DCP's collectives: each writes its shares and reports to the coordinator where they are
stored. Plain DCP needs the pickled `.metadata`. The manifest has the same index as JSON, and that is the one we read.
Tensors are read without unpickling them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.boxes import Box, ByteRuns
from hydra_ckpt.layout.plan import CELL_BYTES, StoredChunk, StoredTensor
from hydra_ckpt.layout.replicas import WriteShare
from hydra_ckpt.layout.specs import ITEMSIZE, TensorSpec
from hydra_ckpt.storage.digests import Digested, digest_of
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.header import read_piece, refuse_overlap
from hydra_ckpt.storage.memory import bytes_of, narrow
from hydra_ckpt.storage.read import Fetch
from hydra_ckpt.storage.torch_file import read_tensor

# One written chunk: tensor, element type, global shape, offsets, sizes, file, first byte, bytes.
Row = list[Any]


class _SharePlanner(SavePlanner):
    """Gives this rank's shares to DCP's writer."""

    def __init__(self, shares: Mapping[int, WriteShare], sources: Mapping[int, memoryview]) -> None:
        self._shares = {_index(share.spec.name, share.box): (share, sources[key]) for key, share in shares.items()}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to set up."""

    def create_local_plan(self) -> SavePlan:
        """One item per share."""
        return SavePlan([_item(index, share) for index, (share, _) in self._shares.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Not called: ranks have divided the work already."""
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The share's bytes as a tensor."""
        share, source = self._shares[write_item.index]
        dtype = TORCH_DTYPE[share.spec.dtype]
        # frombuffer refuses an empty buffer
        return (torch.frombuffer(source, dtype=dtype) if source else torch.empty(0, dtype=dtype, device="cpu")).view(
            share.box.sizes
        )


def _index(name: str, box: Box) -> MetadataIndex:
    return MetadataIndex(name, torch.Size(box.offsets))


def _item(index: MetadataIndex, share: WriteShare) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(share.box.offsets), torch.Size(share.box.sizes))
    properties = TensorProperties(dtype=TORCH_DTYPE[share.spec.dtype])
    data = TensorWriteData(chunk, properties, torch.Size(share.spec.shape))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def write_shares(
    directory: Path, shares: Mapping[int, WriteShare], sources: Mapping[int, memoryview], rank: int
) -> list[Row]:
    """Write this rank's shares of one part as a `.distcp` file, durably.

    Returns:
        A row for each chunk; see `Row`.
    """
    if not shares:
        return []
    planner = _SharePlanner(shares, sources)
    writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
    writer.set_up_storage_writer(False, rank=rank, use_collectives=False)
    [plan] = writer.prepare_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    results = writer.write_data(plan, planner).wait()
    specs = {_index(share.spec.name, share.box): share for share in shares.values()}
    rows: list[Row] = []
    for result in results:
        share, place = specs[result.index], result.storage_data
        spec, box = share.spec, share.box
        extent = [place.relative_path, place.offset, place.length]
        rows.append([spec.name, spec.dtype, list(spec.shape), list(box.offsets), list(box.sizes), *extent])
    if len(rows) != len(shares):
        raise OSError(f"DCP wrote {len(rows)} of {len(shares)} tensors to {directory}")
    return rows


def digest_file(path: Path, file: int) -> list[Digested]:
    """Digests of a finished file, cell by cell."""
    records = []
    with path.open("rb", buffering=0) as source:
        offset = 0
        while data := source.read(CELL_BYTES):
            records.append(Digested(file, ByteRuns(offset, len(data)), digest_of(data)))
            offset += len(data)
    return records


def finish_part(directory: Path, rows: Sequence[Row]) -> bytes:
    """Coordinator only: write DCP's `.metadata`, durably.

    Returns:
        Its content.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    results = []
    for name, dtype, shape, offsets, sizes, file, first, length in rows:
        properties = TensorProperties(dtype=TORCH_DTYPE[dtype])
        known = tensors.setdefault(name, TensorStorageMetadata(properties, torch.Size(shape), []))
        known.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        index = MetadataIndex(name, torch.Size(offsets), len(known.chunks) - 1)
        results.append(WriteResult(index, length, _StorageInfo(file, first, length)))
    FileSystemWriter(directory, sync_files=True).finish(Metadata(dict(tensors)), [results])
    return (directory / ".metadata").read_bytes()


def stored_tensors(path: Path, directory: str, rows: Sequence[Row]) -> dict[str, StoredTensor]:
    """The tensors that rows of the manifest describe.

    Raises:
        CorruptCheckpointError: A row is invalid.
    """
    found: dict[str, StoredTensor] = {}
    for row in rows:
        try:
            name, dtype, shape, offsets, sizes, file, first, length = row
            spec = TensorSpec(str(name), dtype, tuple(map(int, shape)))
            box = Box(tuple(map(int, offsets)), tuple(map(int, sizes)))
            inside = all(
                a >= 0 and n >= 0 and a + n <= m for a, n, m in zip(box.offsets, box.sizes, spec.shape, strict=True)
            )
            if dtype not in ITEMSIZE or not inside or int(first) < 0 or int(length) <= 0:
                raise ValueError(row)
        except (ValueError, TypeError) as error:
            raise CorruptCheckpointError(path, f"its index of .distcp files is damaged: {error}") from None
        chunk = StoredChunk(box, f"{directory}/{file}", int(first))
        known = found.get(spec.name)
        found[spec.name] = StoredTensor(spec, (*(known.chunks if known else ()), chunk))
    for name, tensor in found.items():
        refuse_overlap(path.parent, name, tensor.chunks)
    return found


@torch.no_grad()
def fetch_distcp(root: Path, wanted: Sequence[Fetch], lengths: Mapping[tuple[str, int], int]) -> int:
    """Fetch boxes out of `.distcp` files.

    Args:
        root: The checkpoint's directory.
        wanted: What to read, into what.
        lengths: File and first byte of a chunk to its length in bytes.

    Returns:
        Bytes read.

    Raises:
        CorruptCheckpointError: A chunk is missing or is not the tensor the index says.
    """
    total = 0
    for item in wanted:
        covered = 0
        for chunk, common in _overlaps(item):
            length = lengths[chunk.file, chunk.offset]
            tensor = _load(root, chunk, length, TORCH_DTYPE[item.stored.spec.dtype])
            source, target = narrow(tensor, common.within(chunk.box)), narrow(item.into, common.within(item.box))
            target.copy_(source)
            covered += common.numel
            total += length
        if covered != item.box.numel:
            raise CorruptCheckpointError(
                root, f"{item.stored.spec.name}: {covered} of {item.box.numel} elements are stored"
            )
    return total


def are_same(root: Path, one: StoredTensor, other: StoredTensor, lengths: Mapping[tuple[str, int], int]) -> bool:
    """Whether two stored tensors have the same bits."""
    if (one.spec.shape, one.spec.dtype) != (other.spec.shape, other.spec.dtype):
        return False
    found = [torch.empty(item.spec.shape, dtype=TORCH_DTYPE[item.spec.dtype], device="cpu") for item in (one, other)]
    wholes = [Fetch(item, Box.whole(item.spec.shape), into) for item, into in zip((one, other), found, strict=True)]
    fetch_distcp(root, wholes, lengths)
    return bool(bytes_of(found[0]) == bytes_of(found[1]))


def _overlaps(item: Fetch) -> Iterator[tuple[StoredChunk, Box]]:
    for chunk in item.stored.chunks:
        common = chunk.box.intersect(item.box)
        if common is not None:
            yield chunk, common


def _load(root: Path, chunk: StoredChunk, length: int, dtype: torch.dtype) -> torch.Tensor:
    data = read_piece(root, chunk.file, chunk.offset, length)
    where = (chunk.offset, chunk.offset + length)
    try:
        tensor = read_tensor(data)
    except Exception as error:  # noqa: BLE001 - whatever the damage leads to
        raise CorruptCheckpointError(root / chunk.file, f"cannot be read: {error}", byte_range=where) from None
    if tuple(tensor.shape) != chunk.box.sizes or tensor.dtype != dtype:
        raise CorruptCheckpointError(
            root / chunk.file, "holds a different tensor than the index says", byte_range=where
        )
    return tensor
