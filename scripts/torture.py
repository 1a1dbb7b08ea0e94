"""Kill training at random moments, again and again, and see whether anything published is ever lost.

    scripts/torture [--kills 200] [--seed 0] [--ranks 1,2,4]

Each life of the run is a set of real processes that get SIGKILL (one of them, or all) at a random moment: while it
starts, loads, stages, writes, publishes or prunes. After each death the directory is examined from outside, and the
next life resumes from it. At the end an uninterrupted run must have reached the same bits.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hydra_ckpt.storage.verify import checks, findings
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.testing import RankFailedError, run_distributed
from tests.training import Run

OPTIONS: dict[str, Any] = {
    "is_async": True,
    "save_consolidated": "always",
    "max_recent_checkpoints": 2,
    "consolidation_timeout_minutes": 0.15,
}


def live(directory: Path, parallel: str, until: int, victim: int | None, delay_s: float) -> list[dict[str, str]]:
    """One life: train until the end or until killed `delay_s` after the start; victim None kills all ranks."""
    rank = dist.get_rank()
    if victim in (None, rank) and delay_s > 0:
        threading.Thread(target=_kill_later, args=(delay_s,), daemon=True).start()
    return [Run(directory, parallel, OPTIONS, every_n_steps=1, workers=0).train(until)]


def _kill_later(delay_s: float) -> None:
    time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)


def examine(directory: Path, newest: int) -> tuple[int, str | None]:
    """The newest published step, and what is wrong, if anything."""
    catalog = scan(directory)
    if catalog.damaged:
        return newest, f"damaged: {catalog.damaged}"
    for checkpoint in catalog.checkpoints:
        manifest = checkpoint.manifest
        bad = list(findings(checkpoint.path, checks(checkpoint.path, manifest.files, manifest.digests)))
        if bad:
            return newest, f"{checkpoint.name}: {bad[0]}"
    steps = [checkpoint.step for checkpoint in catalog.checkpoints]
    # Only between the publication of the very first checkpoint and its pointer may there be none.
    unpointed = len(steps) == 1 and catalog.checkpoints[0].pointers_pending
    if steps and not unpointed and catalog.pointed("LATEST") is None:
        return newest, "LATEST leads nowhere"
    if max(steps, default=0) < newest:
        return newest, f"step {newest} was published and is gone"
    return max(steps, default=0), None


def torture(root: Path, world: int, kills: int, chance: random.Random) -> Counter[str]:
    """Kill one run so often; returns what happened."""
    parallel = "none" if world == 1 else "fsdp"
    directory, newest, until = root / f"run{world}", 0, 10_000
    seen: Counter[str] = Counter()
    for number in range(kills):
        victim = chance.choice([None, chance.randrange(world)])
        delay_s = chance.uniform(0.05, 1.0 + world)  # more ranks take longer to start
        try:
            run_distributed(live, world, directory, parallel, until, victim, delay_s, timeout_s=60)
        except RankFailedError as error:
            hung = [text for text in error.failures.values() if "in time" in text or "did not exit" in text]
            seen["hung"] += bool(hung)
        seen["all ranks killed" if victim is None else "one rank killed"] += 1
        before = newest
        newest, wrong = examine(directory, newest)
        if wrong:
            seen["lost or damaged"] += 1
            print(f"  kill {number}: {wrong}", flush=True)
        seen["advanced"] += newest > before
    expected = run_distributed(live, world, root / f"whole{world}", parallel, newest + 3, None, 0.0, timeout_s=600)
    resumed = run_distributed(live, world, directory, parallel, newest + 3, None, 0.0, timeout_s=600)
    seen["bits differ at the end"] += expected != resumed
    seen["steps reached"] = newest
    return seen


def main() -> int:
    """Parse, torture, print a table; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", default="1,2,4")
    arguments = parser.parse_args()
    worlds = [int(text) for text in arguments.ranks.split(",")]
    chance = random.Random(arguments.seed)  # noqa: S311 - moments to kill at, no secrets
    titles = ("ranks", "kills", "all", "one", "advanced", "steps", "lost", "hung", "bits")
    print(" ".join(f"{title:>{width}}" for title, width in zip(titles, (5, 6, 5, 5, 9, 6, 5, 5, 7), strict=True)))
    losses = 0
    with tempfile.TemporaryDirectory(prefix="hydra_ckpt_torture_") as root:
        for world in worlds:
            share = -(-arguments.kills // len(worlds))
            seen = torture(Path(root), world, share, chance)
            losses += seen["lost or damaged"] + seen["hung"] + seen["bits differ at the end"]
            print(
                f"{world:5d} {share:6d} {seen['all ranks killed']:5d} {seen['one rank killed']:5d} "
                f"{seen['advanced']:9d} {seen['steps reached']:6d} {seen['lost or damaged']:5d} {seen['hung']:5d} "
                f"{'differ' if seen['bits differ at the end'] else 'equal':>7}",
                flush=True,
            )
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
