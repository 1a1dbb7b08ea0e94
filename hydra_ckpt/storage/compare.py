"""Two checkpoints compared, tensor by tensor, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.layout.specs import ITEMSIZE
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.file_parts import Part, open_part
from hydra_ckpt.storage.naming import decode_naming
from hydra_ckpt.storage.read import Fetch
from hydra_ckpt.storage.verification import read_small
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.parts import is_export


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs.

    Attributes:
        part: The part it belongs to.
        name: Its name.
        first: Element type and shape in the first checkpoint; None if it lacks the tensor.
        second: The same of the second.
        largest: The largest absolute difference of two elements; None if element types or shapes differ, NaN if only
            one of them is NaN.
        elements: How many elements differ.
    """

    part: str
    name: str
    first: str | None
    second: str | None
    largest: float | None = None
    elements: int | None = None


def compare(first: Checkpoint, second: Checkpoint) -> Iterator[TensorDifference]:
    """The tensors that differ, bit by bit: NaN equals itself, and 0.0 is not -0.0.

    A model saved as shards and one saved consolidated are the same if their tensors are.

    Raises:
        CorruptCheckpointError: A file is damaged.
    """
    for part in sorted({*first.manifest.parts, *second.manifest.parts}):
        sides = [_open(checkpoint, part) for checkpoint in (first, second)]
        for name in sorted({*sides[0].tensors, *sides[1].tensors}):
            found = _compare(part, name, *sides)
            if found is not None:
                yield found


def _open(checkpoint: Checkpoint, part: str) -> Part:
    if part not in checkpoint.manifest.parts:
        return Part({}, lambda _: 0, 1)
    opened = open_part(checkpoint, part)
    record = checkpoint.manifest.files.get(f"{part}/{names.NAMING}")
    whole = is_export(checkpoint.manifest.parts[part].files)
    if record is None or whole:
        return opened
    # Shards under the model's own names: whole tensors that only have another name in the export have that name here.
    path = f"{part}/{names.NAMING}"
    naming = decode_naming(checkpoint.path / path, read_small(checkpoint.path, path, record))
    called = {alias.source: alias.name for alias in naming.aliases if alias.is_whole}
    return Part(
        {called.get(name, name): item for name, item in opened.tensors.items()}, opened.read, opened.block_bytes
    )


def _compare(part: str, name: str, first: Part, second: Part) -> TensorDifference | None:
    one, other = first.tensors.get(name), second.tensors.get(name)
    if one is None or other is None:
        return TensorDifference(part, name, _kind(one), _kind(other))
    if (one.spec.dtype, one.spec.shape) != (other.spec.dtype, other.spec.shape):
        return TensorDifference(part, name, _kind(one), _kind(other))
    largest, elements = 0.0, 0
    for box in _blocks(one, min(first.block_bytes, second.block_bytes)):
        left, right = (_read(side, item, box) for side, item in ((first, one), (second, other)))
        differs = _bits(left) != _bits(right)
        count = int(differs.sum())
        if count:
            elements += count
            distance = _distance(left[differs], right[differs])
            largest = distance if math.isnan(distance) or distance > largest else largest
    return TensorDifference(part, name, _kind(one), _kind(other), largest, elements) if elements else None


def _kind(item: StoredTensor | None) -> str | None:
    return None if item is None else f"{item.spec.dtype} {list(item.spec.shape)}"


def _blocks(item: StoredTensor, nbytes: int) -> Iterator[Box]:
    shape = item.spec.shape
    if not shape:
        yield Box.whole(shape)
        return
    row = max(1, prod(shape[1:]) * ITEMSIZE[item.spec.dtype])
    rows = max(1, nbytes // row)
    for start in range(0, shape[0], rows):
        yield Box.whole(shape).rows(start, min(start + rows, shape[0]))


def _read(part: Part, item: StoredTensor, box: Box) -> torch.Tensor:
    into = torch.empty(box.sizes, dtype=TORCH_DTYPE[item.spec.dtype], device="cpu")
    part.read([Fetch(item, box, into)])
    return into


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    if not one.is_complex():
        one, other = one.double(), other.double()
    return float((one - other).abs().max())
