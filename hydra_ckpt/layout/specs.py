"""What the layout needs of a tensor: its name, element type and global shape.

Example: `w` has 6 x 4 fp32 numbers, so 96 bytes, however it is sharded:

    >>> w = TensorSpec("w", "F32", (6, 4))
    >>> w.itemsize, w.nbytes
    (4, 96)

As a grid of 3 pairs of rows, it has three dimensions in the arithmetic (see `grids`), and two in the file:

    >>> TensorSpec("w", "F32", (3, 2, 4), flat=(6, 4)).file_shape
    (6, 4)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

# Element types as the safetensors format spells them, with their size in bytes.
ITEMSIZE: dict[str, int] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A whole tensor.

    Attributes:
        name: Its key in the file.
        dtype: Element type in safetensors' spelling, a key of `ITEMSIZE`.
        shape: Global shape; `()` for a scalar.
        flat: The shape that a file gives it, if `shape` is a finer grid of the same elements (see `grids`).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    flat: tuple[int, ...] | None = None

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape that a file gives it."""
        return self.shape if self.flat is None else self.flat

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.itemsize
