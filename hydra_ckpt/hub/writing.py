"""Writes an export from stored tensors in bounded memory; it becomes visible only when complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hydra_ckpt.errors import CheckpointConfigError, CheckpointExistsError
from hydra_ckpt.files import Files
from hydra_ckpt.hub.model_export import FLOATS
from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.layout.file_layout import DEFAULT_FILE_BYTES, FileLayout, by_file, by_size, index_json, lay_out
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.storage.merge import content, write_through
from hydra_ckpt.storage.read import Fetch
from hydra_ckpt.store import names
from hydra_ckpt.store.draft import sync_tree


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        path: The directory.
        files: Names of its weight files.
        nbytes: Their total size in bytes.
    """

    path: Path
    files: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Source:
    """Stored tensors of a model, ready to be read.

    Attributes:
        tensors: The stored tensors, by name.
        naming: From these to the export's tensors.
        stem: Name of the weight files without suffixes.
        read: Reads boxes.
        block_bytes: The largest block to read at once.
    """

    tensors: Mapping[str, StoredTensor]
    naming: TensorMapping
    stem: str
    read: Callable[[list[Fetch]], int]
    block_bytes: int

    def cast(self, dtype: str) -> Source:
        """The same source with all floating-point tensors in one dtype.

        Raises:
            CheckpointConfigError: The dtype is unknown.
        """
        if dtype not in FLOATS:
            raise CheckpointConfigError(f"dtype={dtype} is not one of: {', '.join(FLOATS)}")
        kinds = {name: item.spec.dtype for name, item in self.tensors.items()}
        floating = {alias.name for alias in self.naming.aliases if kinds[alias.source] in FLOATS.values()}
        return replace(self, naming=replace(self.naming, dtypes=dict.fromkeys(floating, FLOATS[dtype])))

    def layouts(self, max_file_bytes: int | None) -> list[FileLayout]:
        """The files to write: those that the naming lists, unless a size is given."""
        # The tensors of an average have other names in their file.
        specs = self.naming.specs([replace(item.spec, name=name) for name, item in self.tensors.items()])
        by_map = self.naming.files and max_file_bytes is None
        groups = by_file(specs, self.naming.files) if by_map else by_size(specs, max_file_bytes or DEFAULT_FILE_BYTES)
        return [replace(layout, path=layout.path.removeprefix("/")) for layout in lay_out(groups, "", self.stem)]


def refuse_occupied(out: Path) -> None:
    """Check that a directory can be created here; an empty one may already exist.

    Raises:
        CheckpointExistsError: It already exists, or would be inside a checkpoint.
        CheckpointConfigError: It cannot be created here.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise CheckpointExistsError(f"{out} already exists; name a directory that does not exist, or an empty one")
    place = out.absolute()
    if out.exists() and place.samefile(Path.cwd()):
        raise CheckpointConfigError(f"{out} is the working directory, which cannot be replaced; name one below it")
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir():
        raise CheckpointConfigError(f"{out} is below {above}, which is a file; name another directory")
    for parent in (place, *place.resolve().parents):
        if (parent / names.MANIFEST).exists():
            raise CheckpointExistsError(
                f"{out} is inside the checkpoint {parent}, which must not be changed; name another directory"
            )


def write_export(
    source: Source,
    small: Mapping[str, bytes],
    out: Path,
    *,
    max_file_bytes: int | None,
    check: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] | None,
) -> Exported:
    """Write a directory of safetensors files and small ones, durably; a crash leaves nothing in its place.

    Args:
        source: The tensors.
        small: Other files by name; the index of several weight files is added.
        out: The directory to create; see `refuse_occupied`.
        max_file_bytes: Size at which a new file begins; None for the source's own files.
        check: Called when everything is written but not yet visible; if it raises, the export is discarded.
        progress: Called with the bytes written so far and in total.
    """
    layouts = source.layouts(max_file_bytes)
    total = sum(layout.nbytes for layout in layouts)
    files, done = Files(), 0
    if len(layouts) > 1:
        small = {**small, f"{source.stem}.safetensors.index.json": index_json(layouts)}

    def counted(blocks: Iterator[memoryview]) -> Iterator[memoryview]:
        nonlocal done
        for block in blocks:
            yield block
            done += len(block)
            if progress is not None:
                progress(done, total)

    with drafted(out, files) as draft:
        for layout in layouts:
            blocks = content(layout, source.naming, source.tensors, source.read, source.block_bytes)
            write_through(files, draft / layout.path, layout.nbytes, counted(blocks), None)
        for name, data in small.items():
            files.make_dir((draft / name).parent)
            files.write_new(draft / name, data)
        check()
    return Exported(out, tuple(layout.path for layout in layouts), total)


@contextmanager
def drafted(out: Path, files: Files) -> Iterator[Path]:
    """A directory beside `out` that is durably renamed to it on success, and removed on failure."""
    draft = out.absolute().with_name(f".{out.name}.draft-{names.nonce()}")
    files.make_dir(draft)
    try:
        yield draft
        sync_tree(files, draft)
        if out.is_dir():
            out.rmdir()
        files.rename(draft, out.absolute())
        files.sync_dir(out.absolute().parent)
    except BaseException:
        files.remove_tree(draft)
        raise
