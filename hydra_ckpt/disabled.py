"""The Checkpointer of a run without checkpoints (`checkpoint.enabled=false`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hydra_ckpt import metrics as metric
from hydra_ckpt.checkpointer import Checkpointer
from hydra_ckpt.distributed.group import Group, gather_everywhere
from hydra_ckpt.hub.base import BaseReport, load_base
from hydra_ckpt.report import LoadReport, Stats
from hydra_ckpt.resolved import ResolvedConfig, refuse_unlike
from hydra_ckpt.saving.pending import PendingSave
from hydra_ckpt.state.app_state import AppState

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from hydra_ckpt.store.catalog import Checkpoint

log = logging.getLogger(__name__)


class DisabledCheckpointer(Checkpointer):
    """A Checkpointer that saves and loads nothing, but still fills a model with the weights of its reference model.

    Args:
        config: The settings, resolved.
        dp_rank: Data-parallel rank.
        tp_rank: Tensor-parallel rank.
        pp_rank: Pipeline-parallel rank.
        process_group: The ranks that checkpoint together; None for all.

    Raises:
        CheckpointConfigError: The ranks are configured differently; on all of them.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        *,
        dp_rank: int,
        tp_rank: int,
        pp_rank: int,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        # Not the base class's: there is no directory to hold, and no thread to start.
        self.config = config
        self.dp_rank, self.tp_rank, self.pp_rank = dp_rank, tp_rank, pp_rank
        self.stats = Stats()
        self._process_group, self._deciding = process_group, config.keep.best_metric_key
        limit_s = config.write.timeout_s
        refuse_unlike(config.settings, lambda payload: gather_everywhere(process_group, payload, limit_s))

    enabled = False
    deciding_metric = property(lambda self: self._deciding)
    best_value = None
    has_trouble = False
    longest_save_s = 0.0
    pending = None

    def has_lost(self, step: int) -> bool:
        """Nothing is lost."""
        return False

    def wants(self, step: int, epoch: int) -> bool:
        """Nothing is to be saved."""
        return False

    def pointed(self, pointer: str) -> Checkpoint | None:
        """There is no checkpoint."""
        return None

    def start(self, state: AppState) -> LoadReport | None:
        """A fresh start."""
        return None

    def load(
        self,
        state: AppState,
        restore_from: str | os.PathLike[str] | None = None,
        parts: list[str] | None = None,
    ) -> LoadReport | None:
        """A fresh start."""
        if restore_from is not None:
            log.warning("checkpoint.enabled=false: restore_from=%s is ignored", restore_from)
        return None

    def load_base_model(self, model: nn.Module | list[nn.Module]) -> BaseReport:
        """See `Checkpointer.load_base_model`."""
        group = Group.create(self._process_group, self.config.write.timeout_s)
        channel = group.channel("base")
        try:
            return load_base(model, self.config.hub, channel, allow_pickle=self.config.read.allow_pickle)
        finally:
            channel.drain()  # rank 0 hosts the store that the others still read from
            channel.close()
            group.close()

    def save(
        self,
        state: AppState,
        *,
        step: int,
        epoch: int = 0,
        metrics: Mapping[str, Any] | None = None,
        is_final: bool = False,
        skippable: bool = True,
    ) -> PendingSave:
        """A save that is done, and has saved nothing."""
        return PendingSave.nothing(step)

    def decide_by(self, key: str) -> None:
        """Only for `deciding_metric`."""
        self._deciding = key

    def add_metrics(self, step: int, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Only checks the metrics; see `Checkpointer.add_metrics`."""
        metric.deciding_key(metric.as_floats(metrics), self._deciding)

    def recheck(self, state: AppState, step: int, epoch: int) -> None:
        """Does nothing."""

    def prepare(self, state: AppState) -> None:
        """Does nothing."""

    def spread_experts(self, moe_mesh: DeviceMesh) -> None:
        """Does nothing."""

    def note_best(self, value: float | None) -> None:
        """Does nothing."""

    def settle(self) -> None:
        """Does nothing."""

    def meet(self) -> None:
        """Does nothing."""

    def wait(self) -> None:
        """Does nothing."""

    def drain(self) -> None:
        """Does nothing."""

    def report_failure(self) -> None:
        """Does nothing."""

    def refuse_closed(self, what: str) -> None:
        """Does nothing: it may be used after it was closed."""

    def close(self) -> None:
        """Does nothing."""
