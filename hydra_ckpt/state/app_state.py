"""The live objects that a checkpoint saves."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import nn

from hydra_ckpt.errors import CheckpointConfigError


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state that can be saved and loaded."""

    def state_dict(self) -> Any:
        """The state as plain data and tensors."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Load a state."""


@dataclass
class AppState:
    """The live objects of a training run. Everything but the model is optional.

    Attributes:
        model: A module, a list of modules (pipeline parts of one model), or a dict of independent models.
        optimizer: One, a list or a dict; a parameter's state belongs to the optimizer that holds it. Wrappers that
            are not a `torch.optim.Optimizer` but have `state_dict` and `load_state_dict` are saved and loaded through
            these.
        lr_scheduler: One, a list or a dict.
        dataloader: Resumable if its `state_dict()` works; see `hydra_ckpt.resumable`.
        tokenizer: Saved with the export by its `save_pretrained`.
        extras: Other objects with `state_dict` and `load_state_dict`, by name.
    """

    model: nn.Module | list[nn.Module] | dict[str, nn.Module]
    optimizer: Any = None
    lr_scheduler: Any = None
    dataloader: Any = None
    tokenizer: Any = None
    extras: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_extras()
        for scheduler in self.lr_schedulers:
            if not isinstance(scheduler, Stateful):
                raise CheckpointConfigError(
                    "lr_scheduler: expected an object with state_dict() and load_state_dict(), a list or a dict of "
                    f"them, got {type(scheduler).__name__}"
                )
        if not any(self.models.values()) or not all(
            isinstance(module, nn.Module) for modules in self.models.values() for module in modules
        ):
            raise CheckpointConfigError(
                f"model: expected a torch.nn.Module, a list or a dict of them, got {type(self.model).__name__}"
            )
        for name in self.model if isinstance(self.model, dict) else ():
            if not name.isidentifier():
                raise CheckpointConfigError(f"model[{name!r}]: names of models must be identifiers")
        for kind, value in (("optimizer", self.optimizer), ("lr_scheduler", self.lr_scheduler)):
            called = _called(kind, value)
            if twice := sorted({name for name in called if called.count(name) > 1}):
                raise CheckpointConfigError(f"{kind}: two objects would be called {twice[0]}; give each its own key")

    def _check_extras(self) -> None:
        given: Any = self.extras  # of whatever type it may be
        if given is not None and not isinstance(given, Mapping):
            raise CheckpointConfigError(f"extras: expected a dict of objects by name, got {type(given).__name__}")
        extras: dict[Any, Any] = dict(given or {})
        for name, extra in extras.items():
            if not isinstance(name, str) or "/" in name or ":" in name:
                raise CheckpointConfigError(f"extras[{name!r}]: the name must be a string without '/' and ':'")
            if not isinstance(extra, Stateful):
                raise CheckpointConfigError(
                    f"extras[{name!r}] ({type(extra).__name__}) has no state_dict() and load_state_dict(); "
                    "give it both, or keep it out of extras"
                )
        self.extras = extras

    @classmethod
    def from_accelerator(
        cls,
        accelerator: Any,
        extras: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        *,
        dataloader: Any = None,
        models: Mapping[str, nn.Module] | None = None,
    ) -> AppState:
        """Everything that `accelerator.save_state` would save. Call it after the last `prepare`.

        Objects of `register_for_checkpointing` are extras under their class's name in lower case, with a number if
        there are several (`counter_0`, `counter_1`) or the name is taken. So are the gradient scaler (`grad_scaler`)
        and, by their index, the other prepared loaders that can report their position (`dataloader_1`).

        Args:
            accelerator: The Accelerator.
            extras: Other objects, by names that you choose.
            tokenizer: Saved with the export.
            dataloader: The training loader, prepared or not. Without it, it is the only prepared loader that shuffles,
                else the only one that can report its position; if that is ambiguous, a resumed run starts its data from
                the beginning, with a warning.
            models: Names of the prepared models. Without it, several are `model_0`, `model_1` and so on.

        Raises:
            CheckpointConfigError: No model was prepared, or `models` does not name exactly those that were.
        """
        from hydra_ckpt.state.accelerated import prepared

        return cls(tokenizer=tokenizer, **prepared(accelerator, extras or {}, dataloader, models))

    @property
    def models(self) -> dict[str, list[nn.Module]]:
        """Modules by the model's name; the only model's name is empty."""
        if isinstance(self.model, dict):
            return {name: [model] for name, model in self.model.items()}
        return {"": as_list(self.model)}

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers themselves, without accelerate's wrappers."""
        return [unwrap_optimizer(optimizer) for optimizer in as_list(self.optimizer)]

    @property
    def named_optimizers(self) -> dict[str, Any]:
        """The same by the names that reports and messages use: `optimizer`, or `optimizer.0`, or `optimizer.<key>`."""
        return dict(zip(_called("optimizer", self.optimizer), self.optimizers, strict=True))

    @property
    def lr_schedulers(self) -> list[Any]:
        """The schedulers in order."""
        return as_list(self.lr_scheduler)

    @property
    def named_schedulers(self) -> dict[str, Any]:
        """The same by name, as `named_optimizers`."""
        return dict(zip(_called("lr_scheduler", self.lr_scheduler), self.lr_schedulers, strict=True))

    @property
    def keys(self) -> dict[str, list[str] | None]:
        """For `optimizer` and `lr_scheduler` the keys that identify the objects; None if only their order does."""
        return {"optimizer": _keys(self.optimizer), "lr_scheduler": _keys(self.lr_scheduler)}


def as_list(value: Any) -> list[Any]:
    """One, several or no objects as a list. A container with a state of its own is one object."""
    if value is None:
        return []
    if isinstance(value, Stateful):
        return [value]
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, Iterable) else [value]


def _called(kind: str, value: Any) -> list[str]:
    """The names of the members of one field."""
    if isinstance(value, Mapping) and not isinstance(value, Stateful):
        # A parameter that is a key, for an optimizer of its own, is no name.
        return [f"{kind}.{key if isinstance(key, str | int) else number}" for number, key in enumerate(value)]
    count = len(as_list(value))
    return [kind] if count == 1 else [f"{kind}.{number}" for number in range(count)]


def _keys(value: Any) -> list[str] | None:
    """The keys of a dict of objects; None for a list, or for one object."""
    if not isinstance(value, Mapping) or isinstance(value, Stateful):
        return None
    return [str(key) for key in value] if all(isinstance(key, str | int) for key in value) else None


def counterparts(saved: Sequence[str] | int, live: Sequence[str] | int) -> list[int | None]:
    """Which saved object each live one is: by their keys, or by position unless both have keys.

    Args:
        saved: The keys of the saved objects; or how many there are.
        live: The same of the live objects.

    Returns:
        For each live object the number of the saved one; None if there is none.
    """
    if isinstance(saved, int) or isinstance(live, int):
        count, wanted = (item if isinstance(item, int) else len(item) for item in (saved, live))
        return [number if number < count else None for number in range(wanted)]
    numbers = {key: number for number, key in enumerate(saved)}
    return [numbers.get(key) for key in live]


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, which refuses hooks."""
    accelerate = sys.modules.get("accelerate.optimizer")  # no wrapper where nobody imported it
    while accelerate is not None and isinstance(optimizer, accelerate.AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Stateful):  # a wrapper that is no Optimizer is taken by its state_dict
        raise CheckpointConfigError(
            "optimizer: expected a torch.optim.Optimizer, or an object with state_dict() and load_state_dict(), a list "
            f"or a dict of them, got {type(optimizer).__name__}"
        )
    return optimizer
