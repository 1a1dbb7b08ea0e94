"""Optimizers with one state for all parameters of a group: it fits only the same parameters in the same order.

LBFGS keeps its history as one row of all parameters, with the first of them. Example: for `a` of 2 elements and `b` of
3 it has 5 elements, and begins with those of `a`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.optim import LBFGS

from hydra_ckpt.errors import some_of
from hydra_ckpt.state.holders import Holder
from hydra_ckpt.state.optimizer_homes import section
from hydra_ckpt.state.optimizer_loading import Fit, place_of
from hydra_ckpt.storage.decoding import tensor_names


def leave_joint(
    described: Mapping[str, Any], found: Fit, names: Mapping[int, str], sizes: Mapping[str, int], gone: Collection[str]
) -> None:
    """Leave the state of groups as it is that have one for all parameters, if these are not those that it was for.

    Args:
        described: The saved description.
        found: What of it fits.
        names: Identity of a parameter to its name.
        sizes: Name of every saved tensor, those of models included, to its number of elements.
        gone: Names of parameters that are not loaded.
    """
    for holder, state in zip(found.live, found.state, strict=True):
        groups = [group["params"] for one in section(described, holder.path)["optimizers"] for group in one["groups"]]
        for index, group in enumerate(holder.groups):
            here = [names[id(item)] for item in group["params"]]
            for saved in (saved for saved in groups if not set(saved).isdisjoint(here)):
                if saved == here and not set(here).intersection(gone):
                    continue
                if _is_joint(holder, state, saved, sizes):
                    found.different.update(_difference(holder, index, saved, here))
                    found.leave(saved)


def _is_joint(holder: Holder, state: Mapping[str, Any], saved: Sequence[str], sizes: Mapping[str, int]) -> bool:
    """Whether a saved group had one state for all of its parameters."""
    held = [state[name] for name in saved if name in state]
    if isinstance(holder.optimizer, LBFGS):
        return bool(held)
    tensors = {sizes.get(name) for name in tensor_names(held)}
    is_known = len(saved) > 1 and all(name in sizes for name in saved)
    return is_known and sum(sizes[name] for name in saved) in tensors


def _difference(holder: Holder, index: int, saved: Sequence[str], here: Sequence[str]) -> dict[str, str]:
    """What is wrong with a group, by its name."""
    if set(saved) == set(here) and list(saved) != list(here):
        return {
            place_of(holder, index): "its parameters have another order than in the checkpoint, and it has one state "
            f"for all of them. Give them to it in this order: {some_of(saved)}"
        }
    return {place_of(holder): "it has one state for all parameters, which fits only if all of them are loaded"}
