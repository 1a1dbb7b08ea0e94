"""The order in which a run saves and loads; other modules do each step."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ckpt.distributed.group import Group, gather_everywhere
from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.files import Files
from hydra_ckpt.hub.base import BaseReport, load_base
from hydra_ckpt.loading.changes import changes, log_changes
from hydra_ckpt.loading.restoring import Restorer
from hydra_ckpt.loading.run_position import RunPosition
from hydra_ckpt.report import LoadReport, Stats
from hydra_ckpt.resolved import ResolvedConfig, refuse_unlike
from hydra_ckpt.saving.pending import PendingSave
from hydra_ckpt.saving.request import non_negative_int
from hydra_ckpt.saving.run_metrics import RunMetrics
from hydra_ckpt.saving.save import JOIN_PATIENCE_S
from hydra_ckpt.saving.saver import Saver, optimizer_classes
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Extractor
from hydra_ckpt.state.ranks import Ranks, Topology
from hydra_ckpt.store.catalog import Checkpoint, scan
from hydra_ckpt.store.directory import Directory
from hydra_ckpt.store.lease import Times
from hydra_ckpt.values import refuse_url

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and loads the state of one training run. Created by `CheckpointingConfig.build`; a context manager.

    Collective: every rank of the group makes the same calls in the same order.

    Args:
        config: The settings, resolved.
        dp_rank: Data-parallel rank.
        tp_rank: Tensor-parallel rank.
        pp_rank: Pipeline-parallel rank: the stage.
        moe_mesh: The mesh of expert parallelism.
        process_group: The ranks that checkpoint together; None for all.
        pp_group: Not needed: pipeline stages find each other among the ranks of `process_group`.
        files: The file layer; tests pass one that records or fails.
        times: How long the lease of the directory waits; tests pass short ones.

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
        moe_mesh: DeviceMesh | None = None,
        process_group: dist.ProcessGroup | None = None,
        pp_group: dist.ProcessGroup | None = None,
        files: Files | None = None,
        times: Times | None = None,
    ) -> None:
        self.config = config
        self.dp_rank, self.tp_rank, self.pp_rank = dp_rank, tp_rank, pp_rank
        self._process_group = process_group
        self._pid = os.getpid()
        self.stats = Stats()
        limit_s = config.write.timeout_s
        refuse_unlike(config.settings, lambda payload: gather_everywhere(process_group, payload, limit_s))
        self._closed = self._let_go = False  # _let_go: close() has come to its end
        self.group = Group.create(process_group, config.write.timeout_s)
        self._channel = self.group.channel("main")
        root = self._channel.coordinator_step(
            "agreeing on checkpoint.checkpoint_dir", lambda: str(config.where.checkpoint_dir)
        )
        self.root = Path(root)
        self._directory = Directory(self.root, files or Files(), config.keep, config.where.owner, times=times)
        self._extractor = Extractor(config.write.is_peft, pp_rank, config.write.unsaved)
        self._topology = Topology.agree(Ranks(dp_rank, tp_rank, pp_rank), self._channel)
        # Half the limit, so that a rank that cannot find the directory reports it before the others time out.
        self._patience_s = min(JOIN_PATIENCE_S, config.write.timeout_s / 2)
        restorer = Restorer(
            config.read, self._directory, self._extractor, self._channel, self._topology, self._patience_s
        )
        self._saver = Saver(
            config,
            self.group,
            self._channel,
            self._directory,
            self._extractor,
            self._topology,
            self.stats,
            self._patience_s,
            moe_mesh,
        )
        self._position = RunPosition(config, self._directory, self._channel, restorer)
        self._metrics = RunMetrics(config.keep, self._directory, self._saver, is_coordinator=self.group.rank == 0)

    @property
    def enabled(self) -> bool:
        """Whether checkpointing is on; if not, saves and loads do nothing (see `DisabledCheckpointer`)."""
        return True

    @property
    def deciding_metric(self) -> str:
        """The metric that decides which checkpoint is best: configured, set by `decide_by`, or from an earlier run."""
        return self._metrics.deciding

    @property
    def best_value(self) -> float | None:
        """The best metric when the run began: from the published checkpoints, up to the one it resumed from."""
        return self._metrics.best_value

    @property
    def has_trouble(self) -> bool:
        """Whether the last save failed and the error was not raised yet, or its outcome is unknown on this rank."""
        return self._saver.known.has_trouble

    def has_lost(self, step: int) -> bool:
        """Whether the last save was for this step and failed, as far as this rank knows."""
        return self.pending is not None and self.pending.step == step and self.pending.has_failed

    def settle(self) -> None:
        """Collective: wait for the save under way; a rank that was cut off gets its outcome from rank 0."""
        self.refuse_closed("settling a save")
        self.wait()
        self._saver.known.settle()

    def meet(self) -> None:
        """Collective: wait for the save under way, and `settle` it if any rank has trouble with it."""
        self.refuse_closed("settling a save")
        self.wait()
        self._saver.known.meet()

    @property
    def longest_save_s(self) -> float:
        """The longest time a save has taken, in seconds."""
        return self._saver.background.longest_save_s

    def pointed(self, pointer: str) -> Checkpoint | None:
        """The checkpoint that LATEST, BEST or another pointer points to."""
        return scan(self.root).pointed(pointer)

    def on_rank_0(self, what: str, step: Callable[[], Any]) -> Any:
        """Collective: let rank 0 decide something; all ranks get its answer (plain data), or raise its error."""
        self.refuse_closed(what)
        return self._channel.coordinator_step(what, step)

    def spread_experts(self, moe_mesh: DeviceMesh) -> None:
        """Set the mesh of expert parallelism, if it is known only after `build`; call on every rank."""
        self.refuse_closed("setting the mesh of expert parallelism")
        self._saver.spread_experts(moe_mesh)

    # -- loading -------------------------------------------------------------------------------------------------

    def start(self, state: AppState) -> LoadReport | None:
        """Collective: begin a run: take the directory, finish or remove what a crash left, resume as configured.

        Returns:
            What was loaded, or None for a fresh start.
        """
        self.refuse_closed("beginning a run")
        self._check(state)
        self._position.open()
        report = self.load(state)
        self._extractor.try_dataloader(state)  # not before: asking may fix where a fresh loader begins
        self._settle()
        self._saver.begin_run(state)
        if report is not None and self.group.rank == 0:
            texts, classes = dict(self.config.hydra_texts), optimizer_classes(state.optimizers)
            log_changes(report.path, changes(report.path, texts, classes, self.group.world_size))
        return report

    def _check(self, state: AppState) -> None:
        """Collective: refuse right away what can never be saved, and report what the configuration leaves out."""
        error: Exception | None = None
        try:
            self._extractor.check(state)
        except CheckpointError as refusal:
            error = refusal
        self._channel.raise_together("looking at the models", error)
        self._saver.left_out.announce()

    def load(
        self, state: AppState, restore_from: str | os.PathLike[str] | None = None, parts: list[str] | None = None
    ) -> LoadReport | None:
        """Collective: load a checkpoint. The directory is not changed.

        Args:
            state: The objects to load into.
            restore_from: Which checkpoint; see CheckpointingConfig. None for the configured one, or for the newest one
                of this run if it began from that and has been started again.
            parts: Which parts; None for the configured ones. Without `progress` the step starts at 0.

        Returns:
            What was loaded, or None for a fresh start.

        Raises:
            CheckpointNotFoundError: The requested checkpoint does not exist.
            CorruptCheckpointError: It is damaged; the message says if tensors were overwritten before this was found.
            KeyMismatchError: It does not fit; nothing was installed.
            CheckpointExistsError: Training would continue below steps that are already published; nothing was
                installed.
        """
        self.refuse_closed("loading a checkpoint")
        refuse_url("restore_from", restore_from)
        self.wait()
        return self._position.restore(state, restore_from, parts)

    def _settle(self) -> None:
        """Collective, once: clear the way for new steps."""
        found = self._position.settle()
        if found is not None:
            self._saver.known.knows(found["published"], found["exported"])
            self._metrics.begin(found)

    def load_base_model(self, model: nn.Module | list[nn.Module]) -> BaseReport:
        """Collective: fill a model with the weights of `checkpoint.model_repo_id`, not from a checkpoint.

        The model may be on the meta device, and sharded; each rank reads what it
        holds.

        Args:
            model: The model, or the parts of it that this rank holds.

        Raises:
            CheckpointConfigError: No reference is configured, or its weights may not or cannot be read.
            CheckpointNotFoundError: The reference, or one of its files, does not exist.
            KeyMismatchError: Names are missing, or shapes differ; lists all of them.
        """
        self.refuse_closed("loading the base model")
        return load_base(model, self.config.hub, self._channel, allow_pickle=self.config.read.allow_pickle)

    # -- saving --------------------------------------------------------------------------------------------------

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
        """Collective: save the state as it is now.

        With `is_async` it returns as soon as training may continue; the optimizers' next step waits for what is still
        being copied. A final save of a step that this run has published without its export adds the export.

        Args:
            state: What to save.
            step: Number of completed optimizer steps.
            epoch: The current epoch.
            metrics: Metrics known so far; more may follow (`add_metrics`).
            is_final: Whether this is the end of training.
            skippable: Whether `when_busy=skip` may skip it; a final save is never skipped. A save that may not be
                skipped may be the last one, so every byte that several ranks hold is compared.

        Returns:
            The save; if it was skipped, one that is done and `skipped`.

        Raises:
            SaveFailedError: The previous save failed, or this one did and is not asynchronous. A rank that was cut off
                gets the outcome when the ranks next meet; only `result()` and `close()` raise `SaveOutcomeUnknown`.
            CheckpointExistsError: The step is already published.
        """
        self.refuse_closed(f"saving step {step}")
        step, epoch = non_negative_int("step", step), non_negative_int("epoch", epoch)
        if skippable and not is_final and self.config.write.skips_when_busy and self._saver.known.is_busy():
            self.stats.skipped += 1
            return PendingSave.nothing(step, skipped=True)
        begun = time.monotonic()
        self.wait()
        self.stats.waited_s += time.monotonic() - begun
        pending = self._begin_save(state, step, epoch, metrics, is_final=is_final, is_last=not skippable)
        try:
            if not self.config.write.is_async:
                pending.wait()
                if not pending.is_unknown:
                    self.report_failure()
        finally:
            self.stats.blocked_s += time.monotonic() - begun
        return pending

    def _begin_save(
        self,
        state: AppState,
        step: int,
        epoch: int,
        metrics: Mapping[str, Any] | None,
        *,
        is_final: bool,
        is_last: bool,
    ) -> PendingSave:
        """Collective: begin a save. A failure of the previous one is raised once all ranks have met."""
        try:
            self._position.open()
            self._settle()
            request = self._saver.request(step, epoch, metrics, is_final, is_last=is_last)
            return self._saver.begin(state, request, self._metrics.deciding, self.report_failure)
        except CheckpointError:
            self.report_failure()  # more helpful than the error that the other ranks are missing from this save
            raise

    def wants(self, step: int, epoch: int) -> bool:
        """Whether a final save of this step would add anything to what is published."""
        return self._saver.wants(step, epoch)

    def recheck(self, state: AppState, step: int, epoch: int) -> None:
        """Collective, before the final save: compare in full what the last save only sampled.

        If replicas differ, the final save makes that checkpoint again, and the first one is set aside.

        Raises:
            CheckpointError: They differ, and `checkpoint.on_drift` is raise; then nothing is saved again.
        """
        self.meet()  # a rank that was cut off must know how the save ended before the ranks compare
        self._saver.recheck(state, step, epoch)

    def prepare(self, state: AppState) -> None:
        """Collective: agree on the layout, and let the background allocate the buffers of asynchronous saves.

        Best called once all state exists, after the first optimizer step: it refuses state that cannot be saved, or not
        exported as configured, and warms up memory for the first save. Without it the first save does this work.
        """
        self.refuse_closed("preparing to save")
        self._saver.prepare(state)

    def decide_by(self, key: str) -> None:
        """Let this metric decide from now on which checkpoint is best; only rank 0's call counts.

        Otherwise `checkpoint.best_metric_key` decides.
        """
        self._metrics.decide_by(key)

    def note_best(self, value: float | None) -> None:
        """Set the deciding metric's best value so far; only rank 0's call counts. Later saves record it.

        It may belong to a step that is not saved: a run that resumes from a later checkpoint then knows it.
        """
        self._metrics.note_best(value)

    def add_metrics(self, step: int, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Add metrics to a step this run has saved, once it is published; only rank 0's call counts.

        Metrics that cannot be written now are kept, with a warning, and written with the next attempt.

        Raises:
            CheckpointConfigError: A value is not a number, or it is not clear which metric decides.
            CheckpointError: The Checkpointer is closed.
        """
        self.refuse_closed(f"adding metrics to step {step}")
        self._metrics.add(step, epoch, self._metrics.checked(metrics))

    # -- the end -------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> PendingSave | None:
        """The last save begun."""
        return self._saver.known.pending

    def wait(self) -> None:
        """Return when no save is under way; errors are left to `report_failure`."""
        if self.pending is not None:
            self.pending.wait()

    def drain(self) -> None:
        """Return when everything begun in the background is done: saves, added metrics. Deletions may continue."""
        if not self._closed:
            self._saver.background.afterwards(self._directory.write_metrics)  # retry those that a full disk refused
            self._saver.background.drain()

    def report_failure(self) -> None:
        """Raise the last save's error, unless already seen; with `on_save_failure=warn` log it instead.

        A final save that failed always raises; one whose outcome is unknown may not have failed.
        """
        self._saver.known.report_failure(raises=self.config.write.raise_failures)

    def close(self) -> None:
        """Finish what is under way, end the background threads, release the directory. Idempotent.

        If it is interrupted, the next call does the rest.

        Raises:
            SaveFailedError: The last save failed and its error was not raised yet.
            SaveOutcomeUnknown: This rank was cut off from the others, and does not know whether the save is published.
        """
        self._closed = True
        if not self._let_go:
            self._saver.close()
            self._directory.close()
            self._channel.close()
            self.group.close()
            self._let_go = True
        self.report_failure()

    def refuse_closed(self, what: str) -> None:
        """Raise if this Checkpointer has been closed, or belongs to another process; `what` needs it open."""
        if os.getpid() != self._pid:
            raise CheckpointError(
                f"{what}: this process was forked from process {self._pid}; only that process may save"
            )
        if self._closed:
            raise CheckpointError(f"{what}: the Checkpointer is closed; build a new one")

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            log.error("%s", error)
