"""The reference model: its place on disk, and the contents of its files. Never uses the network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.storage.header import read_header
from hydra_ckpt.store.small_files import read_small_file

_INDICES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
_SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_PICKLED = ("pytorch_model.bin.index.json", "pytorch_model.bin")
_MAX_BYTES = 256 << 20
_MAX_REVISION_BYTES = 4096


@dataclass(frozen=True)
class Reference:
    """A model directory as Hugging Face lays it out.

    Attributes:
        directory: The local directory, or the snapshot in the hub cache.
        root: The directory that must contain its files after following links: a snapshot's files link into the cache.
    """

    directory: Path
    root: Path

    def has(self, name: str) -> bool:
        """Whether this file exists."""
        return (self.directory / name).is_file()

    def matching(self, pattern: str) -> list[str]:
        """The names of its files that match a shell pattern."""
        found = (path for path in self.directory.glob(pattern) if path.is_file())
        return sorted(str(path.relative_to(self.directory)) for path in found)

    def read(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            CorruptCheckpointError: It is a link that leads out of the directory, not a regular file, or far too large.
        """
        return read_small_file(self.root / self.inside(name), _MAX_BYTES)

    def json(self, name: str) -> dict[str, Any]:
        """The content of a small JSON file; empty if there is none.

        Raises:
            CorruptCheckpointError: It is not a JSON object, or far too large.
        """
        if not self.has(name):
            return {}
        path = self.directory / name
        try:
            return dict(json.loads(self.read(name)))
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            raise CorruptCheckpointError(path, f"is not a JSON object: {error}") from None

    def inside(self, name: str) -> str:
        """The path of a file relative to `root`, after following links.

        Raises:
            CorruptCheckpointError: The name, or a link, leads out of `root`.
        """
        path = self.directory / name
        real = path.resolve()
        if not real.is_relative_to(self.root) or ".." in Path(name).parts:
            raise CorruptCheckpointError(path, f"leads out of {self.root}")
        return str(real.relative_to(self.root))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json; empty if there is none."""
        return self.json("config.json")

    @cached_property
    def file_map(self) -> Mapping[str, str]:
        """Name of a tensor to its file, as given by the index; empty for a single file.

        Raises:
            CorruptCheckpointError: The index is invalid.
        """
        for index in _INDICES:
            if self.has(index):
                found = self.json(index).get("weight_map")
                if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
                    raise CorruptCheckpointError(self.directory / index, "has no weight_map from names to files")
                return {str(name): file for name, file in found.items()}
        return {}

    @property
    def weight_files(self) -> list[str]:
        """The safetensors files with its weights."""
        if self.file_map:
            return sorted(set(self.file_map.values()))
        return [name for name in _SINGLE if self.has(name)][:1]

    @property
    def pickled(self) -> list[str]:
        """Its pickled PyTorch files, for models that have no others."""
        if self.has(_PICKLED[0]):
            return sorted({str(file) for file in self.json(_PICKLED[0]).get("weight_map", {}).values()})
        return [_PICKLED[1]] if self.has(_PICKLED[1]) else []

    def tensors(self, *, complete: bool = True) -> dict[str, StoredTensor]:
        """Its tensors by name; files are named relative to `root`.

        Args:
            complete: Whether all files must exist.

        Raises:
            CheckpointNotFoundError: Files that the index lists are missing; names all of them.
            CorruptCheckpointError: A header is damaged.
        """
        missing = [name for name in self.weight_files if not self.has(name)]
        if missing and complete:
            raise CheckpointNotFoundError(
                f"{self.directory}: the index lists files that do not exist: {', '.join(missing)}. The download is "
                "incomplete; repeat it"
            )
        found: dict[str, StoredTensor] = {}
        for name in self.weight_files:
            if name not in missing:
                found.update({item.spec.name: item for item in read_header(self.root, self.inside(name))[0]})
        return found


def find_reference(repo_id: str, cache_dir: Path) -> Reference:
    """A reference model by local directory or hub id.

    Args:
        repo_id: The hub id or directory. A directory of that name takes precedence.
        cache_dir: The hub cache.

    Raises:
        CheckpointNotFoundError: It is in neither place.
    """
    local = Path(repo_id).expanduser()
    if local.is_dir():
        return at(local)
    repository = cache_dir / f"models--{repo_id.replace('/', '--')}"
    reference = repository / "refs" / "main"
    if ".." not in repo_id.split("/") and reference.is_file():
        snapshot = repository / "snapshots" / _revision(reference)
        if snapshot.is_dir():
            return Reference(snapshot, repository.resolve())
    raise CheckpointNotFoundError(
        f"checkpoint.model_repo_id={repo_id} is not a directory, and {cache_dir} has no complete copy of it "
        f"({repository.name}/refs/main). Download it with `hf download {repo_id}`, set checkpoint.model_cache_dir, or "
        "name a directory"
    )


def _revision(reference: Path) -> str:
    """The snapshot named by a file in refs/; a name that leads elsewhere is refused."""
    name = read_small_file(reference, _MAX_REVISION_BYTES, follow=True).decode(errors="replace").strip()
    if "/" in name or "\0" in name or name in ("", ".", ".."):
        raise CorruptCheckpointError(reference, "does not name a snapshot")
    return name


def at(directory: Path) -> Reference:
    """The reference model in a local directory."""
    real = directory.resolve()
    # A snapshot in a hub cache, given by its path: its files link to the neighbouring blobs/.
    cached = real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir()
    return Reference(directory.absolute(), real.parent.parent if cached else real)
