"""Checkpoints of any device mesh load on any other, exactly, each rank reading only what it needs."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hydra_ckpt import CorruptCheckpointError
from hydra_ckpt.storage.digests import Check
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.testing import run_distributed
from tests.meshes import KEYS, Net, Place, Run, canonical, place, values

FOUR = ("one", "ddp2", "fsdp2", "fsdp4", "hsdp2x2", "tp2", "fsdp2_tp2")
EIGHT = ("one", "fsdp4_tp2", "hsdp2x2_tp2", "fsdp2_tp2")

FORMATS: dict[str, dict[str, Any]] = {
    "consolidated": {"save_consolidated": "always", "is_async": True},
    "shards": {"save_consolidated": "never"},
    "torch_save": {"model_save_format": "torch_save"},
}


def _matrix(root: Path, names: tuple[str, ...], options: dict[str, Any], size: int) -> dict[str, Any]:
    """Save on every mesh, then load every checkpoint on every mesh; what was found, by (saved, loaded)."""
    logging.getLogger("hydra_ckpt").setLevel(logging.ERROR)  # random numbers that are derived again do not matter here
    found: dict[str, Any] = {}
    places = {name: place(name) for name in names}
    for name, here in places.items():
        if here.group is not None:
            run = Run(here, size)
            with here.build(root / name, **options) as engine:
                engine.save(run.state, step=3).result()
                found[f"{name} wrote"] = engine.stats.written_bytes
        dist.barrier()
    for here in places.values():
        if here.group is not None:
            found.update(_load_all(root, here, names, options, size))
        dist.barrier()
    return found


def _load_all(root: Path, here: Place, names: tuple[str, ...], options: dict[str, Any], size: int) -> dict[str, Any]:
    """Load every checkpoint, into a run that has trained and into one whose optimizers have no state yet."""
    found = {}
    with here.build(root / f"on {here.name}", **options) as engine:
        for saved in names:
            for trained in (True, False):
                run = Run(here, size, trained=trained)
                run.fill("wrong")
                report = engine.load(run.state, restore_from=str(root / saved / "LATEST"))
                assert report is not None
                found[saved, here.name, trained] = (run.wrong(), report.read_bytes, run.local_nbytes())
    return found


def _check_matrix(root: Path, world: int, names: tuple[str, ...], options: dict[str, Any], size: int = 9) -> None:
    results = run_distributed(_matrix, world, root, names, options, size, timeout_s=280)
    pairs = set()
    for found in results:
        for pair, outcome in found.items():
            if isinstance(pair, tuple):
                wrong, read, needed = outcome
                assert wrong == [], pair
                # PyTorch's format can be read by whole written chunks only.
                assert read == needed or "torch_save" in options.values(), pair
                pairs.add(pair)
    assert len(pairs) == 2 * len(names) ** 2
    for name in names:
        checkpoint = Checkpoint.open((root / name / "LATEST").resolve())
        total = sum(found.get(f"{name} wrote", 0) for found in results)
        expected = values_of_all(size)
        assert total == sum(tensor.nbytes for tensor in expected.values()), name  # each byte by one rank only
        if options.get("save_consolidated") == "always":
            _check_files(checkpoint, expected)


def values_of_all(size: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    model = Net(size)
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {}
    for key in KEYS:
        name = canonical(key.removeprefix("ema:").split(":")[0])
        tensor = live["step"].float() if key.endswith(":step") else live[name]
        found[key] = values(key, torch.arange(tensor.numel()).view(tensor.shape), tensor.dtype)
    return found


def _check_files(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    """The files as the safetensors library alone reads them: whole tensors, under their plain names, the tie once."""
    for part, keys in {
        "model": {key for key in KEYS if ":" not in key},
        "optim": {key for key in KEYS if ":" in key and not key.startswith("ema:")},
    }.items():
        found = {}
        for path in checkpoint.manifest.parts[part].files:
            found.update(load_file(checkpoint.path / path))
        assert set(found) == keys
        for key, tensor in found.items():
            same = tensor.contiguous().view(-1).view(torch.uint8), expected[key].contiguous().view(-1).view(torch.uint8)
            assert torch.equal(*same), (checkpoint.path, key)


@pytest.mark.parametrize(
    ("form", "names"),
    [("consolidated", ("one", "ddp2", "fsdp4", "tp2", "fsdp2_tp2")), ("torch_save", ("hsdp2x2", "fsdp2_tp2"))],
    ids=["consolidated", "torch_save"],
)
def test_any_mesh_loads_on_any_other(tmp_path: Path, form: str, names: tuple[str, ...]) -> None:
    _check_matrix(tmp_path, 4, names, FORMATS[form])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["consolidated", "shards", "torch_save"])
def test_any_mesh_loads_on_any_other_in_every_format(tmp_path: Path, form: str) -> None:
    _check_matrix(tmp_path, 4, FOUR, FORMATS[form])


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 9, 13])
def test_eight_ranks_with_strided_uneven_shards(tmp_path: Path, size: int) -> None:
    _check_matrix(tmp_path, 8, EIGHT, FORMATS["consolidated"], size)


def _damage(root: Path) -> list[str]:
    """Flip a bit in several places of each tensor file; a mesh that did not write it must find each."""
    logging.getLogger("hydra_ckpt").setLevel(logging.ERROR)
    here, other = place("fsdp4"), place("hsdp2x2")
    with here.build(root, save_consolidated="always") as engine:
        checkpoint = engine.save(Run(here).state, step=1).result()
    missed = []
    run = Run(other)
    with other.build(root) as engine:
        for file in sorted(checkpoint.path.rglob("*.safetensors")):
            if "progress" in file.parts:
                continue
            size = file.stat().st_size
            for position in {4096, (4096 + size) // 2, size - 1}:
                dist.barrier()
                if dist.get_rank() == 0:
                    _flip(file, position)
                dist.barrier()
                try:
                    engine.load(run.state, restore_from=str(checkpoint.path))
                    missed.append(f"{file.name} {position}")
                except CorruptCheckpointError:
                    pass
                dist.barrier()
                if dist.get_rank() == 0:
                    _flip(file, position)
        dist.barrier()
        engine.load(run.state, restore_from=str(checkpoint.path))
    return missed + run.wrong()


def _flip(file: Path, position: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_found_on_another_mesh_whoever_reads_it(tmp_path: Path) -> None:
    assert run_distributed(_damage, 4, tmp_path) == [[]] * 4


def _compared(root: Path) -> list[tuple[str, int]]:
    """Which digests this rank compares when it loads what another mesh has saved."""
    logging.getLogger("hydra_ckpt").setLevel(logging.ERROR)
    here, other = place("fsdp2_tp2"), place("fsdp4")
    with here.build(root, save_consolidated="always") as engine:
        engine.save(Run(here).state, step=1).result()
    compared: list[tuple[str, int]] = []
    compare = Check.compare

    def recording(self: Check, directory: Path, data: memoryview) -> None:
        compared.append((self.file, self.region.offset))
        compare(self, directory, data)

    with pytest.MonkeyPatch.context() as patch, other.build(root) as engine:
        patch.setattr(Check, "compare", recording)
        engine.load(Run(other, trained=False).state)
    return compared


def test_every_byte_is_compared_the_ranks_share_what_none_reads_whole(tmp_path: Path) -> None:
    by_rank = run_distributed(_compared, 4, tmp_path)
    tensors = [item for compared in by_rank for item in compared if item[0].split("/")[0] in ("model", "optim")]
    # What all ranks hold, each compares as it reads it, before it uses it; all else is compared by one of them.
    assert set(Counter(tensors).values()) == {1, 4}
    assert all(len(compared) == len(set(compared)) for compared in by_rank)
    assert all(compared for compared in by_rank)
    checkpoint = (tmp_path / "LATEST").resolve()
    existing = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert {file for compared in by_rank for file, _ in compared} == existing - {"manifest.json"}
