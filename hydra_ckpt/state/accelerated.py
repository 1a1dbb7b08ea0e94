"""What an Accelerator has prepared and registered: everything that its `save_state` would save."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import SequentialSampler

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.state.wrappers import unwrap

log = logging.getLogger(__name__)

_REMEDY = "AppState.from_accelerator(accelerator, dataloader=loader)"


def prepared(
    accelerator: Any, extras: Mapping[str, Any], dataloader: Any, models: Mapping[str, nn.Module] | None
) -> dict[str, Any]:
    """The fields of an AppState.

    Args:
        accelerator: An Accelerator that has prepared everything.
        extras: The user's own objects.
        dataloader: The training loader; None to look for it among the prepared ones.
        models: Names of the prepared models; None for numbers.

    Raises:
        CheckpointConfigError: No model was prepared, or `models` does not name exactly those that were.
    """
    if not accelerator._models:
        raise CheckpointConfigError(
            "AppState.from_accelerator: the Accelerator holds no model, so nothing is prepared yet. Call it after the "
            "last prepare()"
        )
    loaders = _distinct(accelerator._dataloaders)
    training = _training_loader(loaders) if dataloader is None else dataloader
    found = dict(extras)
    if accelerator.scaler is not None:
        _add(found, "grad_scaler", [accelerator.scaler])
    for kind, objects in _by_kind(accelerator._custom_objects).items():
        _add(found, kind, objects)
    beside = {f"dataloader_{n}": item for n, item in enumerate(loaders) if item is not training and is_stateful(item)}
    for name, loader in beside.items():
        _add(found, name, [loader])
    _add(found, "accelerator", [Progress(accelerator)])
    return {
        "model": _named_models(_distinct(accelerator._models), models),
        "optimizer": _one_or_list(_distinct(accelerator._optimizers)),
        "lr_scheduler": _one_or_list(_distinct(accelerator._schedulers)),
        "dataloader": training,
        "extras": found,
    }


class Progress:
    """The Accelerator's own count of micro-batches, by which it accumulates gradients.

    It also checks that nothing was prepared or registered since, because no save would contain it.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._known = _everything(accelerator)  # kept alive, so that their identities stay theirs
        self._has_warned = False

    def state_dict(self) -> dict[str, int]:
        """The count.

        Raises:
            CheckpointConfigError: Something was prepared or registered later.
        """
        known = {id(item) for item in self._known}
        later = [item for item in _everything(self._accelerator) if id(item) not in known]
        # Loaders without a position, such as those of each validation, have nothing to lose.
        loaders = self._accelerator._dataloaders
        later = [item for item in later if is_stateful(item) or not any(item is loader for loader in loaders)]
        if later:
            kinds = ", ".join(type(item).__name__ for item in later)
            raise CheckpointConfigError(
                f"AppState.from_accelerator: the Accelerator got {kinds} after it was called, so a checkpoint would "
                "lack it. Call it after the last prepare() and register_for_checkpointing()"
            )
        self._warn_of_gradients()
        return {"step": int(self._accelerator.step)}

    def _warn_of_gradients(self) -> None:
        """Warn once if gradients are being accumulated: as with `save_state`, they are not saved."""
        if self._accelerator.sync_gradients or self._has_warned:
            return
        self._has_warned = True
        log.warning(
            "saved in the middle of gradient accumulation (gradient_accumulation_steps=%d): the gradients so far are "
            "not in the checkpoint, so the first step after a resume lacks them. Save after an optimizer step, when "
            "accelerator.sync_gradients is True",
            self._accelerator.gradient_accumulation_steps,
        )

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load the count."""
        self._accelerator.step = state["step"]


class UndecidedLoader:
    """Takes the place of the training loader if it is unknown which of the prepared loaders that is."""

    def __init__(self, loaders: Sequence[Any]) -> None:
        self._count = len(loaders)

    def state_dict(self) -> Any:
        """Nothing to save.

        Raises:
            CheckpointConfigError: Always.
        """
        which = (
            "whether training reads the prepared loader" if self._count == 1 else "which prepared loader training reads"
        )
        raise CheckpointConfigError(f"it is unknown {which}; name it: {_REMEDY}")

    def load_state_dict(self, state: Any) -> None:
        """Never called: nothing is saved."""


def is_stateful(loader: Any) -> bool:
    """Whether a loader can report its position; accelerate's have a `state_dict()` that may not work."""
    if not hasattr(loader, "load_state_dict"):
        return False
    try:
        loader.state_dict()
    except Exception:  # noqa: BLE001 - a foreign loader may raise anything
        return False
    return True


def _training_loader(loaders: Sequence[Any]) -> Any:
    """The only loader that shuffles, else the only one that can report its position."""
    for found in (list(filter(_shuffles, loaders)), list(filter(is_stateful, loaders))):
        if len(found) == 1:
            return found[0]
    return UndecidedLoader(loaders) if loaders else None


def _shuffles(loader: Any) -> bool:
    get_sampler = getattr(loader, "get_sampler", None)
    sampler = get_sampler() if get_sampler is not None else None
    return sampler is not None and not isinstance(sampler, SequentialSampler)


def _named_models(models: list[Any], given: Mapping[str, nn.Module] | None) -> Any:
    if given is None:
        return models[0] if len(models) == 1 else {f"model_{number}": item for number, item in enumerate(models)}
    by_core = {id(unwrap(item)): item for item in models}
    wanted = {name: id(unwrap(model)) for name, model in given.items()}
    strange = [f"models[{name!r}] was not prepared" for name, core in wanted.items() if core not in by_core]
    nameless = [type(unwrap(by_core[core])).__name__ for core in by_core if core not in wanted.values()]
    if strange or nameless:
        raise CheckpointConfigError(
            "AppState.from_accelerator: models= must name each model that the Accelerator has prepared: "
            + "; ".join([*strange, *(f"a {kind} has no name" for kind in nameless)])
        )
    return {name: by_core[core] for name, core in wanted.items()}


def _by_kind(objects: Iterable[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for item in _distinct(objects):
        found.setdefault(type(item).__name__.lower(), []).append(item)
    return found


def _add(extras: dict[str, Any], name: str, objects: list[Any]) -> None:
    """Add objects under a name, numbered if there are several or the name is taken; skip those already present."""
    objects = [item for item in objects if not any(item is other for other in extras.values())]
    if len(objects) == 1 and name not in extras:
        extras[name] = objects[0]
        return
    free = (numbered for number in range(len(extras) + len(objects)) if (numbered := f"{name}_{number}") not in extras)
    extras.update(zip(list(free), objects, strict=False))


def _everything(accelerator: Any) -> list[Any]:
    lists = ("_models", "_optimizers", "_schedulers", "_dataloaders", "_custom_objects")
    return [item for name in lists for item in getattr(accelerator, name)]


def _distinct(items: Iterable[Any]) -> list[Any]:
    return list({id(item): item for item in items}.values())


def _one_or_list(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else (items or None)
