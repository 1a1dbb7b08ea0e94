"""One part of a checkpoint, whatever its format, ready to be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.storage.distcp import fetch_distcp, stored_tensors
from hydra_ckpt.storage.header import read_tensors
from hydra_ckpt.storage.ledger import Ledger
from hydra_ckpt.storage.merge import BLOCK_BYTES
from hydra_ckpt.storage.read import Fetch, fetch
from hydra_ckpt.storage.stage_names import without_stages
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint

# A chunk of `.distcp` files can only be loaded whole.
WHOLE_TENSORS = 1 << 62


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint.

    Attributes:
        tensors: By name.
        read: Reads boxes of them.
        block_bytes: The largest block to read at once.
    """

    tensors: Mapping[str, StoredTensor]
    read: Callable[[list[Fetch]], int]
    block_bytes: int


def open_part(checkpoint: Checkpoint, part: str, ledger: Ledger | None = None) -> Part:
    """Read the headers of a part's files. Tensors that pipeline stages have named separately are merged by their names.

    Args:
        checkpoint: The checkpoint.
        part: The name of a part in its manifest.
        ledger: Digests to compare while reading; those of `.distcp` files cover other bytes and are left.

    Raises:
        CorruptCheckpointError: A file is damaged.
    """
    record = checkpoint.manifest.parts[part]
    if record.format != "distcp":
        tensors = read_tensors(checkpoint.path, list(record.files))
        if part == names.EXTRAS:
            tensors = without_stages(tensors)
        return Part(tensors, partial(fetch, checkpoint.path, ledger=ledger), BLOCK_BYTES)
    lengths = {(f"{part}/{row[5]}", row[6]): row[7] for row in record.index}
    tensors = stored_tensors(checkpoint.path / names.MANIFEST, part, record.index)
    return Part(tensors, partial(fetch_distcp, checkpoint.path, lengths=lengths), WHOLE_TENSORS)
