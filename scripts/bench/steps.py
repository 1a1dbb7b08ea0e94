"""The cost of a step without a save: the time in `on_step_end`, and what the agreement of the ranks adds to a loop.

scripts/bench/steps.py [--ranks 2] [--rounds 15] [--steps 500]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rounds import Table, arguments_of, timed
from torch import nn

from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig
from hydra_ckpt.testing import run_distributed

# The first steps agree one by one.
_WARM_UP = 200


def _step(square: torch.Tensor) -> None:
    """About as long as the shortest steps that anybody distributes."""
    torch.mm(square, square)


class Loops:
    """The same loop with and without the callback."""

    def __init__(self, root: Path, steps: int) -> None:
        self.steps, self.done = steps, 0
        self.square = torch.rand(400, 400)
        self.inside: list[float] = []
        self.callback = CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(root)), max_run_time_s=1e6)
        model = nn.Linear(8, 8)
        self.callback.on_train_begin(AppState(model, torch.optim.AdamW(model.parameters())))
        for _ in range(_WARM_UP):
            self._watched_step()
        self.inside.clear()

    def bare(self, _: int) -> float:
        """The work of the steps alone."""
        return timed(lambda: [_step(self.square) for _ in range(self.steps)])

    def watched(self, _: int) -> float:
        """The same, with `on_step_end` after every step."""
        return timed(self._watched)

    def _watched(self) -> None:
        for _ in range(self.steps):
            self._watched_step()

    def _watched_step(self) -> None:
        _step(self.square)
        self.done += 1
        begun = time.perf_counter()
        self.callback.on_step_end(self.done)
        self.inside.append(time.perf_counter() - begun)


def _bench(root: Path, steps: int, rounds: int) -> None:
    loops = Loops(root, steps)
    table = Table()
    table.run({"steps": loops.bare, "steps + on_step_end": loops.watched}, rounds)
    table.show(f"{steps} steps, {dist.get_world_size()} ranks", ["steps"])
    inside = sorted(1e6 * seconds for seconds in loops.inside)
    low, median, high = statistics.quantiles(inside, n=4)
    mean = statistics.fmean(inside)
    if dist.get_rank() == 0:
        print(f"inside on_step_end: median {median:.0f} us [{low:.0f}, {high:.0f}], mean {mean:.0f} us")
    loops.callback.close()


def main() -> None:
    """Parse, start the ranks, print."""
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        run_distributed(_bench, given.ranks, Path(root), given.steps, given.rounds, timeout_s=900)


if __name__ == "__main__":
    main()
