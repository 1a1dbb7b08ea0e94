"""Host memory for snapshots, allocated once and reused from save to save, and the positions of the tensors in it.

Pages touched for the first time cost five to twenty times the copy itself; a pool that keeps its buffers pays this cost
once. A buffer is lent to one snapshot at a time and comes back when that snapshot is released.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from hydra_ckpt.storage.memory import bytes_of, resident

SMALL_BYTES = 32 << 10
"""Tensors up to this size are copied in `save()`: copying one is as fast as taking samples of it."""

# Starts of tensors in a buffer: a cache line, and a multiple of every element size.
_ALIGNMENT = 64
# Fewer small tensors of a kind are not worth a separate call.
_LEAST_PACKED = 4
# One sample of a page, and a few at the ends of tensors.
_BYTES_A_WORD = 2048
# A run alternates between few layouts.
_MAX_LAYOUTS = 4
_NO_CASTS: Mapping[int, torch.dtype] = {}


@dataclass(frozen=True)
class BufferSlice:
    """The place of one tensor, or of several of a kind side by side, in a buffer.

    Attributes:
        start: Offset in bytes.
        dtype: The element type there.
        shape: The shape; with several tensors their number comes first.
    """

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """This part of a buffer's memory."""
        return memory[self.start : self.start + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """The positions of a snapshot's tensors in a buffer.

    Attributes:
        kinds: What it depends on: the key, element type in the buffer and of the tensor, shape and device of each
            tensor.
        packs: Small tensors of one kind, which one call copies: their keys and their place.
        single: Key to place, of all others.
        nbytes: Size of the buffer.
    """

    kinds: tuple[tuple[object, ...], ...]
    packs: tuple[tuple[tuple[int, ...], BufferSlice], ...]
    single: Mapping[int, BufferSlice]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[int, torch.Tensor], casts: Mapping[int, torch.dtype] = _NO_CASTS) -> Layout:
        """Lay tensors out.

        Args:
            tensors: Tensors by key.
            casts: Element types of the copies, where they are not the tensors' own.
        """
        kinds = _kinds(tensors, casts)
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for kind, tensor in zip(kinds, tensors.values(), strict=True):
            if 0 < tensor.nbytes <= SMALL_BYTES and kind[1] == kind[2]:
                groups[kind[2:]].append(kind[0])
        packs, end = [], 0
        for keys in groups.values():
            if len(keys) >= _LEAST_PACKED:
                like = tensors[keys[0]]
                packs.append((tuple(keys), BufferSlice(end, like.dtype, (len(keys), *like.shape))))
                end = _next(packs[-1][1])
        packed = {key for keys, _ in packs for key in keys}
        single = {}
        for key, dtype, _, shape, _ in kinds:
            if key not in packed:
                single[key] = BufferSlice(end, dtype, tuple(shape))
                end = _next(single[key])
        return cls(kinds, tuple(packs), single, end)


def _kinds(
    tensors: Mapping[int, torch.Tensor], casts: Mapping[int, torch.dtype]
) -> tuple[tuple[int, torch.dtype, torch.dtype, torch.Size, int], ...]:
    return tuple(
        (key, casts.get(key, tensor.dtype), tensor.dtype, tensor.shape, tensor.get_device())
        for key, tensor in tensors.items()
    )


def _next(place: BufferSlice) -> int:
    return place.start + -(-place.nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Slots:
    """A layout in the memory of one buffer.

    Attributes:
        layout: The layout.
        packs: The keys of each pack and its memory.
        targets: Key to memory, of the right element type and shape.
        views: The same as bytes.
    """

    layout: Layout
    packs: tuple[tuple[tuple[int, ...], torch.Tensor], ...]
    targets: Mapping[int, torch.Tensor]
    views: Mapping[int, memoryview]

    @classmethod
    def make(cls, layout: Layout, memory: torch.Tensor) -> Slots:
        """Make the views, which takes longer than copying small tensors does."""
        packs = tuple((keys, place.view(memory)) for keys, place in layout.packs)
        targets = {key: place.view(memory) for key, place in layout.single.items()}
        views = {key: bytes_of(target) for key, target in targets.items()}
        for keys, target in packs:
            targets.update(zip(keys, target.unbind(), strict=True))
            views.update(zip(keys, _cut(bytes_of(target), len(keys)), strict=True))
        return cls(layout, packs, targets, views)


def _cut(data: memoryview, number: int) -> Iterator[memoryview]:
    size = len(data) // number
    return (data[start : start + size] for start in range(0, len(data), size))


class Buffer:
    """Host memory for the tensors of one snapshot, with the views into it that the last ones needed.

    Args:
        nbytes: Its size.
        pinned: Whether it is page-locked.

    Attributes:
        turn: How many snapshots it has held.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = self._allocate(nbytes)
        self._slots: Slots | None = None
        self._words = torch.empty(0, dtype=torch.int64, device="cpu")
        self.turn = 0

    def _allocate(self, nbytes: int) -> torch.Tensor:
        if not self._pinned:
            return resident(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._memory.numel()

    def slots(self, layout: Layout) -> Slots:
        """A place for each tensor; the same object for the same layout."""
        self.turn += 1
        if self._slots is None or (self._slots.layout is not layout and self._slots.layout.kinds != layout.kinds):
            self._slots = Slots.make(layout, self._memory)
        return self._slots

    def words(self, number: int) -> torch.Tensor:
        """Memory for this many samples of the snapshot, int64 of shape (number,); kept like the rest."""
        if self._words.numel() < number:
            self._words = self._allocate(8 * number).view(torch.int64)
        return self._words[:number]


class BufferPool:
    """Buffers that outlive a save. Safe to use from several threads.

    Args:
        pinned: Allocate page-locked memory, for copies from an accelerator. Untested on GPU.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: list[Buffer] = []
        self._layouts: list[tuple[object, list[int], Layout]] = []
        self._lock = threading.Lock()

    def layout(
        self, tensors: Mapping[int, torch.Tensor], casts: Mapping[int, torch.dtype] = _NO_CASTS, plan: object = None
    ) -> Layout:
        """How to lay tensors out.

        Args:
            tensors: Tensors by key.
            casts: Element types of the copies, where they are not the tensors' own.
            plan: The object that determines keys, element types and shapes. Layouts are cached by the identity of this
                object, because reading the shapes of thousands of tensors takes longer than copying small ones.
        """
        if plan is None:
            return Layout.of(tensors, casts)
        devices = [tensor.get_device() for tensor in tensors.values()]
        with self._lock:
            for known, places, layout in self._layouts:
                if known is plan and places == devices:
                    return layout
            layout = Layout.of(tensors, casts)
            self._layouts = [(plan, devices, layout), *self._layouts][:_MAX_LAYOUTS]
        return layout

    def prewarm(self, nbytes: int) -> None:
        """Allocate and touch a buffer of at least this size, unless one is free, and memory for its samples."""
        buffer = self.take(nbytes)
        buffer.words(nbytes // _BYTES_A_WORD)
        self.give_back(buffer)

    def holds(self, nbytes: int) -> bool:
        """Whether `take` would find a buffer of this size, and allocate none."""
        with self._lock:
            return any(buffer.nbytes >= nbytes for buffer in self._free)

    def take(self, nbytes: int) -> Buffer:
        """A buffer of at least `nbytes`; its pages are resident."""
        with self._lock:
            fitting = [buffer for buffer in self._free if buffer.nbytes >= nbytes]
            # Only buffers that fit are worth keeping: buffers that became too small are freed.
            self._free = fitting[1:]
        return fitting[0] if fitting else Buffer(nbytes, pinned=self._pinned)

    def give_back(self, buffer: Buffer) -> None:
        """Return a buffer that is no longer in use."""
        with self._lock:
            self._free.append(buffer)

    def clear(self) -> None:
        """Free all buffers that are not lent."""
        with self._lock:
            self._free, self._layouts = [], []
