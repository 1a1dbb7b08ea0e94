"""What comparing replicas costs: `save()` and the wait before the next step, this tree against another one.

    scripts/bench/drift.py --against PATH [--ranks 2] [--megabytes 96] [--rounds 6] [--ema]

PATH is another checkout of this repository, such as a `git worktree` of an earlier commit. The state is that of
DistributedDataParallel with AdamW, equal on all ranks; steps take no time, so all copying is waited for. Each
measurement is a fresh set of processes, the two trees alternate, and ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_SAVES, _WARM = 16, 4


class Average:
    """A moving average of a model, equal on all ranks."""

    def __init__(self, model: Any) -> None:
        self.shadow = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return self.shadow

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Never called."""


def worker(tree: str, directory: str, megabytes: int, has_average: bool) -> tuple[float, float]:
    """Seconds of `save()` alone, and with the wait before the next step: the least of many saves."""
    import time

    import torch
    import torch.distributed as dist

    import hydra_ckpt
    from hydra_ckpt import AppState, CheckpointingConfig

    assert Path(hydra_ckpt.__file__).is_relative_to(tree), hydra_ckpt.__file__
    torch.manual_seed(0)
    shapes = [(512, 1024)] * (megabytes // 2) + [(1024,)] * (megabytes // 2)
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        moments = {key: torch.randn(parameter.shape) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    extras = {"ema": Average(model)} if has_average else {}
    state = AppState(model, optimizer, extras=extras)
    config = CheckpointingConfig(
        checkpoint_dir=directory, is_async=True, save_consolidated="never", max_recent_checkpoints=1, restore_from=None
    )
    saves, both = [], []
    with config.build(dist.get_rank(), 0, 0) as engine:
        engine.prepare(state)
        for step in range(1, _SAVES + 1):
            dist.barrier()
            before, begun = engine.stats.blocked_s, time.perf_counter()
            pending = engine.save(state, step=step)
            saves.append(time.perf_counter() - begun)
            optimizer.step()  # without gradients: nothing but the hook
            both.append(engine.stats.blocked_s - before)
            pending.result()
            engine.drain()
    return min(saves[_WARM:]), min(both[_WARM:])


def measure(tree: Path, ranks: int, megabytes: int, has_average: bool) -> tuple[float, float]:
    """The slowest rank's seconds, in fresh processes that import the package from `tree`."""
    command = [sys.executable, __file__, "--worker", "--ranks", str(ranks), "--megabytes", str(megabytes)]
    command += ["--ema"] if has_average else []
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    # The processes that ranks are forked from look for modules in the working directory first.
    result = subprocess.run(command, env=environment, cwd=tree, check=True, capture_output=True, text=True)
    found = json.loads(result.stdout.splitlines()[-1])
    return max(row[0] for row in found), max(row[1] for row in found)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        from hydra_ckpt.testing import run_distributed

        with tempfile.TemporaryDirectory() as directory:
            found = run_distributed(
                worker, given.ranks, str(Path.cwd()), directory, given.megabytes, given.ema, timeout_s=300
            )
        print(json.dumps(found))
        return
    here = Path(__file__).resolve().parent.parent.parent
    rows = []
    for number in range(given.rounds):
        pair = {}
        for tree in (given.against, here) if number % 2 else (here, given.against):
            pair[tree] = measure(tree.resolve(), given.ranks, given.megabytes, given.ema)
        rows.append((pair[given.against], pair[here]))
        print(f"round {number}: before {pair[given.against]}, now {pair[here]}", flush=True)
    for place, title in enumerate(("save()", "save() and the wait")):
        ratios = sorted(now[place] / before[place] for before, now in rows)
        before, now = (statistics.median(row[side][place] for row in rows) for side in (0, 1))
        print(
            f"{title}: {1e3 * before:.1f} ms before, {1e3 * now:.1f} ms now, ratio {statistics.median(ratios):.3f} "
            f"[{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        )


if __name__ == "__main__":
    main()
