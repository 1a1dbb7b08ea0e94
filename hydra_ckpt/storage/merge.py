"""The second way to write consolidated files: one rank merges the ranks' shard files, in bounded memory.

For file systems on which several hosts cannot write ranges of one file, and for settings where only one rank writes the
export. Files are written from front to back; with a staging directory they are built there and then copied into place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from hydra_ckpt.files import Files
from hydra_ckpt.layout.aliases import SliceMapping, TensorMapping
from hydra_ckpt.layout.boxes import Box, ByteRuns
from hydra_ckpt.layout.file_layout import FileLayout
from hydra_ckpt.layout.plan import CELL_BYTES, StoredTensor
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.digests import Digested, digest_of
from hydra_ckpt.storage.dtypes import TORCH_DTYPE
from hydra_ckpt.storage.header import read_tensors
from hydra_ckpt.storage.memory import bytes_of, narrow, view_as
from hydra_ckpt.storage.read import Fetch, fetch
from hydra_ckpt.store import names

# Small enough that the allocator reuses the same memory; larger blocks cost fresh pages each time.
BLOCK_BYTES = 16 << 20


def merge_shards(
    files: Files,
    source: Path,
    shards: Sequence[str],
    target: Path,
    layouts: Sequence[FileLayout],
    naming: TensorMapping,
    *,
    staging_dir: Path | None,
    first_file: int,
) -> list[Digested]:
    """Coordinator only: build whole files out of shard files, durably.

    Args:
        files: The file layer.
        source: The checkpoint or draft that holds the shards.
        shards: Their names in it.
        target: The draft that gets the whole files.
        layouts: The contents of these files.
        naming: From the shards' tensors to theirs.
        staging_dir: Where to build them first, if not in place.
        first_file: Index of the first whole file in the digests.

    Returns:
        Digests of the whole files.

    Raises:
        CorruptCheckpointError: The shards do not hold all of a tensor.
    """
    stored = read_tensors(source, list(shards))
    records: list[Digested] = []
    for number, layout in enumerate(layouts, first_file):
        place = target / layout.path
        built = staging_dir / f"{names.nonce()}-{place.name}" if staging_dir else place
        files.make_dir(built.parent)
        blocks = content(layout, naming, stored, partial(fetch, source))
        records += write_through(files, built, layout.nbytes, blocks, number, direct=built == place)
        if built != place:
            write_through(files, place, layout.nbytes, _read(built), None)
            files.unlink(built)
    return records


def content(
    layout: FileLayout,
    naming: TensorMapping,
    stored: Mapping[str, StoredTensor],
    read: Callable[[list[Fetch]], int],
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[memoryview]:
    """All bytes of a whole file in order, tensors in blocks.

    Args:
        layout: The file.
        naming: From the stored tensors to the file's.
        stored: The tensors it is made of.
        read: Reads boxes of them.
        block_bytes: The largest block, unless a row is larger.
    """
    yield memoryview(layout.header)
    for spec in layout.tensors:
        row_bytes = max(spec.nbytes // spec.shape[0], 1) if spec.shape and spec.shape[0] else spec.nbytes
        step = max(block_bytes // max(row_bytes, 1), 1)
        whole = Box.whole(spec.shape)
        for start in range(0, spec.shape[0], step) if spec.shape else [0]:
            box = whole.rows(start, min(start + step, spec.shape[0])) if spec.shape else whole
            yield bytes_of(_block(spec, box, naming, stored, read))


def _block(
    spec: TensorSpec,
    box: Box,
    naming: TensorMapping,
    stored: Mapping[str, StoredTensor],
    read: Callable[[list[Fetch]], int],
) -> torch.Tensor:
    block = torch.empty(box.sizes, dtype=TORCH_DTYPE[spec.dtype], device="cpu")
    for alias in naming.by_name[spec.name]:
        found = alias.sought(box)
        if found is None:
            continue
        inner, common = found
        if alias.is_whole and stored[alias.source].spec.dtype == spec.dtype:
            read([Fetch(stored[alias.source], inner, block)])
            continue
        part = _part(stored[alias.source], alias, inner, read)
        narrow(block, common.within(box)).copy_(view_as(alias, part, Box.whole(inner.sizes)))
    return block


def _part(source: StoredTensor, alias: SliceMapping, box: Box, read: Callable[[list[Fetch]], int]) -> torch.Tensor:
    """A box of a source; if it is a box only in a grid, the whole source is read for it."""
    sizes = source.spec.shape if alias.grid else box.sizes
    part = torch.empty(sizes, dtype=TORCH_DTYPE[source.spec.dtype], device="cpu")
    read([Fetch(source, Box.whole(sizes) if alias.grid else box, part)])
    return narrow(part.view(alias.grid), box) if alias.grid else part


def _read(path: Path) -> Iterator[memoryview]:
    with path.open("rb", buffering=0) as source:
        while data := source.read(BLOCK_BYTES):
            yield memoryview(data)


def write_through(
    files: Files, path: Path, nbytes: int, blocks: Iterable[memoryview], number: int | None, *, direct: bool = True
) -> list[Digested]:
    """Write a new file from front to back, durably.

    Args:
        files: The file layer.
        path: The file.
        nbytes: Its size.
        blocks: All of its bytes.
        number: Its index in the digests; None for none.
        direct: Whether it will not be read again soon.

    Returns:
        Digests of all of it.
    """
    records: list[Digested] = []
    position = 0
    files.allocate(path, nbytes)
    with files.open(path, direct=direct) as file:
        for block in blocks:
            file.write_at(position, block)
            if number is not None:
                records += _digests(number, position, block)
            position += len(block)
        file.sync()
    return records


def _digests(number: int, position: int, block: memoryview) -> Iterator[Digested]:
    for start in range(0, len(block), CELL_BYTES):
        cell = block[start : start + CELL_BYTES]
        yield Digested(number, ByteRuns(position + start, len(cell)), digest_of(cell))
