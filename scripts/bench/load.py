"""The time of a resume, with ours and DCP in turn, from a warm and a cold page cache.

scripts/bench/load.py [--ranks 2] [--blocks 96] [--rounds 15] [--adam]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rounds import Measure, Table, arguments_of, build, local_tensors, timed, together

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.testing import run_distributed


def read_floor(path: Path, local: list[torch.Tensor]) -> Measure:
    """`preadv` of the bytes the rank needs: its share of every file from end to end, into the live tensors.

    What they hold afterwards is nonsense, which does not matter here; other memory may be faster to write to.
    """
    rank, world = dist.get_rank(), dist.get_world_size()

    def read() -> None:
        views = [memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) for tensor in reversed(local)]
        for file in sorted(path.rglob("*.safetensors")):
            descriptor = os.open(file, os.O_RDONLY)
            size = os.fstat(descriptor).st_size
            offset, end = size * rank // world, size * (rank + 1) // world
            while views and offset < end:
                view = views.pop()
                count = os.preadv(descriptor, [view[: end - offset]], offset)
                offset += count
                if count < len(view):
                    views.append(view[count:])
            os.close(descriptor)
        together()

    return lambda _: timed(read)


def cold(place: Path, measure: Measure) -> Measure:
    """The same with the files dropped from the page cache before."""

    def drop_and_measure(number: int) -> float:
        for file in place.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        together()
        return measure(number)

    return drop_and_measure


def _rank(root: str, arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    place = Path(root)
    model, optimizer = build(arguments.blocks, adam=arguments.adam)
    state = AppState(model, optimizer if arguments.adam else None)
    config = CheckpointingConfig(checkpoint_dir=str(place / "ours"), save_consolidated="always")
    tensors: dict[str, Any] = dict(model.state_dict())
    if arguments.adam:
        for name, parameter in model.named_parameters():
            tensors.update({f"optim.{name}.{key}": value for key, value in optimizer.state[parameter].items()})
    with config.build(dist.get_rank(), 0, 0) as checkpointer:
        checkpointer.save(state, step=1).result()
        dcp.save(tensors, checkpoint_id=place / "dcp")
        local = local_tensors(model, optimizer)
        trusting = CheckpointingConfig(checkpoint_dir=str(place / "ours"), verify_on_load=False).build(
            dist.get_rank(), 0, 0
        )
        contestants: dict[str, Measure] = {
            "read floor (preadv)": read_floor(place / "ours", local),
            "ours, digests not compared": lambda _: timed(lambda: trusting.load(state)),
            "ours, every digest compared": lambda _: timed(lambda: checkpointer.load(state)),
            "dcp.load of .distcp": lambda _: timed(lambda: dcp.load(tensors, checkpoint_id=place / "dcp")),
        }
        for measure in contestants.values():
            measure(0)
        table = Table()
        table.run(contestants, arguments.rounds)
        if dist.get_rank() == 0:
            size = sum(tensor.nbytes for tensor in local) / 1e6
            print(f"{dist.get_world_size()} ranks, FSDP2, {len(tensors)} tensors, {size:.0f} MB a rank", flush=True)
        bases = ["read floor (preadv)", "dcp.load of .distcp"]
        table.show("seconds of a resume, warm page cache", bases)
        table = Table()
        table.run({name: cold(place, measure) for name, measure in contestants.items()}, arguments.rounds)
        table.show("seconds of a resume, files dropped from the page cache", bases)
        trusting.close()


def main() -> None:
    """Parse and run."""
    parser = arguments_of(__doc__)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hydra_ckpt_bench_", dir=os.environ.get("BENCH_DIR")) as root:
        run_distributed(_rank, arguments.ranks, root, arguments, timeout_s=3600)


if __name__ == "__main__":
    main()
