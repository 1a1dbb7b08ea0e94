"""What differs between two configurations, key by key, and which differences make an exact resume impossible.

Applications name things as they like, so kinds of settings are recognized by their names: `trainer.batch_size`,
`per_device_train_batch_size` and `data.loader.bs` are all sizes of batches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_ckpt.errors import printable

_ABSENT = "(absent)"
_SHOWN_CHARACTERS = 60
_SHOWN_KEY_CHARACTERS = 200
_SHOWN_DIFFERENCES = 30
_MAX_DEPTH = 50  # what is deeper is compared whole

# Kinds of settings by a key's last word or its path. The first match counts.
_HARMLESS = re.compile(
    r"(^|\.)(num_workers|pin_memory\w*|persistent_workers|prefetch\w*|verbose|log\w*|run_name|project|tags?)$"
    r"|(^|\.)(checkpoint|callbacks|logger|loggers|hydra|wandb|tensorboard)(\.|$)"
)
_KINDS = (
    ("seed", re.compile(r"(^|[._])seeds?$")),
    ("batch size", re.compile(r"(^|[._])(batch_?size|bs|batch_?size_\w+)$")),
    ("gradient accumulation", re.compile(r"accum")),
    ("optimizer type", re.compile(r"(^|\.)optim\w*(\.(\w+\.)*(_target_|name|type|class|cls))?$")),
    (
        "number of ranks",
        re.compile(r"(^|[._])(world_size|num_nodes|nnodes|n?devices|num_processes|num_gpus|gpus)$|(^|\.)mesh\."),
    ),
    ("precision", re.compile(r"precision$|(^|[._])(amp|bf16|fp16)$")),
    ("data", re.compile(r"(^|\.)(\w+_)?data(sets?|module|loaders?)?(\.|$)|(^|[._])(shuffle|seq_len\w*)$")),
)


@dataclass(frozen=True)
class Difference:
    """A setting that differs.

    Attributes:
        key: Its full key.
        before: Its value then, as text.
        now: Its value now, as text.
        kind: What makes an exact resume impossible by it: seed, batch size, ...; empty for other settings.
    """

    key: str
    before: str
    now: str
    kind: str

    def __str__(self) -> str:
        return printable(f"{_cut(self.key, _SHOWN_KEY_CHARACTERS)}: {self.before} -> {self.now}")


def differences(before: Any, now: Any) -> list[Difference]:
    """The settings that differ, by key.

    Args:
        before: A configuration as plain data.
        now: Another one.
    """
    then, later = (dict(_flat(side)) for side in (before, now))
    found = []
    for path in sorted({*then, *later}):
        if path in then and path in later and (then[path] == later[path] or str(then[path]) == str(later[path])):
            continue
        old, new = (_text(side[path]) if path in side else _ABSENT for side in (then, later))
        key = ".".join(path)
        found.append(Difference(key, old, new, kind_of(key)))
    return found


def shown(found: Sequence[object]) -> str:
    """Differences, or what says more about them, as one text; only the first ones if there are many."""
    more = len(found) - _SHOWN_DIFFERENCES
    texts = [str(item) for item in found[:_SHOWN_DIFFERENCES]]
    return "; ".join([*texts, f"and {more} more"] if more > 0 else texts)


def kind_of(key: str) -> str:
    """What depends on a setting in an exact resume, judged by its key; empty if nothing does."""
    lower = key.lower()
    if _HARMLESS.search(lower):
        return ""
    return next((kind for kind, pattern in _KINDS if pattern.search(lower)), "")


def about_saving(key: str) -> bool:
    """Whether a setting only affects how a run is saved, not what it computes."""
    return key.startswith(("checkpoint.", "callbacks.checkpoint."))


def about_beginning(key: str) -> bool:
    """Whether a setting determines where a run begins."""
    return key in ("checkpoint.restore_from", "checkpoint.restore_parts", "checkpoint.on_conflict")


def _flat(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All settings with their paths; a key may itself contain dots."""
    if isinstance(node, Mapping) and node and len(path) < _MAX_DEPTH:
        for key, value in node.items():
            yield from _flat(value, (*path, str(key)))
    else:
        yield path, node


def _text(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return _cut(text, _SHOWN_CHARACTERS)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
