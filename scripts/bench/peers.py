"""What others do with the same tensors: each method gives a contestant for `rounds.Table`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rounds import Measure, fresh, timed, together
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType


class Peers:
    """The contestants that are not ours.

    Args:
        root: Where they write.
        state_dict: Gives what DCP's users hand over.
    """

    def __init__(self, root: Path, state_dict: Callable[[], dict[str, Any]]) -> None:
        self.root = root
        self.state_dict = state_dict
        self.group = dist.new_group(backend="gloo")
        self._managers: list[Any] = []

    def asynchronous(self) -> dict[str, Measure]:
        """Time each keeps the training thread."""
        cached = DefaultStager(
            StagingOptions(use_pinned_memory=False, use_non_blocking_copy=False, use_async_staging=False)
        )
        found = {
            "dcp.async_save, default": self.dcp_async("dcp_async"),
            # BlockingAsyncStager's own cache needs pinned memory, which a machine without an accelerator has not.
            "dcp.async_save, DefaultStager (cached)": self.dcp_async("dcp_cached", cached),
            "dcp.async_save, process-based": self.dcp_async("dcp_process", kind=AsyncCheckpointerType.PROCESS),
        }
        if importlib.util.find_spec("torch_checkpointing"):
            found["torch-checkpointing, CPU settings"] = self.torch_checkpointing(is_async=True)
        return found

    def durable(self) -> dict[str, Measure]:
        """Time of a synchronous save."""
        found: dict[str, Measure] = {
            "dcp.save (shards)": self.dcp_sync,
            "DCP HF writer + consolidation, fsync": self.hf_then_consolidate,
        }
        if importlib.util.find_spec("torch_checkpointing"):
            found["torch-checkpointing (shards), fsync"] = self.torch_checkpointing(is_async=False)
        return found

    def dcp_async(self, name: str, stager: Any = None, kind: Any = AsyncCheckpointerType.THREAD) -> Measure:
        """`dcp.async_save` until it returns; the write is waited for outside of the time."""

        def measure(_: int) -> float:
            path = fresh(self.root / name)
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
        path = fresh(self.root / "dcp")
        state = self.state_dict()
        return timed(lambda: dcp.save(state, checkpoint_id=path))

    def hf_then_consolidate(self, _: int) -> float:
        """DCP's Hugging Face writer, its shards merged by all ranks, everything made durable."""
        from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank

        path = fresh(self.root / "hf")
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
            _sync(path / "whole")

        (path / "whole").mkdir(parents=True, exist_ok=True)
        together()
        return timed(save)

    def torch_checkpointing(self, *, is_async: bool) -> Measure:
        """Each rank's shards in a file of its own; asynchronous with the settings its documentation gives for CPUs."""
        import torch_checkpointing as tc
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        config = tc.CheckpointManager.Config.with_sync_save()
        if is_async:
            staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
            config.save = tc.AsyncCheckpointSaverConfig(staging_config=staging)
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)  # ext4 refuses its unaligned writes
        manager = config.build()
        self._managers.append(manager)

        def measure(_: int) -> float:
            path = fresh(self.root / f"tc_{is_async}")
            state = self.state_dict()
            found: list[Any] = []

            def save() -> None:
                found.append(manager.save(str(path), {"model": state}))
                if not is_async:
                    _sync(path)

            taken = timed(save)
            if found[0] is not None:
                found[0].result()
            return taken

        return measure

    def accelerate(self, model: nn.Module) -> Measure:
        """`Accelerator.save_state` of a plain model, its files synced to disk."""
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        accelerator.prepare_model(model)

        def measure(_: int) -> float:
            path = fresh(self.root / "accelerate")

            def save() -> None:
                accelerator.save_state(str(path))
                _sync(path)

            return timed(save)

        return measure

    def close(self) -> None:
        """End what runs in the background."""
        for manager in self._managers:
            manager.close()


def _sync(directory: Path) -> None:
    """Collective: make the files below a directory durable, shared out over the ranks."""
    together()
    for file in sorted(path for path in directory.rglob("*") if path.is_file())[
        dist.get_rank() :: dist.get_world_size()
    ]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    together()
