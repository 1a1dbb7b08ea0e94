"""Who writes what: ranks that hold the same values divide the work among themselves, without communication.

Example: 4 DDP ranks hold `w` (6 rows of 16 bytes) and a bias of 16 bytes, 112 bytes in all. Laid end to end and cut
into stretches of 112 / 4 = 28 bytes, the cuts at 28, 56 and 84 move up to the next row, at 32, 64 and 96. So ranks 0 to
2 write two rows of `w` each, and rank 3 writes the bias:

    >>> w, bias = TensorSpec("w", "F32", (6, 4)), TensorSpec("bias", "F32", (4,))
    >>> for rank in range(4):
    ...     held = [LocalShard(spec, Box.whole(spec.shape), replica=(rank, 4)) for spec in (w, bias)]
    ...     print(rank, {share.spec.name: (share.start, share.stop) for share in shares(held).values()})
    0 {'w': (0, 2)}
    1 {'w': (2, 4)}
    2 {'w': (4, 6)}
    3 {'bias': (0, 4)}

With many replicas, not all of them write: of 512 that hold 1 GiB, 16 write 64 MiB each. Of 4, all do:

    >>> stretches(512, held=1 << 30, whole=1 << 30), stretches(4, held=1 << 30, whole=1 << 30)
    (16, 4)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from hydra_ckpt.layout.boxes import Box, Sharding
from hydra_ckpt.layout.specs import TensorSpec

# This many replicas always share the work: about the number on one node.
_ALWAYS = 8
# More join as long as each writes this much, and this much of a file goes to each replica with its peers: files of 5 GB
# then have about 64 writers where tensors are not sharded.
_LEAST_BYTES = 1 << 20
_FILE_STRETCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A part of a tensor that this rank holds, perhaps together with others.

    Attributes:
        spec: The whole tensor.
        box: The part held.
        replica: This rank's index among the ranks holding the same box, and their number.
        group: Equal for tensors replicated over the same ranks; these are divided together.
        divisible: False if replicas may differ (buffers): then the first of them writes it all.
    """

    spec: TensorSpec
    box: Box
    replica: tuple[int, int] = (0, 1)
    group: Hashable = None
    divisible: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the part held."""
        return self.box.numel * self.spec.itemsize


@dataclass(frozen=True, slots=True)
class WriteShare:
    """What this rank writes of a holding: its rows from `start` to `stop` of the first dimension.

    Attributes:
        spec: The whole tensor.
        box: The part to write, in the whole tensor's coordinates.
        start: First row, counted within the holding. 0 for a scalar.
        stop: Row after the last one. 1 for a scalar.
    """

    spec: TensorSpec
    box: Box
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return self.box.numel * self.spec.itemsize


def shares(holdings: Sequence[LocalShard]) -> dict[int, WriteShare]:
    """This rank's shares by the position of the holding; a holding that others write has none.

    The holdings of a group, laid end to end in the order given (the order of the files), are cut into equal
    stretches, one per replica, so few replicas share a file. Cuts fall between rows, which keeps shares boxes. If there
    are many replicas, only as many write as get a stretch large enough to be worth it.
    """
    mine: dict[int, WriteShare] = {}
    divided: dict[Hashable, list[int]] = defaultdict(list)
    for position, holding in enumerate(holdings):
        if holding.box.numel == 0:
            # Other ranks hold the tensor's elements; a tensor without elements must still be stored.
            if holding.spec.nbytes == 0 and holding.replica[0] == 0:
                mine[position] = _rows(holding, 0, _row_count(holding))
            continue
        if holding.divisible and holding.replica[1] > 1:
            divided[holding.group].append(position)
        elif holding.replica[0] == 0:
            mine[position] = _rows(holding, 0, _row_count(holding))
    for positions in divided.values():
        mine.update(_divide(holdings, positions))
    return mine


def _divide(holdings: Sequence[LocalShard], positions: Iterable[int]) -> dict[int, WriteShare]:
    """Cut one group's holdings; every replica computes the same cuts."""
    positions = list(positions)
    index, count = holdings[positions[0]].replica
    total = sum(holdings[position].nbytes for position in positions)
    parts = stretches(count, total, sum(holdings[position].spec.nbytes for position in positions))
    number = -(-index * parts // count)
    if number * count // parts != index:
        return {}  # the parts are spread evenly over the replicas; this one has none
    first, last = total * number // parts, total * (number + 1) // parts
    mine, begin = {}, 0
    for position in positions:
        holding = holdings[position]
        nbytes = holding.nbytes
        if begin + nbytes > first and begin < last:
            rows = _row_count(holding)
            row_bytes = nbytes // rows
            start, stop = (min(max(-(-(cut - begin) // row_bytes), 0), rows) for cut in (first, last))
            if start < stop:
                mine[position] = _rows(holding, start, stop)
        begin += nbytes
    return mine


def stretches(replicas: int, held: int, whole: int) -> int:
    """Into how many stretches a group is cut: if there are many replicas, not all of them should write to a file.

    Args:
        replicas: How many hold the same.
        held: Bytes that each of them holds.
        whole: Bytes of the whole tensors; the other parts are divided by other replicas in the same way.
    """
    least = max(_LEAST_BYTES, _FILE_STRETCH_BYTES * held // whole)
    return min(replicas, max(_ALWAYS, held // least))


def ranks_per_file(sharding: Sharding) -> int:
    """How many ranks would write to a file of a sharded tensor: of each shard as many replicas as always share it."""
    return sharding.shards * min(sharding.replica[1], _ALWAYS) if sharding.order else 1


def _row_count(holding: LocalShard) -> int:
    return holding.box.sizes[0] if holding.box.sizes else 1


def _rows(holding: LocalShard, start: int, stop: int) -> WriteShare:
    box = holding.box.rows(start, stop) if holding.box.sizes else holding.box
    return WriteShare(holding.spec, box, start, stop)
