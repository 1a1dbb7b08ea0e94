"""Checking bytes against the digests taken when they were written."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.boxes import ByteRuns
from hydra_ckpt.storage.digests import Check, decode, hex_digest
from hydra_ckpt.storage.read import OpenFiles
from hydra_ckpt.store.manifest import FileRecord

log = logging.getLogger(__name__)


def read_small(root: Path, file: str, record: FileRecord) -> bytes:
    """Read and check a whole file whose digest is in the manifest.

    Raises:
        CorruptCheckpointError: It is missing or its bytes differ.
    """
    with OpenFiles(root) as files:
        # The size first: a manifest may promise more than there is memory.
        size = files.size(file)
        if size != record.bytes:
            raise CorruptCheckpointError(root / file, "the file has another size", expected=record.bytes, found=size)
        try:
            data = bytearray(size)
        except MemoryError:
            raise CorruptCheckpointError(root / file, f"has {size} bytes, more than there is memory for") from None
        if size:
            files.read_into(file, ByteRuns(0, size), memoryview(data))
    found = hex_digest(bytes(data))
    if found != record.xxh3:
        raise CorruptCheckpointError(root / file, "its digest does not match", expected=record.xxh3, found=found)
    return bytes(data)


def checks(root: Path, files: Mapping[str, FileRecord], digests: Sequence[str]) -> list[Check]:
    """Everything that can be checked in a checkpoint: the records of all sidecars, then small files whole.

    Raises:
        CorruptCheckpointError: A sidecar is damaged, or a file has bytes that no digest covers.
    """
    sizes = {name: record.bytes for name, record in files.items()}
    covered: dict[str, int] = dict.fromkeys(files, 0)
    found = []
    for sidecar in digests:
        named, records = decode(root / sidecar, read_small(root, sidecar, files[sidecar]), sizes)
        for record in records:
            found.append(Check(named[record.file], record.region, record.digest))
            covered[named[record.file]] += record.region.nbytes
    for name, file in files.items():
        if file.xxh3 is not None:
            found.append(Check(name, ByteRuns(0, file.bytes), int(file.xxh3, 16)))
        elif covered[name] != file.bytes:
            raise CorruptCheckpointError(
                root / name, "its digests do not cover all of it", expected=file.bytes, found=covered[name]
            )
    return found


def share_out(everything: Sequence[Check], rank: int, world_size: int) -> list[Check]:
    """One rank's part of the checks, equal in bytes."""
    total = sum(check.region.nbytes for check in everything)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    mine, position = [], 0
    for check in everything:
        if first <= position < last or (total == 0 and rank == 0):
            mine.append(check)
        position += check.region.nbytes
    return mine


def findings(root: Path, wanted: Sequence[Check]) -> Iterator[CorruptCheckpointError]:
    """Read and compare; one error for every mismatch."""
    buffer = bytearray(max((check.region.nbytes for check in wanted), default=0))
    with OpenFiles(root) as files:
        for check in wanted:
            if not check.region.nbytes:
                continue
            view = memoryview(buffer)[: check.region.nbytes]
            try:
                files.read_into(check.file, check.region, view)
                check.compare(root, view)
            except CorruptCheckpointError as error:
                yield error
