"""What a shared document holds besides tensors, by a dotted label: ranks may have different values of it.

`optimizer.param_groups.<optimizer>.<group>` is a group's description, `optimizer.state.<parameter>` the state of a
parameter that has more than tensors, and `optimizer.empty` the parameters whose state is empty. Of optimizers inside
others, `optimizer.inner.<attributes>` is the groups and `optimizer.inner_state.<attributes>::<parameter>` a state.
`optimizer.own.<optimizer>` is an optimizer's own `state_dict()`. Schedulers, extra state, extras, entries of modules
and the keys of optimizers and schedulers have separate labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_SCHEDULERS, _GROUPS, _EMPTY = "lr_scheduler.", "optimizer.param_groups.", "optimizer.empty"
_STATE, _INNER_STATE = "optimizer.state.", "optimizer.inner_state."
_INNER, _OWN = "optimizer.inner.", "optimizer.own."
_OF = "::"  # between an inner optimizer's attributes and a parameter
_KINDS = ("extra_state", "extras", "entries", "keys")

ABSENT = object()
"""What takes the place of data under a label that a rank did not have."""


def plain_of(shared: Mapping[str, Any]) -> dict[str, Any]:
    """The plain data of a shared document, by label."""
    found = _of_optimizers(shared["optimizer"]) if "optimizer" in shared else {}
    found.update({f"{_SCHEDULERS}{number}": tree for number, tree in enumerate(shared["lr_scheduler"])})
    for kind in _KINDS:
        found.update({f"{kind}.{name}": tree for name, tree in shared.get(kind, {}).items()})
    return found


def is_state(label: str) -> bool:
    """Whether a label is that of a parameter's state, which a rank has only where it is more than tensors."""
    return label.startswith((_STATE, _INNER_STATE))


def state_at(shared: Mapping[str, Any], label: str) -> Any:
    """A parameter's state in a shared document, whatever it holds; ABSENT where there is none."""
    states, name = _states(shared["optimizer"], label)
    return states.get(name, ABSENT)


def put_plain(shared: dict[str, Any], label: str, tree: Any) -> None:
    """Put what `plain_of` or `state_at` gave under a label back into a shared document, in place."""
    kind, _, name = label.partition(".")
    if kind == "optimizer":
        _put_into_optimizers(shared["optimizer"], label, tree)
    elif label.startswith(_SCHEDULERS):
        shared["lr_scheduler"][int(name)] = tree
    else:
        shared[kind][name] = tree


def _of_optimizers(described: Mapping[str, Any]) -> dict[str, Any]:
    inner = described.get("inner", {})
    found: dict[str, Any] = {
        f"{_GROUPS}{number}.{index}": group
        for number, optimizer in enumerate(described["optimizers"])
        for index, group in enumerate(optimizer["groups"])
    }
    found.update({f"{_STATE}{name}": state for name, state in _with_more_than_tensors(described["state"])})
    found[_EMPTY] = [described.get("empty", []), {path: one.get("empty", []) for path, one in inner.items()}]
    for path, one in inner.items():
        found[f"{_INNER}{path}"] = one["optimizers"]
        states = _with_more_than_tensors(one["state"])
        found.update({f"{_INNER_STATE}{path}{_OF}{name}": state for name, state in states})
    found.update({f"{_OWN}{number}": tree for number, tree in described.get("own", {}).items()})
    return found


def _with_more_than_tensors(states: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The states that the names of their tensors do not describe: with plain data, strides or attributes."""
    yield from ((name, state) for name, state in states.items() if not all(map(_is_name, state.values())))


def _is_name(value: Any) -> bool:
    return type(value) is dict and value.keys() == {"~", "v"} and value["~"] == "tensor"


def _states(described: Mapping[str, Any], label: str) -> tuple[dict[str, Any], str]:
    """The states that a label's is among, and its name there."""
    if label.startswith(_STATE):
        return described["state"], label.removeprefix(_STATE)
    path, _, name = label.removeprefix(_INNER_STATE).rpartition(_OF)
    return described["inner"][path]["state"], name


def _put_into_optimizers(described: dict[str, Any], label: str, value: Any) -> None:
    if is_state(label):
        states, name = _states(described, label)
        states.pop(name, None)
        if value is not ABSENT:
            states[name] = value
    elif label == _EMPTY:
        described["empty"], inner = value
        for path, empty in inner.items():
            described["inner"][path]["empty"] = empty
    elif label.startswith(_GROUPS):
        number, index = map(int, label.removeprefix(_GROUPS).split("."))
        described["optimizers"][number]["groups"][index] = value
    elif label.startswith(_INNER):
        described["inner"][label.removeprefix(_INNER)]["optimizers"] = value
    else:
        described["own"][label.removeprefix(_OWN)] = value
