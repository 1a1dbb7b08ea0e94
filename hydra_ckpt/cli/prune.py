"""`hydra-ckpt prune`: deletes checkpoints that no rule keeps. Does not import torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hydra_ckpt.cli.holding import decision, held
from hydra_ckpt.cli.locating import locate
from hydra_ckpt.cli.output import print_json, shown_size
from hydra_ckpt.errors import CheckpointConfigError, counted
from hydra_ckpt.store.catalog import Catalog, scan
from hydra_ckpt.store.retention import Context, policies, superfluous

__all__ = ["prune"]


def prune(
    directory: Annotated[Path, typer.Argument(help="A checkpoint directory, or a run directory with checkpoints/.")],
    newest: Annotated[int | None, typer.Option(help="Keep this many of the newest.")] = None,
    best: Annotated[int | None, typer.Option(help="Keep this many of the best.")] = None,
    every_n_steps: Annotated[int | None, typer.Option(help="Keep those whose step is a multiple of this.")] = None,
    younger_than_s: Annotated[float | None, typer.Option(help="Keep those younger than this many seconds.")] = None,
    metric: Annotated[str | None, typer.Option(help="The metric for --best; default: the run's own.")] = None,
    mode: Annotated[str | None, typer.Option(help="min or max; default: the run's own.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete them; without it they are only listed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Delete the checkpoints that no rule given here keeps; without --yes, only list them.

    Checkpoints that LATEST, BEST or a pointer of your own leads to are always kept, and so are those being read.
    """
    rules: dict[str, Any] = {
        "newest": newest,
        "best": best,
        "every_n_steps": every_n_steps,
        "younger_than_s": younger_than_s,
    }
    rules = {name: value for name, value in rules.items() if value is not None}
    if not rules or mode not in (None, "min", "max"):
        wrong = f"--mode {mode} is neither min nor max" if rules else "no rule says what to keep"
        raise CheckpointConfigError(f"{wrong}; give one or more of --newest, --best, --every-n-steps, --younger-than-s")
    keeping = policies(rules, None)
    root = locate(directory).root
    catalog = scan(root)
    own = decision(catalog)
    context = Context(metric or own.best_metric_key, mode or own.best_metric_mode, time.time())
    if best is not None:
        _refuse_unmeasured(catalog, context)
    if yes:
        with held(root, own) as run:
            catalog = scan(root)
            going = superfluous(catalog, keeping, context)
            run.retire(going)
    else:
        going = superfluous(catalog, keeping, context)
    gone = [
        {"name": item.name, "path": str(item.path), "step": item.step, "bytes": item.manifest.nbytes} for item in going
    ]
    nbytes = sum(item.manifest.nbytes for item in going)
    if as_json:
        newer = sorted(catalog.newer)
        print_json({"directory": str(root), "deleted": yes, "checkpoints": gone, "bytes": nbytes, "newer": newer})
        return
    for name in sorted(catalog.newer):
        print(f"kept: {name}, which is of a newer format")
    for item in going:
        print(f"{'deleted' if yes else 'would be deleted'}: {item.name}")
    tail = "" if yes or not going else "; pass --yes to delete"
    print(f"{len(going)} of {counted(len(catalog.checkpoints), 'checkpoint')}, {shown_size(nbytes)}{tail}")


def _refuse_unmeasured(catalog: Catalog, context: Context) -> None:
    """Raise if there are checkpoints, but none has the metric that decides the best."""
    if not catalog.checkpoints or catalog.best(context.metric, context.mode) is not None:
        return
    measured = sorted({name for item in catalog.checkpoints for name in item.metrics})
    instead = (
        f"choose one of these with --metric: {', '.join(measured)}"
        if measured
        else "none has any metric; leave out --best"
    )
    raise CheckpointConfigError(
        f"--best: no checkpoint in {catalog.root} has a finite metric {context.metric!r} to compare; {instead}"
    )
