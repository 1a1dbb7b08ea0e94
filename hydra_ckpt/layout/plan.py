"""Plans: a save or a load written out as byte ranges of files and positions in memory.

Example of a save: `w` begins at byte 4096 of its file, and rank 1 of 2 writes rows 3 to 5, bytes 4144 to 4191:

    >>> from hydra_ckpt.layout.file_layout import lay_out
    >>> w = TensorSpec("w", "F32", (6, 4))
    >>> files = lay_out([[w]], "model", "model")
    >>> halves = [WriteShare(w, Box((0, 0), (3, 4)), 0, 3), WriteShare(w, Box((3, 0), (3, 4)), 3, 6)]
    >>> list(fill_files(files, {0: halves[1]}))
    [WriteItem(file=0, region=ByteRuns(offset=4144, run=48, count=1, stride=0), share=0, start=0)]

Each rank sends one number instead of its ranges. If the ranges of all ranks tile the files, these add up to a number
that the coordinator computes alone; here 4096 to 4144 and 4144 to 4192 do:

    >>> plans = [WritePlan(tuple(files), (), {0: half}, tuple(fill_files(files, {0: half})), "") for half in halves]
    >>> sum(plan.coverage for plan in plans) % 2**64 == full_coverage(files)
    True
    >>> plans[0].coverage == full_coverage(files)
    False

Example of a load: another run wants rows 2 and 3. In shard files of 3 rows each, these are the last row of the first
file and the first row of the second one:

    >>> stored = StoredTensor(w, tuple(StoredChunk(half.box, f"shard-{n}", 4096) for n, half in enumerate(halves)))
    >>> for read in reads(stored, Box((2, 0), (2, 4))):
    ...     print(read.file, read.box.offsets, read.regions)
    shard-0 (2, 0) (ByteRuns(offset=4128, run=16, count=1, stride=0),)
    shard-1 (3, 0) (ByteRuns(offset=4096, run=16, count=1, stride=0),)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from hydra_ckpt.layout.boxes import Box, ByteRuns, regions
from hydra_ckpt.layout.file_layout import FileLayout
from hydra_ckpt.layout.replicas import WriteShare
from hydra_ckpt.layout.specs import TensorSpec

CELL_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class WriteItem:
    """Bytes with one digest: a region of a file, filled from one share.

    Attributes:
        file: Index into the plan's files.
        region: Where the bytes belong.
        share: Position of the share they come from.
        start: First byte within the share's own row-major bytes.
    """

    file: int
    region: ByteRuns
    share: int
    start: int


@dataclass(frozen=True)
class WritePlan:
    """What one rank writes in one save.

    Attributes:
        files: The files that all ranks fill together, equal on every rank; the coordinator creates them.
        own_files: Files that only this rank fills, and creates itself.
        block_files: Files that this rank fills together with some others, equal on these.
        led: Those of `block_files` that this rank creates, by their position there.
        shares: What this rank writes, by the position of the holding it is taken from.
        pieces: Where; file indices count through `files`, `own_files`, `block_files`.
        fingerprint: Equal on ranks whose plans match.
        foreign: Part to the shares that are written in a separate format, by position.
        direct: Indices of the files that are written past the page cache: no rank maps them, or reads them again soon.
    """

    files: tuple[FileLayout, ...]
    own_files: tuple[FileLayout, ...]
    shares: Mapping[int, WriteShare]
    pieces: tuple[WriteItem, ...]
    fingerprint: str
    foreign: Mapping[str, Mapping[int, WriteShare]] = field(default_factory=dict)
    block_files: tuple[FileLayout, ...] = ()
    led: frozenset[int] = frozenset()
    direct: frozenset[int] = frozenset()

    @cached_property
    def nbytes(self) -> int:
        """Bytes of tensor values this rank writes, each file counted."""
        own = sum(share.nbytes for shares in self.foreign.values() for share in shares.values())
        return sum(piece.region.nbytes for piece in self.pieces) + own

    @property
    def all_files(self) -> tuple[FileLayout, ...]:
        """Shared files, this rank's own, its blocks': what `WriteItem.file` indexes."""
        return self.files + self.own_files + self.block_files

    @property
    def created(self) -> list[int]:
        """Indices of the files that this rank creates, whatever the coordinator does."""
        first = len(self.files) + len(self.own_files)
        return [*range(len(self.files), first), *(first + position for position in sorted(self.led))]

    @cached_property
    def coverage(self) -> int:
        """A sum over this rank's byte ranges of the files that ranks fill together; see `full_coverage`.

        The rank that creates a block's file subtracts what that file must add up to: only its block knows the file.
        """
        first = len(self.files) + len(self.own_files)
        seeds = [_seed(file.path) for file in self.block_files]
        total = 0
        for piece in self.pieces:
            if piece.file < len(self.files):
                total += _boundary_sum(piece.file, piece.region)
            elif piece.file >= first:
                total += _boundary_sum(seeds[piece.file - first], piece.region)
        for position in self.led:
            total -= _boundary_sum(seeds[position], _data_region(self.block_files[position]))
        return total % (1 << 64)


def full_coverage(files: Sequence[FileLayout]) -> int:
    """What the ranks' `coverage` must add up to (modulo 2**64) if every byte is written exactly once.

    Each range contributes g(end) - g(start) for a fixed pseudo-random g. Ranges that tile a file telescope to
    g(end of file) - g(start of data); any gap or overlap leaves boundaries that do not cancel.
    """
    return sum(_boundary_sum(index, _data_region(file)) for index, file in enumerate(files)) % (1 << 64)


def _data_region(file: FileLayout) -> ByteRuns:
    return ByteRuns(len(file.header), file.nbytes - len(file.header))


def _seed(path: str) -> int:
    """Replaces a file's index if not all ranks count the file."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=7).digest(), "little") + (1 << 32)


def _boundary_sum(file: int, region: ByteRuns) -> int:
    starts = region.offset + np.arange(region.count, dtype=np.uint64) * np.uint64(region.stride)
    ends = starts + np.uint64(region.run)
    return int(_mix(file, ends).sum(dtype=np.uint64)) - int(_mix(file, starts).sum(dtype=np.uint64))


def _mix(file: int, positions: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014) of the positions, seeded by the file."""
    with np.errstate(over="ignore"):
        x = positions + np.uint64((file + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def fill_files(
    files: Sequence[FileLayout], shares: Mapping[int, WriteShare], first_file: int = 0
) -> Iterator[WriteItem]:
    """The pieces that put whole-tensor shares where they belong in files of whole tensors."""
    located = {spec.name: (index, file.offsets[spec.name]) for index, file in enumerate(files) for spec in file.tensors}
    for position, share in shares.items():
        if share.spec.name not in located:
            continue
        index, base = located[share.spec.name]
        start = 0
        for region in regions(share.box, share.spec.shape, share.spec.itemsize, base):
            for cell in cells(region):
                yield WriteItem(first_file + index, cell, position, start)
                start += cell.nbytes


def cells(region: ByteRuns) -> Iterator[ByteRuns]:
    """Cut a region into parts of at most `CELL_BYTES`: runs on the file's grid, strided ones by whole runs."""
    if region.count == 1:
        position, end = region.offset, region.offset + region.run
        while position < end:
            stop = min(end, (position // CELL_BYTES + 1) * CELL_BYTES)
            yield ByteRuns(position, stop - position)
            position = stop
        return
    step = max(CELL_BYTES // region.run, 1)
    for first in range(0, region.count, step):
        count = min(step, region.count - first)
        yield ByteRuns(region.offset + first * region.stride, region.run, count, region.stride if count > 1 else 0)


def fingerprint(texts: Iterable[str]) -> str:
    """A short digest of a sequence of texts."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def describe(specs: Iterable[TensorSpec]) -> Iterator[str]:
    """Specs as texts to fingerprint."""
    return (f"{spec.name}|{spec.dtype}|{list(spec.shape)}" for spec in specs)


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A box of a tensor as it is stored in a file: row-major from byte `offset` on."""

    box: Box
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a checkpoint: one chunk where files hold whole tensors, several where they hold shards."""

    spec: TensorSpec
    chunks: tuple[StoredChunk, ...]

    def on_grid(self, grid: tuple[int, ...]) -> StoredTensor:
        """A tensor that is stored whole, with boxes counted in a finer grid of it."""
        (chunk,) = self.chunks
        spec = TensorSpec(self.spec.name, self.spec.dtype, grid, self.spec.file_shape)
        return StoredTensor(spec, (StoredChunk(Box.whole(grid), chunk.file, chunk.offset),))


@dataclass(frozen=True, slots=True)
class Read:
    """One box to fetch.

    Attributes:
        file: The file that holds it.
        box: The box, in the coordinates of the whole tensor.
        regions: Its bytes in the file, in the box's row-major order.
    """

    file: str
    box: Box
    regions: tuple[ByteRuns, ...]


def reads(stored: StoredTensor, wanted: Box) -> list[Read]:
    """What to read for one box of a stored tensor; each of its elements exactly once.

    Raises:
        LookupError: The stored chunks do not cover the box, or cover a part twice.
    """
    spec, first = stored.spec, stored.chunks[0]
    if first.box.sizes == spec.shape:  # a file of whole tensors: by far the most frequent case
        return [Read(first.file, wanted, tuple(regions(wanted, spec.shape, spec.itemsize, first.offset)))]
    found = []
    for chunk in stored.chunks:
        common = chunk.box.intersect(wanted)
        if common is not None:
            inner = regions(common.within(chunk.box), chunk.box.sizes, stored.spec.itemsize, chunk.offset)
            found.append(Read(chunk.file, common, tuple(inner)))
    covered = sum(read.box.numel for read in found)
    if covered != wanted.numel:
        raise LookupError(f"{stored.spec.name}: the stored parts hold {covered} of the {wanted.numel} elements wanted")
    return found
