"""Kill training at random moments, again and again, and see whether anything published is ever lost.

    scripts/torture [--kills 200] [--seed 0] [--ranks 1,2,4] [--drifts 6]
    scripts/torture --hosts [--events 200] [--seconds 3600] [--seed 0]

Each life of the run is a set of real processes that get SIGKILL (one of them, or all) at a random moment: while it
starts, loads, stages, writes, publishes or prunes. After each kill the directory is examined from outside, and the
next life resumes from it. At the end an uninterrupted run must have reached the same bits.

Then runs drift on purpose: at a random step one replica gets other values in a random tensor, in one element or in all.
The next save must report it, and every checkpoint must hold the first replica's values and no others.
"""

from __future__ import annotations

import argparse
import logging
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

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hydra_ckpt import CheckpointCallback
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.state.wrappers import canonical
from hydra_ckpt.storage.header import read_tensors
from hydra_ckpt.storage.read import Fetch, fetch
from hydra_ckpt.storage.verification import checks, findings
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


def drifting(directory: Path, until: int, at: int, who: int, seed: int) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """A run of which rank `who` drifts after step `at`: rank 0's tensors by step, and the steps of the warnings."""
    run = Run(directory, "ddp", {**OPTIONS, "max_recent_checkpoints": None}, every_n_steps=1, workers=0)
    held: dict[int, dict[str, Any]] = {}
    told: list[int] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(max(held, default=0) + 1) if "replicas" in record.getMessage() else None
    logging.getLogger("hydra_ckpt").addHandler(handler)

    def after_step(step: int, callback: CheckpointCallback) -> None:
        pending = callback.checkpointer.pending if callback.checkpointer is not None else None
        if pending is not None:
            pending.result()  # nothing is being copied any more
        held[step] = {name: value.clone() for name, value in tensors_of(run).items()}
        if step == at and dist.get_rank() == who:
            chance = random.Random(seed)  # noqa: S311 - no secrets
            tensor = chance.choice([value for value in tensors_of(run).values() if value.is_floating_point()])
            flat = tensor.detach().view(-1)
            place = chance.choice([slice(None), chance.randrange(flat.numel())])
            with torch.no_grad():
                flat[place] += 1

    run.train(until, after_step=after_step)
    return (held, told) if dist.get_rank() == 0 else ({}, [])


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    """Parameters and moments that replicas hold, by their names in a checkpoint."""
    names = {parameter: canonical(name) for name, parameter in run.model.named_parameters()}
    found: dict[str, torch.Tensor] = {f"model/{name}": parameter.detach() for parameter, name in names.items()}
    for parameter, state in run.optimizer.state.items():
        found.update({f"optim/{names[parameter]}:{key}": value for key, value in state.items()})
    return found


def drift(root: Path, world: int, number: int, chance: random.Random) -> Counter[str]:
    """One run that drifts; what went wrong."""
    directory, at, until = root / f"drift{world}-{number}", chance.randrange(1, 6), 8
    who, seed = chance.randrange(1, world), chance.randrange(1 << 30)
    held, told = run_distributed(drifting, world, directory, until, at, who, seed, timeout_s=120)[0]
    seen: Counter[str] = Counter()
    seen["told late or never"] += told[:1] != [at + 1]
    for checkpoint in scan(directory).checkpoints:
        stored = {
            f"{part}/{name}": item
            for part, record in checkpoint.manifest.parts.items()
            for name, item in read_tensors(checkpoint.path, list(record.files)).items()
        }
        wanted = {name: value for name, value in held[checkpoint.step].items() if name in stored}
        got = {name: torch.empty_like(value) for name, value in wanted.items()}
        fetch(
            checkpoint.path, [Fetch(stored[name], Box.whole(stored[name].spec.shape), got[name]) for name in got], None
        )
        seen["compared"] += len(got)
        seen["mixed"] += any(not torch.equal(got[name], value) for name, value in wanted.items())
    return seen


def main() -> int:
    """Parse, torture, print a table; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--drifts", type=int, default=6, help="runs whose replicas drift on purpose")
    parser.add_argument("--hosts", action="store_true", help="pauses, partitions and zombies on several hosts instead")
    parser.add_argument("--events", type=int, default=200, help="with --hosts: how many of them")
    parser.add_argument("--seconds", type=float, help="with --hosts: for how long at most")
    arguments = parser.parse_args()
    if arguments.hosts:
        import torture_hosts

        return torture_hosts.main(arguments.events, arguments.seconds, arguments.seed)
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
        for world in [world for world in worlds if world > 1]:
            seen = Counter[str]()
            for number in range(arguments.drifts):
                seen += drift(Path(root), world, number, chance)
            late, mixed = seen["told late or never"], seen["mixed"]
            losses += late + mixed + (not seen["compared"])
            print(
                f"{world} ranks, {arguments.drifts} runs that drift: {late} told late or never, "
                f"{mixed} checkpoints mix replicas, {seen['compared']} tensors compared",
                flush=True,
            )
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
