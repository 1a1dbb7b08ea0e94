"""Own state of live optimizers that a checkpoint lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra_ckpt.state.holders import Holder
from hydra_ckpt.state.optimizer_homes import section
from hydra_ckpt.state.optimizer_oracle import is_own_method, is_plain, loads_plainly, tells_only


def forgets(optimizer: Any) -> bool:
    """Whether an optimizer loses its own state when it loads a state without any: PyTorch's replaces all of it."""
    is_known = is_own_method(optimizer, "state_dict", "torch.optim.")
    return is_known and loads_plainly(optimizer) and not is_plain(optimizer)


def is_as_saved(described: Mapping[str, Any], holder: Holder, names: Mapping[int, str], place: int | None) -> bool:
    """Whether an optimizer has the class that it had when it was saved, as far as the description says.

    An object of the same class had no own state at the save: it gets some later.

    Args:
        described: The saved description.
        holder: The optimizer.
        names: Identity of a parameter to its name.
        place: The number of the saved one of the same key or position.
    """
    saved = section(described, "")["optimizers"]
    mine = {names[id(parameter)] for parameter in holder.parameters}
    classes = {one["class"] for one in saved for group in one["groups"] if mine.intersection(group["params"])}
    if not mine and place is not None and place < len(saved):
        classes.add(saved[place]["class"])
    return not classes.isdisjoint({type(holder.optimizer).__qualname__, ""})


def told_beyond(inside: Sequence[Holder]) -> list[str]:
    """What an optimizer's own state_dict() returns beyond the state and options of its parameters, by dotted name.

    Args:
        inside: It and those that it wraps.
    """
    optimizer = inside[0].optimizer
    if is_plain(optimizer):
        return []
    try:
        told = optimizer.state_dict()
    except Exception:  # noqa: BLE001 - a foreign object's; it is refused when it is saved
        return []
    return sorted(_beyond(told, inside[0].called, inside))


def _beyond(told: Any, place: str, inside: Sequence[Holder]) -> Iterator[str]:
    if not isinstance(told, Mapping):
        yield place
        return
    walked = {key: told[key] for key in ("state", "param_groups") if key in told}
    known = walked.keys() if any(tells_only(walked, holder) for holder in inside) else ()
    for key, value in told.items():
        if key in known or (isinstance(value, Mapping | list | tuple) and not value):
            continue
        if isinstance(value, Mapping) and value.keys() >= {"state", "param_groups"}:
            yield from _beyond(value, f"{place}.{key}", inside)
        else:
            yield f"{place}.{key}"
