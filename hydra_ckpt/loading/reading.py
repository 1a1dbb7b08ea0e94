"""Reads what a load has planned, and compares every byte with its digest, on whichever rank reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.storage.distcp import fetch_distcp
from hydra_ckpt.storage.ledger import Ledger, Span
from hydra_ckpt.storage.read import Fetch, fetch
from hydra_ckpt.storage.verification import checks, findings, share_out
from hydra_ckpt.store.catalog import Checkpoint


@dataclass
class Reader:
    """Reads the tensors of one checkpoint.

    Args:
        checkpoint: The checkpoint.
        channel: To the other ranks; not used to communicate here.
        verify: Whether every byte is compared with its digest.

    Attributes:
        read_bytes: Number of bytes read so far.
    """

    checkpoint: Checkpoint
    channel: Channel
    verify: bool
    read_bytes: int = 0
    _ledger: Ledger | None = None

    def read(self, source: Source, fetches: Sequence[Fetch]) -> list[Span]:
        """Read; returns which digests were compared on the way."""
        if self.verify:
            manifest = self.checkpoint.manifest
            self._ledger = Ledger(checks(self.checkpoint.path, manifest.files, manifest.digests))
        self.read_bytes = read_boxes(source, fetches, self._ledger)
        return [] if self._ledger is None else self._ledger.done()

    def read_again(self, source: Source, fetches: Sequence[Fetch]) -> None:
        """Read what was compared before."""
        read_boxes(source, fetches)

    def verify_rest(self, done: Sequence[Sequence[int]]) -> None:
        """Compare this rank's share of the digests that no rank compared while it read.

        Args:
            done: First and last number of each stretch of digests that some rank has compared.

        Raises:
            CorruptCheckpointError: Bytes are not what was written.
        """
        if self._ledger is not None:
            rest = self._ledger.left((first, last) for first, last in done)
            for error in findings(self.checkpoint.path, share_out(rest, self.channel.rank, self.channel.world_size)):
                raise error

    def verify_headers(self) -> None:
        """Compare this rank's share of the digests of headers: is a name that does not match a damaged one?

        Raises:
            CorruptCheckpointError: Bytes are not what was written.
        """
        manifest = self.checkpoint.manifest
        everything = checks(self.checkpoint.path, manifest.files, manifest.digests) if self.verify else []
        headers = [check for check in everything if check.region.offset == 0]
        for error in findings(self.checkpoint.path, share_out(headers, self.channel.rank, self.channel.world_size)):
            raise error


def read_boxes(source: Source, wanted: Sequence[Fetch], ledger: Ledger | None = None) -> int:
    """Read boxes of stored tensors, in the order of the files.

    Args:
        source: The checkpoint, read.
        wanted: The boxes and where they go.
        ledger: Digests to compare on the way.

    Returns:
        Number of bytes read.

    Raises:
        CorruptCheckpointError: Bytes are missing, or are not what was written.
    """
    ordered = sorted(wanted, key=lambda item: (item.stored.chunks[0].file, item.stored.chunks[0].offset))
    foreign = [item for item in ordered if item.stored.chunks[0].file.endswith(".distcp")]
    own = [item for item in ordered if not item.stored.chunks[0].file.endswith(".distcp")]
    return fetch(source.root, own, ledger) + fetch_distcp(source.root, foreign, source.lengths)
