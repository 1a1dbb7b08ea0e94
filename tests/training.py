"""A small training run with every random source of a real one, for the tests that need one."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from hydra_ckpt import AppState, CheckpointCallback, CheckpointingConfig, resumable

FEATURES = 13


class Samples(Dataset[torch.Tensor]):
    """Samples with random augmentation, as in real training."""

    def __len__(self) -> int:
        return 41

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((FEATURES,), float(index) / 41) + 0.01 * torch.randn(FEATURES)


class Net(nn.Module):
    """Parameters of odd sizes, a buffer that forward changes, dropout, and a parameter that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 7)
        self.norm = nn.BatchNorm1d(7)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(7, 3)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


class Ema:
    """A moving average that keeps tensors like the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            self.shadow[name].lerp_(parameter.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "decay": 0.9}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = dict(state["shadow"])


@dataclass
class Run:
    """One run of training; the same arguments and directory give the same run."""

    directory: Path
    parallel: str = "none"
    options: dict[str, Any] | None = None
    every_n_steps: int = 3
    accumulate: int = 2
    workers: int = 2

    def __post_init__(self) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        torch.manual_seed(1)
        self.model: nn.Module = Net()
        if self.parallel == "fsdp":
            mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
            for module in (self.model.first, self.model.last, self.model):
                fully_shard(module, mesh=mesh)
        elif self.parallel == "ddp":
            self.model = DistributedDataParallel(self.model, find_unused_parameters=True)
        self.ema = Ema(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [4, 8])
        loader = DataLoader(Samples(), batch_size=2, shuffle=True, num_workers=self.workers, drop_last=True)
        self.loader = resumable(loader, seed=3, rank=rank, world_size=world)
        self.state = AppState(self.model, self.optimizer, self.scheduler, self.loader, extras={"ema": self.ema})
        random.seed(rank)
        np.random.seed(rank)
        torch.manual_seed(100 + rank)

    def train(self, until: int, *, finish: bool = True, after_step: Any = None) -> dict[str, str]:
        """Train until so many steps are done; returns a digest of everything that must be reproduced."""
        config = CheckpointingConfig(checkpoint_dir=str(self.directory), **(self.options or {}))
        with CheckpointCallback(config, every_n_steps=self.every_n_steps) as callback:
            start = callback.on_train_begin(self.state)
            step, epoch = (start.step, start.epoch) if start else (0, 0)
            while step < until:
                step = self._epoch(callback, step, epoch, until, after_step)
                if step < until:
                    callback.on_epoch_end(epoch)
                    epoch += 1
            if finish:
                callback.on_train_end()
            return self.digests()

    def _epoch(self, callback: CheckpointCallback, step: int, epoch: int, until: int, after_step: Any) -> int:
        micro = 0
        for batch in self.loader:
            loss = self.model(batch + random.random() * 0.01 + np.random.rand() * 0.01).square().mean()
            (loss / self.accumulate).backward()
            micro += 1
            if micro % self.accumulate:
                continue
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.ema.update(self.model)
            step += 1
            callback.on_step_end(step, epoch)
            if after_step is not None:
                after_step(step, callback)
            if step >= until:
                break
        return step

    def digests(self) -> dict[str, str]:
        """Digests of parameters, buffers, optimizer, EMA, schedule and random numbers to come."""
        state = {
            "model": dict(self.model.state_dict()),
            "optimizer": {
                f"{number}.{key}": value
                for number, held in enumerate(self.optimizer.state.values())
                for key, value in held.items()
            },
            "ema": self.ema.shadow,
        }
        found = {name: _digest(tensors) for name, tensors in state.items()}
        found["lr"] = repr(self.scheduler.get_last_lr())
        found["random"] = repr((random.random(), np.random.rand(), torch.rand(1).item()))
        return found


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(name.encode() + local.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
