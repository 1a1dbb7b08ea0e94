"""The time of an export made afterwards, compared with reading and writing as many bytes, in turn.

scripts/bench/export.py [--ranks 2] [--blocks 96] [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rounds import Measure, Table, arguments_of, build, timed

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.hub.offline import export_checkpoint
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.testing import run_distributed

_PIECE_BYTES = 8 << 20


def copy_floor(shards: list[Path], target: Path) -> None:
    """Read every byte and write it to one new file in large pieces through warm memory; fsync."""
    piece = memoryview(bytearray(_PIECE_BYTES))
    with target.open("wb", buffering=0) as out:
        for shard in shards:
            with shard.open("rb", buffering=0) as source:
                while count := source.readinto(piece):
                    out.write(piece[:count])
        os.fsync(out.fileno())


def _save(root: str, arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    model, _ = build(arguments.blocks, adam=False)
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="false")
    with config.build(dist.get_rank(), 0, 0) as engine:
        engine.save(AppState(model), step=1).result()


def _alone(checkpoints: str, arguments: argparse.Namespace) -> None:
    root = Path(checkpoints)
    checkpoint = Checkpoint.open(root / "LATEST")
    shards = [checkpoint.path / name for name in checkpoint.manifest.parts["model"].files]

    def fresh(action: Callable[[Path], object], name: str) -> Measure:
        def measure(_: int) -> float:
            with tempfile.TemporaryDirectory(dir=root.parent) as place:
                os.sync()
                return timed(lambda: action(Path(place) / name))

        return measure

    contestants = {
        "read + write floor": fresh(lambda out: copy_floor(shards, out), "floor"),
        "export, digests not compared": fresh(lambda out: export_checkpoint(checkpoint, out, verify=False), "plain"),
        "export, every digest compared": fresh(lambda out: export_checkpoint(checkpoint, out), "verified"),
    }
    for measure in contestants.values():
        measure(0)
    table = Table(touched=sum(shard.stat().st_size for shard in shards))
    table.run(contestants, arguments.rounds)
    print(f"{sum(shard.stat().st_size for shard in shards) / 1e6:.0f} MB in {len(shards)} shards, one process")
    table.show("seconds of an export, warm page cache", ["read + write floor"])


def main() -> None:
    """Parse and run."""
    parser = arguments_of(__doc__)
    parser.set_defaults(rounds=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hydra_ckpt_bench_", dir=os.environ.get("BENCH_DIR")) as root:
        run_distributed(_save, arguments.ranks, f"{root}/run", arguments, timeout_s=600)
        run_distributed(_alone, 1, f"{root}/run", arguments, timeout_s=600)


if __name__ == "__main__":
    main()
