"""Element types: PyTorch's and safetensors' names for them."""

from __future__ import annotations

import torch

from hydra_ckpt.errors import CheckpointConfigError

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
