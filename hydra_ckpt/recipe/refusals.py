"""One line for everything that is refused before training: the key, what is wrong with it, and what it accepts.

Hydra and OmegaConf say the same in several lines, or as a stack; here the error objects are read, and their texts only
if there is nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from hydra.errors import CompactHydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from hydra_ckpt.config import CheckpointingConfig
from hydra_ckpt.errors import CheckpointConfigError, CheckpointError
from hydra_ckpt.registry import CallbackSchema

__all__ = ["refusal"]

_SHOWN = 8  # keys
_GROUP, _CALLBACK = "checkpoint", "callbacks.checkpoint"
_CONSTRUCTED = {"CheckpointingConfig": (_GROUP, CheckpointingConfig), "CheckpointCallback": (_CALLBACK, CallbackSchema)}


def refusal(error: BaseException) -> str | None:
    """The line for an error that is a refusal; None for any other error, whose stack trace is needed.

    Args:
        error: What composing, instantiating or training has raised.
    """
    causes = list(_chain(error))
    for cause in causes:
        if isinstance(cause, CheckpointError):
            return f"{type(cause).__name__}: {cause}"
        if isinstance(cause, TypeError):
            return _unexpected_argument(cause)
    if not isinstance(error, CompactHydraException | OmegaConfBaseException):
        return None
    found = next((cause for cause in causes if isinstance(cause, OmegaConfBaseException)), None)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option}: there is no such option; {_choice(option, error.options, group)}"
    if isinstance(found, ConfigKeyError | ConfigAttributeError) and isinstance(found.parent_node, DictConfig):
        return _unknown_key(str(found.full_key), found.parent_node)
    if isinstance(found, ValidationError) and found.full_key:
        return _wrong_type(found)
    return " ".join(str(error if found is None else found).split())


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        # A resolver's refusal is the cause of the error of the interpolation that called it.
        error = error.__cause__ or (error.__context__ if isinstance(error, InterpolationResolutionError) else None)


def _unknown_key(full_key: str, parent: DictConfig) -> str:
    place, _, name = full_key.rpartition(".")
    return f"{full_key}: there is no such key; {_choice(name, map(str, parent), place or 'the configuration')}"


def _wrong_type(error: ValidationError) -> str:
    place, _, name = str(error.full_key).rpartition(".")
    if place == _GROUP:
        try:
            CheckpointingConfig(**{name: error.value})  # says what the setting takes
        except CheckpointConfigError as refused:
            return f"{type(refused).__name__}: {refused}"
    return f"{error.full_key}: {str(error.msg).splitlines()[0]}"


def _unexpected_argument(error: TypeError) -> str | None:
    """A key that no schema refused, because it was added or the configuration was read from plain YAML."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if found is None or found[1] not in _CONSTRUCTED:
        return None
    place, schema = _CONSTRUCTED[found[1]]
    names = [field.name for field in fields(schema)]
    return f"{place}.{found[2]}: there is no such key; {_choice(found[2], names, place)}"


def _choice(wrong: str, names: Iterable[Any], place: str) -> str:
    """What could be meant: the keys nearest to it, and where all of them are listed."""
    known = [name for name in names if not name.startswith(("_", "base_"))]
    close = get_close_matches(wrong, known, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    if len(known) <= _SHOWN:
        return f"{meant}{place} takes {', '.join(known)}"
    near = get_close_matches(wrong, known, n=_SHOWN, cutoff=0.0)
    return f"{meant}{place} takes {', '.join(near)} and {len(known) - _SHOWN} more, see docs/configuration.md"
