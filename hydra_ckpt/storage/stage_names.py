"""Names of tensors that belong to one pipeline stage, or to one rank, and are not unique by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def qualify(name: str, stage: int) -> str:
    """A tensor's name that no other stage gives; the first stage's names stay as they are."""
    return f"{stage}/{name}" if stage else name


def on_rank(rank: int, name: str) -> str:
    """A tensor's name in the file of one rank's own values."""
    return f"rank-{rank}/{name}"


def unqualified(name: str) -> str:
    """The name within its stage."""
    return _split(name)[1]


def without_stages(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors of all stages by their names within these; a name that several stages give is the first stage's."""
    found: dict[str, T] = {}
    for name, item in sorted(tensors.items(), key=lambda pair: _split(pair[0])[0]):
        short = unqualified(name)
        found[name if short in found else short] = item
    return found


def _split(name: str) -> tuple[int, str]:
    stage, slash, rest = name.partition("/")
    return (int(stage), rest) if slash and stage.isdecimal() else (0, name)
