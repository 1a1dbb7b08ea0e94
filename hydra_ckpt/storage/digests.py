"""Digests of what was written: one record per piece, in a binary sidecar.

A sidecar starts with a line of JSON, the names of the files that its records cover; the records follow. A record is 40
bytes, little endian: file index (u32), number of runs (u32), offset, run and stride in bytes (u64 each), and the xxh3
64-bit digest of the runs' bytes joined (u64). The manifest holds the digest of the sidecar itself. Each rank's records
form one file, so no rank has to know how many the others wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.boxes import ByteRuns

_RECORD = np.dtype(
    [("file", "<u4"), ("count", "<u4"), ("offset", "<u8"), ("run", "<u8"), ("stride", "<u8"), ("digest", "<u8")]
)


@dataclass(frozen=True, slots=True)
class Digested:
    """A region of a file and the digest its bytes must have."""

    file: int
    region: ByteRuns
    digest: int


@dataclass(frozen=True, slots=True)
class Check:
    """Bytes of a checkpoint and the digest they must have.

    Attributes:
        file: Relative to the checkpoint.
        region: Which bytes.
        digest: Their xxh3 64-bit digest.
    """

    file: str
    region: ByteRuns
    digest: int

    def compare(self, root: Path, data: memoryview) -> None:
        """Raise unless these bytes, read from the checkpoint at `root`, have the digest.

        Raises:
            CorruptCheckpointError: They are not what was written.
        """
        found = digest_of(data)
        if found != self.digest:
            raise CorruptCheckpointError(
                root / self.file,
                "the bytes are not those that were written",
                byte_range=(self.region.offset, self.region.end),
                expected=f"xxh3 {self.digest:016x}",
                found=f"{found:016x}",
            )


def digest_of(data: bytes | memoryview) -> int:
    """The xxh3 64-bit digest."""
    return xxhash.xxh3_64_intdigest(data)


def hex_digest(data: bytes | memoryview) -> str:
    """The xxh3 64-bit digest as the manifest spells it."""
    return xxhash.xxh3_64_hexdigest(data)


def encode(files: Sequence[str], records: Iterable[Digested]) -> bytes:
    """A sidecar for these files."""
    rows = [
        (item.file, item.region.count, item.region.offset, item.region.run, item.region.stride, item.digest)
        for item in records
    ]
    return json.dumps(list(files)).encode() + b"\n" + np.array(rows, dtype=_RECORD).tobytes()


def decode(path: Path, data: bytes, sizes: Mapping[str, int]) -> tuple[list[str], list[Digested]]:
    """Files and records of a sidecar, checked against the sizes of the checkpoint's files.

    Raises:
        CorruptCheckpointError: The sidecar is incomplete, or a record is outside its file.
    """
    line, _, body = data.partition(b"\n")
    try:
        files = json.loads(line)
        limits = [sizes[file] for file in files]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"its list of files cannot be read: {error!r}") from None
    if len(body) % _RECORD.itemsize:
        raise CorruptCheckpointError(
            path, f"its records are not a multiple of {_RECORD.itemsize} bytes", found=len(body)
        )
    records = []
    for file, count, offset, run, stride, digest in np.frombuffer(body, _RECORD).tolist():
        region = ByteRuns(offset, run, count, stride)
        if file >= len(limits) or not count or not run or region.end > limits[file] or (count > 1 and stride < run):
            raise CorruptCheckpointError(path, f"a digest covers bytes that do not exist: file {file}, {region}")
        records.append(Digested(file, region, digest))
    return files, records
