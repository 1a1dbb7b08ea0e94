"""What a job returned, as plain data that a record holds exactly."""

from __future__ import annotations

import json
import math
import operator
from typing import Any

__all__ = ["plain_objective", "read_objective", "written_objective"]

# In JSON, {_NOT_FINITE: "nan"} is a number. A dictionary of the job that has this key alone is the value of such a key.
_NOT_FINITE = "not finite"
_NUMBERS = {str(number): number for number in (math.nan, math.inf, -math.inf)}
# Deeper data may be written here and not read by a process with a deeper stack, or not fit in a summary.
_DEEPEST = 32
_MOST_CHARACTERS = 16 << 20


def plain_objective(value: Any) -> Any:
    """A job's result as plain data: tuples become lists, and numbers of other libraries become Python's.

    Raises:
        TypeError: It is not plain data.
        ValueError: It could not be read again as it is.
    """
    plain = _plain(value, _DEEPEST)
    text = json.dumps(written_objective(plain))
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"it takes {len(text)} characters")
    # The texts tell types, the order of keys, and NaN.
    if repr(read_objective(json.loads(text))) != repr(plain):
        raise ValueError("JSON cannot hold it exactly")
    return plain


def _plain(value: Any, depth: int) -> Any:
    if depth < 0:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("it has keys that are not texts")
        return {str.__str__(key): _plain(item, depth - 1) for key, item in value.items()}
    return _number(value)


def _number(value: Any) -> int | float:
    if isinstance(value, (bytes, bytearray, memoryview)):  # float() would parse them
        raise TypeError("it is not plain data")
    try:
        return int(operator.index(value))
    except Exception:  # noqa: BLE001 - numbers of other libraries that are not whole raise what they like
        return float(value)


def written_objective(objective: Any) -> Any:
    """Plain data as strict JSON has it, without NaN and infinities."""
    if isinstance(objective, float) and not math.isfinite(objective):
        return {_NOT_FINITE: str(objective)}
    if isinstance(objective, list):
        return [written_objective(item) for item in objective]
    if not isinstance(objective, dict):
        return objective
    written = {key: written_objective(item) for key, item in objective.items()}
    return {_NOT_FINITE: written} if written.keys() == {_NOT_FINITE} else written


def read_objective(written: Any) -> Any:
    """The reverse of `written_objective`.

    Raises:
        KeyError: It is not such data.
    """
    if isinstance(written, list):
        return [read_objective(item) for item in written]
    if not isinstance(written, dict):
        return written
    if written.keys() != {_NOT_FINITE}:
        return {key: read_objective(item) for key, item in written.items()}
    inner = written[_NOT_FINITE]
    if not isinstance(inner, dict):
        return _NUMBERS[str(inner)]
    return {key: read_objective(item) for key, item in inner.items()}
