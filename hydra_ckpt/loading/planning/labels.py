"""From the labels of what ranks had different values of to the names that reports use for the live objects."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import called
from hydra_ckpt.storage.stage_names import unqualified

_IN_MODELS = {"extra_state": "extra_state", "entries": "state_dict()", "metadata": "state_dict()"}


def label_of_tensor(name: str) -> str:
    """The label of the object that has a tensor of the part `extras`. Example: `extras.ema` for `1/ema:shadow.0`."""
    owner, _, rest = unqualified(name).partition(":")
    if owner in ("lr_scheduler", "extra_state"):
        return f"{owner}.{re.split('[.:]', rest)[0]}"
    if owner in _IN_MODELS:
        return f"{owner}.{rest.partition(':')[0]}"
    return f"extras.{owner}"


def part_of_label(label: str) -> str:
    """The part of a checkpoint that a label belongs to."""
    kind = label.partition(".")[0]
    return "model" if kind in _IN_MODELS else kind


def called_here(
    label: str,
    state: AppState,
    models: Collection[str],
    homes: Mapping[str, Sequence[int | None]],
    owners: Mapping[str, str],
) -> str | None:
    """What reports call the object, or the part of it, that a label is about; None if there is none here.

    Args:
        label: See `hydra_ckpt.state.plain`.
        state: The live objects.
        models: Names of the saved models.
        homes: For `optimizer` and `lr_scheduler` the number of the saved object for each live one.
        owners: Name of a parameter to the live optimizer that holds it.
    """
    kind, _, name = label.partition(".")
    if kind in _IN_MODELS:
        return f"{called(name if name in models else '')}.{_IN_MODELS[kind]}"
    if kind == "extras":
        return label if name in state.extras else None
    if kind == "lr_scheduler":
        return _live(name, list(state.named_schedulers), homes[kind])
    section, _, place = name.partition(".")
    if (kind, section) == ("optimizer", "state"):
        return f"{owners.get(place, kind)}.{place}"
    if kind != "optimizer" or section not in ("param_groups", "own"):
        return label if kind == "optimizer" else None
    number, _, index = place.partition(".")
    found = _live(number, list(state.named_optimizers), homes[kind])
    return found and f"{found}.{f'param_groups.{index}' if section == 'param_groups' else 'state_dict()'}"


def _live(number: str, live: Sequence[str], homes: Sequence[int | None]) -> str | None:
    return next((name for name, home in zip(live, homes, strict=True) if str(home) == number), None)
