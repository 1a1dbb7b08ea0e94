"""Tensors as bytes: row-major views without copies."""

from __future__ import annotations

import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any element type, as writable bytes."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() == 0:
        return memoryview(bytearray())
    # A bool tensor is one byte an element already, and view() would refuse it under some element types.
    return memoryview(flat.view(torch.uint8).numpy().data)


def is_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether `bytes_of` can look at this tensor where it lies."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()
