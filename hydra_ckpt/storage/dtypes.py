"""What files can hold: element types by PyTorch's and safetensors' names, kinds of tensors, names."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from hydra_ckpt.errors import CheckpointConfigError, leave_out
from hydra_ckpt.storage.header import LIMIT, MAX_DIMENSIONS
from hydra_ckpt.storage.subclasses import inner_memory, is_wrapper, local_part

TORCH_DTYPE: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
SAFETENSORS_DTYPE = {dtype: name for name, dtype in TORCH_DTYPE.items()}
# The first is the header's own key, the second marks values in progress files that JSON cannot express.
_RESERVED_NAMES = frozenset({"__metadata__", "~"})


def check_name(name: str) -> None:
    """Check that files can hold a tensor of this name.

    Raises:
        CheckpointConfigError: They cannot.
    """
    if name in _RESERVED_NAMES:
        raise CheckpointConfigError(
            f"no tensor can be stored under the name {name!r}, which the files use themselves; rename the parameter or "
            "buffer, or keep it in a submodule"
        )
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise CheckpointConfigError(f"the name {name!a} of a tensor is not valid Unicode text; rename it")


def check_storable(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor's elements are separate in memory, and that a file can hold its name and its shape.

    Raises:
        CheckpointConfigError: It has not.
    """
    check_name(name)
    if is_lazy(tensor):
        raise CheckpointConfigError(
            f"{name} is not initialized yet, as in LazyLinear: run one forward pass before its state is saved or loaded"
        )
    if is_wrapper(inner_memory(local_part(tensor))):
        raise CheckpointConfigError(
            f"{name} is a {type(local_part(tensor)).__qualname__}, a tensor that wraps others, which only the state of "
            "optimizers and extras may be: load the model's weights as ordinary tensors and convert them after "
            f"loading, {leave_out(f'model.{name}')}"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise CheckpointConfigError(
            f"{name}: tensors of the layout {kind} cannot be stored; keep a dense one (.to_dense()), "
            "or register the buffer with persistent=False"
        )
    if tensor.dim() > MAX_DIMENSIONS or max(tensor.shape, default=0) >= LIMIT:
        raise CheckpointConfigError(
            f"{name} has {tensor.dim()} dimensions, the longest of {max(tensor.shape)}; a stored tensor has at most "
            f"{MAX_DIMENSIONS}, each shorter than 2**{LIMIT.bit_length() - 1}. Reshape it"
        )


def check_elements_apart(kind: str, name: str, tensor: torch.Tensor) -> None:
    """Check that no two elements of a live tensor are one in memory, as in an expanded view.

    Args:
        kind: What it is, for the message.
        name: Its name.
        tensor: A strided tensor.

    Raises:
        CheckpointConfigError: Some are.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.numel() and any(
        stride == 0 and size > 1 for stride, size in zip(local.stride(), local.shape, strict=True)
    ):
        raise CheckpointConfigError(
            f"the {kind} {name} is an expanded view whose elements share memory, so that no value can be loaded into "
            "it; register it with .contiguous()"
        )


def safetensors_dtype(name: str, dtype: torch.dtype) -> str:
    """The format's name of a tensor's element type.

    Raises:
        CheckpointConfigError: The format has none.
    """
    try:
        return SAFETENSORS_DTYPE[dtype]
    except KeyError:
        raise CheckpointConfigError(
            f"{name}: safetensors cannot store elements of {dtype}; convert the tensor, "
            f"or keep it out of the state (supported: {', '.join(map(str, SAFETENSORS_DTYPE))})"
        ) from None
