"""Optimizer steps wait until what they change has been copied."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

log = logging.getLogger(__name__)


class StepHooks:
    """Hooks that run before the steps of optimizers. Training thread only.

    Args:
        before_step: Called before each step of an optimizer that takes hooks.
    """

    def __init__(self, before_step: Callable[[], None]) -> None:
        self._before_step = before_step
        self._hooked: MutableMapping[torch.optim.Optimizer, bool] = WeakIdKeyDictionary()
        self._handles: list[Any] = []
        self._has_warned = False

    def hook(self, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Hook every optimizer; returns whether all of them take hooks."""
        for optimizer in optimizers:
            if optimizer not in self._hooked and _takes_hooks(optimizer):
                self._handles.append(optimizer.register_step_pre_hook(_untraced(lambda *_: self._before_step())))
                self._hooked[optimizer] = True
        unhookable = [type(optimizer).__qualname__ for optimizer in optimizers if optimizer not in self._hooked]
        if unhookable and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s takes no hooks (it was created without torch.optim.Optimizer.__init__), so save() copies "
                "everything before it returns",
                ", ".join(unhookable),
            )
        return not unhookable

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()


def _takes_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether step() will call hooks: Optimizer.__init__ wraps it and creates the dict of hooks."""
    return "_optimizer_step_pre_hooks" in vars(optimizer) and bool(getattr(type(optimizer).step, "hooked", False))


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook, not traced by torch.compile. Traced, it would break a compiled step into many graphs.

    torch.compiler imports torch._dynamo, which takes seconds; creating an optimizer has already imported it.
    """
    untraced: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return untraced
