"""Bytes to and from files: safetensors headers, digests, staging, and the writer and reader built on them.

`SafetensorsWriter`, `SafetensorsReader` and `PooledStager` plug into `torch.distributed.checkpoint` on their own:

    dcp.save(state_dict, storage_writer=SafetensorsWriter(path))
    dcp.load(state_dict, storage_reader=SafetensorsReader(path))
"""

from __future__ import annotations

from hydra_ckpt.storage.dcp_reader import SafetensorsReader
from hydra_ckpt.storage.dcp_writer import SafetensorsWriter
from hydra_ckpt.storage.staging import PooledStager

__all__ = ["PooledStager", "SafetensorsReader", "SafetensorsWriter"]
