"""Compares live objects with a checkpoint: what to read into which tensor, and everything that does not match."""

from __future__ import annotations

from hydra_ckpt.errors import some_of
from hydra_ckpt.loading.planning.labels import (
    called_in_reports,
    part_of_tensor,
)
from hydra_ckpt.loading.planning.load_plan import LoadPlan
from hydra_ckpt.loading.planning.match_around import AroundMatcher
from hydra_ckpt.loading.planning.match_models import ModelMatcher
from hydra_ckpt.loading.planning.match_optimizers import OptimizerMatcher
from hydra_ckpt.loading.sources.source import Source


def plan_load(source: Source, *, strict: bool) -> LoadPlan:
    """Compare a checkpoint with the live objects; local, and nothing is changed.

    Args:
        source: The checkpoint, read.
        strict: Whether a mismatch will be an error; then no targets are made for the state around it.
    """
    plan = LoadPlan()
    available = source.available()
    if "model" in available:
        ModelMatcher(source, plan, strict).match()
    if "optimizer" in available:
        OptimizerMatcher(source, plan, strict).match()
    around = AroundMatcher(source, plan, strict)
    around.match()
    for label in () if source.per_rank.is_here else source.per_rank.plain:
        around.derived_from_rank_0(label)
    _note_drifted(source)
    return plan


def _note_drifted(source: Source) -> None:
    """Report the tensors of replicas that had drifted apart: all replicas get the values of the first one."""
    available, notes = source.available(), source.notes
    labels = [label for label in source.shared.get("drifted", ()) if part_of_tensor(label) in available]
    found = [called_in_reports(label) for label in labels]
    for part in {label.partition("/")[0] for label in labels}:
        dotted = part_of_tensor(f"{part}/")
        if {f"{part}/{name}" for name in source.stored(part)} <= set(labels):  # all of it
            found = [dotted, *(name for name in found if not name.startswith(f"{dotted}."))]
    if found:
        notes.rederived += [name for name in found if name not in notes.rederived]
        notes.texts.append(
            f"replicas had drifted apart when this was saved; all have the first one's values now: {some_of(found)}"
        )
