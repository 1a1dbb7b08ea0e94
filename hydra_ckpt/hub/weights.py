"""Reads the weights of a reference model box by box, and dequantizes them if they are FP8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Protocol

import torch

from hydra_ckpt.errors import CheckpointConfigError, CheckpointNotFoundError, CorruptCheckpointError
from hydra_ckpt.hub.reference import Reference
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.dtypes import TORCH_DTYPE, safetensors_dtype
from hydra_ckpt.storage.memory import narrow
from hydra_ckpt.storage.pickled import load_pickled
from hydra_ckpt.storage.read import Fetch, fetch

_BLOCK_BYTES = 64 << 20
_FP8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
# Quantization methods whose FP8 weights have separate scales; others pack their values in their own ways.
_FP8_METHODS = {"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"}
_SCALES = ("_scale_inv", "_scale")
# Activation scales of quantized models; a dequantized model does not need them.
_ACTIVATION_SCALES = ("input_scale", "activation_scale", "input_global_scale")


@dataclass(frozen=True)
class ReadRequest:
    """A box of a reference's tensor, and the tensor that receives it: of the same shape and any dtype.

    The box may refer to a finer grid of the tensor, of shape `grid`.
    """

    name: str
    box: Box
    into: torch.Tensor
    grid: tuple[int, ...] = ()


class Weights(Protocol):
    """A reference model's tensors."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The specs of all tensors, by name."""

    def read(self, wanted: Sequence[ReadRequest]) -> int:
        """Read boxes; returns the bytes read."""


class SafetensorsWeights:
    """Weights in safetensors files.

    Args:
        reference: Where they are stored.
    """

    def __init__(self, reference: Reference) -> None:
        self._root = reference.root
        self._stored: Mapping[str, StoredTensor] = reference.tensors()

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """See `Weights`; in file order."""
        ordered = sorted(self._stored.values(), key=lambda item: (item.chunks[0].file, item.chunks[0].offset))
        return {item.spec.name: item.spec for item in ordered}

    def read(self, wanted: Sequence[ReadRequest]) -> int:
        """See `Weights`."""
        return fetch(self._root, (found for item in wanted for found in self._fetches(item)))

    def _fetches(self, item: ReadRequest) -> Iterator[Fetch]:
        stored = self._stored[item.name]
        stored = stored.on_grid(item.grid) if item.grid else stored
        for part in _blocks(item.box, stored.spec):
            yield Fetch(stored, part, item.into if part is item.box else narrow(item.into, part.within(item.box)))


class PickledWeights:
    """Weights in PyTorch's `.bin` files.

    Args:
        reference: Where they are stored.
    """

    def __init__(self, reference: Reference) -> None:
        missing = [name for name in reference.pickled if not reference.has(name)]
        if missing:
            raise CheckpointNotFoundError(f"{reference.directory}: files are missing: {', '.join(missing)}")
        self._tensors: dict[str, torch.Tensor] = {}
        for name in reference.pickled:
            self._tensors.update(load_pickled(reference.root / reference.inside(name)))

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """See `Weights`."""
        return {
            name: TensorSpec(name, safetensors_dtype(name, tensor.dtype), tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, wanted: Sequence[ReadRequest]) -> int:
        """See `Weights`."""
        sources = [narrow(self._on_grid(item), item.box) for item in wanted]
        for item, source in zip(wanted, sources, strict=True):
            item.into.copy_(source)
        return sum(source.nbytes for source in sources)

    def _on_grid(self, item: ReadRequest) -> torch.Tensor:
        tensor = self._tensors[item.name]
        return tensor.reshape(item.grid) if item.grid else tensor


def _blocks(box: Box, spec: TensorSpec) -> Iterator[Box]:
    """Split a box into parts, to bound the memory that a change of dtype takes."""
    if box.numel * spec.itemsize <= _BLOCK_BYTES or not box.sizes:
        yield box
        return
    row_bytes = box.numel // box.sizes[0] * spec.itemsize
    step = max(_BLOCK_BYTES // max(row_bytes, 1), 1)
    for start in range(0, box.sizes[0], step):
        yield box.rows(start, min(start + step, box.sizes[0]))


class Dequantized:
    """Converts FP8 weights to the values they represent.

    Args:
        weights: The stored weights.
        config: The reference's `quantization_config`.
        permitted: `checkpoint.dequantize_base_checkpoint`.

    Raises:
        CheckpointConfigError: Dequantizing is forbidden, or the quantization is not FP8 with scales.
    """

    def __init__(self, weights: Weights, config: Mapping[str, Any], permitted: bool | None) -> None:
        self._weights = weights
        specs = weights.specs
        self._scales = {
            name: name + end
            for name, spec in specs.items()
            for end in _SCALES
            if spec.dtype in _FP8 and name + end in specs
        }
        # The first spelling wins if both exist.
        method = config.get("quant_method")
        if method is not None and (method not in _FP8_METHODS or not self._scales):
            raise CheckpointConfigError(
                f"the reference model is quantized by {method} (quantization_config.quant_method in its config.json) "
                "in a way this version cannot read; it reads FP8 with scales per block, per channel or per tensor. "
                "Use an unquantized copy of the model"
            )
        if self._scales and permitted is False:
            raise CheckpointConfigError(
                "checkpoint.dequantize_base_checkpoint=false, but the reference model is quantized "
                f"({next(iter(self._scales))}); set it to null or true, or use an unquantized copy"
            )
        self._block = _block_size(config)
        for name, scale in self._scales.items():
            self._check_scale(name, specs[name].shape, specs[scale].shape)

    def _check_scale(self, name: str, shape: tuple[int, ...], scale: tuple[int, ...]) -> None:
        """Check that a weight's scales have a readable shape, before anything is read."""
        rows = scale == shape[:1]
        if prod(scale) == 1 or rows:
            return
        blocks = len(scale) == len(shape) and all(
            -(-size // step) == count for size, step, count in zip(shape, self._steps(shape, scale), scale, strict=True)
        )
        if not blocks:
            raise CorruptCheckpointError(
                self._scales[name],
                f"its shape {list(scale)} fits neither blocks of {list(self._block)} nor the rows of {name}, whose "
                f"shape is {list(shape)}. The block size is set in config.json (quantization_config.weight_block_size)",
            )

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """See `Weights`; scales are left out."""
        scales = set(self._scales.values())
        return {
            name: spec
            for name, spec in self._weights.specs.items()
            if name not in scales and not (self._scales and name.endswith(_ACTIVATION_SCALES))
        }

    def read(self, wanted: Sequence[ReadRequest]) -> int:
        """See `Weights`; a target of FP8 gets the stored values."""
        scaled = [item for item in wanted if self._is_scaled(item)]
        plain = [item for item in wanted if not self._is_scaled(item)] if scaled else wanted
        return self._weights.read(plain) + sum(self._read_scaled(item) for item in scaled)

    def _is_scaled(self, item: ReadRequest) -> bool:
        stored = self._weights.specs[item.name].dtype
        if stored not in _FP8 or item.into.dtype == TORCH_DTYPE[stored]:
            return False
        if item.name not in self._scales:
            raise CheckpointConfigError(f"{item.name} is FP8, but there is no scale for it ({item.name}_scale_inv)")
        return True

    def _read_scaled(self, item: ReadRequest) -> int:
        name, box = item.name, item.box
        spec = self._weights.specs[name]
        if item.grid:
            whole = torch.empty(spec.shape, dtype=item.into.dtype, device="cpu")
            total = self._read_scaled(ReadRequest(name, Box.whole(spec.shape), whole))
            item.into.copy_(narrow(whole.view(item.grid), box))
            return total
        scales, total = self._read_all(self._scales[name])
        factors = self._factors(spec, scales)
        for part in _blocks(box, TensorSpec(name, "F32", spec.shape)):
            stored = torch.empty(part.sizes, dtype=TORCH_DTYPE[spec.dtype], device="cpu")
            total += self._weights.read([ReadRequest(name, part, stored)])
            values = stored.to(torch.float32)
            if factors is None:
                values *= scales.reshape(())
            else:
                values *= _spread(factors, part, self._steps(spec.shape, tuple(factors.shape)))
            narrow(item.into, part.within(box)).copy_(values)
        return total

    def _read_all(self, name: str) -> tuple[torch.Tensor, int]:
        spec = self._weights.specs[name]
        found = torch.empty(spec.shape, dtype=torch.float32, device="cpu")
        if spec.dtype in ("U8", "F8_E8M0"):
            # Powers of two stored as exponents, as in the microscaling formats.
            raw = torch.empty(spec.shape, dtype=TORCH_DTYPE[spec.dtype], device="cpu")
            count = self._weights.read([ReadRequest(name, Box.whole(spec.shape), raw)])
            return (raw.to(torch.float32) if spec.dtype == "F8_E8M0" else (raw.to(torch.float32) - 127).exp2()), count
        return found, self._weights.read([ReadRequest(name, Box.whole(spec.shape), found)])

    def _factors(self, spec: TensorSpec, scales: torch.Tensor) -> torch.Tensor | None:
        """The scales, with as many dimensions as the weight; None if one scale applies to all elements."""
        if scales.numel() == 1:
            return None
        return scales.reshape(-1, *[1] * (len(spec.shape) - 1)) if tuple(scales.shape) == spec.shape[:1] else scales

    def _steps(self, shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
        """How many elements share a scale along each dimension."""
        blocks = (*(1,) * (len(shape) - 2), *self._block)[-len(shape) :]
        return tuple(
            1 if count == size else (max(size, 1) if count == 1 else block)
            for size, count, block in zip(shape, scale, blocks, strict=True)
        )


def _block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    found = config.get("weight_block_size") or (128, 128)
    try:
        rows, columns = (int(size) for size in found)
    except (TypeError, ValueError):
        raise CheckpointConfigError(f"quantization_config.weight_block_size={found} is not two numbers") from None
    if rows < 1 or columns < 1:
        raise CheckpointConfigError(f"quantization_config.weight_block_size={found} must be positive")
    return rows, columns


def _spread(factors: torch.Tensor, box: Box, steps: tuple[int, ...]) -> torch.Tensor:
    """The factor of every element of a box; has the box's shape, or can be broadcast to it."""
    for dim, (start, size, step) in enumerate(zip(box.offsets, box.sizes, steps, strict=True)):
        factors = factors.index_select(dim, torch.arange(start, start + size, device=factors.device) // step)
    return factors
