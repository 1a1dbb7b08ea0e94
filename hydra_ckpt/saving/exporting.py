"""Adds a Hugging Face export to a published checkpoint, without writing training state again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra_ckpt.saving.save import DraftWriter, check_space
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.draft import Draft, discard, join_draft, sync_tree
from hydra_ckpt.store.fenced import replace_prepared
from hydra_ckpt.store.manifest import to_bytes


@dataclass
class AddExport:
    """The transaction: the export is written to a draft, moved in, and visible once the manifest lists it.

    Args:
        writer: Fills the draft; its content has consolidated files only.
        root: The checkpoint directory.
        step: The checkpoint's step.
        name: The checkpoint's name.
        fence: Raises if this process may no longer publish.
    """

    writer: DraftWriter
    root: Path
    step: int
    name: str
    fence: Callable[[], None]

    def begin(self) -> dict[str, Any]:
        """Coordinator only; see `Transaction`."""
        self.fence()
        check_space(self.root, self.writer.content.total_bytes)
        draft = self.writer.prepare(self.root, f"{self.name}.export")
        return {"path": str(draft.path), "token": draft.token}

    def work(self, note: dict[str, Any]) -> dict[str, Any]:
        """Every rank; see `Transaction`."""
        draft = join_draft(Path(note["path"]), self.name, note["token"], patience_s=self.writer.patience_s)
        return self.writer.write(draft)

    def finish(self, note: dict[str, Any], receipts: list[dict[str, Any]]) -> dict[str, Any]:
        """Coordinator only; see `Transaction`."""
        draft = Draft(Path(note["path"]), self.name, note["token"])
        checkpoint = Checkpoint.open(self.root / self.name)
        found = self.writer.collect(draft, receipts)
        found.update(self.writer.merge(draft, checkpoint.path, checkpoint.manifest.parts))
        exports = dict(self.writer.content.exports)
        if exports.keys() <= checkpoint.manifest.exports.keys():
            # A failed attempt had already replaced the manifest; the files it lists must stay.
            self.writer.files.sync_dir(checkpoint.path)
            discard(self.writer.files, draft.path)
            return {"name": self.name, "bytes": checkpoint.manifest.nbytes}
        sidecars = [path for path in found if path.startswith(f"{names.DIGESTS}/")]
        sync_tree(self.writer.files, draft.path)
        self.fence()
        for place in [*exports.values(), *sidecars]:
            self._move_in(draft, checkpoint, place)
        manifest = replace(
            checkpoint.manifest,
            files={**checkpoint.manifest.files, **found},
            digests=(*checkpoint.manifest.digests, *sorted(sidecars)),
            exports={**checkpoint.manifest.exports, **exports},
        )
        # Prepared in the draft, which a run that takes over removes: a late replacement then has no source file.
        prepared = draft.path / names.MANIFEST
        replace_prepared(self.writer.files, prepared, checkpoint.path / names.MANIFEST, to_bytes(manifest))
        discard(self.writer.files, draft.path)
        return {"name": self.name, "bytes": manifest.nbytes}

    def _move_in(self, draft: Draft, checkpoint: Checkpoint, place: str) -> None:
        """Move a file or directory to its place; leftovers of an interrupted attempt are moved out into the draft.

        No manifest lists leftovers. A run that takes over removes the draft, so a late call moves nothing.
        """
        files, target = self.writer.files, checkpoint.path / place
        if target.exists() or target.is_symlink():
            files.rename(target, draft.path / f"replaced-{names.nonce()}")
        files.rename(draft.path / place, target)
        files.sync_dir(target.parent)

    def abort(self, note: dict[str, Any]) -> None:
        """Coordinator only; see `Transaction`."""
        discard(self.writer.files, Path(note["path"]))

    def is_published(self, note: dict[str, Any]) -> bool:
        """Always False: rank 0 may still fail after the manifest lists the export."""
        return False
