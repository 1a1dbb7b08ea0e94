"""The end of a save through DCP: small files and the manifest, by the coordinator, when all ranks have written."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from hydra_ckpt import __version__
from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.files import Files
from hydra_ckpt.layout.file_layout import FileLayout, index_json
from hydra_ckpt.storage.dcp_draft import ASSIGNMENT
from hydra_ckpt.storage.dcp_layout import STATE, Sidecar, Written
from hydra_ckpt.storage.dcp_values import PLANNER_DATA, TENSORS, VALUES
from hydra_ckpt.storage.digests import hex_digest
from hydra_ckpt.storage.encoding import encode
from hydra_ckpt.store import names
from hydra_ckpt.store.draft import Draft, complete_draft
from hydra_ckpt.store.manifest import WRITER, FileRecord, Manifest, PartRecord


def complete(
    files: Files,
    draft: Draft,
    layouts: tuple[FileLayout, ...],
    metadata: Metadata,
    results: Sequence[Sequence[WriteResult]],
    sidecar: Sidecar,
) -> None:
    """Coordinator only: write what only it can write, the manifest last; from here on the draft is complete.

    Args:
        files: The file layer.
        draft: The draft, with everything that the ranks write.
        layouts: The files that ranks filled together.
        metadata: DCP's.
        results: What each rank wrote.
        sidecar: This rank's digests: those of the headers are among them, even if no item was its own.

    Raises:
        CheckpointError: Two values' tensors have one name.
    """
    flat = [result for rank in results for result in rank]
    reports: list[Written] = [result.storage_data for result in flat]
    _refuse_shared_names(reports)
    small = _small_files(layouts, metadata, flat)
    for path, data in small.items():
        files.write_new(draft.path / path, data)
    # All from the reports: what another host has created may not be listed here yet.
    inner = {path: FileRecord(nbytes) for report in reports for path, nbytes in report.own_files}
    found = {sidecar, *(report.sidecar for report in reports)}
    sidecars = {path: FileRecord(nbytes, digest) for path, nbytes, digest in found}
    records = {file.path: FileRecord(file.nbytes) for file in layouts} | inner | sidecars
    records.update({path: FileRecord(len(data), hex_digest(data)) for path, data in small.items()})
    parts = {STATE: PartRecord("safetensors", tuple(file.path for file in layouts))}
    if inner:
        parts[TENSORS] = PartRecord("safetensors", tuple(sorted(inner)))
    for path in (names.TOKEN, ASSIGNMENT):
        files.unlink(draft.path / path)
    manifest = Manifest(
        step=0,
        epoch=0,
        created=time.time(),
        world_size=len(results),
        parts=parts,
        files=records,
        digests=tuple(sorted(sidecars)),
        details={WRITER: __version__},
    )
    complete_draft(files, draft, manifest)


def _refuse_shared_names(reports: Sequence[Written]) -> None:
    counts = Counter(name for report in reports for name in report.tensors)
    shared = sorted(name for name, count in counts.items() if count > 1)
    if shared:
        raise CheckpointError(f"{shared[0]}: two tensors inside values have this name; rename a key of the state")


def _small_files(
    layouts: tuple[FileLayout, ...], metadata: Metadata, results: Sequence[WriteResult]
) -> dict[str, bytes]:
    values = {item.index.fqn: item.storage_data.value for item in results if item.storage_data.box is None}
    small = {VALUES: json.dumps(values, sort_keys=True).encode()}
    if metadata.planner_data is not None:
        inner: dict[str, object] = {}
        data = encode(metadata.planner_data, "planner_data", inner)  # type: ignore[arg-type]
        if inner:
            raise CheckpointError(f"{min(inner)}: planner_data cannot hold tensors")
        small[PLANNER_DATA] = json.dumps(data, sort_keys=True).encode()
    if len(layouts) > 1:
        small[f"{STATE}/model.safetensors.index.json"] = index_json(layouts)
    return small
