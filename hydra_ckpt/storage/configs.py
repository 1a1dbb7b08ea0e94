"""OmegaConf's containers as plain data: what Hydra's `instantiate` hands to schedulers and other objects.

A container is stored on its own, without the one that it is in, with the flags (`readonly`, `struct` and others) that
it has from there.
"""

# ruff: noqa: SLF001 - flags, types and raw values have no public access

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

_KINDS: dict[str, Any] = {"dict": DictConfig, "list": ListConfig}
_LEAVES = (bool, float, int, str, bytes, type(None), Enum, PurePath)
_REMEDY = (
    "make it plain data before the object gets it: OmegaConf.to_container(value, resolve=True), or `_convert_: all` "
    "in the config that Hydra instantiates"
)


class NotPlainError(Exception):
    """A container that could not be restored exactly. The text says why, and what to do."""


def is_config(value: Any) -> bool:
    """Whether a value is one of OmegaConf's containers."""
    return type(value) in (DictConfig, ListConfig)


def from_config(value: Any) -> dict[str, Any]:
    """A container as plain data: `kind`, `flags` and `content`.

    The content of a dict is a list of pairs; of a list, a list; that of a missing, absent or interpolated container a
    text or None. Missing values are "???" and interpolations are texts, as OmegaConf has them.

    Raises:
        NotPlainError: It is typed, holds other values, or an interpolation that its own content cannot resolve.
    """
    is_inside = value._get_parent() is not None
    found: dict[str, Any] = _data(value, "", is_inside=is_inside)
    for flag in _flags_around(value):
        found["flags"].setdefault(flag, value._get_flag(flag))
    again = to_config(found)
    # What is inherited and what is set on it come to the same for a container that is on its own.
    if strange := next(_unlike(value, again, "", is_first=True), None):
        raise NotPlainError(f"{strange}; {_REMEDY}")
    return found


def to_config(data: Any) -> Any:
    """What `from_config` was given.

    Raises:
        ValueError: The data describes no container.
    """
    try:
        return _made(data)
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from None


def _made(data: Any) -> Any:
    if type(data) is not dict:
        return data
    content = data["content"]
    if type(content) is list and data["kind"] == "dict":
        content = {key: _made(item) for key, item in content}
    elif type(content) is list:
        content = [_made(item) for item in content]
    found = _KINDS[data["kind"]](content, flags={"allow_objects": True})
    found._metadata.flags = dict(data["flags"])
    found._invalidate_flags_cache()
    return found


def _data(node: Any, place: str, *, is_inside: bool) -> Any:
    content: Any = node.__dict__["_content"] if is_config(node) else node._value()
    if is_inside and node._is_interpolation():
        raise NotPlainError(
            f"its value {place or 'itself'} is the interpolation {content}, which needs the config around it; {_REMEDY}"
        )
    if not is_config(node):
        if not isinstance(content, _LEAVES):
            raise NotPlainError(f"its value {place} is a {type(content).__qualname__}; {_REMEDY}")
        return content
    if isinstance(content, dict):
        content = [[key, _data(item, _join(place, key), is_inside=is_inside)] for key, item in content.items()]
    elif isinstance(content, list):
        content = [_data(item, _join(place, key), is_inside=is_inside) for key, item in enumerate(content)]
    kind = "dict" if isinstance(node, DictConfig) else "list"
    return {"kind": kind, "flags": dict(node._metadata.flags or {}), "content": content}


def _flags_around(node: Any) -> set[str]:
    """Names of the flags that are set on the containers around one."""
    found: set[str] = set()
    while (node := node._get_parent()) is not None:
        found.update(node._metadata.flags or ())
    return found


def _unlike(node: Any, again: Any, place: str, *, is_first: bool = False) -> Iterator[str]:
    """Where a restored container is another one than it was: what is typed or set on a value is not stored."""
    if type(node) is not type(again) or _facts(node, is_first=is_first) != _facts(again, is_first=is_first):
        yield f"its value {place} is typed or has settings of its own" if place else "it is typed"
        return
    content, other = (item.__dict__.get("_content") for item in (node, again))
    if isinstance(content, dict) and isinstance(other, dict):
        for (key, item), held in zip(content.items(), other.values(), strict=True):
            yield from _unlike(item, held, _join(place, key))
    elif isinstance(content, list) and isinstance(other, list):
        for key, pair in enumerate(zip(content, other, strict=True)):
            yield from _unlike(*pair, _join(place, key))


def _facts(node: Any, *, is_first: bool) -> tuple[Any, ...]:
    found = {**vars(node._metadata)}
    if is_first:  # these are its place in the container around it
        del found["key"], found["flags"]
    return tuple(sorted((key, repr(value)) for key, value in found.items()))


def _join(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)
