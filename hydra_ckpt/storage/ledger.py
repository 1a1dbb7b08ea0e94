"""A ledger of digests: which ones were compared while bytes were read anyway, and which are left."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hydra_ckpt.layout.boxes import ByteRuns
from hydra_ckpt.layout.plan import cells
from hydra_ckpt.storage.digests import Check

Span = tuple[int, int]


class Ledger:
    """The digests of one checkpoint and which of them this rank has compared.

    Bytes are compared as they are read: a cell's bytes are digested while they are still in the processor's cache.

    Args:
        checks: Everything that can be compared, in an order that is the same on all ranks.
    """

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = checks
        self._done: set[int] = set()
        self._strided: dict[tuple[str, ByteRuns], int] = {}
        self._plain: dict[str, list[tuple[int, int, int]]] = {}  # offset, end, index
        for index, check in enumerate(checks):
            region = check.region
            if region.count > 1:
                self._strided[check.file, region] = index
            else:
                self._plain.setdefault(check.file, []).append((region.offset, region.offset + region.run, index))
        for starts in self._plain.values():
            starts.sort()

    def pieces(self, file: str, region: ByteRuns) -> Iterator[tuple[ByteRuns, int | None]]:
        """A region cut so that each piece has the bytes of one digest, or belongs to no complete digest (None)."""
        if region.count > 1:
            for cell in cells(region):
                yield cell, self._strided.get((file, cell))
            return
        starts = self._plain.get(file, [])
        position, limit = region.offset, region.offset + region.run
        for at in range(bisect_left(starts, (position,)), len(starts)):
            offset, end, index = starts[at]
            if end > limit:
                break
            if offset < position:
                continue  # an overlapping digest; it is compared with what is left
            if offset > position:
                yield ByteRuns(position, offset - position), None
            yield ByteRuns(offset, end - offset), index
            position = end
        if position < limit:
            yield ByteRuns(position, limit - position), None

    def compare(self, root: Path, index: int, data: memoryview) -> None:
        """Compare the bytes of one digest.

        Raises:
            CorruptCheckpointError: They are not what was written.
        """
        self._checks[index].compare(root, data)
        self._done.add(index)

    def done(self) -> list[Span]:
        """The digests this rank has compared: first byte and the byte after the last of each unbroken row."""
        return _joined((index, index + 1) for index in self._done)

    def left(self, done: Iterable[Span]) -> list[Check]:
        """The checks outside these spans."""
        position = 0
        found: list[Check] = []
        for first, behind in _joined(done):
            found += self._checks[position:first]
            position = max(position, behind)
        return [*found, *self._checks[position:]]


def join(spans: Sequence[Sequence[Sequence[int]]]) -> list[Span]:
    """Coordinator only: merge what the ranks have compared."""
    return _joined((first, behind) for own in spans for first, behind in own)


def _joined(spans: Iterable[Span]) -> list[Span]:
    found: list[Span] = []
    for first, behind in sorted(spans):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], behind))
        else:
            found.append((first, behind))
    return found
