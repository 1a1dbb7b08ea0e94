"""Writing a plan: every piece of every share to its place, digested on the way and durable at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.files import Files, OpenFile
from hydra_ckpt.layout.boxes import ByteRuns
from hydra_ckpt.layout.plan import WriteItem, WritePlan
from hydra_ckpt.storage.digests import Digested, digest_of

_RETRY_S = 0.01


def create_files(files: Files, root: Path, plan: WritePlan) -> list[Digested]:
    """Coordinator only: create the files that ranks fill together, with their headers, at full size.

    Returns:
        The headers' digests.
    """
    return [_create(files, root, plan, index) for index in range(len(plan.files))]


def _create(files: Files, root: Path, plan: WritePlan, index: int, *, named_last: bool = False) -> Digested:
    layout = plan.all_files[index]
    target = root / layout.path
    path = target.with_name(f".{target.name}.new") if named_last else target
    files.allocate(path, layout.nbytes)
    with files.open(path) as file:
        file.write_at(0, layout.header)
        file.sync()
    if named_last:
        files.rename(path, target)
    return Digested(index, ByteRuns(0, len(layout.header)), digest_of(layout.header))


def create_own_files(files: Files, root: Path, plan: WritePlan, *, patience_s: float = 60.0) -> list[Digested]:
    """Create this rank's own files and those of its blocks that it leads; wait for those that others lead.

    A file that others wait for gets its name last: one that is found has its header and its full size.

    Args:
        files: The file layer.
        root: The draft's directory.
        plan: This rank's.
        patience_s: How long to wait for other ranks' files, in seconds.

    Returns:
        The headers' digests.

    Raises:
        CheckpointError: A file of a block does not appear.
    """
    records = []
    for index in plan.created:
        shared = index >= len(plan.files) + len(plan.own_files)
        records.append(_create(files, root, plan, index, named_last=shared))
    deadline = time.monotonic() + patience_s
    for path in (root / file.path for file in plan.block_files):
        while not path.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{path} did not appear within {patience_s:g} s: the first rank of its block has not created it. "
                    "That rank has failed or is late; if it is alive, check that all hosts share the directory"
                )
            time.sleep(_RETRY_S)
    return records


def write_plan(
    files: Files, root: Path, plan: WritePlan, sources: Mapping[int, memoryview], *, start_with: int = 0
) -> list[Digested]:
    """Write this rank's part of a plan, durably.

    Args:
        files: The file layer.
        root: The draft's directory, in which all of the plan's files have been created.
        plan: What goes where.
        sources: The bytes of each share, by the plan's position of the share.
        start_with: The file to begin with, so that ranks do not queue on the same one.

    Returns:
        A digest for every piece written.
    """
    records: list[Digested] = []
    count = max(len(plan.all_files), 1)
    ordered = sorted(plan.pieces, key=lambda piece: ((piece.file - start_with) % count, piece.region.offset))
    for index, pieces in groupby(ordered, key=lambda piece: piece.file):
        with files.open(root / plan.all_files[index].path, direct=index in plan.direct) as file:
            records += [_write(file, piece, sources) for piece in pieces]
            file.sync()
    return records


def digests_below(plan: WritePlan, sources: Mapping[int, memoryview], prefix: str) -> list[Digested]:
    """The digests that `write_plan` would return for the pieces of files below `prefix`; nothing is written."""
    return [
        Digested(piece.file, piece.region, digest_of(_data(piece, sources)))
        for piece in plan.pieces
        if plan.all_files[piece.file].path.startswith(prefix)
    ]


def _data(piece: WriteItem, sources: Mapping[int, memoryview]) -> memoryview:
    return sources[piece.share][piece.start : piece.start + piece.region.nbytes]


def _write(file: OpenFile, piece: WriteItem, sources: Mapping[int, memoryview]) -> Digested:
    region, data = piece.region, _data(piece, sources)
    if region.count == 1:
        file.write_at(region.offset, data)
    else:
        file.write_runs(region.offset, region.run, region.count, region.stride, data)
    return Digested(piece.file, region, digest_of(data))
