"""Options of optimizers that cannot be stored, and that their own `state_dict()` leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.state.optimizer_oracle import is_plain
from hydra_ckpt.storage.encoding import Sink, encode

_SURE = {bool, float, int, str, type(None), torch.Tensor}


def untold_options(optimizer: Any, options: Mapping[str, Any], sink: Sink) -> list[str]:
    """The names of options that cannot be stored and are not in what the optimizer's own state_dict() returns.

    They stay as they are built. Example: `__class__`, a type, in the groups of an optimizer whose state_dict() drops
    the keys that begin with `_`.

    Args:
        optimizer: The optimizer.
        options: The options of one of its groups.
        sink: Takes what is encoded of the optimizer; nothing is added to it.
    """
    if is_plain(optimizer):
        return []  # its state_dict() returns them all
    found = [key for key, value in options.items() if not _can_be_stored(value, sink)]
    if not found:
        return []
    try:
        told = optimizer.state_dict()
    except Exception:  # noqa: BLE001 - a foreign object's; it is refused when its own state is taken
        return []
    return [key for key in found if all(_can_be_stored(value, sink) for value in _told_as(key, told))]


def _can_be_stored(value: Any, sink: Sink) -> bool:
    if type(value) in _SURE:
        return True
    try:
        encode(value, "", Sink(sink.inside, sink.called, sink.known))
    except CheckpointError:
        return False
    return True


def _told_as(key: str, told: Any) -> Iterator[Any]:
    """What a state dict has under a name, at any depth."""
    if isinstance(told, dict):
        if key in told:
            yield told[key]
        for value in told.values():
            yield from _told_as(key, value)
    elif isinstance(told, list | tuple):
        for value in told:
            yield from _told_as(key, value)
