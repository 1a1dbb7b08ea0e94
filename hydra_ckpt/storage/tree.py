"""Nested Python values as JSON plus named tensors; nothing is pickled.

What JSON does not know is an object with the key "~": `{"~": "tuple", "v": [...]}`. Tensors are referred to by name.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from hydra_ckpt.errors import CheckpointError, CorruptCheckpointError
from hydra_ckpt.storage.dtypes import SAFETENSORS_DTYPE

_TAG = "~"
_AS_THEY_ARE = {int, str, bool, type(None)}
# NumPy's element types that torch and safetensors share; byte orders other than the machine's are not among them.
_ARRAY_DTYPES = set(map(np.dtype, ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", "c8")))


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
    encoder = _ENCODERS.get(kind)
    if encoder is not None:
        tag, content = encoder(value)
        return _tagged(tag, encode(content, name, tensors))
    if kind is np.ndarray and value.dtype in _ARRAY_DTYPES:
        return _tagged("ndarray", encode(torch.from_numpy(np.array(value, order="C")), name, tensors))
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return _tagged("scalar", [value.dtype.str, encode(value.item(), name, tensors)])
    raise CheckpointError(
        f"{name}: a {kind.__module__}.{kind.__qualname__} can be stored neither as JSON nor as a tensor. "
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


_ENCODERS: dict[type, Callable[[Any], tuple[str, Any]]] = {
    tuple: lambda value: ("tuple", list(value)),
    torch.Size: lambda value: ("size", list(value)),
    set: lambda value: ("set", list(value)),
    OrderedDict: lambda value: ("ordered", dict(value)),
    Counter: lambda value: ("counter", dict(value)),
    bytes: lambda value: ("bytes", base64.b64encode(value).decode()),
    torch.dtype: lambda value: ("dtype", str(value).removeprefix("torch.")),
    torch.device: lambda value: ("device", str(value)),
    io.BytesIO: lambda value: ("stream", [_as_tensor(value.getvalue()), value.tell()]),
}


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def decode(data: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `encode` was given.

    Raises:
        CorruptCheckpointError: The data was not made by `encode`, or a tensor is missing.
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
        return _DECODERS[tag](decode(content, tensors))
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptCheckpointError("progress", f"cannot be decoded: {error!r}") from None


def _dtype(name: str) -> torch.dtype:
    return next(dtype for dtype in SAFETENSORS_DTYPE if str(dtype) == f"torch.{name}")


def _stream(parts: Any) -> io.BytesIO:
    data, position = parts
    stream = io.BytesIO(data.numpy().tobytes())
    stream.seek(position)
    return stream


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "tuple": tuple,
    "size": torch.Size,
    "set": set,
    "ordered": OrderedDict,
    "counter": Counter,
    "map": dict,
    "bytes": base64.b64decode,
    "ndarray": lambda tensor: tensor.numpy(),
    "scalar": lambda pair: np.dtype(pair[0]).type(pair[1]),
    "dtype": _dtype,
    "device": torch.device,
    "stream": _stream,
}


def tensor_names(data: Any) -> list[str]:
    """Names of the tensors that encoded data refers to."""
    if isinstance(data, list):
        return [name for item in data for name in tensor_names(item)]
    if not isinstance(data, dict):
        return []
    if data.get(_TAG) == "tensor":
        return [data["v"]]
    return [name for item in data.values() for name in tensor_names(item)]
