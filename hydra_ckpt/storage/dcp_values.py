"""Values in DCP state dicts that are not tensors: JSON, and separate tensors; nothing is pickled on disk."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem, SavePlanner, WriteItem

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, CorruptCheckpointError
from hydra_ckpt.storage import decoding, encoding
from hydra_ckpt.storage.dtypes import check_name

VALUES = "objects.json"
# Mapping of the planner, by which nested keys are found again.
PLANNER_DATA = "planner_data.json"
TENSORS = "objects"
# A planner's own bytes, which no other planner is given: it might unpickle them.
_BYTES = "planner_bytes"


def encode_item(planner: SavePlanner, item: WriteItem, tensors: dict[str, torch.Tensor]) -> tuple[Any, tuple[str, ...]]:
    """The planner's data for an item that is not a tensor, encoded.

    A value is encoded. If the planner turns values into bytes in its own way, these are stored unchanged.

    Args:
        planner: Any save planner.
        item: One of its items.
        tensors: Receives the tensors in the value, by name.

    Returns:
        JSON data, and the names of its tensors.

    Raises:
        CheckpointError: It cannot be stored.
    """
    name, own = item.index.fqn, dict[str, torch.Tensor]()
    data = _own_bytes(planner, item)
    if data is None:
        encoded = encoding.encode(planner.lookup_object(item.index), name, own)  # type: ignore[attr-defined]
    else:
        own[name] = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if data
            else torch.empty(0, dtype=torch.uint8, device="cpu")
        )
        encoded = {"~": _BYTES, "v": name}
    for key, tensor in own.items():
        _check_inner(key, tensor)
        if key in tensors:
            raise CheckpointError(f"{key}: two tensors inside values would have this name; rename a key of the state")
    tensors.update(own)
    return encoded, tuple(own)


def _own_bytes(planner: SavePlanner, item: WriteItem) -> bytes | None:
    """What the planner makes of a value, if that is not what DefaultSavePlanner makes of it."""
    if isinstance(planner, DefaultSavePlanner) and not _customised(type(planner)):
        return None
    found = planner.resolve_data(item)
    if not isinstance(found, io.BytesIO):
        raise CheckpointError(f"{item.index.fqn}: the planner gave {type(found).__name__} for a value, not io.BytesIO")
    data = found.getvalue()
    if isinstance(planner, DefaultSavePlanner):
        plain = DefaultSavePlanner.transform_object(planner, item, planner.lookup_object(item.index))
        return None if plain.getvalue() == data else data
    return data


def _customised(kind: type[DefaultSavePlanner]) -> bool:
    default = DefaultSavePlanner
    return kind.resolve_data is not default.resolve_data or kind.transform_object is not default.transform_object


def _check_inner(name: str, tensor: torch.Tensor) -> None:
    check_name(name)
    if type(tensor) is not torch.Tensor or tensor.requires_grad:
        kind = type(tensor).__name__ if type(tensor) is not torch.Tensor else "tensor that requires grad"
        raise CheckpointError(
            f"{name}: a {kind} inside another value would come back as a plain tensor. Save it under a key of its own "
            "(DefaultSavePlanner(flatten_state_dict=True) flattens dicts and lists), or save it detached"
        )


def load_item(planner: LoadPlanner, item: ReadItem, path: Path, data: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a stored value to the planner.

    Args:
        planner: Any load planner.
        item: Its item.
        path: The file it comes from, for messages.
        data: What `encode_item` made of it.
        tensors: The tensors that it refers to.

    Raises:
        CheckpointConfigError: Another planner made its bytes.
        CorruptCheckpointError: The data is damaged.
    """
    name = item.storage_index.fqn
    if isinstance(data, dict) and data.get("~") == _BYTES:
        if type(planner).load_bytes is DefaultLoadPlanner.load_bytes:
            raise CheckpointConfigError(
                f"{name}: {path} has it as bytes that a save planner made, which DefaultLoadPlanner would unpickle. "
                "Load with a planner whose load_bytes() reads what the save planner wrote"
            )
        planner.load_bytes(item, io.BytesIO(tensors[data["v"]].numpy().tobytes()))
        return
    try:
        value = decoding.decode(data, tensors)
    except CorruptCheckpointError:
        raise CorruptCheckpointError(path, f"{name} cannot be decoded") from None
    # DCP's planners take pickled bytes; these are made here, of data that was decoded here.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    planner.load_bytes(item, buffer)


def tensor_names(data: Any) -> list[str]:
    """Names of the tensors that a stored value refers to."""
    if isinstance(data, dict) and data.get("~") == _BYTES:
        return [data["v"]]
    return decoding.tensor_names(data)
