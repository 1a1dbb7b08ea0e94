"""Tensor subclasses that wrap other tensors, such as torchao's 8-bit optimizer states: taken apart and put together.

PyTorch's protocol for them (`__tensor_flatten__`, `__tensor_unflatten__`) gives their inner tensors by name and the
rest as plain data. A class is looked up among the modules that are imported already; nothing is imported because a
checkpoint names it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hydra_ckpt.errors import CheckpointError, CorruptCheckpointError

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor as it is, subclass or not; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # noqa: SLF001 - to_local() costs a view


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory itself but wraps tensors that have."""
    if type(tensor) in _PLAIN or isinstance(tensor, DTensor | AsyncCollectiveTensor):
        return False  # the last is the result of a collective that is still under way
    return bool(is_traceable_wrapper_subclass(tensor))


def inner_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a wrapper that only adds behaviour to one tensor of its shape and type; else the tensor itself.

    So are the weights that torchao casts to float8 when FSDP2 gathers them.
    """
    if not is_wrapper(tensor):
        return tensor
    attributes, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = getattr(tensor, attributes[0]) if len(attributes) == 1 else tensor
    is_same = (inner.dtype, inner.shape, inner.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    return inner_memory(inner) if inner is not tensor and is_same else tensor


def addresses(tensor: torch.Tensor) -> list[int]:
    """Where the memory of this rank's part of a tensor begins; several of a wrapper."""
    local = local_part(tensor)
    if not is_wrapper(local):
        return [local.data_ptr()]
    attributes, _ = local.__tensor_flatten__()  # type: ignore[attr-defined]
    return [address for name in attributes for address in addresses(getattr(local, name))]


def check_wrapper(tensor: torch.Tensor) -> None:
    """Check that a wrapper can be found again by the name of its class.

    Raises:
        CheckpointError: It cannot.
    """
    kind = type(tensor)
    if _find(kind.__module__, kind.__qualname__) is not kind:
        raise CheckpointError(
            f"the class {kind.__module__}.{kind.__qualname__} cannot be found by its name; define it at the top of a "
            "module"
        )


def take_apart(tensor: torch.Tensor) -> dict[str, Any]:
    """A wrapper as plain data and its inner tensors, which may be wrappers themselves."""
    attributes, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return {
        "class": [type(tensor).__module__, type(tensor).__qualname__],
        "context": context,
        "inner": {name: getattr(tensor, name) for name in attributes},
        "size": list(tensor.shape),
        "stride": list(tensor.stride()),
    }


def put_together(data: Any) -> torch.Tensor:
    """The wrapper that `take_apart` was given.

    Raises:
        CorruptCheckpointError: The class is not imported here, or is not such a wrapper.
    """
    module, name = data["class"]
    kind = _find(module, name)
    if not (isinstance(kind, type) and issubclass(kind, torch.Tensor) and hasattr(kind, "__tensor_unflatten__")):
        raise CorruptCheckpointError(
            "progress",
            f"{module}.{name} is not a tensor subclass that is imported here; import its module before loading",
        )
    found: torch.Tensor = kind.__tensor_unflatten__(
        data["inner"], data["context"], torch.Size(data["size"]), tuple(data["stride"])
    )
    return found


def _find(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for word in name.split("."):
        found = getattr(found, word, None)
    return found
