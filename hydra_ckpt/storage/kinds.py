"""Values that JSON cannot express, each as a tag and a content that JSON or a tensor can express; types included.

Enums and named tuples are looked up among the modules that are imported already: decoding never imports a module and
never calls what a checkpoint names.
"""

from __future__ import annotations

import base64
import datetime as dt
import io
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import Enum, Flag
from pathlib import PosixPath, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.storage.configs import NotPlainError, from_config, to_config
from hydra_ckpt.storage.dtypes import SAFETENSORS_DTYPE

Tagged = tuple[str, Any]

# NumPy's element types that torch and safetensors share; byte orders other than the machine's are not among them.
_SHARED_DTYPES = set(map(np.dtype, ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", "c8")))
# Others that their text fully describes: no structures, no objects, nothing specific to one machine.
_PLAIN_KINDS = "biufcmMSU"
_PATHS = {kind.__name__: kind for kind in (PosixPath, PurePosixPath, PureWindowsPath)}
_TIMES: dict[str, Any] = {kind.__name__: kind for kind in (dt.datetime, dt.date, dt.time)}
_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (bool, dict, float, int, list, set, str, tuple)}
_TORCH_NAMES = {
    str(item).removeprefix("torch."): item
    for kind in (torch.dtype, torch.layout, torch.memory_format)
    for item in vars(torch).values()
    if isinstance(item, kind)
}


class NotExactError(Exception):
    """A value of a known kind that could not be restored exactly. The text says what would be lost."""


def tagged(value: Any) -> Tagged | None:
    """A value as a tag and its content; None if its kind is not known.

    Raises:
        NotExactError: It could not be restored as it is.
    """
    kind = type(value)
    encoder = _ENCODERS.get(kind)
    if encoder is not None:
        return encoder(value)
    if isinstance(value, Enum):
        return _from_enum(value)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return _from_named_tuple(value)
    if isinstance(value, np.dtype):
        return "numpy_dtype", _dtype_text(value)
    if isinstance(value, np.generic):
        return _from_scalar(value)
    return None


# -- classes that the user's modules define -------------------------------------------------------------------------


def _found(module: str, qualname: str) -> Any:
    """What an imported module has under a name. Reads namespaces only, so that no code runs."""
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = vars(found).get(name) if hasattr(found, "__dict__") else None
    return found


def _place(kind: type) -> list[str]:
    if _found(kind.__module__, kind.__qualname__) is not kind:
        raise NotExactError(
            f"its class {kind.__module__}.{kind.__qualname__} is not what a module has under that name, so it could "
            "not be found again; define it at the top of a module"
        )
    return [kind.__module__, kind.__qualname__]


def _class_at(module: str, qualname: str, base: type) -> Any:
    kind = _found(module, qualname)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise CheckpointError(
            f"the checkpoint holds a {module}.{qualname}, which this program has not imported, or no longer has; "
            f"import {module} before the load"
        )
    return kind


def _from_enum(value: Enum) -> Tagged:
    # Combined flags have no name, or one that differs between versions of Python.
    name = value.name if type(value).__members__.get(value.name or "") is value else None
    if name is None and not isinstance(value, Flag):
        raise NotExactError("it is not a member of its class")
    return "enum", [*_place(type(value)), name, value.value]


def _to_enum(content: list[Any]) -> Enum:
    module, qualname, name, value = content
    kind = _class_at(module, qualname, Enum)
    member = kind.__members__.get(name) if name is not None else _flags(kind, value)
    # A set has no order, and NaN is not equal to itself.
    if member is None or not (member.value == value or repr(member.value) == repr(value)):
        raise CheckpointError(
            f"the checkpoint holds {module}.{qualname}.{name or ''} with the value {value!r}, which it does not have "
            "in this program; restore the class as it was"
        )
    return member


def _flags(kind: type[Enum], value: Any) -> Enum | None:
    try:
        return kind(value) if issubclass(kind, Flag) else None
    except ValueError:
        return None


def _from_named_tuple(value: Any) -> Tagged:
    if getattr(value, "__dict__", None):
        raise NotExactError("it has attributes besides its fields")
    return "namedtuple", [*_place(type(value)), list(type(value)._fields), list(value)]


def _to_named_tuple(content: list[Any]) -> Any:
    module, qualname, fields, values = content
    kind = _class_at(module, qualname, tuple)
    if list(getattr(kind, "_fields", ())) != fields:
        raise CheckpointError(
            f"the checkpoint holds a {module}.{qualname} with the fields {', '.join(fields)}, which it does not have "
            "in this program; restore the class as it was"
        )
    return tuple.__new__(kind, values)


# -- NumPy ---------------------------------------------------------------------------------------------------------


def _dtype_text(dtype: np.dtype[Any]) -> str:
    if dtype.kind not in _PLAIN_KINDS or dtype.metadata:
        raise NotExactError(f"its element type is {dtype}")
    is_wide = dtype.itemsize > {"f": 8, "c": 16}.get(dtype.kind, dtype.itemsize)
    if is_wide or np.dtype(dtype.str) != dtype:
        raise NotExactError(f"its element type is {dtype}")
    return dtype.str


def _from_array(value: np.ndarray[Any, Any]) -> Tagged:
    if value.dtype in _SHARED_DTYPES and (value.flags.c_contiguous or not value.flags.f_contiguous):
        return "ndarray", torch.from_numpy(np.array(value, order="C"))
    order: Literal["F", "C"] = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    raw = np.frombuffer(value.tobytes(order), np.uint8)
    return "raw_array", [_dtype_text(value.dtype), list(value.shape), order, torch.from_numpy(raw.copy())]


def _to_array(content: list[Any]) -> np.ndarray[Any, Any]:
    dtype, shape, order, raw = content
    return np.frombuffer(raw.numpy().tobytes(), dtype).reshape(shape, order=order).copy(order)


def _from_scalar(value: np.generic) -> Tagged:
    text = _dtype_text(value.dtype)
    if value.dtype.kind in "mM":
        return "moment", [text, int(value.view("i8"))]
    if value.dtype.kind in "fc" and value != value:  # noqa: PLR0124 - a NaN, of which there are many
        return "raw_scalar", [text, value.tobytes()]
    return "scalar", [text, value.item()]


# -- the rest ------------------------------------------------------------------------------------------------------


def _from_time(value: Any) -> Tagged:
    content = [type(value).__name__, value.isoformat(), getattr(value, "fold", 0)]
    if repr(_to_time(content)) != repr(value):  # a time zone has its own name
        raise NotExactError(f"its text, {content[1]}, does not fully describe its time zone; convert it to UTC")
    return "time", content


def _to_time(content: list[Any]) -> Any:
    name, text, fold = content
    found = _TIMES[name].fromisoformat(text)
    return found.replace(fold=1) if fold else found


def _from_default_dict(value: defaultdict[Any, Any]) -> Tagged:
    factory = value.default_factory
    name = None if factory is None else getattr(factory, "__name__", "")
    if factory is not None and _FACTORIES.get(name or "") is not factory:
        raise NotExactError(f"its factory is {factory!r}; None and {', '.join(_FACTORIES)} are known")
    return "defaultdict", [name, dict(value)]


def _from_stream(value: io.BytesIO) -> Tagged:
    return "stream", [torch.from_numpy(np.frombuffer(value.getvalue(), np.uint8).copy()), value.tell()]


def _to_stream(pair: list[Any]) -> io.BytesIO:
    stream = io.BytesIO(pair[0].numpy().tobytes())
    stream.seek(pair[1])
    return stream


def _from_generator(value: torch.Generator) -> Tagged:
    if value.device.type != "cpu":
        raise NotExactError(f"it is a generator of {value.device}; store its get_state() instead")
    return "generator", value.get_state()


def _to_generator(state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def _from_config(value: Any) -> Tagged:
    try:
        return "config", from_config(value)
    except NotPlainError as error:
        raise NotExactError(str(error)) from None


def _dtype(name: str) -> torch.dtype:
    return next(dtype for dtype in SAFETENSORS_DTYPE if str(dtype) == f"torch.{name}")


_ENCODERS: dict[type, Callable[[Any], Tagged]] = {
    tuple: lambda value: ("tuple", list(value)),
    torch.Size: lambda value: ("size", list(value)),
    set: lambda value: ("set", list(value)),
    OrderedDict: lambda value: ("ordered", dict(value)),
    Counter: lambda value: ("counter", dict(value)),
    bytes: lambda value: ("bytes", base64.b64encode(value).decode()),
    torch.dtype: lambda value: ("dtype" if value in SAFETENSORS_DTYPE else "torch", str(value).removeprefix("torch.")),
    torch.device: lambda value: ("device", str(value)),
    np.ndarray: _from_array,
    frozenset: lambda value: ("frozenset", list(value)),
    deque: lambda value: ("deque", [value.maxlen, list(value)]),
    defaultdict: _from_default_dict,
    MappingProxyType: lambda value: ("mappingproxy", dict(value)),
    complex: lambda value: ("complex", [value.real, value.imag]),
    range: lambda value: ("range", [value.start, value.stop, value.step]),
    slice: lambda value: ("slice", [value.start, value.stop, value.step]),
    bytearray: lambda value: ("bytearray", base64.b64encode(value).decode()),
    dt.timedelta: lambda value: ("timedelta", [value.days, value.seconds, value.microseconds]),
    **dict.fromkeys(_TIMES.values(), _from_time),
    **{kind: lambda value: ("path", [type(value).__name__, str(value)]) for kind in _PATHS.values()},
    torch.layout: lambda value: ("torch", str(value).removeprefix("torch.")),
    torch.memory_format: lambda value: ("torch", str(value).removeprefix("torch.")),
    torch.Generator: _from_generator,
    io.BytesIO: _from_stream,
    **dict.fromkeys((DictConfig, ListConfig), _from_config),
}

DECODERS: dict[str, Callable[[Any], Any]] = {
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
    "enum": _to_enum,
    "namedtuple": _to_named_tuple,
    "numpy_dtype": np.dtype,
    "raw_array": _to_array,
    "raw_scalar": lambda pair: np.frombuffer(pair[1], pair[0])[0],
    "moment": lambda pair: np.int64(pair[1]).view(pair[0]),
    "frozenset": frozenset,
    "deque": lambda pair: deque(pair[1], pair[0]),
    "defaultdict": lambda pair: defaultdict(None if pair[0] is None else _FACTORIES[pair[0]], pair[1]),
    "mappingproxy": MappingProxyType,
    "complex": lambda pair: complex(*pair),
    "range": lambda content: range(*content),
    "slice": lambda content: slice(*content),
    "bytearray": lambda text: bytearray(base64.b64decode(text)),
    "timedelta": lambda content: dt.timedelta(*content),
    "time": _to_time,
    "path": lambda pair: _PATHS[pair[0]](pair[1]),
    "torch": _TORCH_NAMES.__getitem__,
    "generator": _to_generator,
    "stream": _to_stream,
    "config": to_config,
}
"""From a tag to what makes the value of its decoded content."""
