"""Checks for the values of settings: each takes what was typed and returns it as it is meant, or refuses it by name.

A schema has checked most of this before, but a configuration read back from plain YAML, or written in Python, has none.
"""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from hydra_ckpt.errors import CheckpointConfigError

__all__ = [
    "EXPORT_DTYPES",
    "Check",
    "choice",
    "count",
    "directory",
    "exit_code",
    "minutes",
    "optional",
    "place",
    "positive",
    "refuse",
    "refuse_url",
    "rules",
    "switch",
    "switch_or",
    "text",
    "texts",
    "word",
]

Check = Callable[[str, Any], Any]

# About two years: clocks and sockets count in smaller units and must not overflow.
_ENDLESS_MINUTES = 1_000_000


def refuse(name: str, value: object, choices: str) -> NoReturn:
    """Refuse a value.

    Args:
        name: The setting's name below ``checkpoint``.
        value: What was typed.
        choices: What the setting takes instead.

    Raises:
        CheckpointConfigError: Always.
    """
    raise CheckpointConfigError(f"checkpoint.{name}={value!r} is not valid; it takes {choices}.")


def word(value: object) -> str:
    """What was typed as one of a few words, in lower case; empty where it is neither a text nor a bool."""
    return str(value).strip().lower() if isinstance(value, (bool, str)) else ""


def optional(check: Check) -> Check:
    """A check that also takes null."""
    return lambda name, value: None if value is None else check(name, value)


# Element types of exports, by their short names.
EXPORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def choice(*words: str, short: Mapping[str, str] = MappingProxyType({})) -> Check:
    """A check that takes one of the words, in any case and with surrounding space.

    Args:
        words: The words.
        short: Short forms, to the words they stand for.
    """

    def check(name: str, value: object) -> str:
        found = short.get(word(value), word(value))
        if found not in words:
            refuse(name, value, " or ".join(words))
        return found

    return check


def switch(name: str, value: object) -> bool:
    """Takes true and false, and no number or text in their place."""
    if not isinstance(value, bool):
        refuse(name, value, "true or false")
    return value


def switch_or(*words: str) -> Check:
    """A check that takes true, false, or one of the words."""

    def check(name: str, value: object) -> bool | str:
        return value if isinstance(value, bool) else str(choice("true", "false", *words)(name, value))

    return check


def text(name: str, value: object) -> str:
    """Takes a text that is not blank; a path becomes one, because not every YAML reader understands a path."""
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(given, str) or not given.strip():
        refuse(name, value, "a non-empty string")
    return given


# Names of stores, as they begin a URL. A path made of one has lost one of its two slashes.
_STORES = "s3|s3a|s3n|gs|gcs|az|azure|abfs|abfss|adl|wasb|wasbs|hf|msc|memory|file|https?|ftp|sftp|ssh|hdfs|oss|r2|dbfs"
_URL = re.compile(
    rf"\s*([A-Za-z][A-Za-z0-9+.-]*::|({_STORES}):|(.*/)?([A-Za-z][A-Za-z0-9+.-]*://|({_STORES}):/))", re.IGNORECASE
)
_INTERPOLATION = re.compile(r"\$\{[^}]*\}")
# At the beginning of a name: elsewhere a dollar sign is part of it.
_VARIABLE = re.compile(r"(?:^|/)\s*\$([A-Za-z_]\w*)")


def refuse_url(name: str, value: object) -> None:
    """Refuse a URL where a local path is meant: it would be taken for a relative directory called `s3:`.

    Args:
        name: What it was given for, as the user calls it.
        value: What was given.

    Raises:
        CheckpointConfigError: It is a URL.
    """
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(given, str) and _URL.match(given):
        raise CheckpointConfigError(
            f"{name}={given}: object stores and other URLs are not supported, only directories of this host or of a "
            "file system that it has mounted. Give a path such as /data/run, and copy from there"
        )


def place(name: str, value: object) -> str:
    """Takes a text that names a local file or directory: no URL, and nothing that the system refuses as a path."""
    found = text(name, value)
    refuse_url(f"checkpoint.{name}", found)
    if interpolation := _INTERPOLATION.search(found):
        refuse(name, value, f"a path; {interpolation[0]} is resolved only in a configuration that Hydra has composed")
    variable = _VARIABLE.search(found)
    literal = Path(found[: variable.end()]) if variable else None
    if variable and literal and not (literal.is_absolute() and os.path.lexists(literal)):  # one may be called so
        called = variable[1]
        refuse(name, value, f"a path; only a shell expands ${called}: write ${{oc.env:{called}}}, which Hydra resolves")
    if "\0" in found or not _is_encodable(found):
        refuse(name, value, "a path that the file system can store, without NUL and lone surrogates")
    return found


def _is_encodable(path: str) -> bool:
    """Whether the system can be given this path; it can have names that are not UTF-8."""
    try:
        return bool(os.fsencode(path))
    except UnicodeEncodeError:
        return False


def directory(name: str, value: object) -> str:
    """Takes a place that may begin with `~` or `~user`."""
    found = place(name, value)
    try:
        Path(found).expanduser()
    except RuntimeError:
        refuse(name, value, f"a path; {Path(found).parts[0]} is no home directory of this host")
    return found


def texts(*among: str) -> Check:
    """A check that takes a list of texts: any texts, or, where some are given, at least one of those."""

    def check(name: str, value: object) -> list[str]:
        items = _plain(value)
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            refuse(name, items, "a list of strings")
        if among and not (items and set(items) <= set(among)):
            refuse(name, items, f"a list of some of {', '.join(among)}")
        return items

    return check


def count(name: str, value: object) -> int:
    """Takes a whole number from 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        refuse(name, value, "a whole number of at least 1")
    return value


def minutes(name: str, value: object) -> float:
    """Takes a number of minutes above 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < _ENDLESS_MINUTES:
        refuse(name, value, f"a number of minutes above 0 and below {_ENDLESS_MINUTES}")
    return float(value)


def positive(name: str, value: object) -> float:
    """Takes a finite number above 0."""
    # NaN is neither above nor below anything.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        refuse(name, value, "a positive number")
    return value


def rules(nested: str, **known: Check) -> Check:
    """A check that takes a mapping of rules as plain data: those known, and under `nested` a list of such mappings."""

    def check(name: str, value: object) -> dict[str, Any]:
        given = _plain(value)
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
            refuse(name, given, "a mapping like {newest: 3, best: 2, every_n_steps: 1000}")
        for key, item in given.items():
            if key == nested and isinstance(item, list):
                for position, inner in enumerate(item):
                    check(f"{name}.{key}[{position}]", inner)
            elif key == nested:
                refuse(f"{name}.{key}", item, "a list of mappings, such as [{newest: 3}]")
            elif key in known:
                known[key](f"{name}.{key}", item)
            else:
                raise CheckpointConfigError(
                    f"checkpoint.{name}.{key}: there is no such rule; choose from {', '.join([*known, nested])}."
                )
        return copy.deepcopy(given)

    return check


def _plain(value: Any) -> Any:
    """The same data without omegaconf's containers, which can exist only if omegaconf is imported."""
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and omegaconf.OmegaConf.is_config(value):
        return omegaconf.OmegaConf.to_container(value, resolve=True)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def exit_code(code: object) -> int | None:
    """The value of `callbacks.checkpoint.requeue_exit_code`, which is no setting of the group ``checkpoint``.

    Raises:
        CheckpointConfigError: It is not a whole number from 1 to 255, or None.
    """
    if code is None:
        return None
    if isinstance(code, bool) or not isinstance(code, int) or not 0 < code < 256:
        raise CheckpointConfigError(
            f"callbacks.checkpoint.requeue_exit_code={code!r}: expected a whole number from 1 to 255, or null"
        )
    return code
