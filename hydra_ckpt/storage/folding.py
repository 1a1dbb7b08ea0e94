"""Digests of live tensors on their devices: equal bytes have equal digests on ranks with the same kind of device.

Bytes in host memory are digested by xxh3. On an accelerator the digest is a polynomial that the device evaluates, so
that only 8 bytes per tensor are fetched; it cannot be compared with a digest of host memory. Untested on GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch._utils import _flatten_dense_tensors

from hydra_ckpt.storage.digests import digest_of
from hydra_ckpt.storage.memory import bytes_of, is_plain_memory

# Below this the calls cost more than the bytes: such tensors are digested together.
SMALL_BYTES = 64 << 10
_FACTOR = 6364136223846793005  # odd: a change of any one element changes the result
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a tensor, counted row by row.

    Attributes:
        tensor: The tensor; this rank's part of it.
        start: The first byte.
        stop: The byte after the last one.
    """

    tensor: torch.Tensor
    start: int
    stop: int


def whole(tensor: torch.Tensor) -> Stretch:
    """All bytes of a tensor."""
    return Stretch(tensor, 0, tensor.nbytes)


def digest(small: Iterable[torch.Tensor], stretches: Iterable[Stretch]) -> int:
    """One digest of tensors and of stretches of others; it depends on their order, not on their place in memory.

    Args:
        small: Tensors without gradients, of fewer than `SMALL_BYTES` each: they are copied together first.
        stretches: Of larger ones.
    """
    packs: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
    for tensor in small:
        packs[tensor.dtype, tensor.device].append(tensor)
    found: list[torch.Tensor | int] = [_digest(stretch) for stretch in stretches]
    found += [_digest(whole(_joined(tensors))) for tensors in packs.values()]
    return digest_of(b"".join(number.to_bytes(8, "little", signed=True) for number in _fetched(found)))


def digest_each(tensors: Sequence[torch.Tensor]) -> list[int]:
    """A digest of each tensor."""
    return [number % (1 << 64) for number in _fetched([_digest(whole(tensor)) for tensor in tensors])]


def is_constant(tensor: torch.Tensor) -> bool:
    """Whether all elements are equal, as before training those of norms and biases are."""
    if not tensor.numel():
        return True
    # As bytes: not every element type can be compared.
    rows = tensor.detach().contiguous().reshape(-1).view(torch.uint8).view(tensor.numel(), -1)
    return bool((rows == rows[0]).all())


def _fetched(found: Sequence[torch.Tensor | int]) -> list[int]:
    """Digests as signed numbers; those on a device are fetched in one go."""
    numbers = [item if isinstance(item, int) else 0 for item in found]
    devices: dict[torch.device, list[int]] = defaultdict(list)
    for place, item in enumerate(found):
        if isinstance(item, torch.Tensor):
            devices[item.device].append(place)
    for places in devices.values():
        values = torch.stack([item for place in places if isinstance(item := found[place], torch.Tensor)]).tolist()
        for place, value in zip(places, values, strict=True):
            numbers[place] = value
    return [number - (1 << 64) if number >= 1 << 63 else number for number in numbers]


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    flat: torch.Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat


def _digest(stretch: Stretch) -> torch.Tensor | int:
    tensor = stretch.tensor.detach().resolve_conj().resolve_neg()
    if is_plain_memory(tensor):
        return digest_of(bytes_of(tensor)[stretch.start : stretch.stop])
    if stretch.stop - stretch.start < tensor.nbytes:
        size = tensor.element_size()
        tensor = tensor.contiguous().reshape(-1)[stretch.start // size : -(-stretch.stop // size)]
    if tensor.device.type == "cpu":
        return digest_of(bytes_of(tensor.contiguous()))
    return fold(tensor)


def fold(tensor: torch.Tensor) -> torch.Tensor:
    """A polynomial of a tensor's bytes, modulo 2**64, computed on the tensor's device.

    Args:
        tensor: Any element type, shape and device.

    Returns:
        Shape (), int64, on the tensor's device.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    padded = torch.nn.functional.pad(data, (0, -data.numel() % 8))
    words = (padded if padded.storage_offset() % 8 == 0 else padded.clone()).view(torch.int64)
    powers = torch.full((min(words.numel(), _BLOCK),), _FACTOR, dtype=torch.int64, device=data.device).cumprod(0)
    total = torch.full((), data.numel(), dtype=torch.int64, device=data.device)
    for block in torch.split(words, _BLOCK):
        total = total * _FACTOR + (block * powers[: block.numel()]).sum()
    return total
