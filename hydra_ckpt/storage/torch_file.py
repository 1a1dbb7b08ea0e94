"""A single tensor in the form of `torch.save`, read without unpickling and without more memory than its bytes take.

The form is a zip archive whose entries are not compressed: `data.pkl`, which describes the tensor, and `data/0`, its
memory. What `torch.load` makes of such a file can be far larger than the file: entries may be compressed, and a pickle
may ask for any amount of memory. Source: `torch/serialization.py`, `torch/_utils.py`.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from hydra_ckpt.storage.header import LIMIT, MAX_DIMENSIONS
from hydra_ckpt.storage.pickle_machine import PERSISTENT, Noted, run

__all__ = ["read_tensor"]

_MAX_ENTRIES = 16
_MAX_PICKLE_BYTES = 1 << 20
_LOCAL_HEADER = 30  # bytes before the name
_BUILDERS = {"_rebuild_tensor_v2": 6, "_rebuild_tensor_v3": 7}  # with the fewest arguments that each takes
_TYPED = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


def read_tensor(data: bytearray) -> torch.Tensor:
    """The tensor in a file; it shares the memory of `data`.

    Raises:
        Exception: Of any kind, if this is not a file of one tensor.
    """
    entries = _entries(data)
    if entries.get("byteorder", b"little") != b"little":
        raise ValueError("it was written on a machine with the other byte order")
    if len(entries["data.pkl"]) > _MAX_PICKLE_BYTES:
        raise ValueError("its pickle is larger than a tensor needs")
    return _built(run(bytes(entries["data.pkl"])), entries)


def _entries(data: bytearray) -> dict[str, memoryview]:
    """The bytes of an archive's entries, by name without the directory that contains them all."""
    view = memoryview(data)
    with zipfile.ZipFile(io.BufferedReader(_Reader(view))) as archive:
        infos = archive.infolist()
    if len(infos) > _MAX_ENTRIES:
        raise ValueError(f"it has {len(infos)} entries, a tensor has a few")
    found: dict[str, memoryview] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"its entry {info.filename!r} is compressed")
        header = view[info.header_offset : info.header_offset + _LOCAL_HEADER]
        if len(header) < _LOCAL_HEADER or bytes(header[:4]) != b"PK\3\4":
            raise ValueError(f"its entry {info.filename!r} is not where it should be")
        extras = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))  # the name and what follows it
        begin = info.header_offset + _LOCAL_HEADER + extras
        content = view[begin : begin + info.file_size]
        name = info.filename.partition("/")[2]
        if len(content) != info.file_size or name in found:
            raise ValueError(f"its entry {info.filename!r} is cut off, or there twice")
        found[name] = content
    return found


class _Reader(io.RawIOBase):
    """Memory as a file, without a copy of it."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._position = view, 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read anywhere."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        if position < 0:
            raise OSError("before the beginning")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Read what fits."""
        piece = self._view[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


def _built(described: Any, entries: Mapping[str, memoryview]) -> torch.Tensor:
    if not isinstance(described, Noted) or described.what not in _BUILDERS or described.state is not None:
        raise ValueError("it holds something other than a plain tensor")
    arguments = described.arguments or ()
    if len(arguments) < _BUILDERS[described.what]:
        raise ValueError("its description is incomplete")
    storage, offset, sizes, strides = arguments[:4]
    kind, key = _storage(storage)
    dtype = _TYPED.get(kind)
    if described.what == "_rebuild_tensor_v3":
        dtype = getattr(torch, arguments[6].what, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"its elements are of an unknown type ({kind[:80]})")
    sizes, strides, (offset,) = _naturals(sizes), _naturals(strides), _naturals((offset,))
    memory = entries[f"data/{key}"]
    # frombuffer refuses an empty buffer
    flat = torch.frombuffer(memory, dtype=dtype) if memory else torch.empty(0, dtype=dtype, device="cpu")
    return flat.as_strided(sizes, strides, offset)  # torch itself refuses what lies outside the memory


def _storage(noted: Any) -> tuple[str, str]:
    """The class of a storage, and its name in the archive."""
    if not isinstance(noted, Noted) or noted.what != PERSISTENT or not noted.arguments:
        raise TypeError("its memory is not described")
    word, kind, key, *_ = noted.arguments[0]
    if word != "storage" or not isinstance(kind, Noted) or not isinstance(key, str):
        raise ValueError("its memory is described in another way")
    return kind.what, key


def _naturals(values: Any) -> tuple[int, ...]:
    found = tuple(values)
    if not all(type(value) is int and 0 <= value < LIMIT for value in found) or len(found) > MAX_DIMENSIONS:
        raise ValueError("a size or position is not a valid number")
    return found
