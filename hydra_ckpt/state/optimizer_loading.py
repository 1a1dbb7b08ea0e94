"""Saved optimizer state compared with live optimizers: what fits, and where it is read into."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra_ckpt.state.holders import Holder, holders
from hydra_ckpt.state.optimizer import OPTIONS, name_of
from hydra_ckpt.state.optimizer_homes import home_of, section
from hydra_ckpt.state.optimizer_lacking import forgets, is_as_saved, told_beyond
from hydra_ckpt.storage.decoding import tensor_names

# What PyTorch's schedulers put among the options of any optimizer, and names that users give to groups.
_LABELS = {"params", "name", "param_names"}
# What schedulers add to options.
_BESIDE = {*_LABELS, "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}


@dataclass(frozen=True)
class Fit:
    """A saved description compared with live optimizers, parameter by parameter.

    Optimizers may be numbered and grouped differently than in the run that saved, for example on other pipeline stages.

    Attributes:
        live: The optimizers and those inside them.
        held: Names of their parameters.
        options: For each of these and each of its groups the saved options, encoded; None for a group that stays as
            it is.
        state: For each of these the saved state of its parameters, encoded.
        own: Number of an optimizer to its own saved state_dict, encoded.
        absent: Numbers of optimizers none of whose parameters is in the description.
        refused: Numbers of optimizers that the description does not fit; they stay as they are.
        missing: Parameters of the other live optimizers that the description lacks.
        left: Parameters whose state stays as it is although the description has it.
        different: Name of an optimizer or group to why no options fit it.
        lacking: Live options that the saved groups lack, and own state that optimizers had not got yet, by dotted
            name; they stay as they are.
        lacked: Own state that optimizers of other classes had not, by dotted name.
        dropped: Groups whose options stay as they are, by dotted name.
        left_out: Identity of a live group to the names of the options that the save left out; they stay as built.
        forgetting: Numbers of optimizers that lose their own state, because the saved ones had none.
        notes: What has changed, in words.
        replaced: Number of an optimizer to the class of the saved one, if that is another one with the same options.
    """

    live: list[Holder]
    held: set[str] = field(default_factory=set)
    options: list[list[dict[str, Any] | None]] = field(default_factory=list)
    state: list[dict[str, Any]] = field(default_factory=list)
    own: dict[int, Any] = field(default_factory=dict)
    absent: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    left: set[str] = field(default_factory=set)
    different: dict[str, str] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)
    lacked: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    left_out: dict[int, frozenset[str]] = field(default_factory=dict)
    forgetting: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    replaced: dict[int, str] = field(default_factory=dict)

    def leave(self, names: Collection[str]) -> None:
        """Leave the state of these parameters as it is: they themselves are not loaded."""
        for holder, state in zip(self.live, self.state, strict=True):
            for name in set(names) & state.keys():
                self.left.add(name)
                del state[name]
                self.own.pop(holder.number, None)  # it holds the same state

    def drop(self, tensors: Collection[str]) -> set[str]:
        """Leave states and options as they are that hold one of these tensors; returns the tensors found."""
        lost: set[str] = set()
        for holder, state in zip(self.live, self.state, strict=True):
            for name, tree in list(state.items()):
                if here := set(tensors).intersection(tensor_names(tree)):
                    lost |= here
                    self.left.add(name)
                    del state[name]
                    self.own.pop(holder.number, None)
        for holder, rows in zip(self.live, self.options, strict=True):
            for index, options in enumerate(rows):
                if here := set(tensors).intersection(tensor_names(options)):
                    lost |= here
                    rows[index] = None
                    self.dropped.append(place_of(holder, index).replace(", group ", ".param_groups."))
        for number, tree in list(self.own.items()):
            if here := set(tensors).intersection(tensor_names(tree)):
                lost |= here
                del self.own[number]
        return lost

    def trees(self) -> list[Any]:
        """All encoded data that will be installed."""
        return [self.options, self.state, list(self.own.values())]


def empty_states(described: Mapping[str, Any]) -> dict[str, set[str]]:
    """Parameters that had a state without anything in it, by the path of the optimizer that held it."""
    return {path: set(one.get("empty", ())) for path, one in {"": described, **described.get("inner", {})}.items()}


def fit(
    described: Mapping[str, Any],
    optimizers: Mapping[str, Any],
    names: Mapping[int, str],
    homes: Sequence[int | None],
    unsaved: Collection[str] = (),
) -> Fit:
    """Find the saved options and state of every live group.

    Args:
        described: The saved description.
        optimizers: What the live optimizers are called, to these.
        names: Identity of a parameter to its name.
        homes: For each the number of the saved one of the same key or position. Only what has no parameters needs it.
        unsaved: Dotted names of what the save left out.

    Raises:
        CheckpointError: A live optimizer holds a parameter that belongs to no model of the AppState.
    """
    found = Fit(holders(optimizers, names))
    for holder in found.live:
        _fit_holder(found, section(described, holder.path), holder, names, homes, unsaved)
    for number, place in enumerate(homes):
        if place is None and not any(holder.parameters for holder in found.live if holder.number == number):
            found.absent.add(number)
        home = home_of(described, found.live, number, names, place)
        tree = described.get("own", {}).get(str(number if home is None else home))
        if number in found.absent | found.refused:
            continue
        if tree is None:
            _lack_own(found, described, number, names, place)
            continue
        if home is not None:
            found.own[number] = tree
        else:
            found.different[_called(found.live, number)] = (
                "it has state of its own besides that of its parameters, which fits only the same parameters in the "
                "same groups"
            )
    return found


def _lack_own(
    found: Fit, described: Mapping[str, Any], number: int, names: Mapping[int, str], place: int | None
) -> None:
    """Note what own state a live optimizer has, if the saved one had none."""
    inside = [holder for holder in found.live if holder.number == number]
    if forgets(inside[0].optimizer):
        found.forgetting.add(number)
    elif is_as_saved(described, inside[0], names, place):
        found.lacking.extend(told_beyond(inside))
    else:
        found.lacked.extend(told_beyond(inside))


def _called(live: Sequence[Holder], number: int) -> str:
    return next(holder.called for holder in live if holder.number == number)


@dataclass(frozen=True)
class _SavedGroup:
    """A saved group of options.

    Attributes:
        index: Its number.
        options: Its options, encoded.
        kind: The class of its optimizer; empty if nothing says it.
        left_out: Names of options that the save left out.
    """

    index: int
    options: Mapping[str, Any]
    kind: str
    left_out: frozenset[str]


def _left_out(group: Mapping[str, Any], path: str, unsaved: Collection[str]) -> frozenset[str]:
    """Names of the options of a saved group that the save left out."""
    if not unsaved or not group["params"]:
        return frozenset()
    place = f".{group['params'][0]}{f'.~{path}' if path else ''}.{OPTIONS}."
    return frozenset(name.partition(place)[2] for name in unsaved if place in name)


def _fit_holder(
    found: Fit,
    described: Mapping[str, Any],
    holder: Holder,
    names: Mapping[int, str],
    homes: Sequence[int | None],
    unsaved: Collection[str],
) -> None:
    saved = {
        name: known
        for optimizer in described["optimizers"]
        for index, group in enumerate(optimizer["groups"])
        for known in [_SavedGroup(index, group["options"], optimizer["class"], _left_out(group, holder.path, unsaved))]
        for name in group["params"]
    }
    rows: list[dict[str, Any] | None] = []
    everyone: list[str] = []
    missing: list[str] = []
    for index, group in enumerate(holder.groups):
        members = [name_of(parameter, names, holder, index) for parameter in group["params"]]
        everyone += members
        missing += [name for name in members if name not in saved]
        if not members:
            rows.append(_empty_group(described, holder, index, homes))
            continue
        rows.append(_fit_group(found, holder, index, group, {name: saved[name] for name in members if name in saved}))
    if everyone and len(missing) == len(everyone) and not holder.path:
        found.absent.add(holder.number)
    else:
        found.missing.extend(missing)
    found.options.append(rows)
    found.held.update(everyone)
    held = {names[id(parameter)] for parameter in holder.parameters}
    found.state.append({name: state for name, state in described["state"].items() if name in held})
    if any(row is not None for row in rows) and _splits(described, holder, names):
        found.notes.append(
            f"{place_of(holder)}: its parameters are grouped differently than in the checkpoint; each group gets the "
            "options that its parameters had there"
        )


def _splits(described: Mapping[str, Any], holder: Holder, names: Mapping[int, str]) -> bool:
    """Whether groups that were built with different options get the options of one saved group."""
    homes = {
        name: (number, index)
        for number, optimizer in enumerate(described["optimizers"])
        for index, group in enumerate(optimizer["groups"])
        for name in group["params"]
    }
    built: dict[tuple[int, int], str] = {}
    for group in holder.groups:
        options = repr({key: value for key, value in group.items() if key != "params"})
        for home in {homes[name] for item in group["params"] if (name := names[id(item)]) in homes}:
            if built.setdefault(home, options) != options:
                return True
    return False


def moved_groups(
    described: Mapping[str, Any], found: Fit, names: Mapping[int, str], homes: Sequence[int | None]
) -> list[str]:
    """Groups that are not at the place where their parameters were: what goes by position does not fit them.

    Other tools' directories do not say how groups were arranged.

    Args:
        described: The saved description.
        found: What of it fits.
        names: Identity of a parameter to its name.
        homes: For each live optimizer the number of the saved one whose place it has.
    """
    if not all(optimizer["class"] for optimizer in described["optimizers"]):
        return []
    before = {
        name: (number, index)
        for number, optimizer in enumerate(described["optimizers"])
        for index, group in enumerate(optimizer["groups"])
        for name in group["params"]
    }
    return [
        place_of(holder, index)
        for holder in found.live
        if not holder.path and holder.number not in found.absent | found.refused
        for index, group in enumerate(holder.groups)
        if {before[name] for item in group["params"] if (name := names[id(item)]) in before}
        - {(homes[holder.number], index)}
    ]


def place_of(holder: Holder, index: int | None = None) -> str:
    """What messages call an optimizer, or one of its groups."""
    inner = f".{holder.path}" if holder.path else ""
    return f"{holder.called}{inner}" + ("" if index is None else f", group {index}")


def _empty_group(
    described: Mapping[str, Any], holder: Holder, index: int, homes: Sequence[int | None]
) -> dict[str, Any] | None:
    """The options of a group without parameters, which only its number and the optimizer's key or number identify."""
    saved, home = described["optimizers"], homes[holder.number]
    if home is None or len(saved) != len(homes) or len(saved[home]["groups"]) != len(holder.groups):
        return None
    group: dict[str, Any] = saved[home]["groups"][index]
    return None if group["params"] else group["options"]


def _fit_group(
    found: Fit, holder: Holder, index: int, group: Mapping[str, Any], saved: Mapping[str, _SavedGroup]
) -> dict[str, Any] | None:
    """The saved options of a group's parameters, if they are the same for all and of the same kind of optimizer."""
    left_out: frozenset[str] = frozenset().union(*(one.left_out for one in saved.values()))
    found.left_out[id(group)] = left_out
    for one in {id(one): one for one in saved.values()}.values():
        why = _incompatible(one.kind, one.options.keys() - left_out, holder.optimizer, group.keys() - left_out)
        if why is not None:
            found.different[place_of(holder)] = why
            found.refused.add(holder.number)
        elif one.kind not in ("", type(holder.optimizer).__qualname__):
            found.replaced[holder.number] = one.kind
    kinds = {_kind(one.index, one.options): one.options for one in saved.values()}
    if len(kinds) > 1:
        first = {_kind(one.index, one.options): name for name, one in reversed([*saved.items()])}
        found.different[place_of(holder, index)] = (
            "its parameters had different options in the checkpoint (for example, "
            f"{' and '.join(sorted(first.values())[:2])} had). Group them as in the run that saved"
        )
        return None
    options = next(iter(kinds.values()), None)
    if options is None:
        return None
    dotted = ".".join(filter(None, (holder.called, holder.path, "param_groups", str(index))))
    found.lacking.extend(f"{dotted}.{key}" for key in sorted(group.keys() - options.keys() - left_out - _LABELS))
    return dict(options)


def _incompatible(saved: str, options: set[str], live: Any, here: set[str]) -> str | None:
    """Why the options, and so the state, of a saved optimizer are not a live one's; None if they may be.

    Args:
        saved: Its class; empty if nothing says it.
        options: Names of its options.
        live: The live optimizer.
        here: Names of the live group's options.
    """
    name = type(live).__qualname__
    # A wrapper's defaults may be its own affair, which no group has.
    gone, new = options - here - _BESIDE, (set(getattr(live, "defaults", None) or {}) & here) - options
    # A class may gain or lose options from version to version; others may bear its name.
    differ = bool(gone or new) if saved and saved != name else bool(gone and new)
    if not differ:
        return None
    sides = [f"only {where}: {', '.join(sorted(names))}" for where, names in (("there", gone), ("here", new)) if names]
    return (
        f"{saved or 'another optimizer'} in the checkpoint, {name} in the AppState, with other options "
        f"({'; '.join(sides)}). To start with a new optimizer, load only the other parts: "
        "restore_parts=[model,dataloader,rng,extras,progress]"
    )


def _kind(index: int, options: Mapping[str, Any]) -> tuple[str, int | None]:
    """Equal for groups that may become one. Tensors among the options count as equal in groups of one number."""
    tensors = tensor_names(options)
    text = json.dumps(options, sort_keys=True)
    for name in tensors:
        text = text.replace(json.dumps(name), "0")
    return text, index if tensors else None
