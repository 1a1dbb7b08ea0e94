"""The differential test finds faults: each fix is taken out in turn, and one of few random cases must fail.

Nowhere else do tests replace parts of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_ckpt.loading.installing import install as installing_all
from hydra_ckpt.loading.installing import install_around as installing_around
from hydra_ckpt.loading.installing import install_optimizers as installing_optimizers
from hydra_ckpt.state import (
    beyond_tensors,
    capture,
    fresh_tensors,
    holders,
    module_oracle,
    optimizer,
    optimizer_installing,
    optimizer_loading,
    optimizer_oracle,
    optimizer_targets,
)
from hydra_ckpt.storage import decoding, encoding, sharing
from tests.differential import check, drawn, quiet  # noqa: F401 - a fixture

# So many cases are tried before a fault counts as not found.
PATIENCE = 300


def _without(patch: pytest.MonkeyPatch, place: Any, name: str, instead: Any) -> None:
    assert hasattr(place, name)
    patch.setattr(place, name, instead)


def _no_own_state(patch: pytest.MonkeyPatch) -> None:
    _without(patch, optimizer, "own_state", lambda *_: None)


def _no_own_entries(patch: pytest.MonkeyPatch) -> None:
    _without(patch, beyond_tensors, "own_entries", lambda *_: {})


def _nothing_given_back_to_modules(patch: pytest.MonkeyPatch) -> None:
    _without(patch, beyond_tensors.BeyondTensors, "give_back", lambda *_: [])


def _hooks_that_only_load_are_passed_over(patch: pytest.MonkeyPatch) -> None:
    _without(patch, beyond_tensors, "customizes_loading", lambda _: False)


def _walked_tensors_are_not_put_back(patch: pytest.MonkeyPatch) -> None:
    _without(patch, module_oracle, "_remember", lambda _: lambda: None)


def _state_is_not_installed_again(patch: pytest.MonkeyPatch) -> None:
    """After an optimizer's load_state_dict(), which casts and copies."""
    real = optimizer_installing.give_back

    def give_back(called: str, item: Any, decoded: Any, found: Any, _: Any) -> list[str]:
        return real(called, item, decoded, found, lambda: None)

    _without(patch, installing_optimizers, "give_back", give_back)


def _strides_are_dropped(patch: pytest.MonkeyPatch) -> None:
    _without(patch, fresh_tensors, "strides", lambda _: {})
    _without(patch, optimizer_targets, "strides", lambda _: {})


def _empty_states_are_dropped(patch: pytest.MonkeyPatch) -> None:
    _without(patch, installing_all, "empty_states", lambda _: set())


def _parameters_come_back_as_tensors(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(decoding.DECODERS, "parameter", lambda pair: pair[0])


def _leaves_forget_that_they_need_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(decoding.DECODERS, "leaf", lambda tensor: tensor)


def _what_is_shared_is_stored_apart(patch: pytest.MonkeyPatch) -> None:
    _without(patch, sharing.Apart, "sharing", lambda *_: sharing.NOTHING_SHARED)
    _without(patch, sharing.Sharing, "of", lambda *_: sharing.NOTHING_SHARED)


def _subclasses_lose_their_scale(patch: pytest.MonkeyPatch) -> None:
    real = encoding.take_apart

    def take_apart(tensor: torch.Tensor) -> dict[str, Any]:
        found = real(tensor)
        return {**found, "inner": {name: torch.ones_like(item) for name, item in found["inner"].items()}}

    _without(patch, encoding, "take_apart", take_apart)


def _inner_optimizers_are_not_seen(patch: pytest.MonkeyPatch) -> None:
    """Neither walked nor told: what a wrapper's own state_dict gives is all there is, and casts."""
    real = holders._within

    def within(item: Any, path: str, seen: set[int]) -> Any:
        return [next(iter(real(item, path, seen)))]

    _without(patch, holders, "_within", within)


def _stray_keys_are_passed_over(patch: pytest.MonkeyPatch) -> None:
    _without(patch, optimizer_oracle, "_strange_keys", lambda _: False)


def _extra_state_is_not_set(patch: pytest.MonkeyPatch) -> None:
    _without(patch, beyond_tensors.BeyondTensors, "set_extra_state", lambda *_: None)


def _options_of_empty_groups_are_not_restored(patch: pytest.MonkeyPatch) -> None:
    _without(patch, optimizer_loading, "_empty_group", lambda *_: None)


def _load_hooks_of_optimizers_are_passed_over(patch: pytest.MonkeyPatch) -> None:
    _without(patch, optimizer_oracle, "_customizes_loading", lambda _: False)
    _without(patch, optimizer_oracle, "is_plain", lambda item: isinstance(item, torch.optim.Optimizer))


def _differences_are_not_seen(patch: pytest.MonkeyPatch) -> None:
    """A load reports as exact what it did not install."""
    _without(patch, installing_around, "differing", lambda *_: [])
    _without(
        patch,
        installing_around.AroundInstaller,
        "_give",
        lambda self, dotted, *_: self.source.notes.took(dotted, []),
    )


def _schedulers_are_saved_as_they_begin(patch: pytest.MonkeyPatch) -> None:
    real = capture.told_by

    def told_by(dotted: str, item: Any) -> Any:
        told = real(dotted, item)
        return {**told, "last_epoch": 0} if "last_epoch" in told else told

    _without(patch, capture, "told_by", told_by)


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    _no_own_state,
    _no_own_entries,
    _nothing_given_back_to_modules,
    _hooks_that_only_load_are_passed_over,
    _walked_tensors_are_not_put_back,
    _state_is_not_installed_again,
    _strides_are_dropped,
    _empty_states_are_dropped,
    _parameters_come_back_as_tensors,
    _leaves_forget_that_they_need_gradients,
    _what_is_shared_is_stored_apart,
    _subclasses_lose_their_scale,
    _inner_optimizers_are_not_seen,
    _stray_keys_are_passed_over,
    _extra_state_is_not_set,
    _options_of_empty_groups_are_not_restored,
    _load_hooks_of_optimizers_are_passed_over,
    _differences_are_not_seen,
    _schedulers_are_saved_as_they_begin,
]


def _first_found(root: Path) -> int:
    """The number of the first case with a fault, an error included: that is what users would see."""
    for seed in range(PATIENCE):
        try:
            if check(drawn(seed, "none"), root / str(seed)).faults:
                return seed
        except Exception:  # noqa: BLE001 - whatever it is, it is seen
            return seed
    return PATIENCE


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_fix_that_is_taken_out_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    found = _first_found(tmp_path)
    print(f"found by case {found}")
    assert found < PATIENCE
