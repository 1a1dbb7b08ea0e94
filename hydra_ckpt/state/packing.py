"""Small state as the bytes of one file: a snapshot of a nested dict, and plain JSON data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_bytes

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.storage.decoding import decode, strides
from hydra_ckpt.storage.encoding import encode


@dataclass(frozen=True)
class Packed:
    """A snapshot of plain data, turned into bytes only when they are needed: in the background.

    Attributes:
        make: Gives the bytes.
    """

    make: Callable[[], bytes]

    @cached_property
    def data(self) -> bytes:
        """The bytes."""
        return self.make()


@dataclass(frozen=True)
class Taken:
    """A snapshot of a nested dict.

    Attributes:
        tree: The dict as JSON data.
        tensors: Copies of its tensors.
    """

    tree: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def packed(self, **more: Any) -> Packed:
        """As one safetensors file: the tensors, and the rest as JSON in the metadata.

        Args:
            **more: Further entries, without tensors.
        """
        tree = {**self.tree, **{key: encode(value, key, {}) for key, value in more.items()}}
        return Packed(lambda: safetensors_bytes(self.tensors, metadata={"tree": _json(tree).decode()}))


def take(value: dict[str, Any]) -> Taken:
    """Take a snapshot of a nested dict: its tensors are copied."""
    tensors: dict[str, torch.Tensor] = {}
    tree = encode(value, "", tensors)
    return Taken(tree, {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


def pack_json(value: Any) -> Packed:
    """JSON data as bytes, made in the background; it must not be changed any more."""
    return Packed(partial(_json, value))


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def unpack(path: Path, data: bytes) -> Any:
    """The dict that `take` was given, from the bytes that `Taken.packed` made.

    Raises:
        CorruptCheckpointError: The data was not made that way.
    """
    try:
        with torch.device("cpu"):
            tensors = safetensors_load(data)
        length = int.from_bytes(data[:8], "little")
        tree = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["tree"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"cannot be read: {error!r}") from None
    lies = strides(tree)
    return decode(tree, {name: _of_its_own(tensor, lies.get(name)) for name, tensor in tensors.items()})


def _of_its_own(tensor: torch.Tensor, lies: tuple[int, ...] | None) -> torch.Tensor:
    """A copy with these strides and memory of its own, which can be resized."""
    if lies is None:
        return tensor.clone()
    return torch.empty_strided(tensor.shape, lies, dtype=tensor.dtype, device="cpu").copy_(tensor)
