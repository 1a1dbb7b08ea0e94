"""Weights in PyTorch's pickled form (`.bin`), read only where the user allowed it; nothing but tensors is unpickled."""

from __future__ import annotations

from pathlib import Path

import torch

from hydra_ckpt.errors import CorruptCheckpointError


def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, mapped into memory rather than read.

    Raises:
        CorruptCheckpointError: It is no state dict of tensors.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 - torch.load raises whatever the file leads to
        raise CorruptCheckpointError(path, f"cannot be read as tensors alone: {error}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CorruptCheckpointError(path, "is no state dict of tensors")
    return {str(name): tensor for name, tensor in loaded.items()}
