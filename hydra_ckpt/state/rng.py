"""Random number generators: Python's, NumPy's, PyTorch's on the CPU and on this rank's device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The state of every generator; resuming from it gives the same numbers."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()  # untested on GPU
    return state


def restore(state: dict[str, Any]) -> None:
    """Set every generator to a captured state."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def kept() -> Iterator[dict[str, Any]]:
    """Put every generator back at the end; gives their state.

    Objects may draw numbers when they are asked for their state: a data loader may make its iterator then. A run that
    was resumed is asked at other times than an uninterrupted one, and must draw the same numbers afterwards.
    """
    state = capture()
    try:
        yield state
    finally:
        restore(state)


def derive(step: int, *place: int) -> None:
    """Seed every generator from the step and a rank's place, where the saved states fit another topology."""
    words = np.random.SeedSequence([step, *place]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
