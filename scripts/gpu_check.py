"""Checks saving and resuming on one GPU, and measures what a save costs there. Takes less than 8 minutes.

scripts/gpu_check [--output gpu_check.json] [--sizes 1,8]

Prints a table, writes the same as JSON, and exits with 0 if everything that ran has passed. Without a GPU the checks
run on the CPU with small states, and those that need a GPU are skipped and say so.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hydra_ckpt import AppState, Checkpointer, CheckpointingConfig, SaveFailedError

_ROUNDS = 3
# A slow disk gets fewer rounds than that after so many seconds.
_PATIENCE_S = 90.0


class Skipped(Exception):  # noqa: N818 - an outcome, not an error
    """A check that this machine cannot make."""


@dataclass
class Outcome:
    """What came of one check.

    Attributes:
        check: Its name.
        status: `passed`, `failed` or `skipped`.
        detail: What was found, or why not.
        seconds: How long it took.
        numbers: Measurements.
    """

    check: str
    status: str
    detail: str
    seconds: float
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """Where the checks run.

    Attributes:
        device: The GPU, or the CPU without one.
        root: A directory for checkpoints.
        width: Width of the model's layers.
    """

    device: torch.device
    root: Path
    width: int

    @property
    def has_gpu(self) -> bool:
        """Whether there is one."""
        return self.device.type == "cuda"

    def needs_gpu(self) -> None:
        """Skip the check without a GPU."""
        if not self.has_gpu:
            raise Skipped("no GPU: on the CPU there are no streams and no pinned memory")

    def needs_room(self, nbytes: float) -> None:
        """Skip the check if the disk cannot take three states of this size, or the GPU one."""
        free = shutil.disk_usage(self.root).free
        if free < 3 * nbytes:
            raise Skipped(f"{free / 1e9:.0f} GB of disk are free, and it needs {3 * nbytes / 1e9:.0f}; set TMPDIR")
        if self.has_gpu and torch.cuda.mem_get_info()[0] < 1.2 * nbytes:
            raise Skipped(f"the GPU has less than {1.2 * nbytes / 1e9:.1f} GB free")

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.has_gpu:
            torch.cuda.synchronize()

    def place(self) -> Path:
        """A new directory for checkpoints."""
        return Path(tempfile.mkdtemp(dir=self.root))

    def engine(self, place: Path, **options: Any) -> Checkpointer:
        """A Checkpointer that saves in the background."""
        options = {"is_async": True, "save_consolidated": "false", "restore_from": None, **options}
        return CheckpointingConfig(checkpoint_dir=str(place), **options).build(0, 0, 0)


class Training:
    """A small model with dropout, parallelized, and its optimizer.

    Args:
        machine: Where.
        kind: `fsdp`, `ddp` or `plain`.
    """

    def __init__(self, machine: Machine, kind: str) -> None:
        torch.manual_seed(0)
        width = machine.width
        layers = [nn.Linear(width, width), nn.Dropout(0.1), nn.BatchNorm1d(width), nn.Linear(width, width)]
        model = nn.Sequential(*layers).to(machine.device)
        self.input = torch.ones(8, width, device=machine.device)
        self.model: nn.Module = model
        if kind == "fsdp":
            mesh = init_device_mesh(machine.device.type, (1,), mesh_dim_names=("dp_shard",))
            for layer in (model[0], model[3], model):
                fully_shard(layer, mesh=mesh)
        elif kind == "ddp":
            self.model = DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.state = AppState(self.model, self.optimizer)

    def step(self) -> None:
        """One optimizer step; dropout draws from the device's generator."""
        self.model(self.input).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> list[torch.Tensor]:
        """Copies of parameters, buffers and optimizer state, queued on the current stream."""
        found = [*self.model.parameters(), *self.model.buffers()]
        found += [value for held in self.optimizer.state.values() for value in held.values()]
        return [(value.to_local() if hasattr(value, "to_local") else value).detach().clone() for value in found]


def expect(holds: bool, what: str) -> None:
    """Fail the check unless it holds."""
    if not holds:
        raise AssertionError(what)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether tensors are equal bit for bit."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def held(checkpointer: Checkpointer) -> Iterator[None]:
    """Keep the background thread from copying until the end of the block."""
    gate = threading.Event()

    def wait() -> None:
        gate.wait(60)

    checkpointer._saver.background.afterwards(wait)  # noqa: SLF001 - there is no public way to slow a save down
    try:
        yield
    finally:
        gate.set()


# -- checks ----------------------------------------------------------------------------------------------------------


def resume(kind: str) -> Callable[[Machine], str]:
    """A run that is resumed ends with the same bits as one that was not, random numbers of the device included."""

    def check(machine: Machine) -> str:
        place, run = machine.place(), Training(machine, kind)
        with machine.engine(place) as checkpointer:
            for _ in range(3):
                run.step()
            checkpointer.save(run.state, step=3)
            for _ in range(3):
                run.step()
            expected, drawn = run.tensors(), torch.rand(4, device=machine.device)
        again = Training(machine, kind)
        with machine.engine(place, restore_from="latest") as checkpointer:
            checkpointer.load(again.state)
            for _ in range(3):
                again.step()
        expect(same(again.tensors(), expected), "parameters, buffers or optimizer state differ after the resume")
        expect(torch.equal(torch.rand(4, device=machine.device), drawn), "random numbers differ after the resume")
        return f"{'NCCL' if machine.has_gpu else 'gloo'}: bits and random numbers equal 3 steps after the resume"

    return check


def order(*, on_default: bool) -> Callable[[Machine], str]:
    """A save right after `optimizer.step()` gives the bytes of that step, although the GPU has yet to compute them."""

    def check(machine: Machine) -> str:
        if not on_default:
            machine.needs_gpu()
        streams = torch.get_device_module(machine.device)
        stream = streams.current_stream() if on_default else streams.Stream()
        place, run = machine.place(), Training(machine, "plain")
        run.step()
        machine.synchronize()
        with machine.engine(place) as checkpointer, streams.stream(stream):
            checkpointer.save(run.state, step=1).result()
            for step in range(2, 6):
                if machine.has_gpu:
                    torch.cuda._sleep(100_000_000)  # noqa: SLF001 - the only way to keep a stream busy for a while
                run.step()
                with held(checkpointer), _no_waiting(machine):  # the mode holds for the background, too
                    pending = checkpointer.save(run.state, step=step)
                expected = run.tensors()
                pending.result()
                again = Training(machine, "plain")
                checkpointer.load(again.state, restore_from=pending.result().path, parts=["model", "optimizer"])
                machine.synchronize()
                expect(same(again.tensors(), expected), f"step {step}: the checkpoint holds other bytes")
        return "4 saves, each with the bytes of its step" + ("; none waited for the GPU" if machine.has_gpu else "")

    return check


@contextmanager
def _no_waiting(machine: Machine) -> Iterator[None]:
    """Let PyTorch raise if the calling thread waits for the GPU."""
    if machine.has_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if machine.has_gpu:
            torch.cuda.set_sync_debug_mode("default")


def torn(machine: Machine) -> str:
    """A write through `.data` between `save()` and the copy fails the save by name."""
    run = Training(machine, "plain")
    with machine.engine(machine.place()) as checkpointer:
        checkpointer.save(run.state, step=1).result()
        for step in range(2, 12):
            with held(checkpointer):
                pending = checkpointer.save(run.state, step=step)
                run.model[3].weight.data.add_(1.0)  # type: ignore[index]
                machine.synchronize()
            try:
                pending.result()
            except SaveFailedError as error:
                expect("model: 3.weight" in str(error), f"the message names no tensor: {error}")
            else:
                expect(False, f"step {step} was published")
        checkpointer.save(run.state, step=99).result()
    return "10 of 10 torn saves found"


def pool(machine: Machine) -> str:
    """Host buffers are allocated once, and page-locked."""
    machine.needs_gpu()
    run, seen = Training(machine, "plain"), set()
    with machine.engine(machine.place()) as checkpointer:
        for step in range(1, 6):
            run.step()
            checkpointer.save(run.state, step=step).result()
            checkpointer.drain()
            for buffer in checkpointer._saver._pool._free:  # noqa: SLF001 - nobody else can tell
                expect(buffer._memory.is_pinned(), "the buffer is not pinned")  # noqa: SLF001 - the same
                seen.add(buffer._memory.data_ptr())  # noqa: SLF001 - the same
    expect(len(seen) == 1, f"{len(seen)} buffers in 5 saves")
    return "one pinned buffer in 5 saves"


# -- measurements ----------------------------------------------------------------------------------------------------


def cost(gigabytes: float) -> Callable[[Machine], dict[str, float]]:
    """Medians in seconds for a state of this size: ours, `dcp.async_save`, and the floor of copies to the host."""

    def measure(machine: Machine) -> dict[str, float]:
        machine.needs_room(gigabytes * 1e9)
        number = max(round(gigabytes * 1e9 / (4 << 22)), 1)
        weights = [nn.Parameter(torch.randn(4096, 1024, device=machine.device)) for _ in range(number)]
        model = nn.ParameterList(weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rounds: list[dict[str, float]] = []
        deadline = time.monotonic() + _PATIENCE_S
        with machine.engine(machine.place(), max_recent_checkpoints=1) as checkpointer:
            for step in range(1, _ROUNDS + 2):
                if len(rounds) > 1 and time.monotonic() > deadline:
                    break
                found = _ours(machine, checkpointer, AppState(model, optimizer), step)
                rounds.append({**found, **_theirs(machine, model), **_floor(machine, weights)})
        shutil.rmtree(checkpointer.root)
        warm = rounds[1:]  # the first one allocates
        return {name: statistics.median(found[name] for found in warm) for name in warm[0]}

    return measure


def _ours(machine: Machine, checkpointer: Checkpointer, state: AppState, step: int) -> dict[str, float]:
    machine.synchronize()
    begun = time.perf_counter()
    pending = checkpointer.save(state, step=step)
    saved = time.perf_counter()
    pending.wait_staged()
    staged = time.perf_counter()
    pending.result()
    found = {"save()": saved - begun, "wait at the hook": staged - saved, "durable": time.perf_counter() - begun}
    checkpointer.drain()
    return found


def _theirs(machine: Machine, model: nn.Module) -> dict[str, float]:
    place = machine.place()
    machine.synchronize()
    begun = time.perf_counter()
    future = dcp.async_save(dict(model.state_dict()), checkpoint_id=str(place / "dcp"))
    blocked = time.perf_counter() - begun
    future.result()
    durable = time.perf_counter() - begun
    shutil.rmtree(place)
    return {"dcp.async_save": blocked, "dcp durable": durable}


def _floor(machine: Machine, tensors: list[nn.Parameter]) -> dict[str, float]:
    """Copy into one warm, pinned buffer again and again: as fast as the bus."""
    target = torch.zeros(tensors[0].shape, pin_memory=machine.has_gpu)
    machine.synchronize()
    begun = time.perf_counter()
    for tensor in tensors:
        target.copy_(tensor.detach(), non_blocking=True)
    machine.synchronize()
    return {"copy floor": time.perf_counter() - begun}


# -- running ---------------------------------------------------------------------------------------------------------


def attempt(name: str, check: Callable[[Machine], str | dict[str, float]], machine: Machine) -> Outcome:
    """Run one check; whatever it raises is its outcome."""
    begun, numbers = time.perf_counter(), {}
    try:
        found = check(machine)
        if isinstance(found, dict):
            numbers, found = found, ", ".join(f"{key} {1e3 * value:.1f} ms" for key, value in found.items())
        status, detail = "passed", found
    except Skipped as reason:
        status, detail = "skipped", str(reason)
    except Exception as error:  # noqa: BLE001 - the other checks continue
        status, detail = "failed", f"{type(error).__name__}: {error}"
    return Outcome(name, status, detail, round(time.perf_counter() - begun, 2), numbers)


def checks(sizes: list[float]) -> dict[str, Callable[[Machine], Any]]:
    """All of them by name, in order."""
    found: dict[str, Callable[[Machine], Any]] = {
        "resume, FSDP2": resume("fsdp"),
        "resume, DDP": resume("ddp"),
        "staging order, default stream": order(on_default=True),
        "staging order, another stream": order(on_default=False),
        "torn saves": torn,
        "pinned pool": pool,
    }
    return {**found, **{f"cost of {size:g} GB": cost(size) for size in sizes}}


def show(machine: Machine, outcomes: list[Outcome]) -> None:
    """Print the table."""
    name = torch.cuda.get_device_name() if machine.has_gpu else "CPU only: the checks ran with small states"
    table = Table(title=f"hydra_ckpt, torch {torch.__version__}, {name}")
    for column in ("check", "outcome", "s", "found"):
        table.add_column(column, overflow="fold")
    colours = {"passed": "green", "failed": "red", "skipped": "yellow"}
    for item in outcomes:
        colour = colours[item.status]
        table.add_row(item.check, f"[{colour}]{item.status}[/]", f"{item.seconds:.1f}", item.detail)
    Console().print(table)


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--sizes", help="GB of the measured states; default 1,8 on a GPU, 0.05 without one")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.getLogger("hydra_ckpt").setLevel(logging.ERROR)  # saves fail on purpose here
    torch.backends.cudnn.deterministic = True
    has_gpu = torch.cuda.is_available()
    sizes = [float(size) for size in (arguments.sizes or ("1,8" if has_gpu else "0.05")).split(",")]
    with tempfile.TemporaryDirectory(prefix="hydra_ckpt_gpu_check_") as root:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            init_method=(Path(root) / "rendezvous").as_uri(),
            rank=0,
            world_size=1,
        )
        device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
        machine = Machine(device, Path(root), 2048 if has_gpu else 128)
        outcomes = [attempt(name, check, machine) for name, check in checks(sizes).items()]
        dist.destroy_process_group()
    show(machine, outcomes)
    report = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        "outcomes": [asdict(item) for item in outcomes],
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return int(any(item.status == "failed" for item in outcomes))


if __name__ == "__main__":
    sys.exit(main())
