"""Puts saved optimizer state into live optimizers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.state.around import told_by
from hydra_ckpt.state.holders import Holder, holders
from hydra_ckpt.state.optimizer_loading import Fit
from hydra_ckpt.state.optimizer_oracle import differing
from hydra_ckpt.storage.decoding import fill


def install(
    found: Fit,
    states: Sequence[Mapping[str, dict[Any, Any]]],
    options: Sequence[Sequence[dict[str, Any] | None]],
    optimizers: Mapping[str, Any],
    names: Mapping[int, str],
    empty: Mapping[str, Collection[str]],
    *,
    is_first: bool = True,
) -> None:
    """Put saved state and options into live optimizers; state that was absent becomes absent.

    Args:
        found: What fits.
        states: For each live optimizer: parameter name to its state, tensors in place.
        options: For each live optimizer and group its options; None for a group that keeps its own.
        optimizers: What the live optimizers are called, to these.
        names: Identity of a parameter to its name.
        empty: What `empty_states` gives.
        is_first: Whether absent state is removed; not after the optimizer has taken its own state over.
    """
    # Looked up again: load_state_dict() of an optimizer gives it new groups and a new state.
    live = {(holder.number, holder.path): holder for holder in holders(optimizers, names)}
    by_place = {(one.number, one.path): state for one, state in zip(found.live, states, strict=True)}
    for saved, groups in zip(found.live, options, strict=True):
        holder = live.get((saved.number, saved.path))
        if holder is None or saved.number in found.absent | found.refused:
            continue
        # What two had in common load_state_dict() may have parted.
        state = by_place[saved.outer or (saved.number, saved.path)]
        for group, chosen, built in zip(holder.groups, groups, saved.groups, strict=False):
            left_out = found.left_out.get(id(built), frozenset()) & (built.keys() - group.keys())
            group.update({key: built[key] for key in left_out})  # load_state_dict() may have dropped them
            group.update(chosen or {})
        if saved.number in found.forgetting and not saved.path:
            _forget_own(holder)
        for parameter in {id(item): item for item in holder.parameters}.values():
            name = names[id(parameter)]
            if name in found.missing or name in found.left:
                continue
            if state.get(name) or name in empty.get(holder.path, ()):
                whole = fill(dict(state.get(name, {})), holder.state.get(parameter))
                holder.state[parameter] = whole  # type: ignore[index]
            elif is_first:
                holder.state.pop(parameter, None)  # type: ignore[attr-defined]


def _forget_own(holder: Holder) -> None:
    """Remove state that belongs to no parameter, as PyTorch's own load_state_dict() would."""
    known = set(map(id, holder.parameters))
    for key in [key for key in holder.state if id(key) not in known]:
        del holder.state[key]  # type: ignore[attr-defined]


def give_back(
    called: str, optimizer: Any, decoded: Callable[..., Any], found: Fit, walk: Callable[[], None]
) -> list[str]:
    """Hand an optimizer its own saved state_dict, and put the walked state back that it may have cast or copied.

    PyTorch casts state to the parameter's element type when it loads: fp32 state of a bf16 parameter would lose half
    its bits. So what was walked is installed again afterwards.

    Args:
        called: What messages call it.
        optimizer: The optimizer.
        decoded: Makes the state dict, each time a new one: some optimizers take theirs apart. With `made={}` it has
            the tensors that are read, otherwise others over the same memory, to compare with.
        found: What fits.
        walk: Installs what was walked.

    Returns:
        Where its state_dict() differs afterwards from what it was given, by dotted name.

    Raises:
        CheckpointError: It refuses the state dict.
    """
    inside = [holder.optimizer for holder in found.live if holder.called == called]
    shared = [(one, other) for one in inside for other in inside if one is not other and _share_groups(one, other)]
    try:
        optimizer.load_state_dict(decoded(made={}))
    except Exception as error:
        raise CheckpointError(
            f"{called} ({type(optimizer).__qualname__}): its load_state_dict() refuses what its state_dict() returned "
            f"when it was saved: {type(error).__name__}: {error}. Build it as in the run that saved; to start with a "
            "new one, load only the other parts: restore_parts=[model,dataloader,rng,extras,progress]"
        ) from error
    for one, other in shared:
        if not _share_groups(one, other):
            with suppress(AttributeError):  # it shows the groups of the other one
                one.param_groups = other.param_groups
    walk()
    return list(differing(decoded(), told_by(called, optimizer), called))


def _share_groups(one: Any, other: Any) -> bool:
    """Whether two optimizers look at one list of groups, so that a scheduler of the outer one acts on the inner one."""
    return getattr(one, "param_groups", None) is getattr(other, "param_groups", 0)
