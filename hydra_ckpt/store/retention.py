"""Retention: small policies that each keep some checkpoints; those that no policy keeps may be deleted.

Policies come as plain data, `{newest: 3, best: 2, every_n_steps: 1000, younger_than_s: 3600}`; a checkpoint stays
if any of them keeps it. `any_of` takes a list of more mappings, for two policies of the same kind. Checkpoints that a
pointer in the directory leads to, or that are being read, always stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.files import Files
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Catalog, Checkpoint
from hydra_ckpt.store.pointers import protected
from hydra_ckpt.store.readers import is_read
from hydra_ckpt.values import Check, count, positive


@dataclass(frozen=True, slots=True)
class Context:
    """What policies decide by: the deciding metric, and the current Unix time in seconds."""

    metric: str
    mode: str
    now: float


# Returns the names of the checkpoints it keeps; None if it cannot decide, as if the policy did not exist.
Policy = Callable[[Sequence[Checkpoint], Context], set[str] | None]


def _newest(most: int) -> Policy:
    return lambda items, _: {item.name for item in sorted(items, key=lambda item: -item.step)[:most]}


def _best(most: int) -> Policy:
    def keep(items: Sequence[Checkpoint], context: Context) -> set[str] | None:
        sign = 1.0 if context.mode == "min" else -1.0
        rated = [(sign * value, item.step, item.name) for item in items if (value := _value(item, context)) is not None]
        return {name for _, _, name in sorted(rated)[:most]} if rated else None

    return keep


def _value(item: Checkpoint, context: Context) -> float | None:
    value = item.metrics.get(context.metric)
    return value if value is not None and abs(value) < float("inf") else None


def _every_n_steps(interval: int) -> Policy:
    return lambda items, _: {item.name for item in items if item.step % interval == 0}


def _younger_than_s(age: float) -> Policy:
    return lambda items, context: {item.name for item in items if context.now - item.manifest.created < age}


_POLICIES: dict[str, tuple[Check, Callable[[Any], Policy]]] = {
    "newest": (count, _newest),
    "best": (count, _best),
    "every_n_steps": (count, _every_n_steps),
    "younger_than_s": (positive, _younger_than_s),
}


_ANY_OF = "any_of"


def policies(retention: Mapping[str, Any] | None, max_recent: int | None) -> list[Policy]:
    """Policies from plain data; none at all keeps everything.

    Raises:
        CheckpointConfigError: A policy is unknown, or its number is invalid.
    """
    wanted = dict(retention or {})
    if max_recent is not None:
        wanted.setdefault("newest", max_recent)
    made = []
    for name, value in wanted.items():
        if name == _ANY_OF:
            made += _any_of(value)
            continue
        if name not in _POLICIES:
            raise CheckpointConfigError(
                f"checkpoint.retention.{name}: unknown policy; choose from {', '.join([*_POLICIES, _ANY_OF])}"
            )
        check, policy = _POLICIES[name]
        made.append(policy(check(f"retention.{name}", value)))
    return made


def _any_of(further: Any) -> list[Policy]:
    if not isinstance(further, Sequence) or not all(isinstance(item, Mapping) for item in further):
        raise CheckpointConfigError(
            f"checkpoint.retention.{_ANY_OF}: expected a list of policies such as [{{newest: 3}}], got {further!r}"
        )
    return [policy for item in further for policy in policies(item, None)]


def superfluous(catalog: Catalog, keeping: Sequence[Policy], context: Context) -> list[Checkpoint]:
    """The checkpoints that may be deleted: not kept by a policy, not the target of a pointer, and not being read.

    If no policy can decide, such as `best` alone while no checkpoint has the metric, all are kept. If LATEST or BEST is
    damaged, the checkpoint it should lead to stays.
    """
    told = [found for policy in keeping if (found := policy(catalog.checkpoints, context)) is not None]
    if not told:
        return []
    pointed = protected(catalog.root)
    kept = pointed.names.union(*told, _due(catalog, context, pointed.lost))
    return [item for item in catalog.checkpoints if item.name not in kept and not is_read(item.path)]


def _due(catalog: Catalog, context: Context, lost: Collection[str]) -> set[str]:
    """The checkpoints that lost pointers should lead to."""
    found: set[str] = set()
    if names.LATEST in lost:
        found.update(item.name for item in catalog.candidates()[:1])
    if names.BEST in lost and (best := catalog.best(context.metric, context.mode)) is not None:
        found.add(best.name)
    return found


def retire(files: Files, checkpoint: Checkpoint, incarnation: str) -> Path:
    """Coordinator only: unpublish a checkpoint immediately, so that its bytes can be deleted later.

    Args:
        files: The file layer.
        checkpoint: The checkpoint to unpublish.
        incarnation: This run's incarnation, which tells a run that has taken over meanwhile what to put back.

    Returns:
        The hidden directory to delete.
    """
    hidden = checkpoint.path.with_name(names.retired_name(checkpoint.name, "deleting", incarnation))
    # One rename: half a checkpoint is never visible.
    files.rename(checkpoint.path, hidden)
    return hidden
