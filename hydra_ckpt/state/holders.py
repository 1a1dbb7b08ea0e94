"""Who holds optimizer state: the optimizers of an AppState, and those that they wrap.

Lookahead, SAM and similar optimizers keep another optimizer in an attribute and let it do the work. Its state belongs
to parameters as any optimizer's does, so it is walked in the same way and reshards with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

_DEEPEST = 4


@dataclass(frozen=True)
class Holder:
    """An optimizer that holds state by parameter.

    Attributes:
        number: Which optimizer of the AppState it is, or is wrapped by.
        called: What messages call that one: `optimizer`, `optimizer.0`, `optimizer.generator`.
        path: Attributes that lead from there to it, with dots; empty for the AppState's own optimizer.
        optimizer: The object.
        groups: Its parameter groups; empty if an outer holder has the same list.
        state: Its state by parameter; empty if an outer holder has the same object.
        parameters: The parameters of all its groups, also of groups that an inner optimizer has.
        outer: Number and path of the outer holder that has the same state; None if its state is its own.
    """

    number: int
    called: str
    path: str
    optimizer: Any
    groups: Sequence[dict[str, Any]]
    state: Mapping[Any, Any]
    parameters: Sequence[torch.Tensor]
    outer: tuple[int, str] | None = None


def holders(optimizers: Mapping[str, Any], known: Mapping[int, str]) -> list[Holder]:
    """The optimizers and those inside them, each outer one before its inner ones.

    Args:
        optimizers: Name of each, to the object.
        known: Identity of a parameter to its name. An inner optimizer over other tensors (fp32 copies of the model's
            parameters) is left to the state_dict() of the one that wraps it.
    """
    found: list[Holder] = []
    for number, (called, optimizer) in enumerate(optimizers.items()):
        seen: set[int] = set()
        homes: dict[int, tuple[int, str]] = {}  # whose state it is
        for path, item in _within(optimizer, "", set()):
            parameters = [member for group in getattr(item, "param_groups", ()) for member in group["params"]]
            if path and not all(id(parameter) in known for parameter in parameters):
                continue
            groups, state = _unseen(item, "param_groups", seen), getattr(item, "state", None)
            home = homes.setdefault(id(state), (number, path))
            if home == (number, path) and state is not None:
                # A fresh state is filled later, so the object itself is kept, empty as it is.
                found.append(Holder(number, called, path, item, groups or [], state, parameters))
            else:
                outer = home if home != (number, path) else None
                found.append(Holder(number, called, path, item, groups or [], {}, parameters, outer))
    return found


def _unseen(item: Any, attribute: str, seen: set[int]) -> Any:
    value = getattr(item, attribute, None)
    if value is None or id(value) in seen:
        return None
    seen.add(id(value))
    return value


def _within(item: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(item) in seen or path.count(".") >= _DEEPEST:
        return
    seen.add(id(item))
    yield path, item
    prefix = f"{path}." if path else ""
    for name, value in getattr(item, "__dict__", {}).items():
        for place, inner in _members(name, value):
            if isinstance(inner, Optimizer):
                yield from _within(inner, prefix + place, seen)


def _members(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An attribute's value, or the items of the list or dict that it is."""
    if isinstance(value, list | tuple):
        yield from ((f"{name}.{index}", item) for index, item in enumerate(value))
    elif type(value) is dict:
        yield from ((f"{name}.{key}", item) for key, item in value.items())
    else:
        yield name, value
