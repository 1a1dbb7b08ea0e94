"""What a save costs, ours and the peers' alternately in one run.

scripts/bench/save.py [--ranks 2] [--blocks 96] [--rounds 15] [--adam] [--bf16] [--tables memory,stall,durable,steps]
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rounds import Measure, Table, arguments_of, build, local_tensors, timed, together
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from hydra_ckpt import AppState, Checkpointer, CheckpointingConfig
from hydra_ckpt.testing import run_distributed

_STEPS = 100


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
        self.group = dist.new_group(backend="gloo")
        self.step = 0
        self.ours: dict[str, Checkpointer] = {}
        self.square = torch.rand(900, 900)

    def state_dict(self) -> dict[str, Any]:
        """What DCP's users hand over: parameters and, with Adam, the optimizer's tensors."""
        found: dict[str, Any] = dict(self.model.state_dict())
        if self.adam:
            for name, parameter in self.model.named_parameters():
                found.update({f"optim.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()})
        return found

    def fresh(self, name: str) -> Path:
        """A directory that does not exist, on the disk all contestants write to."""
        path = self.root / name
        together()
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
        together()
        return path

    def checkpointer(self, key: str, **options: Any) -> Checkpointer:
        """Our Checkpointer with these options, kept from round to round as in training."""
        if key not in self.ours:
            config = CheckpointingConfig(
                checkpoint_dir=str(self.root / key), max_recent_checkpoints=1, restore_from=None, **options
            )
            self.ours[key] = config.build(dist.get_rank(), 0, 0)
        return self.ours[key]

    def settle(self, checkpointer: Checkpointer) -> None:
        """Wait until the old checkpoint is deleted, which goes on in the background and is not the next one's cost."""
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
        path = self.fresh("floor")
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
        """Time the first save of a run keeps the training thread, behind `prepare()`."""
        self.step += 1
        place = self.fresh("first")
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
        """A training step of 20 to 40 ms on one thread, in the optimizer's hooks like a real one."""
        if python:
            sum(number * number for number in range(400_000))
        else:
            torch.mm(self.square, self.square)
        self.optimizer.step()

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
        """Seconds for twenty steps with a save at each."""

        def measure(_: int) -> float:
            checkpointer = self.checkpointer(key, is_async=True, save_consolidated="always", **options)

            def train() -> None:
                for _ in range(20):
                    self.work(python=False)
                    self.step += 1
                    checkpointer.save(self.state, step=self.step)

            taken = timed(train)
            checkpointer.drain()
            return taken

        return measure

    # -- peers ---------------------------------------------------------------------------------------------------

    def dcp_async(self, name: str, stager: Any = None, kind: Any = AsyncCheckpointerType.THREAD) -> Measure:
        """Time `dcp.async_save` keeps the training thread."""

        def measure(_: int) -> float:
            path = self.fresh(name)
            state = self.state_dict()
            found: list[Any] = []
            options = {"async_stager": stager} if stager is not None else {}
            taken = timed(
                lambda: found.append(
                    dcp.async_save(
                        state, checkpoint_id=path, process_group=self.group, async_checkpointer_type=kind, **options
                    )
                )
            )
            result = found[0]
            getattr(result, "upload_completion", result).result()
            return taken

        return measure

    def dcp_sync(self, _: int) -> float:
        """`dcp.save`, whose writer fsyncs its files."""
        path = self.fresh("dcp")
        state = self.state_dict()
        return timed(lambda: dcp.save(state, checkpoint_id=path))

    def hf_then_consolidate(self, _: int) -> float:
        """DCP's Hugging Face writer, its shards merged by all ranks, everything made durable."""
        from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank

        path = self.fresh("hf")
        state = self.state_dict()
        names = list(state)
        size = sum(value.numel() * value.element_size() for value in state.values())
        files = max(-(-size // 5_000_000_000), 1)
        mapping = {name: number * files // len(names) + 1 for number, name in enumerate(names)}

        def save() -> None:
            dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(path / "shards"), save_distributed=True))
            together()
            consolidate_safetensors_files_on_every_rank(str(path / "shards"), str(path / "whole"), mapping)
            together()
            for file in sorted((path / "whole").iterdir())[dist.get_rank() :: dist.get_world_size()]:
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            together()

        (path / "whole").mkdir(parents=True, exist_ok=True)
        together()
        return timed(save)


def stall_table(bench: Bench, rounds: int) -> None:
    """How long saving keeps the training thread."""
    table = Table(touched=3 * bench.nbytes)
    cached = DefaultStager(
        StagingOptions(use_pinned_memory=False, use_non_blocking_copy=False, use_async_staging=False)
    )
    contestants: dict[str, Measure] = {
        "copy floor (warm torch.copy_)": bench.copy_floor,
        "ours, staging awaited in save()": bench.ours_blocked("awaited", wait_for_staging=True),
        "ours, staging overlapped": bench.ours_blocked("overlapped"),
        "ours, first save behind prepare()": bench.ours_first,
        "dcp.async_save as it comes": bench.dcp_async("dcp_async"),
        # BlockingAsyncStager's own cache needs pinned memory, which a machine without an accelerator has not.
        "dcp.async_save, DefaultStager (cached)": bench.dcp_async("dcp_cached", cached),
    }
    for measure in contestants.values():
        measure(0)  # first saves allocate; steady state is what is compared
    table.run(contestants, rounds)
    table.show("seconds the training thread is kept", ["copy floor (warm torch.copy_)", "dcp.async_save as it comes"])


def durable_table(bench: Bench, rounds: int) -> None:
    """How long a save takes until nothing can take it away."""
    table = Table(touched=3 * bench.nbytes)
    contestants: dict[str, Measure] = {
        "write floor (own files, fsync)": bench.write_floor,
        "ours, consolidated, published": bench.ours_durable("whole", save_consolidated="always"),
        "ours, fp32 shards and a bf16 export": bench.ours_durable(
            "cast", save_consolidated="always", export_dtype="bfloat16"
        ),
        "ours, shard files, published": bench.ours_durable("shards", save_consolidated=False),
        "dcp.save (shards)": bench.dcp_sync,
        "DCP HF writer + consolidation, fsync": bench.hf_then_consolidate,
    }
    for measure in contestants.values():
        measure(0)
    table.run(contestants, rounds)
    table.show(
        "seconds of a durable, synchronous save",
        ["write floor (own files, fsync)", "dcp.save (shards)", "DCP HF writer + consolidation, fsync"],
    )


def steps_table(bench: Bench, rounds: int) -> None:
    """What saving without a pause does to training steps."""
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
    table.show("seconds of twenty steps, a save at each", ["awaited"])


def memory_table(bench: Bench, _: int) -> None:
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


TABLES = {"memory": memory_table, "stall": stall_table, "durable": durable_table, "steps": steps_table}


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
        TABLES[name](bench, arguments.rounds)
    bench.close()


def main() -> None:
    """Parse and run."""
    parser = arguments_of(__doc__)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--tables", default="stall,durable")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hydra_ckpt_bench_", dir=os.environ.get("BENCH_DIR")) as root:
        run_distributed(_rank, arguments.ranks, root, arguments, timeout_s=3600)


if __name__ == "__main__":
    main()
