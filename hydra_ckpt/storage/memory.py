"""Tensors as bytes: row-major views without copies."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.distributed.tensor import DTensor

from hydra_ckpt.layout.aliases import SliceMapping
from hydra_ckpt.layout.boxes import Box

_CGROUP = Path("/sys/fs/cgroup")
_HUGE_PAGE = 2 << 20  # bytes, of most processors


def available_bytes(cgroup: Path = _CGROUP) -> int:
    """Available host memory in bytes: of the machine, and of this process's control group if it has a limit."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        cached = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines()).get("file", "0")
        return free if limit == "max" else min(free, int(limit) - used + int(cached))
    except (OSError, ValueError):
        return free  # no control group of version 2


def resident(nbytes: int) -> torch.Tensor:
    """Host memory as uint8 of shape (nbytes,), with resident pages.

    It uses huge pages if the system offers them on request: a processor caches few page addresses, and copies of
    gigabytes touch many pages.
    """
    return _mapped(nbytes)[:nbytes].fill_(0)


def fresh_like(
    tensor: torch.Tensor, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """Like `torch.empty_like`, for a tensor that is about to be filled and kept.

    On the CPU, a large tensor is placed in huge pages if the system offers them on request: it takes its memory from
    the system with its first use, in small pages at some 0.5 GB/s.

    Args:
        tensor: Any tensor, on the meta device too.
        dtype: Element type; None for the tensor's.
        device: Where; None for the tensor's device.
    """
    dtype, device = dtype or tensor.dtype, torch.device(device or tensor.device)
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    nbytes = local.numel() * dtype.itemsize
    if device.type != "cpu" or nbytes < _HUGE_PAGE or not local.is_contiguous():
        return torch.empty_like(tensor, dtype=dtype, device=device)
    memory = torch.empty(local.shape, dtype=dtype, device=device)
    _offer_huge_pages(memory.data_ptr(), nbytes)
    if not isinstance(tensor, DTensor):
        return memory
    return DTensor.from_local(
        memory, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def strided_like(tensor: DTensor, strides: tuple[int, ...]) -> DTensor:
    """An empty DTensor like this one whose dimensions are ordered in memory by these global strides.

    Example: a (4, 6) tensor with strides (1, 4) is column-major; if two ranks share its rows, each gets a (2, 6) part
        with strides (1, 2).
    """
    local = tensor.to_local()
    order = sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    part = torch.empty([local.shape[dim] for dim in order], dtype=local.dtype, device=local.device).permute(inverse)
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=strides
    )


def _offer_huge_pages(address: int, nbytes: int) -> None:
    """Request huge pages for those in this memory, before its first use."""
    start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    whole = (address + nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
    if sys.platform == "linux" and whole > 0:  # a kernel without them returns an error
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(whole), mmap.MADV_HUGEPAGE)


def _mapped(nbytes: int) -> torch.Tensor:
    """A separate allocation, as uint8, which returns to the system when the last tensor in it is gone."""
    # Request whole pages, so that the system aligns them for huge pages; the last part stays in small pages, and only
    # as many as are used.
    memory = mmap.mmap(-1, max(-(-nbytes // _HUGE_PAGE), 1) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = nbytes // _HUGE_PAGE * _HUGE_PAGE
    if sys.platform == "linux" and whole:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, 0, whole)
    return torch.frombuffer(memory, dtype=torch.uint8)


# Longer than any memory: a type for each length would be made and dropped again and again.
_Memory = ctypes.c_char * (1 << 62)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any element type, as writable bytes.

    It keeps the tensor. Its owner must not free or resize the memory meanwhile; `Tensor.numpy()` would make that
    impossible, but for good.
    """
    tensor = tensor.detach().contiguous()
    if tensor.numel() == 0:
        return memoryview(bytearray())
    memory: Any = _Memory.from_address(tensor.data_ptr())
    memory.tensor = tensor
    return memoryview(memory).cast("B")[: tensor.nbytes]


def words_of(tensor: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The same as words of 8 bytes, as far as they are whole."""
    return np.frombuffer(bytes_of(tensor), np.int64, tensor.nbytes // 8)


def is_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether `bytes_of` can view this tensor without a copy."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()


def view_as(alias: SliceMapping, tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """A box of a source's tensor, viewed as the part of the other tensor; shares memory."""
    tensor = narrow(tensor, box)
    kept = [dim for dim in alias.dims if dim is not None]
    dropped = [dim for dim in range(tensor.dim()) if dim not in kept]
    tensor = tensor.permute((*kept, *dropped))
    for _ in dropped:
        tensor = tensor.select(-1, 0)
    for position, dim in enumerate(alias.dims):
        if dim is None:
            tensor = tensor.unsqueeze(position)
    return tensor


def narrow(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The box of a tensor; shares memory."""
    for dim, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor
