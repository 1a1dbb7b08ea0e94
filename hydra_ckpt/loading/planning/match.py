"""Compares live objects with a checkpoint: what to read into which tensor, and everything that does not match."""

from __future__ import annotations

from hydra_ckpt.loading.planning.load_plan import LoadPlan
from hydra_ckpt.loading.planning.match_around import AroundMatcher
from hydra_ckpt.loading.planning.match_drifted import DriftedMatcher
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
    DriftedMatcher(source, plan, strict).match()
    return plan
