"""Writing past the page cache and through maps: the same bytes, and errors are reported."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hydra_ckpt import AppState, Checkpointer, CheckpointingConfig
from hydra_ckpt.files import Files, OpenFile, keeps_ranges_apart
from hydra_ckpt.testing import run_distributed
from hydra_ckpt.testing.processes import PATIENCE

MIB = 1 << 20


ODD = [(0, 9 * MIB), (1, 5 * MIB), (4095, 300_001), (8192, 256 << 10), (77, 1000), (4096, 13 * MIB + 5)]


@pytest.mark.parametrize(("offset", "length"), ODD)
def test_the_bytes_arrive_whatever_their_alignment(tmp_path: Path, offset: int, length: int) -> None:
    data = torch.randint(0, 256, (length + 3,), dtype=torch.uint8).numpy().tobytes()
    files, path = Files(), tmp_path / "file"
    files.allocate(path, offset + length + 10)
    with files.open(path, direct=True) as file:
        file.write_at(0, b"\1" * offset)
        file.write_at(offset, memoryview(data)[3:])  # memory that is aligned to nothing
        file.write_at(offset + length, b"\2" * 10)
        file.sync()
    assert path.read_bytes() == b"\1" * offset + data[3:] + b"\2" * 10


def test_what_was_handed_over_may_change_at_once(tmp_path: Path) -> None:
    files, path, data = Files(), tmp_path / "file", bytearray(b"a" * (4 * MIB))
    files.allocate(path, 40 * MIB)
    with files.open(path, direct=True) as file:
        for number in range(10):
            data[:] = bytes([number]) * len(data)
            file.write_at(number * len(data), data)
        data[:] = b"z" * len(data)
        file.sync()
    written = path.read_bytes()
    assert all(written[n * len(data) : (n + 1) * len(data)] == bytes([n]) * len(data) for n in range(10))


def test_file_systems_that_do_not_offer_it(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    path = (memory if memory.is_dir() else tmp_path) / f"hydra_ckpt_{tmp_path.name}"
    files = Files()
    try:
        files.allocate(path, MIB)
        with files.open(path, direct=True) as file:
            file.write_at(0, b"x" * MIB)
            file.sync()
        assert path.read_bytes() == b"x" * MIB
    finally:
        files.unlink(path)


@contextmanager
def _files_of_at_most(nbytes: int) -> Iterator[None]:
    """The system refuses to write past this position of any file."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_an_error_of_the_device_is_raised_by_the_next_sync_at_the_latest(tmp_path: Path) -> None:
    files, path = Files(), tmp_path / "file"
    files.allocate(path, 64 * MIB)

    def write() -> None:
        with files.open(path, direct=True) as file:
            for number in range(8):
                file.write_at(number * 8 * MIB, b"x" * (8 * MIB))
            file.sync()

    with _files_of_at_most(8 * MIB), pytest.raises(OSError, match="File too large"):
        write()
    write()  # nothing is left of the failure


@pytest.mark.parametrize("pieces", [1, 8])
def test_whatever_goes_wrong_beside_is_raised(tmp_path: Path, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _passes_by(tmp_path):
        pytest.skip("this file system has only the page cache")
    files, path, system = Files(), tmp_path / "file", os.pwrite

    def fail(descriptor: int, data: memoryview, offset: int) -> int:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("none left")
        return system(descriptor, data, offset)

    files.allocate(path, 64 * MIB)
    monkeypatch.setattr(os, "pwrite", fail)

    def write() -> None:
        with files.open(path, direct=True) as file:
            for number in range(pieces):
                file.write_at(number * 8 * MIB, b"x" * (8 * MIB))
            file.sync()

    with pytest.raises(MemoryError, match="none left"):
        write()


def test_without_another_thread_the_ordinary_way_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    files, path = Files(), tmp_path / "file"
    files.allocate(path, MIB)
    held = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with files.open(path, direct=True) as file:
        file.write_at(0, b"x" * MIB)
        file.sync()
    assert path.read_bytes() == b"x" * MIB
    assert len(list(Path("/proc/self/fd").iterdir())) == held


RUN, COUNT, STRIDE = 1000, 300, 2500


def _write_runs(path: Path) -> bytes:
    """What the file has to hold afterwards."""
    data = torch.randint(0, 256, (RUN * COUNT,), dtype=torch.uint8).numpy().tobytes()
    with Files().open(path) as file:
        file.write_runs(77, RUN, COUNT, STRIDE, memoryview(data))
        file.sync()
    expected = bytearray(MIB)
    for number in range(COUNT):
        start = 77 + number * STRIDE
        expected[start : start + RUN] = data[number * RUN : (number + 1) * RUN]
    return bytes(expected)


def test_runs_are_written_one_by_one_where_no_space_is_reserved(tmp_path: Path) -> None:
    reserved, sparse = tmp_path / "reserved", tmp_path / "sparse"
    Files().allocate(reserved, MIB)
    sparse.touch()
    os.truncate(sparse, MIB)
    for path in (reserved, sparse):
        assert _write_runs(path) == path.read_bytes()
    os.truncate(sparse, 0)
    os.truncate(sparse, MIB)
    with _files_of_at_most(4096), pytest.raises(OSError, match="File too large"):
        _write_runs(sparse)  # a write, then: the limit is none for maps


def test_runs_go_through_a_map_where_space_is_reserved(tmp_path: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], check=True, capture_output=True, text=True).stdout
    if kind.strip() not in ("ext2/ext3", "xfs", "tmpfs", "btrfs"):
        pytest.skip(f"{kind.strip()} may reserve nothing")
    path = tmp_path / "file"
    Files().allocate(path, MIB)
    with _files_of_at_most(4096):
        expected = _write_runs(path)
    assert path.read_bytes() == expected


# All but the last page is written, and nothing is left for that. On ext2 the blocks that list blocks make up for it.
FILL = """
import os, sys
from pathlib import Path
from hydra_ckpt.files import Files
place, size = Path(sys.argv[1]), 1 << 20
(place / "file").touch()
os.truncate(place / "file", size)
with Files().open(place / "file") as file:
    file.write_at(0, b"x" * (size - 4096))
    with open(place / "others", "wb", buffering=0) as others:
        try:
            while True:
                others.write(b"x" * 512)
        except OSError:
            pass
    try:
        file.write_runs(size - 4096, 8, 2, 16, memoryview(b"y" * 16))
    except OSError as error:
        print(error)
"""


@pytest.mark.parametrize("kind", ["tmpfs", "ext2"])
def test_a_full_disk_is_an_error_and_ends_no_process(tmp_path: Path, kind: str) -> None:
    place, image = tmp_path / "disk", tmp_path / "image"
    place.mkdir()
    mount = f"mount -t tmpfs -o size=2m none {place}"
    if kind == "ext2":
        mount = f"truncate -s 4M {image} && mkfs.ext2 -q -b 1024 {image} && mount -o loop {image} {place}"
    apart = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    try:
        subprocess.run([*apart, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"no {kind} can be mounted here")
    program = f'{mount} && exec "$@"'
    done = subprocess.run(
        [*apart, program, "sh", sys.executable, "-c", FILL, str(place)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120 * PATIENCE,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[Errno 28] No space left on device"), done.stderr


def _passes_by(place: Path) -> bool:
    """Whether large pieces go past the page cache here; on the file systems that are named they must."""
    files, path = Files(), place / "probe"
    files.allocate(path, MIB)
    with files.open(path, direct=True) as file:
        threads = threading.active_count()
        file.write_at(0, b"x" * MIB)
        file.sync()
        return threading.active_count() > threads


def test_the_file_systems_that_are_named_have_it(tmp_path: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], check=True, capture_output=True, text=True).stdout
    if kind.strip() not in ("ext2/ext3", "xfs"):  # as `stat` calls ext4
        pytest.skip(f"not on {kind.strip()}")
    assert _passes_by(tmp_path)


@pytest.mark.parametrize(
    ("mounts", "apart"),
    [
        (b"dev / ext4 rw 0 0\n", True),
        (b"dev / ext4 rw 0 0\nhost:/x {place} nfs4 rw 0 0\n", False),
        (b"dev / ext4 rw 0 0\ndev {place} xfs rw 0 0\nhost:/x {place} nfs4 rw 0 0\n", False),
        (b"host:/x / nfs rw 0 0\ndev {place} ext4 rw 0 0\n", True),
        (b"dev / ext4 rw 0 0\ndev /\xff\xfe ext4 rw 0 0\nhost:/x {place} cifs rw 0 0\n", False),
    ],
)
def test_what_a_path_is_mounted_as(tmp_path: Path, mounts: bytes, apart: bool) -> None:
    place, table = tmp_path / "my share", tmp_path / "mounts"
    (place / "run").mkdir(parents=True)
    table.write_bytes(mounts.replace(b"{place}", str(place).replace(" ", "\\040").encode()))
    assert keeps_ranges_apart(place / "run", table) is apart


class _Watching(Files):
    """Remembers which files were opened to pass by the page cache."""

    def __init__(self) -> None:
        self.direct: dict[str, bool] = {}

    @contextmanager
    def open(self, path: Path, *, direct: bool = False) -> Iterator[OpenFile]:
        self.direct[path.name] = direct
        with super().open(path, direct=direct) as file:
            yield file


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(700, 901), nn.Linear(901, 700))


def _save(root: Path) -> dict[str, object]:
    """Save models split by rows, and by columns; returns how their files were written and whether they are right."""
    expected, mesh, found = _model().state_dict(), init_device_mesh("cpu", (dist.get_world_size(),)), {}
    plans = {
        "rows": lambda model: [fully_shard(module, mesh=mesh) for module in model],
        "columns": lambda model: parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()}),
    }
    for name, split in plans.items():
        for always in (False, "always"):
            model, files = _model(), _Watching()
            split(model)
            config = CheckpointingConfig(checkpoint_dir=str(root / f"{name}-{always}"), save_consolidated=always)
            tp = dist.get_rank() if name == "columns" else 0
            with Checkpointer(
                config.resolve(), dp_rank=dist.get_rank() - tp, tp_rank=tp, pp_rank=0, files=files
            ) as engine:
                for step in (1, 2):
                    path = engine.save(AppState(model), step=step).result().path
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.zero_()
                engine.load(AppState(model))
            right = all(torch.equal(value.full_tensor(), expected[key]) for key, value in model.state_dict().items())
            if always:
                saved = load_file(path / "model" / "consolidated" / "model.safetensors")
                right = right and all(torch.equal(saved[key], expected[key]) for key in expected)
            weights = [direct for file, direct in files.direct.items() if file.endswith(".safetensors")]
            found[f"{name} {always}"] = (any(weights), right)
    return found


def test_only_files_that_nobody_maps_are_written_so(tmp_path: Path) -> None:
    for found in run_distributed(_save, 2, tmp_path):
        assert found == {
            "rows False": (True, True),
            "rows always": (True, True),
            "columns False": (True, True),
            "columns always": (False, True),
        }
