"""A save publishes the state at the time of save(), or fails and names the tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hydra_ckpt import (
    AppState,
    CheckpointCallback,
    Checkpointer,
    CheckpointError,
    CheckpointingConfig,
    SaveFailedError,
)
from hydra_ckpt.saving.live_shares import Sources
from hydra_ckpt.saving.staged import Staged
from hydra_ckpt.storage import samples
from hydra_ckpt.storage.lanes import Lanes
from hydra_ckpt.storage.pool import SMALL_BYTES, BufferPool, Layout
from hydra_ckpt.storage.staging import Staging
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.testing import run_distributed
from hydra_ckpt.testing.processes import PATIENCE

WIDTH = 256  # a weight of 256 KiB; halves of it are above what is copied in save() too


def stack(layers: int = 3, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(layers)))


def engine(root: Path, **options: Any) -> Checkpointer:
    options = {"is_async": True, "save_consolidated": "false", **options}
    rank = dist.get_rank() if dist.is_initialized() else 0
    return CheckpointingConfig(checkpoint_dir=str(root), **options).build(rank, 0, 0)


@contextmanager
def held(checkpointer: Checkpointer) -> Iterator[None]:
    """Keep the background from copying until the end of the block."""
    gate = threading.Event()
    checkpointer._saver.background.afterwards(lambda: gate.wait(60 * PATIENCE) and None)
    try:
        yield
    finally:
        gate.set()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def first(model: nn.Sequential) -> nn.Parameter:
    return model[0].weight


def by_copy(model: nn.Sequential) -> None:
    first(model).data.copy_(torch.zeros(WIDTH, WIDTH))


def by_storage(model: nn.Sequential) -> None:
    first(model).untyped_storage().fill_(7)


def by_numpy(model: nn.Sequential) -> None:
    first(model).detach().numpy()[...] = 7.0


def by_foreach(model: nn.Sequential) -> None:
    torch._foreach_add_([first(model).data], 1.0)


def by_one_page(model: nn.Sequential) -> None:
    first(model).data.view(-1)[3000:4024].add_(1.0)


def by_the_end(model: nn.Sequential) -> None:
    first(model).data.view(-1)[-1024:].add_(1.0)


def in_place(model: nn.Sequential) -> None:
    with torch.no_grad():
        first(model).mul_(0.5)


def by_freeing(model: nn.Sequential) -> None:
    storage = first(model).untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    first(model).data.fill_(7.0)


WRITES: dict[str, Callable[[nn.Sequential], None]] = {
    "copy_": by_copy,
    "numpy": by_numpy,
    "storage": by_storage,
    "foreach": by_foreach,
    "one page": by_one_page,
    "the end": by_the_end,
    "counted": in_place,
    "freed": by_freeing,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_before_the_copy_fails_the_save_by_name(tmp_path: Path, write: Callable[[nn.Sequential], None]) -> None:
    model = stack()
    with engine(tmp_path) as checkpointer:
        state = AppState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        checkpointer.save(state, step=1).result()
        with held(checkpointer):
            pending = checkpointer.save(state, step=2)
            write(model)
        with pytest.raises(SaveFailedError, match=r"1 tensor changed .*: model: 0\.weight\. Set .*wait_for_staging"):
            pending.result()
        checkpointer.save(state, step=3).result()
    assert [item.step for item in scan(tmp_path).checkpoints] == [1, 3]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_with_staging_awaited_a_write_comes_too_late_to_tear(
    tmp_path: Path, write: Callable[[nn.Sequential], None]
) -> None:
    model = stack()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with engine(tmp_path, wait_for_staging=True) as checkpointer, held(checkpointer):
        checkpointer.save(AppState(model, torch.optim.SGD(model.parameters(), lr=0.1)), step=1)
        write(model)
    assert_published(tmp_path, weights)


def assert_published(root: Path, weights: list[torch.Tensor]) -> None:
    again = stack()
    with engine(root) as checkpointer:
        assert checkpointer.load(AppState(again)) is not None
    assert all(torch.equal(a, b) for a, b in zip(weights, again.parameters(), strict=True))


def test_memory_that_is_freed_before_the_copy_or_the_save_is_named(tmp_path: Path) -> None:
    model = stack()
    with engine(tmp_path) as checkpointer:
        state = AppState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        checkpointer.save(state, step=1).result()
        with held(checkpointer):
            pending = checkpointer.save(state, step=2)
            first(model).untyped_storage().resize_(0)
        with pytest.raises(SaveFailedError, match=r"1 tensor changed .*: model: 0\.weight\."):
            pending.result()
        with pytest.raises(CheckpointError, match=r"0\.weight: its memory was freed"):
            checkpointer.save(state, step=3).result()


def live(model: nn.Module, optimizer: torch.optim.Optimizer, extra: Any) -> list[torch.Tensor]:
    """The tensors of a run: weights, buffers, optimizer state, and those of an extra."""
    states = [item for state in optimizer.state.values() for item in state.values()]
    return [*model.parameters(), *model.buffers(), *states, *extra.values()]


class Kept(dict[str, torch.Tensor]):
    """An extra that holds tensors."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.update(state)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("width", [4, 1024])
def test_live_tensors_can_be_resized_after_a_save_and_a_load(tmp_path: Path, width: int, *, is_async: bool) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Kept]:
        model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        return model, torch.optim.AdamW(model.parameters()), Kept()

    model, optimizer, extra = build()
    model(torch.rand(2, width)).sum().backward()
    optimizer.step()
    extra["average"] = torch.rand(width, width)
    with engine(tmp_path, is_async=is_async) as checkpointer:
        checkpointer.save(AppState(model, optimizer, extras={"kept": extra}), step=1).result()
        assert all(item.untyped_storage().resizable() for item in live(model, optimizer, extra))
        others = build()
        checkpointer.load(AppState(others[0], others[1], extras={"kept": others[2]}), restore_from="latest")
    assert all(item.untyped_storage().resizable() for item in live(*others))
    assert all(map(torch.equal, live(*others), live(model, optimizer, extra)))


def test_what_replaces_the_memory_or_is_undone_leaves_the_save_right(tmp_path: Path) -> None:
    model = stack()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with engine(tmp_path) as checkpointer, held(checkpointer):
        checkpointer.save(AppState(model, torch.optim.SGD(model.parameters(), lr=0.1)), step=1)
        model[0].weight.data = torch.zeros(WIDTH, WIDTH)
        kept = model[1].weight.data.clone()
        model[1].weight.data.zero_()
        model[1].weight.data.copy_(kept)
        model[0].bias.data.zero_()  # small: copied by now
    assert_published(tmp_path, weights)


def test_an_average_swapped_in_by_diffusers_is_never_published(tmp_path: Path) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    model = stack(10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = training_utils.EMAModel(model.parameters(), decay=0.9, min_decay=0.9)
    state = AppState(model, optimizer, extras={"ema": ema})
    with engine(tmp_path) as checkpointer:
        for number in range(1, 11):
            step(model, optimizer)
            ema.step(model.parameters())
            ema.store(model.parameters())
            with held(checkpointer):
                pending = checkpointer.save(state, step=number)
                ema.copy_to(model.parameters())
            with pytest.raises(SaveFailedError, match=r"10 tensors changed .*model: 7\.weight and 2 more"):
                pending.result()
            ema.restore(model.parameters())
    assert not scan(tmp_path).checkpoints


def test_optimizer_state_is_named_too(tmp_path: Path) -> None:
    model = stack()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    with engine(tmp_path) as checkpointer:
        with held(checkpointer):
            pending = checkpointer.save(AppState(model, optimizer), step=1)
            optimizer.state[model[2].weight]["exp_avg"].data.add_(1.0)
        with pytest.raises(SaveFailedError, match=r"1 tensor .*: optim: 2\.weight.exp_avg\. Set"):
            pending.result()


def test_weights_exported_in_another_element_type_are_compared(tmp_path: Path) -> None:
    model = stack()
    first(model).data[0, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-42])
    state = AppState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with engine(tmp_path, save_consolidated="always", export_dtype="bfloat16") as checkpointer:
        for number in range(1, 4):
            checkpointer.save(state, step=number).result()
        with held(checkpointer):
            pending = checkpointer.save(state, step=9)
            model[1].weight.data.neg_()
        with pytest.raises(SaveFailedError, match=r"1 tensor .*model: 1\.weight\. Set"):
            pending.result()


# -- samples ---------------------------------------------------------------------------------------------------------

DTYPES = ["float32", "float64", "bfloat16", "float16", "int64", "int8", "uint8", "bool", "complex64", "float8_e4m3fn"]


def of_bytes(dtype: str, number: int) -> torch.Tensor:
    if dtype == "bool":
        return torch.zeros(number, dtype=torch.bool)
    return torch.zeros(number, dtype=torch.uint8).view(getattr(torch, dtype))


SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda flat: flat.view(64, -1),
    "odd offset": lambda flat: flat[1:],
    "transposed": lambda flat: flat.view(64, -1).t(),
    "columns": lambda flat: flat.view(64, -1)[:, 3:-5],
    "permuted": lambda flat: flat.view(4, 16, -1).permute(1, 2, 0),
}


def torn(tensor: torch.Tensor, pool: BufferPool, write: Callable[[], object], cast: Any = None) -> bool:
    staging = Staging({3: tensor}, pool, {3: cast} if cast else {}, deferred={3})
    staging.begin()
    assert staging.comes_late
    write()
    staging.finish()
    found = staging.torn()
    staging.snapshot.release()
    assert found in ([], [3])
    return bool(found)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_type_and_stride_is_sampled(dtype: str, shape: Callable[[torch.Tensor], torch.Tensor]) -> None:
    flat = of_bytes(dtype, 4 * SMALL_BYTES)
    raw, tensor, pool = flat.view(torch.uint8), shape(flat), BufferPool()
    for start in range(0, raw.numel() - 8192, 5000):
        assert not torn(tensor, pool, lambda: None)
        assert torn(tensor, pool, lambda start=start: raw[start : start + 8192].bitwise_xor_(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_accelerator_s_kernels_read_the_same_words(dtype: str) -> None:
    tensors = {0: of_bytes(dtype, 2 * SMALL_BYTES), 1: of_bytes(dtype, SMALL_BYTES + 64)}
    for tensor in tensors.values():
        tensor.view(torch.uint8).random_(0, 2)
    found = {key: samples._places(tensor.nbytes // 8, 77) for key, tensor in tensors.items()}
    read = [samples.words_of(tensors[key])[samples._slice(span)] for key in found for span in found[key]]
    assert samples._gather(tensors, found).tolist() == [word for words in read for word in words.tolist()]


def test_a_page_anywhere_is_seen_at_every_save() -> None:
    pool = BufferPool()
    for number in (SMALL_BYTES + 8, 9 * 4096, 10 * 4096 + 24):
        raw = torch.zeros(number, dtype=torch.uint8)
        tensor = raw.view(torch.float32)
        for start in [*range(0, number, 4096)] * 3:
            assert torn(tensor, pool, lambda start=start, raw=raw: raw[start : start + 4096].bitwise_xor_(1))


def test_the_places_move_from_save_to_save() -> None:
    tensor = torch.zeros(64, 1024)  # rows of one page
    pool, seen = BufferPool(), 0
    for _ in range(20):
        seen += torn(tensor, pool, lambda: tensor.data[:, 100].add_(1.0))
    assert 0 < seen < 20


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_are_compared_by_value(cast: torch.dtype) -> None:
    torch.manual_seed(0)
    pool = BufferPool()
    for tensor in (torch.randn(200, 200), torch.randn(200, 200).t(), torch.randn(201, 201)[:, 1:]):
        tensor.view(-1, *tensor.shape[1:])[5:9] = float("nan")
        assert not torn(tensor, pool, lambda: None, cast)
        assert torn(tensor, pool, lambda tensor=tensor: tensor.data.add_(1.0), cast)


def test_small_tensors_of_a_kind_lie_side_by_side() -> None:
    torch.manual_seed(0)
    small = {number: torch.randn(3, 5) for number in range(6)}
    tensors = {
        **small,
        6: torch.tensor(2.5),
        7: torch.randn(SMALL_BYTES),
        8: torch.empty(0, 4),
        9: torch.randn(5, 3).t(),
    }
    layout = Layout.of(tensors)
    assert [keys for keys, _ in layout.packs] == [(0, 1, 2, 3, 4, 5, 9)]
    staging = Staging(tensors, BufferPool(), deferred=set(tensors))
    staging.begin()
    for key in (*small, 6, 9):
        expected = bytes(staging.snapshot.sources[key])
        assert expected == tensors[key].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    staging.finish()
    assert bytes(staging.snapshot.sources[7]) == tensors[7].numpy().tobytes()
    assert len(staging.snapshot.sources[8]) == 0


def test_layouts_are_remembered_by_their_plan() -> None:
    pool, plan = BufferPool(), object()
    tensors = {0: torch.ones(4), 1: torch.ones(2)}
    layout = pool.layout(tensors, plan=plan)
    assert pool.layout(tensors, plan=plan) is layout
    assert pool.layout(tensors, plan=object()) is not layout
    buffer = pool.take(layout.nbytes)
    assert buffer.slots(layout) is buffer.slots(Layout.of(tensors))


def test_live_tensors_are_let_go_when_they_have_been_compared() -> None:
    pool = BufferPool()
    tensor = torch.zeros(SMALL_BYTES)
    staged = Staged.copied(Sources({0: tensor}, frozenset({0}), {}), pool, frozenset({0}))
    staged.finish()
    staged.let_change()
    staged.watch()
    assert staged._staging is None
    assert bytes(staged.snapshot().sources[0]) == tensor.numpy().tobytes()
    staged.release()
    assert pool.holds(tensor.nbytes)


# -- streams ---------------------------------------------------------------------------------------------------------


class Streams:
    """In place of torch.cuda: writes down who waits for what."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.running = "training"

    def current_stream(self, device: torch.device) -> Stream:
        return Stream(self, self.running)

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802 - as torch.cuda calls it
        return Stream(self, "lane")

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.running = self.running, stream.name
        yield
        self.running = before


class Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def record_event(self) -> str:
        return self.name

    def wait_event(self, event: str) -> None:
        self.streams.log.append(f"{self.name} waits for {event}")

    def synchronize(self) -> None:
        self.streams.log.append(f"{self.name} is awaited")


def test_copies_follow_the_stream_of_the_thread_that_saves() -> None:
    streams = Streams()
    device = torch.device("cpu")
    lanes = Lanes([device], module_of=lambda _: streams)
    source, target = torch.ones(3), torch.zeros(3)
    lanes.follow()
    lanes.lead()
    assert streams.log == ["lane waits for training", "training waits for lane"]  # and nothing is awaited
    streams.running = "background"
    lanes.copy([(target, source)])
    lanes.synchronize()
    assert streams.log[2:] == ["lane is awaited"]
    assert streams.running == "background"
    assert torch.equal(target, source)
    lanes.meet()
    assert streams.log[-1] == "background is awaited"


def test_host_memory_needs_no_lanes() -> None:
    lanes, target = Lanes.of([torch.ones(2)]), torch.zeros(2)
    lanes.follow()
    lanes.copy([(target, torch.ones(2))])
    lanes.synchronize()
    assert target.tolist() == [1, 1]


# -- several ranks, and training as it is --------------------------------------------------------------------------


def parallel(kind: str) -> nn.Module:
    model = stack(2)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh)
        return model
    return DistributedDataParallel(model) if kind == "ddp" else model


def _tear(root: Path, kind: str) -> list[str]:
    model = parallel(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    state, found = AppState(model, optimizer), []
    with engine(root) as checkpointer:
        step(model, optimizer)
        checkpointer.save(state, step=1).result()
        for number in range(2, 12):
            with held(checkpointer):
                pending = checkpointer.save(state, step=number)
                torn = [t for p in model.parameters() for t in (p.data, optimizer.state[p]["exp_avg"].data)]
                before = [tensor.clone() for tensor in torn]
                if dist.get_rank() == 1:
                    for tensor in torn:
                        tensor.add_(1.0)
            with pytest.raises(SaveFailedError) as failed:
                pending.result()
            for tensor, value in zip(torn, before, strict=True):
                tensor.copy_(value)  # or the next save finds replicas that differ, and leaves rank 1's values out
            found.append(str(failed.value))
    return found


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_one_rank_s_torn_save_fails_on_all(tmp_path: Path, kind: str) -> None:
    one, other = run_distributed(_tear, 2, tmp_path, kind)
    assert one == other
    assert len(one) == 10
    assert all("rank 1: CheckpointError" in text and "weight" in text and "rank 0" not in text for text in one)
    assert [item.step for item in scan(tmp_path).checkpoints] == [1]


def _train(root: Path, kind: str) -> int:
    model = parallel(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"is_async": True, "save_consolidated": "false", "max_recent_checkpoints": 2}
    config = CheckpointingConfig(checkpoint_dir=str(root), **options)
    saves = 0
    with CheckpointCallback(config, every_n_steps=1) as callback:
        callback.on_train_begin(AppState(model, optimizer))
        for number in range(1, 51):
            for _ in range(2):  # gradients accumulate
                model(torch.full((2, WIDTH), float(number))).square().mean().backward()
            optimizer.step()  # waits for the copy of the save before, if need be
            optimizer.zero_grad()
            pending = callback.on_step_end(number)
            saves += pending is not None and not pending.skipped
        callback.on_train_end()
    return saves


def test_training_as_it_is_raises_no_alarm(tmp_path: Path) -> None:
    assert _train(tmp_path, "none") == 50
    assert max(item.step for item in scan(tmp_path).checkpoints) == 50


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_training_on_two_ranks_raises_no_alarm(tmp_path: Path, kind: str) -> None:
    assert run_distributed(_train, 2, tmp_path, kind) == [50, 50]


def test_the_gpu_check_says_what_it_skips_without_one(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "scripts" / "gpu_check"
    report = tmp_path / "report.json"
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(script), "--output", str(report), "--sizes", "0.02"]
    done = subprocess.run(
        command, check=False, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads(report.read_text())["outcomes"]
    assert {item["status"] for item in outcomes} == {"passed", "skipped"}
    assert all("no GPU" in item["detail"] for item in outcomes if item["status"] == "skipped")
    assert [item["check"] for item in outcomes if item["status"] == "skipped"] == [
        "staging order, another stream",
        "pinned pool",
    ]
    assert outcomes[-1]["numbers"]["durable"] > 0
