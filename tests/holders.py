"""Objects with state, for tests that only care about what they hold."""

from __future__ import annotations

from typing import Any

from torch import nn


class Holder:
    """Takes its state over as it is."""

    def __init__(self, held: Any = None) -> None:
        self.held = held

    def state_dict(self) -> Any:
        return {"held": self.held}

    def load_state_dict(self, state: Any) -> None:
        self.held = state["held"]


class Module(nn.Linear):
    """With extra state."""

    def __init__(self, held: Any = None) -> None:
        super().__init__(4, 4)
        self.held = held

    def get_extra_state(self) -> Any:
        return self.held

    def set_extra_state(self, state: Any) -> None:
        self.held = state
