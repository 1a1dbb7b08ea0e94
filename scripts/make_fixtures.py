"""Write checkpoints that every later version has to load: `tests/fixtures/<version>/<case>.tar.gz` and `.json`.

    .venv/bin/python scripts/make_fixtures.py VERSION [CASE ...]

Run it with the code whose format is to be kept, with a new VERSION; existing files are never overwritten. The JSON file
describes what each rank held (`tests.fixture_cases.describe`).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig
from hydra_ckpt.testing import run_distributed
from tests.fixture_cases import CASES, EPOCH, STEP, Case, advance, describe


def save(name: str, directory: Path) -> dict[str, str]:
    """Save a case; returns what this rank held."""
    socket.gethostname = lambda: "fixtures"  # the manifest names the host
    case = CASES[name]
    config = CheckpointingConfig(checkpoint_dir=str(directory), restore_from=None, **case.all_options(directory))
    state = case.build()
    advance(state, trains=case.trains)
    held = describe(state)
    if case.adds_export:
        _train(config, state)
    else:
        _save_once(config, state, case)
    return held


def _train(config: CheckpointingConfig, state: AppState) -> None:
    """The step is published without its export; the end of training adds it."""
    with CheckpointCallback(config, every_n_steps=STEP) as callback:
        callback.on_train_begin(state)
        for step in range(1, STEP + 1):
            callback.on_step_end(step, EPOCH)
        callback.on_train_end()


def _save_once(config: CheckpointingConfig, state: AppState, case: Case) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    with config.build(0 if case.is_pipeline else rank, 0, rank if case.is_pipeline else 0) as engine:
        engine.save(state, step=STEP, epoch=EPOCH, metrics=case.metrics or None).result()
        if case.later_metrics:
            engine.add_metrics(STEP, EPOCH, case.later_metrics)


def make(name: str, target: Path) -> None:
    """Write the two files of a case."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "checkpoints"
        world_size = CASES[name].world_size
        held = run_distributed(save, world_size, name, directory) if world_size > 1 else [save(name, directory)]
        with tarfile.open(target / f"{name}.tar.gz", "x:gz", compresslevel=9) as archive:
            archive.add(directory, "checkpoints", filter=_without_owner)
    (target / f"{name}.json").write_text(json.dumps(held, indent=0, ensure_ascii=False) + "\n")
    print(f"{name}: {(target / f'{name}.tar.gz').stat().st_size} bytes")


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Nothing of the machine it was made on."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return None if member.name.endswith("owner.json") else member


def main() -> None:
    """Write the cases that are asked for, or all."""
    arguments: Any = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("version", help="the version whose format this is")
    arguments.add_argument("cases", nargs="*", choices=[[], *CASES], help="all if none is named")
    given = arguments.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    target = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / given.version
    target.mkdir(parents=True, exist_ok=True)
    for name in given.cases or CASES:
        make(name, target)


if __name__ == "__main__":
    main()
