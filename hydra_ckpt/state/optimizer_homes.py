"""Finds the saved optimizer that a live one is: by its groups of parameters, or by its key or position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra_ckpt.state.holders import Holder


def section(described: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """What a description says of the optimizers, or of those inside them under one path."""
    nothing: Mapping[str, Any] = {"optimizers": [], "state": {}}
    return described if not path else described.get("inner", {}).get(path, nothing)


def has_parameters(described: Mapping[str, Any], number: int) -> bool:
    """Whether the saved optimizer of a number, or one inside it, had parameters."""
    paths = ["", *described.get("inner", {})]
    return any(
        group["params"] for path in paths for one in _numbered(described, number, path) for group in one["groups"]
    )


def home_of(
    described: Mapping[str, Any],
    live: Sequence[Holder],
    number: int,
    names: Mapping[int, str],
    place: int | None,
) -> int | None:
    """The number that an optimizer had when it was saved, by the groups of parameters that it and those inside it have.

    None if none had the same. The place of the same key or position comes first: groups may be empty.
    """
    mine = {
        holder.path: [[names[id(parameter)] for parameter in group["params"]] for group in holder.groups]
        for holder in live
        if holder.number == number and holder.groups
    }
    wanted = [*([] if place is None else [place]), *range(len(described["optimizers"]))]
    return next((place for place in wanted if all(_had(described, place, *item) for item in mine.items())), None)


def _had(described: Mapping[str, Any], number: int, path: str, groups: Sequence[Sequence[str]]) -> bool:
    """Whether the optimizer of a number, or one inside it, had these groups of parameters."""
    there = _numbered(described, number, path)
    return any([group["params"] for group in one["groups"]] == groups for one in there)


def _numbered(described: Mapping[str, Any], number: int, path: str) -> list[Mapping[str, Any]]:
    """What a description says of the optimizer of a number, or of those inside it under one path."""
    saved = section(described, path)["optimizers"]
    # Older checkpoints do not number those inside.
    return [one for place, one in enumerate(saved) if one.get("number", number if path else place) == number]
