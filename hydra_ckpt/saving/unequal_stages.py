"""Refuses ranks of one pipeline stage that hold different tensors, by the names that users know."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hydra_ckpt.errors import TopologyError
from hydra_ckpt.storage.stage_names import unqualified
from hydra_ckpt.store import names

_ALIKE = "give it the same keys, and tensors of the same shapes and types, on every rank"
_RESIZED = (
    "gather or pad tensors that ranks fill at their own pace (replay buffers, list states of metrics) to one size "
    "before the save, or leave them out"
)


def refuse_unequal_stages(speaking: Mapping[int, Mapping[str, Any]]) -> None:
    """Compare what the kinds of ranks of each pipeline stage hold.

    Args:
        speaking: What the first rank of each kind reported.

    Raises:
        TopologyError: Ranks of one stage hold different tensors or objects.
    """
    first: dict[int, tuple[int, set[tuple[str, str, str]]]] = {}
    lines: list[str] = []
    different: set[tuple[str, str]] = set()
    for rank, payload in speaking.items():
        keys = set(_keys(payload))
        known_rank, known = first.setdefault(payload["stage"], (rank, keys))
        if known != keys:
            pair = f"of ranks {known_rank} and {rank}"
            different |= {(part, name) for part, name, _ in known ^ keys}
            for one, only in ((known_rank, known - keys), (rank, keys - known)):
                lines += [f"{pair}, only on rank {one}: {_shown(*key)}" for key in sorted(only)]
    if lines:
        labels = {label for payload in speaking.values() for label in payload["objects"]}
        raise TopologyError(
            "ranks of the same pipeline stage hold different tensors; nothing was written.\n  "
            + "\n  ".join(lines)
            + "".join(f"\n  {remedy}" for remedy in _remedies(labels, different))
        )


def _keys(payload: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Part (or `objects`), name and description of everything that a rank holds."""
    for part, rows in payload["parts"].items():
        # What each rank stores for itself is in its own part, too.
        yield from ((part, row[0], f"{row[1]} {list(row[2])}") for row in rows if part != names.OWN)
    for part, data in payload["adapted"].items():
        for name, _, _, source, offsets, sizes, *_ in data["aliases"]:
            yield part, name, f"made from {source} {offsets} {sizes} by the adapter"
    yield from (("objects", label, "") for label in payload["objects"])


def _shown(part: str, name: str, what: str) -> str:
    return f"{_dotted(name)} {what}" if part == names.EXTRAS else f"{part}: {name} {what}".rstrip()


def _dotted(name: str) -> str:
    """What users call a tensor of the part `extras`. Example: `model.metric.n.0` for `entries::0:metric.n.0`."""
    owner, _, rest = unqualified(name).partition(":")
    if owner == "extra_state":
        return f"model.{rest}"
    if owner in ("entries", "metadata"):
        model, _, inner = rest.partition(":")
        return ".".join(filter(None, ("model", model, inner.partition(":")[2])))
    return f"lr_scheduler.{rest}" if owner == "lr_scheduler" else f"extras.{owner}.{rest}"


def _remedies(labels: Collection[str], different: Collection[tuple[str, str]]) -> list[str]:
    """What to do about tensors that only some ranks of a stage hold.

    Args:
        labels: Of the objects that any rank has.
        different: Part and name of each, or `objects` and its label.
    """
    found: dict[str, None] = {}
    for part, name in sorted(different):
        extra = f"extras.{unqualified(name).partition(':')[0]}" if part == names.EXTRAS else name
        if part in (names.EXTRAS, "objects") and extra.startswith("extras.") and extra in labels:
            found[f"{extra}: {_ALIKE}, {_leave_out(_literal(extra))}"] = None
        elif part == names.EXTRAS:
            called, pattern = _object_of(_dotted(name), labels)
            found[f"{called}: {_ALIKE}, {_leave_out(pattern)}"] = None
        elif part == names.OPTIMIZER:
            found[f"optimizer: {_ALIKE}"] = None
        else:
            found["Build the same model on every rank, or pass each stage's pp_rank to build()"] = None
    resized = any(part == names.EXTRAS for part, _ in different)
    return [*found, *([_RESIZED] if resized else [])]


def _object_of(dotted: str, labels: Collection[str]) -> tuple[str, str]:
    """The object that has a tensor, and a pattern that leaves it out."""
    if dotted.startswith("lr_scheduler."):
        is_alone = sum(label.startswith("lr_scheduler.") for label in labels) == 1
        return ("lr_scheduler",) * 2 if is_alone else (dotted, "lr_scheduler.*")
    before, state, _ = dotted.partition("._extra_state")
    if state:
        return before + state, _literal(before + state)
    # A list has another number of entries at each save.
    stem = re.sub(r"(\.\d+)+$", "", dotted)
    return stem, _literal(stem) + (".*" if stem != dotted else "")


def _literal(dotted: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", dotted)


def _leave_out(pattern: str) -> str:
    return f'or, if it may be lost, leave it out: checkpoint.allow_unsaved=["{pattern}"]'
