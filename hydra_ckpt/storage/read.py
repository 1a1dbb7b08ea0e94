"""Reading boxes of stored tensors into memory, each rank only the bytes it needs."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.boxes import Box, ByteRuns
from hydra_ckpt.layout.plan import Read, StoredTensor, reads
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.header import open_inside
from hydra_ckpt.storage.ledger import Ledger
from hydra_ckpt.storage.memory import bytes_of, is_plain_memory
from hydra_ckpt.store.small_files import unreadable


@dataclass(frozen=True)
class Fetch:
    """One box of a stored tensor and the tensor of the box's shape that receives it, on any device."""

    stored: StoredTensor
    box: Box
    into: torch.Tensor


class OpenFiles:
    """Files of one checkpoint kept open while it is read; a context manager."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    def size(self, file: str) -> int:
        """The file's size in bytes."""
        return self._opened(file)[1]

    def _opened(self, file: str) -> tuple[int, int]:
        if file not in self._open:
            descriptor = open_inside(self.root, file)
            self._open[file] = descriptor, os.fstat(descriptor).st_size
        return self._open[file]

    def read_into(self, file: str, region: ByteRuns, target: memoryview) -> None:
        """Fill `target` with the region's bytes.

        Raises:
            CorruptCheckpointError: The file ends before the region does, or the disk fails.
        """
        descriptor, size = self._opened(file)
        if region.end > size:
            raise CorruptCheckpointError(
                self.root / file, "the file is too short", byte_range=(region.offset, region.end)
            )
        try:
            self._read(file, descriptor, region, target)
        except OSError as error:
            raise unreadable(self.root / file, error) from error

    def _read(self, file: str, descriptor: int, region: ByteRuns, target: memoryview) -> None:
        if region.count > 1:
            _gather(descriptor, region, target)
            return
        position = os.preadv(descriptor, [target], region.offset)
        while position < region.run:
            count = os.preadv(descriptor, [target[position:]], region.offset + position)
            if not count:
                raise CorruptCheckpointError(
                    self.root / file, "the file ends early", byte_range=(region.offset + position, region.end)
                )
            position += count


def _gather(descriptor: int, region: ByteRuns, target: memoryview) -> None:
    page = region.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(descriptor, region.end - page, offset=page, access=mmap.ACCESS_READ) as window:
        shape, strides = (region.count, region.run), (region.stride, 1)
        source = np.ndarray(shape, np.uint8, buffer=window, offset=region.offset - page, strides=strides)
        np.frombuffer(target, np.uint8).reshape(shape)[...] = source
        del source  # a map cannot close while an array looks into it


@torch.no_grad()
def fetch(root: Path, wanted: Iterable[Fetch], ledger: Ledger | None = None) -> int:
    """Fetch every box.

    Args:
        root: The checkpoint.
        wanted: The boxes and where they go.
        ledger: Digests to compare on the way; those of which all bytes are read are compared before the bytes are
            used, the others are left.

    Returns:
        Bytes read.

    Raises:
        CorruptCheckpointError: A file is missing, too short, does not hold the whole box, or its bytes are not those
            that were written. Boxes fetched before that are not undone.
    """
    total = 0
    with OpenFiles(root) as files:
        for item in wanted:
            if item.box.numel == 0:
                continue
            try:
                parts = reads(item.stored, item.box)
            except LookupError as error:
                raise CorruptCheckpointError(root / item.stored.chunks[0].file, str(error)) from None
            for part in parts:
                total += _fetch_part(files, part, item, ledger)
    return total


def _fetch_part(files: OpenFiles, part: Read, item: Fetch, ledger: Ledger | None) -> int:
    target = item.into
    if part.box is not item.box:
        inner = part.box.within(item.box)
        for dim, (start, size) in enumerate(zip(inner.offsets, inner.sizes, strict=True)):
            target = target.narrow(dim, start, size)
    dtype = TORCH_DTYPE[item.stored.spec.dtype]
    direct = is_plain_memory(target) and target.dtype == dtype
    landing = target if direct else torch.empty(part.box.sizes, dtype=dtype, device="cpu")
    view, position = bytes_of(landing), 0
    for region in part.regions:
        for piece, digest in ((region, None),) if ledger is None else ledger.pieces(part.file, region):
            end = position + piece.nbytes
            data = view[position:end]
            files.read_into(part.file, piece, data)
            if ledger is not None and digest is not None:
                ledger.compare(files.root, digest, data)
            position = end
    if not direct:
        target.copy_(landing)
    return position
