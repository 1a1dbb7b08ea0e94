"""The `hydra-ckpt` tool: one module per command, which parses, calls and prints.

Only `prune` and `repair` change a checkpoint directory.

Exit codes: 0: everything is fine, 1: something is wrong, 2: the tool cannot do what was requested.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import hydra_ckpt
from hydra_ckpt.cli.diff import diff
from hydra_ckpt.cli.export import export
from hydra_ckpt.cli.list import list_checkpoints
from hydra_ckpt.cli.prune import prune
from hydra_ckpt.cli.repair import repair
from hydra_ckpt.cli.show import show
from hydra_ckpt.cli.verify import verify_checkpoints
from hydra_ckpt.errors import (
    CheckpointConfigError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    prepare_streams,
    printable,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="hydra-ckpt",
    help="Looks into checkpoint directories, and exports models. Only prune and repair change them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"hydra-ckpt {hydra_ckpt.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Inspect checkpoint directories, and export models. Only prune and repair change a directory."""


app.command("list")(list_checkpoints)
app.command("show")(show)
app.command("verify")(verify_checkpoints)
app.command("export")(export)
app.command("diff")(diff)
app.command("prune")(prune)
app.command("repair")(repair)


def main() -> None:
    """Entry point of the console script. For our own errors it prints the message without a traceback."""
    prepare_streams()
    try:
        app()
    except CheckpointError as error:
        print(f"hydra-ckpt: {error}", file=sys.stderr)
        misuse = (CheckpointConfigError, CheckpointExistsError, CheckpointNotFoundError)
        sys.exit(2 if isinstance(error, misuse) else 1)
    except OSError as error:
        print(f"hydra-ckpt: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
