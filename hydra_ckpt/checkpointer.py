"""The conductor: in what order a run saves and loads. How each step is done stands elsewhere."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hydra_ckpt import metrics as metric
from hydra_ckpt.config import SaveConsolidatedMode
from hydra_ckpt.distributed import Group
from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, CheckpointExistsError
from hydra_ckpt.files import Files, keeps_ranges_apart
from hydra_ckpt.hub.base import BaseReport, load_base
from hydra_ckpt.hub.card import Made
from hydra_ckpt.loading.changes import changes, tell
from hydra_ckpt.loading.restoring import Restorer
from hydra_ckpt.report import LoadReport, Stats
from hydra_ckpt.resolved import ResolvedConfig
from hydra_ckpt.saving.contents import Contents, Sources, model_sources
from hydra_ckpt.saving.drift import Sample, describe_drift
from hydra_ckpt.saving.exporting import AddExport
from hydra_ckpt.saving.pending import PendingSave
from hydra_ckpt.saving.request import SaveRequest
from hydra_ckpt.saving.save import Content, DraftWriter, FailedSave, Save
from hydra_ckpt.saving.staged import Staged
from hydra_ckpt.saving.transaction import Transaction, perform
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Captured, Extractor
from hydra_ckpt.state.ranks import Ranks, Topology
from hydra_ckpt.storage.digests import Digested
from hydra_ckpt.storage.staging import BufferPool, borrow, staged_bytes
from hydra_ckpt.storage.write import digests_below
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint, scan
from hydra_ckpt.store.directory import Directory
from hydra_ckpt.worker import Worker

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

_JOIN_PATIENCE_S = 60.0


class Checkpointer:
    """Saves and loads the state of one training run. Made by `CheckpointingConfig.build`; a context manager.

    Collective: every rank of the group makes the same calls in the same order.

    Args:
        config: The settings, resolved.
        dp_rank: Data-parallel rank.
        tp_rank: Tensor-parallel rank.
        pp_rank: Pipeline-parallel rank: the stage.
        moe_mesh: The mesh of expert parallelism.
        process_group: The ranks that checkpoint together; None for all.
        pp_group: The ranks of this rank's pipeline.
        files: The file layer; tests pass one that records or fails.
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
    ) -> None:
        self.config = config
        self.dp_rank, self.tp_rank, self.pp_rank = dp_rank, tp_rank, pp_rank
        self.moe_mesh, self.pp_group = moe_mesh, pp_group
        self._process_group = process_group
        self.stats = Stats()
        self._pending: PendingSave | None = None
        self._weights: dict[str, frozenset[Digested]] = {}
        self._best_value: float | None = None
        self._deciding = config.keep.best_metric_key
        self._longest_save_s = 0.0
        self._closed = not config.write.enabled
        if self._closed:
            return
        self.group = Group.create(process_group, config.write.timeout_s)
        self._channel = self.group.channel("main")
        self._save_channel = self.group.channel("save")
        root = self._channel.coordinator_step(
            "agreeing on checkpoint.checkpoint_dir", lambda: str(config.where.checkpoint_dir)
        )
        self.root = Path(root)
        self._directory = Directory(self.root, files or Files(), config.keep, config.where.owner)
        self._extractor = Extractor(config.write.is_peft, pp_rank)
        self._topology = Topology.agree(Ranks(dp_rank, tp_rank, pp_rank), self._channel)
        # Whoever looks for a directory in vain tells the others before they give up.
        self._patience_s = min(_JOIN_PATIENCE_S, config.write.timeout_s / 2)
        self._restorer = Restorer(
            config.read, self._directory, self._extractor, self._channel, self._topology, self._patience_s
        )
        self._contents = Contents(
            config, self.group, self._channel, pp_rank, keeps_ranges=keeps_ranges_apart(self.root)
        )
        self._pool = BufferPool(pinned=torch.cuda.is_available())
        self._worker = Worker("hydra_ckpt-save", self._save_channel.farewell)
        self._hooked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._hooks: list[Any] = []
        self._warm = threading.Event()
        self._warm.set()
        self._start_step: int | None = None
        self._published: set[str] = set()
        self._exported: set[str] = set()
        self._opened = self._settled = self._warned_of_unlike = self._warned_of_drift = False

    @property
    def enabled(self) -> bool:
        """Whether checkpointing is on; if not, saves and loads do nothing."""
        return self.config.write.enabled

    @property
    def deciding_metric(self) -> str:
        """The metric that decides which checkpoint is best: configured, told by `decide_by`, or known from before."""
        return self._deciding

    @property
    def best_value(self) -> float | None:
        """The best metric among the published checkpoints when the run began."""
        return self._best_value

    @property
    def has_failed(self) -> bool:
        """Whether the last save has failed and nobody has seen it yet."""
        return self._pending is not None and self._pending.unseen_error is not None

    @property
    def longest_save_s(self) -> float:
        """The longest time from a save's beginning to its end, in seconds."""
        return self._longest_save_s

    def pointed(self, pointer: str) -> Checkpoint | None:
        """The checkpoint that LATEST, BEST or another pointer leads to."""
        return scan(self.root).pointed(pointer) if self.enabled else None

    def on_rank_0(self, what: str, step: Callable[[], Any]) -> Any:
        """Collective: let rank 0 decide something; all ranks get its answer (plain data), or raise its error."""
        return self._channel.coordinator_step(what, step)

    # -- loading -------------------------------------------------------------------------------------------------

    def start(self, state: AppState) -> LoadReport | None:
        """Collective: begin a run: take the directory, finish or sweep what a crash left, resume as configured.

        Returns:
            What was loaded, or None for a fresh start.
        """
        if not self.enabled:
            return None
        self._open_run()
        self._extractor.try_dataloader(state)
        report = self.load(state)
        self._settle()
        if report is not None and self.group.rank == 0:
            tell(report.path, changes(report.path, dict(self.config.hydra_texts), _kinds(state), self.group.world_size))
        return report

    def load(
        self, state: AppState, restore_from: str | None = None, parts: list[str] | None = None
    ) -> LoadReport | None:
        """Collective: load a checkpoint. The directory is not changed.

        Args:
            state: The objects to load into.
            restore_from: Which checkpoint; see CheckpointingConfig. None for the configured one.
            parts: Which parts; None for the configured ones. Without `progress` the step starts at 0.

        Returns:
            What was loaded, or None for a fresh start.

        Raises:
            CheckpointNotFoundError: The checkpoint asked for is not there.
            CorruptCheckpointError: It is damaged; the message says if tensors were overwritten before that showed.
            KeyMismatchError: It does not fit; nothing was installed.
            CheckpointExistsError: Training would go on below steps that are published already.
        """
        if not self.enabled:
            if restore_from is not None:
                log.warning("checkpoint.enabled=false: restore_from=%s is not followed", restore_from)
            return None
        self.wait()
        wanted = self._restorer.wanted_parts(parts)
        report = self._restorer.restore(state, restore_from, wanted)
        self._start_step = report.step if report else 0
        selector = self.config.read.restore_from if restore_from is None else restore_from
        # What auto and latest find is where the run is; another one may be writing on meanwhile.
        if selector not in ("auto", "latest") and (report is None or "progress" in wanted):
            self._channel.coordinator_step("looking for later steps", self._refuse_later)
        return report

    def load_base_model(self, model: nn.Module | list[nn.Module]) -> BaseReport:
        """Collective: fill a model with the weights of `checkpoint.model_repo_id`. Checkpoints are not looked at.

        Works with `enabled=false` too. The model may be on the meta device, and sharded; each rank reads what it holds.

        Args:
            model: The model, or the parts of it that this rank holds.

        Raises:
            CheckpointConfigError: No reference is configured, or its weights may not or cannot be read.
            CheckpointNotFoundError: The reference, or one of its files, is not there.
            KeyMismatchError: Names are missing, or shapes differ; all of them are listed.
        """
        pickle = self.config.read.allow_pickle
        if self.enabled:
            return load_base(model, self.config.hub, self._channel, allow_pickle=pickle)
        group = Group.create(self._process_group, self.config.write.timeout_s)
        channel = group.channel("base")
        try:
            return load_base(model, self.config.hub, channel, allow_pickle=pickle)
        finally:
            channel.farewell()  # rank 0 hosts what the others still listen to
            channel.close()
            group.close()

    def _refuse_later(self) -> None:
        self._directory.refuse_later(self._start_step, self._restorer.passed_over, self.config.read.on_conflict)

    # -- a run ---------------------------------------------------------------------------------------------------

    def _open_run(self) -> None:
        """Collective, once: become the directory's writer."""
        if not self._opened:
            self._channel.coordinator_step(
                "opening the checkpoint directory", lambda: self._directory.open(self._start_step)
            )
            self._opened = True

    def _settle(self) -> None:
        """Collective, once: clear the way for the steps to come."""
        if not self._settled:
            found = self._channel.coordinator_step(
                "clearing the way for new steps",
                lambda: self._directory.settle(
                    self._start_step, self._restorer.passed_over, self.config.read.on_conflict
                ),
            )
            self._published |= set(found["published"])
            self._exported |= set(found["exported"])
            self._best_value = found["best"]
            self._deciding = str(found["deciding"])
            self._settled = True

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

        With `is_async` it returns as soon as training may go on; the optimizers' next step waits for what is still
        being copied. A final save of a step that this run has published without its export adds the export.

        Args:
            state: What to save.
            step: Number of completed optimizer steps.
            epoch: The epoch they were done in.
            metrics: Known so far; more may come (`add_metrics`).
            is_final: Whether this is the end of training.
            skippable: Whether `when_busy=skip` may leave it out; a final save never is.

        Returns:
            The save; where it was left out, one that is done and `skipped`.

        Raises:
            SaveFailedError: An earlier save failed, or this one did and is not asynchronous.
            CheckpointExistsError: The step is published already.
        """
        if not self.enabled:
            return PendingSave.nothing(step)
        if self._closed:
            raise CheckpointError(f"step {step} cannot be saved: the Checkpointer is closed")
        if step < 0 or epoch < 0:
            raise CheckpointConfigError(f"save(step={step}, epoch={epoch}): steps and epochs are counted from 0")
        if skippable and not is_final and self._is_busy():
            self.stats.skipped += 1
            return PendingSave.nothing(step, skipped=True)
        begun = time.monotonic()
        self.wait()
        self.stats.waited_s += time.monotonic() - begun
        self.report_failure()
        self._open_run()
        self._settle()
        pending = self._begin_save(state, self._request(step, epoch, metrics, is_final))
        try:
            if not self.config.write.is_async:
                pending.wait()
                self.report_failure(always_raise=is_final)
        finally:
            self.stats.blocked_s += time.monotonic() - begun
        return pending

    def _is_busy(self) -> bool:
        """Collective where saves may be left out: whether rank 0 is still writing the one before."""
        if not self.config.write.skips_when_busy or self._pending is None:
            return False
        before = self._pending
        return bool(self._channel.coordinator_step("looking at the save before", lambda: not before.done()))

    def _request(self, step: int, epoch: int, metrics: Mapping[str, Any] | None, is_final: bool) -> SaveRequest:
        mode = self.config.write.consolidated
        consolidated = (
            mode is SaveConsolidatedMode.EVERY
            or (mode is SaveConsolidatedMode.FINAL and is_final)
            or self.config.write.is_peft  # an adapter is small; it is written whole at every save
        )
        name = names.checkpoint_name(epoch, step)
        adds = is_final and consolidated and name in self._published and name not in self._exported
        return SaveRequest(step, epoch, dict(metrics or {}), consolidated, adds)

    def wants(self, step: int, epoch: int) -> bool:
        """Whether a final save of this step would add anything to what is published."""
        request = self._request(step, epoch, None, is_final=True)
        return self.enabled and (request.name not in self._published or request.adds_export)

    def _begin_save(self, state: AppState, request: SaveRequest) -> PendingSave:
        name = request.name
        if name in self._published and not request.adds_export:
            raise CheckpointExistsError(f"{self.root / name} is published already; a step is saved once")
        pending = PendingSave(request.step)
        captured, error = self._capture(state, request)
        self._contents.agree(state, captured, error)
        from_shards = request.adds_export and self._has_changed(state, captured, request)
        transaction: Transaction
        staged = Staged()
        try:
            if captured is None:
                raise error or CheckpointError("the state could not be taken apart")
            content, sources = self._contents.make(
                state,
                captured,
                consolidated=request.consolidated,
                export_only=request.adds_export,
                from_shards=from_shards,
                turn=request.step,
                made=Made(request.step, request.epoch, request.metrics, dict(self.config.hydra_texts)),
            )
            staged = self._stage(state, sources)
            transaction = self._transaction(request, content, staged, _kinds(state))
        except Exception as failure:
            transaction = FailedSave(request.step, failure)
        self.stats.saves += 1
        self._published.add(name)
        if request.consolidated:
            self._exported.add(name)
        self._pending = pending  # only now: one that never began would be waited for for ever
        self._worker.submit(lambda: self._carry_out(pending, request, transaction, staged))
        return pending

    def _has_changed(self, state: AppState, captured: Captured | None, request: SaveRequest) -> bool:
        """Collective: whether the weights differ from those published under the step, or it is not known.

        Averages swapped in, or batch statistics measured anew, belong to no step; an export of them beside that
        step's shards would be another model under the same name.
        """
        saved = self._weights.get(request.name)
        live = None if captured is None or saved is None else self._weights_now(state, captured)
        answers = [live is None, live is not None and live != saved]
        unknown, changed = self._channel.agree("comparing weights", answers, _any)
        if changed and self.group.rank == 0:
            log.warning(
                "the weights have changed since step %d was saved; the export holds the saved ones. To export what is "
                "in memory now, save it as a step of its own",
                request.step,
            )
        return bool(unknown or changed)

    def _weights_now(self, state: AppState, captured: Captured) -> frozenset[Digested] | None:
        """Digests of the models' bytes that this rank would write; None if they cannot be had."""
        try:
            content, sources = self._contents.make(state, captured, consolidated=False, export_only=False)
            live = borrow(model_sources(sources, content.plan).tensors)
            return frozenset(digests_below(content.plan, live.sources, f"{names.MODEL}/"))
        except Exception:
            log.debug("the weights cannot be compared", exc_info=True)
            return None  # the save that follows says why, on all ranks

    def prepare(self, state: AppState) -> None:
        """Collective: agree on the layout and let the background allocate the buffers of asynchronous saves.

        Worth calling once all state exists, that is behind the first optimizer step; the first save then finds
        warm memory. Without it the first save does this work itself.
        """
        if not self.enabled or not self.config.write.is_async:
            return
        request = self._request(0, 0, None, is_final=False)
        captured, error = self._capture(state, request)
        self._channel.raise_together("taking the state apart", error)
        assert captured is not None  # raise_together has raised otherwise
        self._contents.agree(state, captured)
        _, sources = self._contents.make(state, captured, consolidated=request.consolidated, export_only=False)
        nbytes = staged_bytes(sources.tensors, sources.casts)
        self._warm.clear()
        self._worker.submit(lambda: self._prewarm(nbytes))

    def _prewarm(self, nbytes: int) -> None:
        try:
            self._pool.prewarm(nbytes)
        finally:
            self._warm.set()

    def _capture(self, state: AppState, request: SaveRequest) -> tuple[Captured | None, Exception | None]:
        """Take the state apart; an error is handed on, because the other ranks have to hear of it."""
        try:
            request.check_metrics(self._deciding)
            return self._extractor.capture(state), None
        except Exception as error:
            return None, error

    def _stage(self, state: AppState, sources: Sources) -> Staged:
        """Copy what training may change before the next optimizer step; look at the rest where it lies."""
        if not self.config.write.is_async:
            return Staged.borrowed(sources)
        self._warm.wait()
        self._hook(state)
        wait = self.config.write.wait_for_staging
        return Staged.copied(sources, self._pool, frozenset() if wait else sources.late)

    def _transaction(
        self, request: SaveRequest, content: Content, staged: Staged, optimizers: list[str]
    ) -> Transaction:
        writer = DraftWriter(
            self._directory.files,
            self.group.rank,
            self.group.world_size,
            content,
            staged.snapshot,
            "export" if request.adds_export else "rank",
            self._patience_s,
            self.config.write.staging_dir,
        )
        fence = self._directory.fence
        if request.adds_export:
            return AddExport(writer, self.root, request.step, request.name, fence)
        directory, topology = self._directory, self._topology.recorded()
        step, epoch, metrics = request.step, request.epoch, request.metrics
        launch = {"launch": self.config.launch} if self.config.launch is not None else {}
        details = {**directory.details, "optimizers": optimizers, **launch}
        return Save(writer, self.root, step, epoch, metrics, topology, fence, directory.point_to, details)

    def _carry_out(self, pending: PendingSave, request: SaveRequest, transaction: Transaction, staged: Staged) -> None:
        """In the background: finish staging, write, publish, prune."""
        begun = time.monotonic()
        try:
            staged.finish()
            pending.staged()
            outcome = perform(transaction, self._save_channel)
        except Exception as error:
            if self.config.write.is_async:
                # Raised at the next hook; said here as well, because a program may end before there is one.
                log.warning("the save of step %d has failed in the background", request.step)
            if not request.adds_export:
                self._published.discard(request.name)
            self._exported.discard(request.name)
            staged.release()
            pending.fail(error)
            return
        staged.release()
        content = None
        if isinstance(transaction, Save | AddExport):
            content = transaction.writer.content
            self.stats.written_bytes += content.plan.nbytes
        if isinstance(transaction, Save) and not request.consolidated:
            self._weights = {request.name: transaction.writer.weights}
        self._warn_of_unlike(outcome.get("unlike", []))
        self._longest_save_s = max(self._longest_save_s, time.monotonic() - begun)
        pending.finish(Checkpoint(self.root / request.name, request.step, request.epoch))
        self._warn_of_drift(outcome.get("drifted", []), content.samples if content is not None else ())
        if self.group.rank == 0:
            self._prune()

    def _warn_of_unlike(self, ranks: list[int]) -> None:
        if ranks and self.group.rank == 0 and not self._warned_of_unlike:
            self._warned_of_unlike = True
            log.warning(
                "options of optimizers, learning rate schedules, extra state or extras differ on rank %s from those on "
                "the first rank that holds the same tensors, whose values all of them get on resuming. Keep them "
                "equal, or put what belongs to one rank into tensors of its own",
                ", ".join(map(str, ranks)),
            )

    def _warn_of_drift(self, ranks: list[int], samples: Sequence[Sample]) -> None:
        """Collective, once: have two replicas that have drifted apart tell in which tensors."""
        if not ranks or self._warned_of_drift:
            return
        self._warned_of_drift = True
        digests = {name: digest for sample in samples for name, digest in sample.digests().items()}
        try:
            told = self._save_channel.gather("comparing replicas", digests if self.group.rank in ranks else None)
        except CheckpointError as error:  # the save itself is published
            log.warning("ranks %d and %d hold different values, but did not tell in which tensors: %s", *ranks, error)
            return
        if told is not None:
            log.warning("%s", describe_drift(ranks, [told[rank] for rank in ranks]))

    def _prune(self) -> None:
        try:
            self._directory.prune()
        except (OSError, CheckpointError) as error:
            log.warning("old checkpoints could not be pruned: %s", error)

    def _hook(self, state: AppState) -> None:
        """Let every optimizer's step wait for the copies it would spoil."""
        for optimizer in state.optimizers:
            if optimizer not in self._hooked:
                self._hooked.add(optimizer)
                self._hooks.append(optimizer.register_step_pre_hook(self._before_step))

    def _before_step(self, *_: Any) -> None:
        if self._pending is not None:
            begun = time.monotonic()
            self._pending.wait_staged(self.config.write.timeout_s)
            self.stats.blocked_s += time.monotonic() - begun

    def decide_by(self, key: str) -> None:
        """From now on this metric decides which checkpoint is best; rank 0's word counts.

        For a caller who has learned which of several metrics it is; without it `checkpoint.best_metric_key` decides.
        """
        self._deciding = key
        if self.enabled and self.group.rank == 0:
            self._directory.decide_by(key)

    def add_metrics(self, step: int, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Add metrics to a step this run has saved, when it is published; rank 0's count.

        Raises:
            CheckpointConfigError: A value is no number, or it cannot be told which metric decides.
        """
        values = metric.as_floats(metrics)
        metric.deciding_key(values, self._deciding, required=False)
        name = names.checkpoint_name(epoch, step)
        if self.enabled and self.group.rank == 0 and name in self._published:
            self._worker.submit(lambda: self._add_metrics(name, values))

    def _add_metrics(self, name: str, values: Mapping[str, float]) -> None:
        try:
            self._directory.add_metrics(name, values)
        except (OSError, CheckpointError) as error:
            log.warning("metrics of %s could not be added: %s", name, error)

    # -- the end -------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> PendingSave | None:
        """The last save begun."""
        return self._pending

    def wait(self) -> None:
        """Return when no save is under way; errors are left to `raise_failure`."""
        if self._pending is not None:
            self._pending.wait()

    def drain(self) -> None:
        """Return when everything begun in the background is done: saves, added metrics, pruning."""
        if not self._closed:
            self._worker.drain()

    def report_failure(self, *, always_raise: bool = False) -> None:
        """Raise the last save's error, unless seen already; with `on_save_failure=warn` log it and go on."""
        if self.config.write.raise_failures or always_raise:
            self.raise_failure()
        elif self._pending is not None and self._pending.unseen_error is not None:
            log.warning("training goes on without the checkpoint: %s", self._pending.unseen_error)
            self._pending.seen()

    def raise_failure(self) -> None:
        """Raise the last save's error, unless somebody has seen it already."""
        if self._pending is not None and self._pending.unseen_error is not None:
            self._pending.result()

    def close(self) -> None:
        """Finish what is under way, end the background threads, let go of the directory. Idempotent.

        Raises:
            SaveFailedError: The last save failed and nobody has seen it yet.
        """
        if not self._closed:
            self._closed = True
            self._worker.close()
            self._directory.close()
            for hook in self._hooks:
                hook.remove()
            self._pool.clear()
            for channel in (self._channel, self._save_channel):
                channel.close()
            self.group.close()
        self.raise_failure()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            log.error("%s", error)


def _kinds(state: AppState) -> list[str]:
    """The optimizers' classes."""
    return [type(optimizer).__qualname__ for optimizer in state.optimizers]


def _any(rows: Sequence[Sequence[bool]]) -> list[bool]:
    """Coordinator only: for each question whether any rank says yes."""
    return [any(answers) for answers in zip(*rows, strict=True)]
