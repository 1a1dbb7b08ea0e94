"""The file that maps a model's tensors to their names in an export, if these differ."""

from __future__ import annotations

import json
from pathlib import Path

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.aliases import TensorMapping


def encode_naming(naming: TensorMapping) -> bytes:
    """The file's content: JSON, each row an alias; see docs/format.md."""
    return (json.dumps(naming.to_data(), separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def decode_naming(path: Path, data: bytes) -> TensorMapping:
    """What `encode_naming` was given.

    Raises:
        CorruptCheckpointError: It was not made by `encode_naming`.
    """
    try:
        return TensorMapping.from_data(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"does not say how an export names tensors: {error}") from None
