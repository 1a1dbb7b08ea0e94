"""The time of `save()` and of the wait before the next optimizer step, with many small tensors and a few large ones.

scripts/bench/many.py [--rounds 7] [--saves 7] [--against PATH]

`--against` names another checkout of this package, for example a `git worktree` of an older commit. Both run in turn,
each time in a fresh process; ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_HERE = Path(__file__).resolve().parent.parent.parent
# Number of tensors and of elements in each.
_STATES = {"36,000 tensors of 64 floats": (36_000, 64), "384 tensors, 0.5 GB": (384, 325_520)}
_NUMBERS = ("save()", "wait at the hook", "both")


def measure(tensors: int, elements: int, saves: int) -> list[float]:
    """Median seconds of `save()`, of the wait at the optimizer's hook right after it, and of both together."""
    import torch
    from torch import nn

    from hydra_ckpt import AppState, CheckpointingConfig

    torch.set_num_threads(1)
    model = nn.ParameterList([nn.Parameter(torch.randn(elements)) for _ in range(tensors)])
    state = AppState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    taken: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as root:
        config = CheckpointingConfig(
            checkpoint_dir=root, is_async=True, save_consolidated="false", max_recent_checkpoints=1
        )
        with config.build(0, 0, 0) as checkpointer:
            for step in range(1, saves + 3):
                begun = time.perf_counter()
                pending = checkpointer.save(state, step=step)
                saved = time.perf_counter()
                pending.wait_staged()
                taken.append((saved - begun, time.perf_counter() - saved))
                pending.result()
                checkpointer.drain()
    warm = taken[2:]  # the first ones plan and allocate
    return [
        statistics.median(save for save, _ in warm),
        statistics.median(wait for _, wait in warm),
        statistics.median(save + wait for save, wait in warm),
    ]


def _run(checkout: Path, name: str, saves: int) -> list[float]:
    """Measure a checkout in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--saves", str(saves)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return list(json.loads(found.stdout.splitlines()[-1]))


def _show(name: str, rounds: list[dict[str, list[float]]]) -> None:
    print(f"\n{name}: medians of {len(rounds)} processes, ms")
    for position, number in enumerate(_NUMBERS):
        medians = {who: statistics.median(found[who][position] for found in rounds) for who in rounds[0]}
        text = "  ".join(f"{who} {1e3 * seconds:8.2f}" for who, seconds in medians.items())
        if "against" in medians:
            ratios = sorted(found["here"][position] / found["against"][position] for found in rounds)
            text += f"  ratio {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        print(f"  {number:18s} {text}", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--one", choices=list(_STATES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*_STATES[arguments.one], arguments.saves)))
        return
    checkouts = {"here": _HERE}
    if arguments.against:
        checkouts["against"] = arguments.against.resolve()
    for name in _STATES:
        rounds = []
        for number in range(arguments.rounds):
            turn = list(checkouts.items()) if number % 2 else list(checkouts.items())[::-1]
            found = {who: _run(checkout, name, arguments.saves) for who, checkout in turn}
            rounds.append({who: found[who] for who in checkouts})
        _show(name, rounds)


if __name__ == "__main__":
    main()
