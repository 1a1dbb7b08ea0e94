"""Reading safetensors headers without trusting them."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.plan import StoredChunk, StoredTensor
from hydra_ckpt.layout.specs import ITEMSIZE, TensorSpec
from hydra_ckpt.store.small_files import open_regular, unreadable

# The limit of the safetensors reference implementation.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
LIMIT = 1 << 62  # of every size and position
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
BOXES_KEY = "hydra_ckpt.boxes"
_POINTER = b"version https://git-lfs"
READ_BYTES = 1 << 30  # Linux gives at most 2 GiB - 4 KiB at once


def open_inside(root: Path, relative: str) -> int:
    """Open a file below `root` for reading; no link on the way is followed.

    Raises:
        CorruptCheckpointError: The name leads outside, contains a link, or does not name a regular file.
    """
    parts = Path(relative).parts
    if not parts or Path(relative).is_absolute() or ".." in parts or "\0" in relative:
        raise CorruptCheckpointError(root, f"the file name {relative!r} leads out of the checkpoint")
    for depth in range(1, len(parts) + 1):
        if os.path.islink(root.joinpath(*parts[:depth])):  # noqa: PTH114 - pathlib raises where the disk fails
            raise CorruptCheckpointError(root / relative, "is, or is below, a symbolic link, which is not followed")
    path = root / relative
    try:
        return open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptCheckpointError(path, "the file is missing") from None


def read_piece(root: Path, relative: str, first: int, length: int) -> bytearray:
    """A range of a file below `root` that an index refers to.

    Raises:
        CorruptCheckpointError: See `open_inside`; or the file is shorter.
    """
    descriptor = open_inside(root, relative)
    try:
        size = os.fstat(descriptor).st_size
        if first < 0 or length < 0 or first + length > size:  # the length in the index may exceed the memory
            raise CorruptCheckpointError(
                root / relative, "ends before what its index names", expected=first + length, found=size
            )
        data, position = bytearray(length), 0
        while position < length:
            count = os.preadv(descriptor, [memoryview(data)[position : position + READ_BYTES]], first + position)
            if not count:
                raise CorruptCheckpointError(root / relative, "ends early", byte_range=(first, first + length))
            position += count
        return data
    except (OSError, MemoryError) as error:
        raise unreadable(root / relative, error) from error
    finally:
        os.close(descriptor)


def read_header(root: Path, relative: str) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors of a file, in the order of their bytes, and the header's metadata.

    Raises:
        CorruptCheckpointError: The header does not describe exactly the bytes that follow it.
    """
    path = root / relative
    descriptor = open_inside(root, relative)
    try:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if os.pread(descriptor, len(_POINTER), 0) == _POINTER:
            raise CorruptCheckpointError(path, "is a git-lfs pointer instead of the file: run `git lfs pull`")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CorruptCheckpointError(
                path,
                "the header is longer than the file",
                byte_range=(0, 8),
                expected=f"at most {size - 8}",
                found=length,
            )
        text = os.pread(descriptor, length, 8)
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(descriptor)
    return _parse(path, relative, text, 8 + length, size)


def _parse(
    path: Path, relative: str, text: bytes, data_start: int, size: int
) -> tuple[list[StoredTensor], dict[str, str]]:
    fail = _failure(path, (8, data_start))
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError, MemoryError) as error:
        raise fail(f"the header is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise fail("the header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fail("__metadata__ must map strings to strings")
    found = sorted((_entry(name, entry, fail) for name, entry in entries.items()), key=lambda item: item[1:])
    position = 0
    for spec, start, end in found:
        if start != position:
            raise fail(f"{spec.name}: its bytes start at {start}, the ones before end at {position}")
        position = end
    if position != size - data_start:
        raise CorruptCheckpointError(
            path, "the file does not have the size that its header gives", expected=data_start + position, found=size
        )
    boxes = _boxes(metadata, fail)
    return [_stored(spec, relative, data_start + start, boxes, fail) for spec, start, _ in found], metadata


def _failure(path: Path, byte_range: tuple[int, int]) -> Callable[[str], CorruptCheckpointError]:
    return lambda problem: CorruptCheckpointError(path, problem, byte_range=byte_range)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key appears twice")
    return unique


def _entry(name: str, entry: Any, fail: Callable[[str], CorruptCheckpointError]) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise fail(f"{name}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise fail(f"{name}: unknown dtype {dtype!r}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise fail(f"{name}: invalid shape {shape!r}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise fail(f"{name}: invalid data_offsets {offsets!r}")
    spec = TensorSpec(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise fail(f"{name}: shape {shape} of {dtype} takes {spec.nbytes} bytes, not {offsets[1] - offsets[0]}")
    return spec, offsets[0], offsets[1]


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < LIMIT for value in values)


def encode_boxes(boxes: dict[str, tuple[tuple[int, ...], Box]]) -> str:
    """Record in a header's metadata which box of which global shape each tensor of the file is."""
    body = {name: [list(shape), list(box.offsets)] for name, (shape, box) in boxes.items()}
    return json.dumps(body, separators=(",", ":"))


def _boxes(metadata: dict[str, str], fail: Callable[[str], CorruptCheckpointError]) -> dict[str, Any] | None:
    if BOXES_KEY not in metadata:
        return None
    try:
        body = json.loads(metadata[BOXES_KEY], object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError, MemoryError) as error:
        raise fail(f"{BOXES_KEY}: {error}") from None
    if not isinstance(body, dict):
        raise fail(f"{BOXES_KEY}: not a JSON object")
    return body


def _stored(
    spec: TensorSpec,
    file: str,
    offset: int,
    boxes: dict[str, Any] | None,
    fail: Callable[[str], CorruptCheckpointError],
) -> StoredTensor:
    if boxes is None:
        return StoredTensor(spec, (StoredChunk(Box.whole(spec.shape), file, offset),))
    entry = boxes.get(spec.name)
    if not isinstance(entry, list) or len(entry) != 2 or not all(_naturals(part) for part in entry):
        raise fail(f"{spec.name}: {BOXES_KEY} does not say which part of the tensor this is")
    shape, corner = tuple(entry[0]), tuple(entry[1])
    inside = len(shape) == len(corner) == len(spec.shape) and all(
        start + size <= whole for start, size, whole in zip(corner, spec.shape, shape, strict=True)
    )
    if not inside or prod(shape) >= LIMIT:
        raise fail(f"{spec.name}: the part at {corner} is not within shape {shape}")
    whole = TensorSpec(spec.name, spec.dtype, shape)
    return StoredTensor(whole, (StoredChunk(Box(corner, spec.shape), file, offset),))


def read_tensors(root: Path, files: list[str]) -> dict[str, StoredTensor]:
    """All tensors of a set of files by name, shards of one tensor brought together.

    Raises:
        CorruptCheckpointError: A header is damaged, or two files disagree about a tensor.
    """
    specs: dict[str, TensorSpec] = {}
    chunks: dict[str, list[StoredChunk]] = defaultdict(list)
    for file in files:
        for stored in read_header(root, file)[0]:
            name = stored.spec.name
            if specs.setdefault(name, stored.spec) != stored.spec:
                raise _unfit(root, name, chunks[name][0], stored.chunks[0])
            chunks[name] += stored.chunks
    for name, found in chunks.items():
        refuse_overlap(root, name, found)
    return {name: StoredTensor(spec, tuple(chunks[name])) for name, spec in specs.items()}


def refuse_overlap(root: Path, name: str, chunks: Sequence[StoredChunk]) -> None:
    """Check that no element is stored twice.

    Raises:
        CorruptCheckpointError: One is.
    """
    # Sweep along the dimension that most chunks begin apart in: each is compared with few others, not with all.
    if len(chunks) == 1:
        return
    dims = range(len(chunks[0].box.sizes))
    dim = max(dims, key=lambda dim: len({chunk.box.offsets[dim] for chunk in chunks}), default=None)
    beside: list[StoredChunk] = []
    for chunk in chunks if dim is None else sorted(chunks, key=lambda chunk: chunk.box.offsets[dim]):
        if dim is not None:
            start = chunk.box.offsets[dim]
            beside = [other for other in beside if other.box.offsets[dim] + other.box.sizes[dim] > start]
        for other in beside:
            if other.box.intersect(chunk.box) is not None:
                raise _unfit(root, name, other, chunk)
        beside.append(chunk)


def _unfit(root: Path, name: str, one: StoredChunk, other: StoredChunk) -> CorruptCheckpointError:
    return CorruptCheckpointError(root / other.file, f"{name} is in {one.file} too, and the two do not match")
