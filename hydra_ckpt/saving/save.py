"""One save, from a staged snapshot to a published checkpoint."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.files import Files
from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.layout.file_layout import FileLayout, index_json
from hydra_ckpt.layout.plan import WritePlan, full_coverage
from hydra_ckpt.saving.write_planning import PartLayout
from hydra_ckpt.state.packing import Packed
from hydra_ckpt.storage.digests import Digested, encode, hex_digest
from hydra_ckpt.storage.distcp import Row, digest_file, finish_part, write_shares
from hydra_ckpt.storage.merge import merge_shards
from hydra_ckpt.storage.staging import Snapshot
from hydra_ckpt.storage.write import create_files, create_own_files, write_plan
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.draft import (
    TAKEN_BACK_WITHIN_S,
    Draft,
    complete_draft,
    create_draft,
    discard,
    join_draft,
    publish_draft,
)
from hydra_ckpt.store.manifest import TOKEN, FileRecord, Manifest, PartRecord
from hydra_ckpt.store.parts import is_of_models

log = logging.getLogger(__name__)

JOIN_PATIENCE_S = 60.0
"""How long ranks look for rank 0's draft, in seconds, at most: network file systems show new directories late."""


@dataclass(frozen=True)
class Merged:
    """Whole files of a part that the coordinator merges from the ranks' shards.

    Attributes:
        part: The part's name.
        files: The merged files' layout.
        naming: From the shards' tensors to the merged ones.
    """

    part: str
    files: tuple[FileLayout, ...]
    naming: TensorMapping


@dataclass(frozen=True)
class Content:
    """What one rank contributes to a save, fixed when the save begins.

    Attributes:
        layouts: How the parts with tensors are laid out.
        plan: What this rank writes.
        shared: What is the same on all ranks that hold the same tensors; None except on the rank that leads them.
        own: What belongs to this rank alone; None if only an export is written.
        assets: Small files by path in the checkpoint. Coordinator only.
        exports: Part to its Hugging Face directory.
        total_bytes: Bytes of tensors that all ranks write together.
        merged: Whole files that the coordinator merges from shards.
        omitted: Dotted names left out because of `checkpoint.allow_unsaved`.
    """

    layouts: tuple[PartLayout, ...]
    plan: WritePlan
    shared: Packed | None
    own: Packed | None
    assets: Mapping[str, bytes]
    exports: Mapping[str, str]
    total_bytes: int
    merged: tuple[Merged, ...] = ()
    omitted: tuple[str, ...] = ()


@dataclass
class DraftWriter:
    """The steps by which ranks fill a draft together; used by a save and by an added export.

    Args:
        files: The file layer.
        rank: This rank.
        world_size: Number of ranks.
        content: What this rank contributes.
        snapshot: Returns the tensors' bytes; called once, in the background.
        sidecar: Prefix of the digest files' names.
        patience_s: How long to look for the coordinator's draft, in seconds.
        staging_dir: Where merged files are built before they are copied into place.

    Attributes:
        weights: Digests of the models' bytes this rank has written; empty before that.
    """

    files: Files
    rank: int
    world_size: int
    content: Content
    snapshot: Callable[[], Snapshot]
    sidecar: str = "rank"
    patience_s: float = JOIN_PATIENCE_S
    staging_dir: Path | None = None
    weights: frozenset[Digested] = frozenset()
    _headers: list[Digested] = field(default_factory=list)
    _small: dict[str, FileRecord] = field(default_factory=dict)
    _rows: dict[str, tuple[Row, ...]] = field(default_factory=dict)

    def prepare(self, root: Path, name: str, *, replaces: bool = False) -> Draft:
        """Coordinator only: the draft with its directories, shared files and small files; see `create_draft`."""
        draft = create_draft(self.files, root, name, replaces=replaces)
        try:
            self._fill(draft)
        except Exception:
            discard(self.files, draft.path)
            raise
        return draft

    def _fill(self, draft: Draft) -> None:
        plan = self.content.plan
        small = {**self.content.assets, **self._indices()}
        places = [*(file.path for file in plan.files), *small, f"{names.DIGESTS}/x", f"{names.PROGRESS}/x"]
        places += [f"{layout.directory}/x" for layout in self.content.layouts]
        places += [file.path for merged in self.content.merged for file in merged.files]
        for directory in sorted({str(Path(place).parent) for place in places}):
            self.files.make_dir(draft.path / directory)
        self._headers = create_files(self.files, draft.path, plan)
        for path, data in small.items():
            self._write_small(draft.path, path, data)

    def _indices(self) -> dict[str, bytes]:
        """The index of every Hugging Face directory with more than one file."""
        found = {}
        everything = [*self.content.plan.files, *(file for merged in self.content.merged for file in merged.files)]
        for directory in self.content.exports.values():
            files = [file for file in everything if file.path.startswith(f"{directory}/")]
            if len(files) > 1:
                stem = files[0].path.removeprefix(f"{directory}/").split("-00001-of-")[0]
                found[f"{directory}/{stem}.safetensors.index.json"] = index_json(files)
        return found

    def _write_small(self, root: Path, path: str, data: bytes) -> None:
        self.files.write_new(root / path, data)
        self._small[path] = FileRecord(len(data), hex_digest(data))

    def write(self, draft: Draft) -> dict[str, Any]:
        """Every rank: tensors, digests and progress; returns the receipt."""
        plan, content = self.content.plan, self.content
        # Before the snapshot, which may take a while: other ranks wait for the files this rank creates.
        records = create_own_files(self.files, draft.path, plan, patience_s=self.patience_s)
        snapshot = self.snapshot()
        try:
            records += write_plan(self.files, draft.path, plan, snapshot.sources, start_with=self.rank)
            rows = self._write_foreign(draft, snapshot)
        finally:
            snapshot.release()
        listed = [file.path for file in plan.all_files]
        self.weights = frozenset(
            item for item in records if item.region.offset and is_of_models(listed[item.file])
        )  # the region at offset 0 is a header
        foreign = sorted({f"{directory}/{row[5]}" for directory, found in rows.items() for row in found})
        for path in foreign:
            records += digest_file(draft.path / path, len(listed))
            listed.append(path)
        label = f"{self.rank:05d}"
        self._write_small(
            draft.path, f"{names.DIGESTS}/{self.sidecar}-{label}.bin", encode(listed, self._headers + records)
        )
        if content.own is not None:
            self._write_small(draft.path, f"{names.PROGRESS}/rank-{label}.safetensors", content.own.data)
        if content.shared is not None:
            self._write_small(draft.path, f"{names.PROGRESS}/shared-{label}.json", content.shared.data)
        small = {path: [record.bytes, record.xxh3] for path, record in self._small.items()}
        own = {plan.all_files[index].path: [plan.all_files[index].nbytes, None] for index in plan.created}
        own.update({path: [(draft.path / path).stat().st_size, None] for path in foreign})
        return {
            "token": draft.token,
            "plan": plan.fingerprint,
            "coverage": plan.coverage,
            "bytes": plan.nbytes,
            "files": {**small, **own},
            "rows": rows or None,
        }

    def _write_foreign(self, draft: Draft, snapshot: Snapshot) -> dict[str, list[Row]]:
        """Write the parts in PyTorch's own format; directory to the rows written there."""
        plan = self.content.plan
        return {
            layout.directory: write_shares(
                draft.path / layout.directory, plan.foreign[layout.part], snapshot.sources, self.rank
            )
            for layout in self.content.layouts
            if layout.distcp
        }

    def collect(self, draft: Draft, receipts: Sequence[dict[str, Any]]) -> dict[str, FileRecord]:
        """Coordinator only: every file of the draft, once the receipts agree.

        Raises:
            CheckpointError: A rank used another draft or plan, or the ranges do not tile the files.
        """
        plan = self.content.plan
        for rank, receipt in enumerate(receipts):
            if receipt["token"] != draft.token or receipt["plan"] != plan.fingerprint:
                raise CheckpointError(
                    f"rank {rank} used another write plan ({receipt['plan']}, here {plan.fingerprint}); "
                    "the ranks hold different tensors"
                )
        covered = sum(receipt["coverage"] for receipt in receipts) % (1 << 64)
        if covered != full_coverage(plan.files):
            raise CheckpointError(
                "the ranks' byte ranges do not cover every file exactly once; the tensors are not sharded as their "
                "placements say. Nothing was published"
            )
        found = {file.path: FileRecord(file.nbytes) for file in plan.files}
        for receipt in receipts:
            found.update({path: FileRecord(size, digest) for path, (size, digest) in receipt["files"].items()})
        for layout in self.content.layouts:
            if layout.distcp:
                rows = [row for receipt in receipts for row in receipt["rows"][layout.directory]]
                found[f"{layout.directory}/.metadata"] = self._finish_foreign(draft, layout, rows)
        return found

    def _finish_foreign(self, draft: Draft, layout: PartLayout, rows: list[Row]) -> FileRecord:
        self._rows[layout.part] = tuple(rows)
        data = finish_part(draft.path / layout.directory, rows)
        return FileRecord(len(data), hex_digest(data))

    def merge(self, draft: Draft, source: Path, parts: Mapping[str, PartRecord]) -> dict[str, FileRecord]:
        """Coordinator only: merge whole files from shards, once the shards are written.

        Args:
            draft: The draft being written.
            source: Where the shards are: the draft, or a published checkpoint.
            parts: The shards' file names.
        """
        if not self.content.merged:
            return {}
        records: list[Digested] = []
        listed: list[FileLayout] = []
        for merged in self.content.merged:
            shards = parts[merged.part].files
            records += merge_shards(
                self.files,
                source,
                shards,
                draft.path,
                merged.files,
                merged.naming,
                staging_dir=self.staging_dir,
                first_file=len(listed),
            )
            listed += merged.files
        sidecar = f"{names.DIGESTS}/{self.sidecar}-merged.bin"
        data = encode([file.path for file in listed], records)
        self.files.write_new(draft.path / sidecar, data)
        found = {file.path: FileRecord(file.nbytes) for file in listed}
        found[sidecar] = FileRecord(len(data), hex_digest(data))
        return found

    def parts(self, found: Mapping[str, FileRecord]) -> dict[str, PartRecord]:
        """The files of each part."""
        return {layout.part: self._part(layout, found) for layout in self.content.layouts if not layout.beside}

    def _part(self, layout: PartLayout, found: Mapping[str, FileRecord]) -> PartRecord:
        start = f"{layout.directory}/{layout.stem}"
        end = ".distcp" if layout.distcp else ".safetensors"
        files = tuple(sorted(path for path in found if path.startswith(start) and path.endswith(end)))
        return PartRecord("distcp" if layout.distcp else "safetensors", files, self._rows.get(layout.part, ()))


def check_space(root: Path, needed: int) -> None:
    """Coordinator only: check for free space before anything is written.

    Raises:
        CheckpointError: The file system has less than `needed` bytes free.
    """
    status = os.statvfs(root)
    free = status.f_bavail * status.f_frsize
    if status.f_blocks and free < needed:  # some network file systems report nothing
        raise CheckpointError(
            f"{root} has {free / 1e9:.3g} GB free and this save needs {needed / 1e9:.3g} GB. Free some space (delete "
            "old checkpoints now with `hydra-ckpt prune DIR --newest 1 --yes`, or after each save with "
            "checkpoint.max_recent_checkpoints), or choose another checkpoint.checkpoint_dir"
        )


@dataclass
class Save:
    """The transaction of a save.

    Args:
        writer: Fills the draft.
        root: The checkpoint directory.
        step: Completed optimizer steps.
        epoch: The epoch.
        metrics: Those known when the save began.
        topology: How the ranks are arranged, as plain data.
        fence: Raises if this process may no longer publish.
        published: Coordinator only: called with the new checkpoint's name to move pointers.
        details: What the manifest records about the run.
        make_way: Coordinator only: sets a published checkpoint of this name aside, if there is one to be replaced.
    """

    writer: DraftWriter
    root: Path
    step: int
    epoch: int
    metrics: Mapping[str, float]
    topology: Mapping[str, Any]
    fence: Callable[[], None]
    published: Callable[[str], None]
    details: Mapping[str, Any] = field(default_factory=dict)
    make_way: Callable[[str], None] | None = None

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return names.checkpoint_name(self.epoch, self.step)

    def begin(self) -> dict[str, Any]:
        """Coordinator only; see `Transaction`."""
        self.fence()
        check_space(self.root, self.writer.content.total_bytes)
        draft = self.writer.prepare(self.root, self.name, replaces=self.make_way is not None)
        return {"path": str(draft.path), "token": draft.token}

    def _draft(self, note: Mapping[str, Any]) -> Draft:
        return Draft(Path(note["path"]), self.name, note["token"])

    def work(self, note: dict[str, Any]) -> dict[str, Any]:
        """Every rank; see `Transaction`."""
        draft = join_draft(Path(note["path"]), self.name, note["token"], patience_s=self.writer.patience_s)
        return self.writer.write(draft)

    def finish(self, note: dict[str, Any], receipts: list[dict[str, Any]]) -> dict[str, Any]:
        """Coordinator only; see `Transaction`."""
        draft = self._draft(note)
        found = self.writer.collect(draft, receipts)
        parts = self.writer.parts(found)
        found.update(self.writer.merge(draft, draft.path, parts))
        content = self.writer.content
        manifest = Manifest(
            step=self.step,
            epoch=self.epoch,
            created=max(time.time(), 0.0),
            world_size=self.writer.world_size,
            parts=parts,
            files=found,
            digests=tuple(sorted(path for path in found if path.startswith(f"{names.DIGESTS}/"))),
            exports=content.exports,
            metrics=self.metrics,
            plan=content.plan.fingerprint,
            topology=self.topology,
            details={**self.details, TOKEN: draft.token},
        )
        complete_draft(self.writer.files, draft, manifest)
        self.fence()
        if self.make_way is not None:
            self.make_way(self.name)
        publish_draft(self.writer.files, draft)
        self.published(self.name)
        return {"name": self.name, "bytes": manifest.nbytes}

    def abort(self, note: dict[str, Any]) -> None:
        """Coordinator only; see `Transaction`."""
        discard(self.writer.files, Path(note["path"]))

    def is_published(self, note: dict[str, Any]) -> bool:
        """A rank that was cut off; see `Transaction`. Looks twice, because rank 0 may first take the name back."""
        if not self._is_there(note):
            return False
        time.sleep(2 * TAKEN_BACK_WITHIN_S)
        return self._is_there(note)

    def _is_there(self, note: Mapping[str, Any]) -> bool:
        try:
            found = Checkpoint.open(self.root / self.name).manifest.details.get(TOKEN)
        except (CheckpointError, OSError):
            return False
        return bool(found == note["token"])
