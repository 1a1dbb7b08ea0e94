"""`hydra-ckpt verify`: compares every byte of a checkpoint with the digests taken when it was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from hydra_ckpt.cli.locating import Located, locate
from hydra_ckpt.cli.output import console, print_json, print_line, shown_size
from hydra_ckpt.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    counted,
)
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.manifest import read_metrics
from hydra_ckpt.store.small_files import size_of

if TYPE_CHECKING:
    from hydra_ckpt.storage.digests import Check

__all__ = ["verify_checkpoints"]

# Pieces read between two updates of the progress bar.
_BATCH = 16


@dataclass(frozen=True)
class _Finding:
    """A difference from what was written.

    Attributes:
        file: Path relative to the checkpoint; empty for the checkpoint as a whole.
        byte_range: Half-open range of bytes, or None for the whole file.
        problem: What is wrong, and where.
    """

    file: str
    byte_range: tuple[int, int] | None
    problem: str

    @classmethod
    def of(cls, root: Path, error: Exception) -> _Finding:
        """A finding from the error that a reader would raise."""
        if not isinstance(error, CorruptCheckpointError):
            return cls("", None, str(error))
        path = Path(error.file)
        file = str(path.relative_to(root)) if path.is_relative_to(root) else error.file
        return cls("" if file == "." else file, error.byte_range, str(error))


@dataclass
class _Verdict:
    """The result for one checkpoint.

    Attributes:
        path: The checkpoint.
        read_bytes: Bytes compared with a digest.
        findings: Everything that is wrong.
        is_newer: Whether the only problem is that a newer version wrote it.
    """

    path: Path
    read_bytes: int = 0
    findings: list[_Finding] = field(default_factory=list)
    is_newer: bool = False

    def note(self, error: Exception) -> None:
        """Add a finding."""
        self.findings.append(_Finding.of(self.path, error))

    def as_data(self) -> dict[str, Any]:
        """The data for `--json`."""
        findings = [
            {"file": item.file, "byte_range": item.byte_range, "problem": item.problem} for item in self.findings
        ]
        return {
            "name": self.path.name,
            "path": str(self.path),
            "step": names.step_of(self.path.name) if names.is_checkpoint_name(self.path.name) else None,
            "whole": not self.findings,
            "newer_format": self.is_newer,
            "read_bytes": self.read_bytes,
            "findings": findings,
        }


def verify_checkpoints(
    directory: Annotated[
        Path, typer.Argument(help="A checkpoint, a checkpoint directory, or a run directory with checkpoints/ in it.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read every byte of a checkpoint, or of all in a directory, and compare it with what was written.

    Exit code 1: something is damaged, or of a newer format, which cannot be verified.
    """
    located = locate(directory)
    paths = list(_paths(located))
    if not paths:
        raise CheckpointNotFoundError(f"{located.root} holds no checkpoints, so there is nothing to verify")
    with _bar(hidden=as_json) as bar:
        verdicts = [_verify(path, bar) for path in paths]
    # A run may be pruning meanwhile: a checkpoint that is gone was not damaged.
    verdicts = [verdict for verdict in verdicts if verdict.path.exists()]
    whole = not any(verdict.findings for verdict in verdicts)
    if as_json:
        found = [verdict.as_data() for verdict in verdicts]
        print_json({"directory": str(located.root), "whole": whole, "checkpoints": found})
    else:
        _show(verdicts, console())
    raise typer.Exit(0 if whole else 1)


def _paths(located: Located) -> Iterator[Path]:
    if located.only is not None:
        yield located.root / located.only
        return
    found = [path for path in located.root.iterdir() if names.is_checkpoint_name(path.name)]
    yield from sorted((path for path in found if not path.is_symlink() and path.is_dir()), key=_order)


def _order(path: Path) -> tuple[int, str]:
    return names.step_of(path.name), path.name


def _bar(*, hidden: bool) -> Progress:
    errors = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=errors,
        transient=True,
        disable=hidden or not errors.is_terminal,
    )


def _verify(path: Path, bar: Progress) -> _Verdict:
    """Find everything that is wrong with one checkpoint, from the manifest down to the bytes."""
    verdict = _Verdict(path)
    try:
        checkpoint = Checkpoint.open(path)
    except (CheckpointError, OSError) as error:
        verdict.note(error)
        verdict.is_newer = isinstance(error, CheckpointFormatError)
        return verdict
    _check_metrics(checkpoint, verdict)
    _check_sizes(checkpoint, verdict)
    _check_bytes(checkpoint, verdict, bar)
    _check_headers(checkpoint, verdict)
    return verdict


def _check_metrics(checkpoint: Checkpoint, verdict: _Verdict) -> None:
    """Check metrics that were added later: their file is beside the manifest and contains its own digest."""
    try:
        read_metrics(checkpoint.path)
    except FileNotFoundError:
        return
    except (CheckpointError, OSError) as error:
        verdict.note(error)


def _check_sizes(checkpoint: Checkpoint, verdict: _Verdict) -> None:
    for name, record in checkpoint.manifest.files.items():
        path = checkpoint.path / name
        with _noting(verdict):
            size = size_of(path)
            if size != record.bytes:
                raise CorruptCheckpointError(path, "the file has another size", expected=record.bytes, found=size)


def _check_bytes(checkpoint: Checkpoint, verdict: _Verdict, bar: Progress) -> None:
    from hydra_ckpt.storage.verification import findings

    # A file of the wrong size has already been reported; checking its bytes would only repeat that.
    known = {finding.file for finding in verdict.findings}
    wanted = [check for check in _checks(checkpoint, verdict) if check.file not in known]
    task = bar.add_task(checkpoint.name, total=sum(check.region.nbytes for check in wanted))
    remaining = iter(wanted)
    while batch := list(islice(remaining, _BATCH)):
        with _noting(verdict):
            for error in findings(checkpoint.path, batch):
                verdict.note(error)
        nbytes = sum(check.region.nbytes for check in batch)
        verdict.read_bytes += nbytes
        bar.advance(task, nbytes)
    bar.remove_task(task)


@contextmanager
def _noting(verdict: _Verdict) -> Iterator[None]:
    """Record errors as findings; a disk that cannot be read is one like any other."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        verdict.note(error)


def _checks(checkpoint: Checkpoint, verdict: _Verdict) -> Sequence[Check]:
    """The checks to make; without a sidecar of digests, only those for digests in the manifest itself."""
    from hydra_ckpt.storage.verification import checks

    manifest = checkpoint.manifest
    known = {finding.file for finding in verdict.findings}
    if known.isdisjoint(manifest.digests):
        try:
            return checks(checkpoint.path, manifest.files, manifest.digests)
        except (CheckpointError, OSError) as error:
            verdict.note(error)
            known.add(verdict.findings[-1].file)
    vouched = {name: record for name, record in manifest.files.items() if record.xxh3 and name not in known}
    return checks(checkpoint.path, vouched, ())


def _check_headers(checkpoint: Checkpoint, verdict: _Verdict) -> None:
    """Check that headers and index describe exactly the existing bytes; damaged bytes in them are already found."""
    from hydra_ckpt.storage.distcp import stored_tensors
    from hydra_ckpt.storage.header import read_tensors

    known = {finding.file for finding in verdict.findings}
    for name, part in checkpoint.manifest.parts.items():
        with _noting(verdict):
            if part.format == "distcp":
                stored_tensors(checkpoint.path / names.MANIFEST, name, part.index)
            elif known.isdisjoint(part.files):
                read_tensors(checkpoint.path, list(part.files))


def _show(verdicts: Sequence[_Verdict], out: Console) -> None:
    for verdict in verdicts:
        name, size = verdict.path.name, shown_size(verdict.read_bytes)
        if not verdict.findings:
            print_line(out, f"{name}: whole, {size} compared", "green")
            continue
        if verdict.is_newer:
            text = f"{name}: newer format: {verdict.findings[0].problem}"
            print_line(out, text, "red")
            continue
        found = counted(len(verdict.findings), "finding")
        print_line(out, f"{name}: damaged, {found}", "red")
        for finding in verdict.findings:
            print_line(out, f"  {finding.problem}")
        print_line(out, f"  {_remedy(verdict, verdicts)}", "bold")


def _remedy(verdict: _Verdict, verdicts: Sequence[_Verdict]) -> str:
    """What to do, in one line."""
    files = {finding.file for finding in verdict.findings}
    if files == {names.METRICS}:
        return f"Only metrics are affected. Delete its {names.METRICS} to continue without those added after the save."
    text = "Restore the checkpoint from a copy, or delete its directory."
    if all(file.startswith(f"{names.DIGESTS}/") for file in files):
        text = (
            "Digests are damaged, so it is unknown whether the tensors are intact. "
            + text
            + " To load it anyway, without checks: checkpoint.verify_on_load=false."
        )
    others = [other.path.name for other in verdicts if not other.findings]
    if others:
        text += f" A run with restore_from=auto skips it; the newest intact one here is {others[-1]}."
    return text
