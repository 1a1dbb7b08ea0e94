"""The cost of a save, with ours and others in turn.

scripts/bench/save.py [--ranks 2] [--blocks 96] [--rounds 15] [--adam] [--bf16] [--step-ms 100]
    [--tables memory,stall,durable,steps]
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peers import Peers
from rounds import Block, Measure, Table, arguments_of, build, fresh, local_tensors, timed, together

from hydra_ckpt import AppState, Checkpointer, CheckpointingConfig
from hydra_ckpt.testing import run_distributed

_STEPS = 40


class Bench:
    """Contestants over one sharded state."""

    def __init__(self, root: Path, blocks: int, *, adam: bool, dtype: torch.dtype) -> None:
        self.root = root
        self.model, self.optimizer = build(blocks, dtype, adam=adam)
        self.state = AppState(self.model, self.optimizer)
        self.adam = adam
        self.local = (
            local_tensors(self.model, self.optimizer)
            if adam
            else [parameter.to_local().detach() for parameter in self.model.parameters()]
        )
        self.nbytes = sum(tensor.nbytes for tensor in self.local)
        self.warm = [torch.empty_like(tensor).copy_(tensor) for tensor in self.local]
        self.step = 0
        self.ours: dict[str, Checkpointer] = {}
        self.square = torch.rand(900, 900)
        self.repeats = {True: 1, False: 1}

    def state_dict(self) -> dict[str, Any]:
        """What DCP's users hand over: parameters and, with Adam, the optimizer's tensors."""
        found: dict[str, Any] = dict(self.model.state_dict())
        if self.adam:
            for name, parameter in self.model.named_parameters():
                found.update({f"optim.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()})
        return found

    def checkpointer(self, key: str, **options: Any) -> Checkpointer:
        """Our Checkpointer with these options, kept from round to round as in training."""
        if key not in self.ours:
            config = CheckpointingConfig(
                checkpoint_dir=str(self.root / key), max_recent_checkpoints=1, restore_from=None, **options
            )
            self.ours[key] = config.build(dist.get_rank(), 0, 0)
        return self.ours[key]

    def settle(self, checkpointer: Checkpointer) -> None:
        """Wait until the old checkpoint is deleted, which happens in the background and is not the next one's cost."""
        checkpointer.drain()
        while any(path.is_dir() for path in checkpointer.root.glob(".*")):
            time.sleep(0.01)

    def close(self) -> None:
        """End our background threads."""
        for checkpointer in self.ours.values():
            checkpointer.close()

    # -- floors --------------------------------------------------------------------------------------------------

    def copy_floor(self, _: int) -> float:
        """`torch.copy_` of the local bytes into warm buffers."""

        def copy() -> None:
            for target, source in zip(self.warm, self.local, strict=True):
                target.copy_(source)

        return timed(copy)

    def write_floor(self, _: int) -> float:
        """The local bytes written to one new file a rank, in large pieces, and fsynced."""
        path = fresh(self.root / "floor")
        path.mkdir(exist_ok=True)
        together()

        def write() -> None:
            descriptor = os.open(path / f"{dist.get_rank()}", os.O_WRONLY | os.O_CREAT, 0o666)
            for tensor in self.local:
                view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
                while view:
                    view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            os.close(descriptor)
            together()

        return timed(write)

    # -- ours ----------------------------------------------------------------------------------------------------

    def ours_blocked(self, key: str, **options: Any) -> Measure:
        """Time `save()` keeps the training thread, in the background save's steady state."""

        def measure(_: int) -> float:
            checkpointer = self.checkpointer(key, is_async=True, save_consolidated="always", **options)
            self.step += 1
            begun = timed(lambda: checkpointer.save(self.state, step=self.step))
            checkpointer.pending.result()
            self.settle(checkpointer)
            return begun

        return measure

    def ours_durable(self, key: str, **options: Any) -> Measure:
        """Time of a synchronous save until it is published."""

        def measure(_: int) -> float:
            checkpointer = self.checkpointer(key, **options)
            self.step += 1
            taken = timed(lambda: checkpointer.save(self.state, step=self.step))
            self.settle(checkpointer)
            return taken

        return measure

    def ours_first(self, _: int) -> float:
        """Time for which the first save of a run blocks the training thread, after `prepare()`."""
        self.step += 1
        place = fresh(self.root / "first")
        config = CheckpointingConfig(
            checkpoint_dir=str(place),
            restore_from=None,
            is_async=True,
            wait_for_staging=True,
            save_consolidated="always",
        )
        with config.build(dist.get_rank(), 0, 0) as checkpointer:
            checkpointer.prepare(self.state)
            checkpointer.drain()
            together()
            return timed(lambda: checkpointer.save(self.state, step=1))

    def work(self, *, python: bool) -> None:
        """A training step on one thread, with the optimizer's hooks like a real one."""
        for _ in range(self.repeats[python]):
            if python:
                sum(number * number for number in range(200_000))
            else:
                torch.mm(self.square, self.square)
        self.optimizer.step()

    def last(self, step_ms: float) -> None:
        """Let steps of both kinds take so long."""
        for python in self.repeats:
            self.repeats[python] = 1
            alone = min(timed(lambda python=python: self.work(python=python)) for _ in range(5))
            self.repeats[python] = max(round(step_ms / 1e3 / alone), 1)

    def steps(self, key: str | None, *, python: bool = False, **options: Any) -> Measure:
        """The 95th percentile of step times while saves follow each other without a pause, or without any."""

        def measure(_: int) -> float:
            checkpointer = None if key is None else self.checkpointer(key, is_async=True, **options)
            taken = []
            for _ in range(_STEPS):
                begun = time.perf_counter()
                self.work(python=python)
                if checkpointer is not None and (checkpointer.pending is None or checkpointer.pending.done()):
                    self.step += 1
                    checkpointer.save(self.state, step=self.step)
                taken.append(time.perf_counter() - begun)
            if checkpointer is not None:
                checkpointer.drain()
            return sorted(taken)[int(0.95 * _STEPS)]

        return measure

    def every_step(self, key: str, **options: Any) -> Measure:
        """Seconds for eight steps with a save at each."""

        def measure(_: int) -> float:
            checkpointer = self.checkpointer(key, is_async=True, save_consolidated="always", **options)

            def train() -> None:
                for _ in range(8):
                    self.work(python=False)
                    self.step += 1
                    checkpointer.save(self.state, step=self.step)

            taken = timed(train)
            checkpointer.drain()
            return taken

        return measure


def stall_table(bench: Bench, rounds: int, _: float) -> None:
    """How long saving keeps the training thread."""
    table = Table(touched=3 * bench.nbytes)
    peers = Peers(bench.root, bench.state_dict)
    contestants: dict[str, Measure] = {
        "copy floor (warm torch.copy_)": bench.copy_floor,
        "ours, save() waits for staging": bench.ours_blocked("awaited", wait_for_staging=True),
        "ours, staging overlapped": bench.ours_blocked("overlapped"),
        "ours, first save after prepare()": bench.ours_first,
        **peers.asynchronous(),
    }
    for measure in contestants.values():
        measure(0)  # first saves allocate; steady state is what is compared
    table.run(contestants, rounds)
    peers.close()
    table.show("seconds the training thread is blocked", ["copy floor (warm torch.copy_)", "dcp.async_save, default"])


def durable_table(bench: Bench, rounds: int, _: float) -> None:
    """How long a save takes until nothing can take it away."""
    table = Table(touched=3 * bench.nbytes)
    peers = Peers(bench.root, bench.state_dict)
    contestants: dict[str, Measure] = {
        "write floor (own files, fsync)": bench.write_floor,
        "ours, consolidated, published": bench.ours_durable("whole", save_consolidated="always"),
        "ours, fp32 shards and a bf16 export": bench.ours_durable(
            "cast", save_consolidated="always", export_dtype="bfloat16"
        ),
        "ours, shard files, published": bench.ours_durable("shards", save_consolidated=False),
        **peers.durable(),
    }
    for measure in contestants.values():
        measure(0)
    table.run(contestants, rounds)
    peers.close()
    table.show(
        "seconds of a durable, synchronous save",
        ["write floor (own files, fsync)", "dcp.save (shards)", "DCP HF writer + consolidation, fsync"],
    )


def steps_table(bench: Bench, rounds: int, step_ms: float) -> None:
    """What saving without a pause does to training steps."""
    bench.last(step_ms)
    always: dict[str, Any] = {"save_consolidated": "always"}
    for python in (False, True):
        table = Table()
        contestants = {
            "no saves": bench.steps(None, python=python),
            "saves without a pause, overlapped": bench.steps("overlapped", python=python, **always),
            "saves without a pause, awaited": bench.steps("awaited", python=python, wait_for_staging=True, **always),
        }
        table.run(contestants, rounds)
        kind = "bound to Python" if python else "in matrix products"
        table.show(f"seconds of a step (95th percentile), {kind}", ["no saves"])
    table = Table()
    table.run(
        {
            "overlapped": bench.every_step("overlapped"),
            "awaited": bench.every_step("awaited", wait_for_staging=True),
        },
        rounds,
    )
    table.show("seconds of eight steps, a save at each", ["awaited"])


def memory_table(bench: Bench, *_: object) -> None:
    """How far memory grows beyond the model; the first save of the process, so no rounds."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpointer = bench.checkpointer("memory", is_async=True, save_consolidated="always")
    for _ in range(3):
        bench.step += 1
        checkpointer.save(bench.state, step=bench.step).result()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if dist.get_rank() == 0:
        print(
            f"\npeak memory of rank 0 grew by {grown / 1024:.0f} MiB over three asynchronous saves; "
            f"staged {bench.nbytes / 2**20:.0f} MiB",
            flush=True,
        )


def single_table(bench: Bench, rounds: int, _: float) -> None:
    """One process and a plain model: what accelerate's users have on a machine like this one."""
    table = Table(touched=3 * bench.nbytes)
    plain = [Block(torch.float32) for _ in range(len(bench.local) // 4)]
    model = torch.nn.Sequential(*plain)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    bench.state = AppState(model)
    contestants: dict[str, Measure] = {
        "write floor (own files, fsync)": bench.write_floor,
        "ours, consolidated, published": bench.ours_durable("whole", save_consolidated="always"),
        "accelerate.save_state, fsync": Peers(bench.root, model.state_dict).accelerate(model),
    }
    for measure in contestants.values():
        measure(0)
    table.run(contestants, rounds)
    table.show("seconds of a durable save of one process", list(contestants)[::2])


TABLES = {
    "memory": memory_table,
    "stall": stall_table,
    "durable": durable_table,
    "steps": steps_table,
    "single": single_table,
}


def _rank(root: str, arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    bench = Bench(Path(root), arguments.blocks, adam=arguments.adam, dtype=dtype)
    if dist.get_rank() == 0:
        count = len(list(bench.model.parameters()))
        print(
            f"{dist.get_world_size()} ranks, FSDP2, {count} parameters, {bench.nbytes / 1e6:.0f} MB a rank, "
            f"{'with' if arguments.adam else 'without'} AdamW, torch {torch.__version__}",
            flush=True,
        )
    for name in arguments.tables.split(","):
        TABLES[name](bench, arguments.rounds, arguments.step_ms)
    bench.close()


def main() -> None:
    """Parse and run."""
    parser = arguments_of(__doc__)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--step-ms", type=float, default=100, help="how long a training step of the table `steps` is")
    parser.add_argument("--tables", default="stall,durable")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hydra_ckpt_bench_", dir=os.environ.get("BENCH_DIR")) as root:
        run_distributed(_rank, arguments.ranks, root, arguments, timeout_s=3600)


if __name__ == "__main__":
    main()
