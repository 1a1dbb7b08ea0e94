"""What a shared document holds besides tensors, by a dotted label: ranks may have different values of it.

`optimizer.param_groups.<optimizer>.<group>` is a group's description, `optimizer.state.<parameter>` the state of a
parameter that has more than tensors, `optimizer.inner.<attributes>` both of optimizers inside others, and
`optimizer.own.<optimizer>` an optimizer's own `state_dict()`. Schedulers, extra state, extras and entries of modules
have separate labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SCHEDULERS, _GROUPS, _STATE = "lr_scheduler.", "optimizer.param_groups.", "optimizer.state."
_INNER, _OWN = "optimizer.inner.", "optimizer.own."
_KINDS = ("extra_state", "extras", "entries")


def plain_of(shared: Mapping[str, Any]) -> dict[str, Any]:
    """The plain data of a shared document, by label."""
    found = _of_optimizers(shared["optimizer"]) if "optimizer" in shared else {}
    found.update({f"{_SCHEDULERS}{number}": tree for number, tree in enumerate(shared["lr_scheduler"])})
    for kind in _KINDS:
        found.update({f"{kind}.{name}": tree for name, tree in shared.get(kind, {}).items()})
    return found


ABSENT = object()
"""What takes the place of data under a label that a rank did not have."""


def put_plain(shared: dict[str, Any], label: str, tree: Any) -> None:
    """Put what `plain_of` gave under a label back into a shared document, in place; ABSENT takes it away."""
    if tree is ABSENT:
        _take_away(shared, label)
        return
    kind, _, name = label.partition(".")
    if kind == "optimizer":
        _put_into_optimizers(shared["optimizer"], label, tree)
    elif label.startswith(_SCHEDULERS):
        shared["lr_scheduler"][int(name)] = tree
    else:
        shared[kind][name] = tree


def _take_away(shared: dict[str, Any], label: str) -> None:
    """Of a parameter's state only tensors are left; other data are in the document of the rank that has them."""
    if label.startswith(_STATE):
        state = shared["optimizer"]["state"].get(label.removeprefix(_STATE), {})
        for key in [key for key, value in state.items() if type(value) is not dict or value.get("~") != "tensor"]:
            del state[key]


def _of_optimizers(described: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{_GROUPS}{number}.{index}": group
        for number, optimizer in enumerate(described["optimizers"])
        for index, group in enumerate(optimizer["groups"])
    }
    found.update({f"{_STATE}{name}": state for name, state in _with_more_than_tensors(described["state"]).items()})
    for path, inner in described.get("inner", {}).items():
        state = _with_more_than_tensors(inner["state"])
        found[f"{_INNER}{path}"] = {"optimizers": inner["optimizers"], "state": state}
    found.update({f"{_OWN}{number}": tree for number, tree in described.get("own", {}).items()})
    return found


def _with_more_than_tensors(states: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: state
        for name, state in states.items()
        if any(type(value) is not dict or value.get("~") != "tensor" for value in state.values())
    }


def _put_into_optimizers(described: dict[str, Any], label: str, value: Any) -> None:
    if label.startswith(_GROUPS):
        number, index = map(int, label.removeprefix(_GROUPS).split("."))
        described["optimizers"][number]["groups"][index] = value
    elif label.startswith(_STATE):
        described["state"][label.removeprefix(_STATE)] = value
    elif label.startswith(_INNER):
        inner = described["inner"][label.removeprefix(_INNER)]
        inner["optimizers"] = value["optimizers"]
        inner["state"].update(value["state"])
    else:
        described["own"][label.removeprefix(_OWN)] = value
