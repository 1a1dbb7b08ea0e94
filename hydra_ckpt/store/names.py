"""Names on disk, each spelled once."""

from __future__ import annotations

import re
import secrets

MANIFEST = "manifest.json"
METRICS = "metrics.json"
OWNER = "owner.json"
LATEST = "LATEST"
BEST = "BEST"
# In a draft: the coordinator's token. In a checkpoint: its pointers have not been moved yet.
TOKEN = ".token"  # noqa: S105

MODEL = "model"
CONSOLIDATED = "consolidated"
# Beside a model's tensors: their names in its export, if these differ.
NAMING = "names.json"
# The small files of an export, in checkpoints without one.
ASSETS = "assets"
# peft's file name for the weights of an adapter.
ADAPTER = "adapter_model"
OPTIMIZER = "optim"
EXTRAS = "extras"
# Tensors whose values differ between ranks under one name: one file per rank.
OWN = "own"
PROGRESS = "progress"
CONFIG = "config"
DIGESTS = "digests"

_CHECKPOINT = re.compile(r"epoch_(\d{1,18})_step_(\d{1,18})")
# Files prepared to replace a pointer or small file.
_PREPARED = re.compile(
    rf"\.({LATEST}|{BEST}|{LATEST}\.txt|{BEST}\.txt|{re.escape(OWNER)}|{re.escape(METRICS)})\.(after-)?[0-9a-f]{{12,}}"
)
_NONCE_DIGITS = 12
_HIDDEN = re.compile(
    r"\.(?P<name>epoch_\d{1,18}_step_\d{1,18}(\.export)?)"
    r"\.(?P<kind>draft|deleting|corrupt|aside)-(?P<nonce>[0-9a-f]+)"
)


def checkpoint_name(epoch: int, step: int) -> str:
    """The directory name of a checkpoint."""
    return f"epoch_{epoch}_step_{step}"


def is_checkpoint_name(name: str) -> bool:
    """Whether a directory of this name may be one of our checkpoints."""
    return _CHECKPOINT.fullmatch(name) is not None


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    match = _CHECKPOINT.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not a checkpoint name")
    return int(match[2])


def hidden_name(name: str, kind: str, ending: str | None = None) -> str:
    """A hidden name beside a checkpoint, a fresh one by default.

    Args:
        name: The checkpoint's name.
        kind: draft, deleting, corrupt or aside.
        ending: Hexadecimal digits that end the name; None for random ones.
    """
    return f".{name}.{kind}-{ending or nonce()}"


def retired_name(name: str, kind: str, incarnation: str) -> str:
    """A fresh hidden name that says which run has retired a checkpoint.

    Args:
        name: The checkpoint's name.
        kind: deleting, corrupt or aside.
        incarnation: The run's incarnation; hexadecimal digits, as `nonce` makes them.
    """
    return hidden_name(name, kind, incarnation + nonce())


def retired_by(name: str) -> str | None:
    """The incarnation in a hidden name made by `retired_name`; None in any other name."""
    match = _HIDDEN.fullmatch(name)
    digits = match["nonce"] if match and match["kind"] != "draft" else ""
    return digits[:_NONCE_DIGITS] if len(digits) == 2 * _NONCE_DIGITS else None


def is_prepared(name: str) -> bool:
    """Whether a hidden file of this name was prepared to replace one of our pointers or small files."""
    return _PREPARED.fullmatch(name) is not None


def parse_hidden(name: str) -> tuple[str, str] | None:
    """The checkpoint's name and the kind of a hidden name, or None for any other name."""
    match = _HIDDEN.fullmatch(name)
    return (match["name"], match["kind"]) if match else None


def nonce() -> str:
    """A short random text."""
    return secrets.token_hex(_NONCE_DIGITS // 2)
