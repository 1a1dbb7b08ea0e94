"""`hydra-ckpt export`: a Hugging Face directory from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from hydra_ckpt.cli.locating import open_one
from hydra_ckpt.cli.output import print_json, shown_size
from hydra_ckpt.errors import CheckpointConfigError, counted
from hydra_ckpt.store import names
from hydra_ckpt.values import EXPORT_DTYPES, refuse_url

if TYPE_CHECKING:
    from hydra_ckpt.hub.writing import Exported

__all__ = ["export"]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint of hydra_ckpt, DCP or accelerate; in a directory with several, what LATEST names."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The directory to create.")],
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: the run's own export type.")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Maximum size of a file, e.g. 5GB; default: the same files as the run's.")
    ] = None,
    part: Annotated[
        str, typer.Option(help="model, one of several models, or an extra that averages the weights.")
    ] = names.MODEL,
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base model.")] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="With --merge: the base model, if not the one the adapter names. For other tools' checkpoints: a "
            "model like theirs."
        ),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare every byte read with its digest.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a Hugging Face directory, which `from_pretrained` can open, from any run's checkpoint.

    The files are those that the run itself would have written. Weights are streamed, whatever their size. For a
    checkpoint of `dcp.save` or accelerate, a model like it (--base) provides names, configuration and tokenizer.
    """
    from hydra_ckpt.hub.foreign_export import export_foreign
    from hydra_ckpt.hub.merging import merge_adapter
    from hydra_ckpt.hub.offline import export_checkpoint
    from hydra_ckpt.storage.pickled import is_foreign

    refuse_url("OUT", out)
    kind = None if dtype is None else _dtype(dtype)
    limit = None if max_shard_size is None else _size(max_shard_size)
    options: dict[str, Any] = {"part": part, "dtype": kind, "max_file_bytes": limit}
    if is_foreign(checkpoint):
        _refuse_merge(checkpoint, merge)
        weights = _stream(checkpoint.name, partial(export_foreign, checkpoint, base=base, **options), out)
    elif merge:
        weights = merge_adapter(open_one(checkpoint), out, base=base, verify=verify, **options)
    elif base is not None:
        raise CheckpointConfigError(
            "--base: checkpoints of hydra_ckpt record their model, so this option is only for --merge"
        )
    else:
        found = open_one(checkpoint)
        weights = _stream(found.name, partial(export_checkpoint, found, verify=verify, **options), out)
    files = {name: (out / name).stat().st_size for name in weights}
    nbytes = sum(files.values())
    if as_json:
        print_json({"path": str(out.resolve()), "files": files, "bytes": nbytes})
    else:
        print(f"{out}: {counted(len(files), 'weight file')}, {shown_size(nbytes)}")


def _refuse_merge(checkpoint: Path, merge: bool) -> None:
    if merge:
        raise CheckpointConfigError(
            f"--merge: {checkpoint} was not written by hydra_ckpt, so it has no adapter in peft's form"
        )


def _stream(name: str, make: Callable[..., Exported], out: Path) -> list[str]:
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        made = make(out, progress=lambda done, total: bar.update(task, completed=done, total=total))
    return list(made.files)


def _dtype(text: str) -> str:
    name = EXPORT_DTYPES.get(text, text)
    if name not in EXPORT_DTYPES.values():
        raise CheckpointConfigError(
            f"--dtype {text} is not one of: {', '.join([*EXPORT_DTYPES, *EXPORT_DTYPES.values()])}"
        )
    return name


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise CheckpointConfigError(f"--max-shard-size {text} is not a size; write, for example, 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
