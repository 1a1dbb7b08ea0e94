"""Ranks that are paused in the middle of something, as by a debugger, a full swap or a frozen virtual machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hydra_ckpt import AppState, Checkpointer, CheckpointError, CheckpointingConfig, SaveFailedError, SaveOutcomeUnknown
from hydra_ckpt.files import Files
from hydra_ckpt.saving.pending import PendingSave
from hydra_ckpt.testing.processes import PATIENCE

LIMIT_S = 3.0 * PATIENCE
"""Of every wait of one rank for another."""

PHASES: dict[str, Callable[[str, Path], bool]] = {
    "making the draft": lambda kind, path: kind == "make_dir" and ".draft-" in path.name,
    "writing the token": lambda kind, path: kind == "write_new" and path.name == ".token",
    "writing its part": lambda kind, path: kind == "write_new" and path.name.startswith("rank-"),
    "writing the manifest": lambda kind, path: kind == "write_new" and path.name == "manifest.json",
    "publishing": lambda kind, path: kind == "rename" and ".draft-" in path.name,
    "having published": lambda kind, path: kind == "renamed" and ".draft-" in path.name,
    "moving LATEST": lambda kind, path: kind == "replace" and path.name == "LATEST",
    "retiring": lambda kind, path: kind == "renamed" and ".deleting-" in path.name,
}
"""Where rank 0 is stopped in a save."""


class Meddling(Files):
    """A file layer that calls `meddle` once, where a phase of a save begins.

    Args:
        meddle: What is to happen.
    """

    def __init__(self, meddle: Callable[[], None]) -> None:
        self._meddle = meddle
        self._lock = threading.Lock()
        self.phase: str | None = None

    def _at(self, kind: str, path: Path) -> None:
        with self._lock:
            if self.phase is None or not PHASES[self.phase](kind, path):
                return
            self.phase = None
        self._meddle()

    def make_dir(self, path: Path) -> None:
        self._at("make_dir", path)
        super().make_dir(path)

    def write_new(self, path: Path, data: bytes) -> None:
        self._at("write_new", path)
        super().write_new(path, data)

    def replace(self, source: Path, target: Path) -> None:
        self._at("replace", target)
        super().replace(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._at("rename", source)
        super().rename(source, target)
        self._at("renamed", source)
        self._at("renamed", target)


def stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def pid_of_rank_0() -> int:
    """Collective."""
    note: list[Any] = [os.getpid()]
    dist.broadcast_object_list(note, src=0)
    return int(note[0])


def wait_until_stopped(pid: int) -> None:
    while state_of(pid) != "T":
        time.sleep(0.02)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def make_state() -> AppState:
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return AppState(model, optimizer)


def config_of(root: Path, **options: Any) -> CheckpointingConfig:
    limit = options.pop("limit_s", LIMIT_S)
    return CheckpointingConfig(checkpoint_dir=str(root), consolidation_timeout_minutes=limit / 60, **options)


def build(config: CheckpointingConfig, files: Files | None = None) -> Checkpointer:
    return Checkpointer(config.resolve(), dp_rank=dist.get_rank(), tp_rank=0, pp_rank=0, files=files)


def outcome_of(pending: PendingSave) -> str:
    """How a rank sees a save: published, failed or unknown."""
    try:
        pending.result()
    except SaveFailedError:
        return "failed"
    except SaveOutcomeUnknown:
        return "unknown"
    return "published"


def attempt(act: Callable[[], Any]) -> str:
    """What became of something: done, or the error of the tree that it ended in."""
    try:
        act()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "done"
