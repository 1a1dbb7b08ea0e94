"""Nested Python values as JSON plus named tensors; nothing is pickled.

What JSON does not know is an object with the key "~": `{"~": "tuple", "v": [...]}`. Tensors are referred to by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from hydra_ckpt.errors import CheckpointError, CorruptCheckpointError
from hydra_ckpt.storage.dtypes import SAFETENSORS_DTYPE
from hydra_ckpt.storage.kinds import DECODERS, TAGS_OF_FORMAT_2, NotExactError, tagged

_TAG = "~"
_AS_THEY_ARE = {int, str, bool, type(None)}


def encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON data; its tensors are added to `tensors` under names that begin with `name`.

    Raises:
        CheckpointError: A value fits neither JSON nor a tensor; the message names its place.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else _tagged("float", repr(value))
    if isinstance(value, torch.Tensor):
        return _tensor(value, name, tensors)
    if kind is dict:
        return _dict(value, name, tensors)
    if kind is list:
        if set(map(type, value)) <= _AS_THEY_ARE:  # the state of Python's generator has 625 numbers
            return list(value)
        return [encode(item, _join(name, str(index)), tensors) for index, item in enumerate(value)]
    try:
        found = tagged(value)
    except NotExactError as error:
        raise _refusal(value, name, f": {error}") from None
    if found is None:
        raise _refusal(value, name, "")
    return _tagged(found[0], encode(found[1], name, tensors))


def _refusal(value: Any, name: str, why: str) -> CheckpointError:
    kind = type(value)
    return CheckpointError(
        f"{name}: a {kind.__module__}.{kind.__qualname__} can be stored neither as JSON nor as a tensor{why}. "
        "Let state_dict() return numbers, texts, lists, dicts and tensors only"
    )


def _join(name: str, key: str) -> str:
    return f"{name}{key}" if not name or name.endswith(":") else f"{name}.{key}"


def _tagged(tag: str, content: Any) -> dict[str, Any]:
    return {_TAG: tag, "v": content}


def _tensor(value: torch.Tensor, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if name in tensors:
        raise CheckpointError(
            f"{name}: two tensors would have this name; let no key contain a dot, or be a text of digits"
        )
    if value.dtype not in SAFETENSORS_DTYPE or value.layout != torch.strided:
        raise CheckpointError(f"{name}: a tensor of {value.dtype}, {value.layout} cannot be stored")
    tensors[name] = value
    return _tagged("tensor", name)


def _dict(value: Mapping[Any, Any], name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if all(type(key) is str for key in value) and _TAG not in value:
        return {key: encode(item, _join(name, key), tensors) for key, item in value.items()}
    pairs = [
        [encode(key, _join(name, "<key>"), tensors), encode(item, _join(name, str(key)), tensors)]
        for key, item in value.items()
    ]
    return _tagged("map", pairs)


def decode(data: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `encode` was given.

    Raises:
        CorruptCheckpointError: The data was not made by `encode`, or a tensor is missing.
        CheckpointError: It holds an enum or a named tuple whose class this program has not, or has otherwise.
    """
    if isinstance(data, list):
        return [decode(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    if _TAG not in data:
        return {key: decode(item, tensors) for key, item in data.items()}
    try:
        tag, content = data[_TAG], data["v"]
        if tag == "tensor":
            return tensors[content]
        return DECODERS[tag](decode(content, tensors))
    except CheckpointError:
        raise  # some of ours are ValueErrors too
    except (KeyError, ValueError, TypeError, AttributeError, StopIteration, RuntimeError) as error:
        raise CorruptCheckpointError("progress", f"cannot be decoded: {error!r}") from None


# No tag lies within a text: there its quotes would have backslashes before them.
_OF_FORMAT_2 = re.compile(rb'"~": ?"(?:' + "|".join(sorted(TAGS_OF_FORMAT_2)).encode() + rb')"')


def format_of(text: bytes) -> int:
    """The lowest format of a checkpoint (`Manifest.format`) whose readers can decode this JSON of encoded data."""
    return 2 if _OF_FORMAT_2.search(text) else 1


def tensor_names(data: Any) -> list[str]:
    """Names of the tensors that encoded data refers to."""
    if isinstance(data, list):
        return [name for item in data for name in tensor_names(item)]
    if not isinstance(data, dict):
        return []
    if data.get(_TAG) == "tensor":
        return [data["v"]]
    return [name for item in data.values() for name in tensor_names(item)]
