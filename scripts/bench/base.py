"""The time to start from a base model, with ours and transformers in turn, from a warm page cache.

scripts/bench/base.py [--ranks 2] [--blocks 24] [--rounds 5]
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from load import read_floor
from rounds import Measure, Table, arguments_of, timed, together
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from hydra_ckpt import Checkpointer, CheckpointingConfig
from hydra_ckpt.testing import run_distributed


def llama(blocks: int) -> transformers.LlamaConfig:
    """About 40 MB a block in full precision."""
    return transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        dtype="float32",
    )


def shard(model: Any, mesh: DeviceMesh) -> Any:
    """FSDP2, layer by layer."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ours(engine: Checkpointer, config: Any, mesh: DeviceMesh) -> Any:
    """Meta device, shard, read slices."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shard(model, mesh)
    engine.load_base_model(model)
    return model


def theirs(directory: Path, mesh: DeviceMesh) -> Any:
    """The whole model on every rank, then shard."""
    return shard(transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32), mesh)


def into_new_model(load: Callable[[], object]) -> Measure:
    """A load that makes its model; the one before, full of cycles, is gone by then."""

    def measure(_: int) -> float:
        gc.collect()
        together()
        return timed(load)

    return measure


def peak_of(action: Any) -> float:
    """MB of resident memory that an action needs at its peak, beyond what there was before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    kept = action()
    peak = _resident("VmHWM") - before
    del kept
    return peak


def _resident(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


def _rank(root: str, arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    directory, config = Path(root) / "base", llama(arguments.blocks)
    if dist.get_rank() == 0:
        transformers.LlamaForCausalLM(config).save_pretrained(directory)
    together()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    place = Path(root) / "checkpoints"
    engine = CheckpointingConfig(checkpoint_dir=str(place), model_repo_id=str(directory)).build(dist.get_rank(), 0, 0)
    kept = ours(engine, config, mesh)
    local = [torch.zeros_like(parameter.to_local()) for parameter in kept.parameters()]
    size = sum(tensor.nbytes for tensor in local) / 1e6
    loads = {
        "ours: meta device, shard, load_base_model": lambda: ours(engine, config, mesh),
        "transformers, then sharded": lambda: theirs(directory, mesh),
    }
    peaks = {name: peak_of(load) for name, load in loads.items()}
    contestants: dict[str, Measure] = {
        "read floor (preadv)": read_floor(directory, local),
        "ours: load_base_model, memory there": lambda _: timed(lambda: engine.load_base_model(kept)),
    }
    for name, load in loads.items():
        contestants[name] = into_new_model(load)
    for measure in contestants.values():
        measure(0)
    table = Table(touched=2 * sum(tensor.nbytes for tensor in local))
    table.run(contestants, arguments.rounds)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, FSDP2, {len(local)} tensors, {size:.0f} MB a rank", flush=True)
        for name, peak in peaks.items():
            print(f"{name}: {peak:.0f} MB at the peak, {peak - size:.0f} MB more than the shards", flush=True)
    bases = ["read floor (preadv)", "transformers, then sharded"]
    table.show("seconds until a sharded model has its weights", bases)
    engine.close()


def main() -> None:
    """Parse and run."""
    parser = arguments_of(__doc__)
    parser.set_defaults(blocks=24, rounds=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hydra_ckpt_bench_", dir=os.environ.get("BENCH_DIR")) as root:
        run_distributed(_rank, arguments.ranks, root, arguments, timeout_s=3600)


if __name__ == "__main__":
    main()
