"""Samples of live tensors, which reveal that a copy made later is torn.

PyTorch counts the changes of a tensor in place, but not those through `.data`, NumPy or the storage. Comparing
everything would cost what copying costs; 8 bytes of each 4 KiB cost a twentieth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch

from hydra_ckpt.storage.lanes import Pair
from hydra_ckpt.storage.memory import words_of
from hydra_ckpt.storage.pool import Buffer

_WORD = 8  # bytes
_PAGE = 512  # words
# Words from one sample to the next. A prime just below a page: every page has one sample, at a different place in each,
# so a change of every n-th element hits some of them.
_STRIDE = 509
# Moves the samples from save to save.
_SHIFT = 197


class Samples:
    """A snapshot of some bytes of tensors. Made in the training thread; compared in any.

    Tensors on an accelerator are read by kernels on its current stream, and nothing waits for them.

    Args:
        tensors: Live tensors by key, each larger than a page.
        casts: Element types of the copies, where they are not the tensors' own.
        buffer: Lends the memory, and chooses the places within the pages.

    Attributes:
        pending: What has to be copied to host memory before the comparison.
    """

    def __init__(self, tensors: Mapping[int, torch.Tensor], casts: Mapping[int, torch.dtype], buffer: Buffer) -> None:
        self._phase = buffer.turn * _SHIFT % _STRIDE
        self._casts = casts
        self._words: dict[int, torch.Tensor] = {}
        self._dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
        self._picked: dict[int, tuple[torch.Tensor, torch.Size, list[int]]] = {}
        self.pending: list[Pair] = []
        kept: dict[torch.device, dict[int, list[range]]] = defaultdict(dict)
        for key, tensor in tensors.items():
            if _is_in_words(tensor):
                kept[tensor.device][key] = _places(tensor.nbytes // _WORD, self._phase)
            else:
                self._pick(key, tensor)
        sizes = [sum(map(len, places)) for found in kept.values() for places in found.values()]
        parts = iter(torch.split(buffer.words(sum(sizes)), sizes))
        for device, found in kept.items():
            words = {key: next(parts) for key in found}
            self._words.update(words)
            if device.type == "cpu":
                whole = ((words_of(tensors[key]), places) for key, places in found.items())
                views = [memory[_slice(span)] for memory, places in whole for span in places]
                np.concatenate(views, out=words_of(_joined(words)))
            else:  # untested on GPU
                self.pending.append((_joined(words), _gather(tensors, found)))

    def _pick(self, key: int, tensor: torch.Tensor) -> None:
        order = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
        picked = _elements(tensor.permute(order), self._phase)
        if picked.device.type != "cpu":  # untested on GPU
            self.pending.append((torch.empty_like(picked, device="cpu"), picked))
            picked = self.pending[-1][0]
        self._picked[key] = picked, tensor.shape, order

    @torch.no_grad()
    def unlike(self, copies: Mapping[int, memoryview]) -> list[int]:
        """The keys of tensors whose copies do not agree with the samples.

        Args:
            copies: Key to the row-major bytes of its copy.
        """
        exact = [key for key in self._words if key not in self._casts]
        # By NumPy, which keeps the interpreter's lock: PyTorch would wait for it again after each of many small calls.
        there = [self._same_words(copies[key]) for key in exact]
        saved = [words_of(self._words[key]) for key in exact]
        found = [key for key, a, b in zip(exact, there, saved, strict=True) if not np.array_equal(a, b)]
        found += [key for key in self._words if key in self._casts and not self._is_cast(key, copies[key])]
        return found + [key for key in self._picked if not self._is_picked(key, copies[key])]

    def _same_words(self, copy: memoryview) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        words = np.frombuffer(copy, np.int64, len(copy) // _WORD)
        return np.concatenate([words[_slice(places)] for places in _places(len(words), self._phase)])

    def _is_cast(self, key: int, copy: memoryview) -> bool:
        """Whether the copy has the samples' values in its own element type."""
        dtype = self._casts[key]
        elements = torch.frombuffer(copy, dtype=dtype)
        each = _WORD // self._dtypes[key].itemsize
        number = len(elements) // each
        rows = elements[: number * each].view(number, each)
        there = torch.cat([rows[_slice(places)] for places in _places(number, self._phase)])
        return _equal(self._words[key].view(self._dtypes[key]).to(dtype), there.flatten())

    def _is_picked(self, key: int, copy: memoryview) -> bool:
        picked, shape, order = self._picked[key]
        dtype = self._casts.get(key, picked.dtype)
        there = _elements(torch.frombuffer(copy, dtype=dtype).view(shape).permute(order), self._phase, picked.dtype)
        if dtype != picked.dtype:
            return _equal(picked.to(dtype), there)
        return torch.equal(_bytes(picked), _bytes(there))


def _is_in_words(tensor: torch.Tensor) -> bool:
    """Whether its memory can be read as words that begin where it begins."""
    aligned = tensor.storage_offset() * tensor.element_size() % _WORD == 0
    return aligned and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _joined(parts: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The memory of parts that are contiguous with each other."""
    first = next(iter(parts.values()))
    return first.as_strided((sum(part.numel() for part in parts.values()),), (1,))


def _gather(tensors: Mapping[int, torch.Tensor], found: Mapping[int, list[range]]) -> torch.Tensor:
    """The words of contiguous tensors of one accelerator at these places, copied there. Untested on GPU."""
    views = []
    for key, places in found.items():
        tensor = tensors[key]
        start = tensor.storage_offset() * tensor.element_size() // _WORD
        words = torch.empty(0, dtype=torch.int64, device=tensor.device)
        words.set_(tensor.untyped_storage(), start, (tensor.nbytes // _WORD,), (1,))
        views += [words[_slice(span)] for span in places]
    return torch.cat(views)


def _places(words: int, phase: int) -> list[range]:
    """One word of each page of this many words; the last page may be incomplete."""
    spread = range(phase, words, _STRIDE)
    return [spread, range(words - 1, words)] if words % _PAGE else [spread]


def _slice(places: range) -> slice:
    return slice(places.start, places.stop, places.step)


def _elements(tensor: torch.Tensor, phase: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy of the elements that make up a word in each page of a tensor of any strides.

    Args:
        tensor: With its dimensions in the order of memory, the slowest first.
        phase: Where in the first page.
        dtype: The element type that pages are counted in; None for the tensor's.
    """
    each = max(_WORD // (dtype or tensor.dtype).itemsize, 1)
    number, device = tensor.numel() // each, tensor.device
    places = _places(number, phase)
    words = torch.cat([torch.arange(found.start, found.stop, found.step, device=device) for found in places])
    index = (words[:, None] * each + torch.arange(each, device=device)).flatten()
    coordinates = []
    for size in reversed(tensor.shape):  # torch.unravel_index would wait for an accelerator
        coordinates.append(index % size)
        index = index // size
    return tensor[tuple(reversed(coordinates))]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().view(torch.uint8)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the values are equal; a NaN may have different bits afterwards."""
    return torch.allclose(one.double(), other.double(), rtol=0, atol=0, equal_nan=True)
