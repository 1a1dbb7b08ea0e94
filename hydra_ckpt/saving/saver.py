"""The saving half of the Checkpointer: from a request to a save that completes in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hydra_ckpt import metrics as metric
from hydra_ckpt.config import SaveConsolidatedMode
from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.distributed.group import Group
from hydra_ckpt.errors import CheckpointError, CheckpointExistsError
from hydra_ckpt.files import keeps_ranges_apart
from hydra_ckpt.hub.card import SaveInfo
from hydra_ckpt.report import Stats
from hydra_ckpt.resolved import ResolvedConfig
from hydra_ckpt.saving.background import Background
from hydra_ckpt.saving.beginning import plain_parameters
from hydra_ckpt.saving.comparing import Look, expert_place
from hydra_ckpt.saving.contents import Contents
from hydra_ckpt.saving.exporting import AddExport
from hydra_ckpt.saving.known import KnownSaves
from hydra_ckpt.saving.left_out import LeftOut
from hydra_ckpt.saving.live_shares import Sources
from hydra_ckpt.saving.pending import PendingSave
from hydra_ckpt.saving.published_weights import PublishedWeights
from hydra_ckpt.saving.request import SaveRequest
from hydra_ckpt.saving.save import Content, DraftWriter, Save
from hydra_ckpt.saving.staged import Staged
from hydra_ckpt.saving.step_hooks import StepHooks
from hydra_ckpt.saving.transaction import FailedSave, Transaction
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Captured, Extractor
from hydra_ckpt.state.ranks import Topology
from hydra_ckpt.storage.pool import BufferPool
from hydra_ckpt.store.directory import Directory

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)


class Saver:
    """Runs saves, one at a time, and knows which ones this run has made.

    Args:
        config: The settings, resolved.
        group: The ranks.
        channel: To the other ranks, for the training thread.
        directory: Where checkpoints are stored.
        extractor: Takes states apart.
        topology: How the ranks are arranged.
        stats: The cost of saving; kept up to date.
        patience_s: How long to look for the coordinator's draft, in seconds.
        moe_mesh: The mesh of expert parallelism, or None.

    Attributes:
        left_out: Reports what is not saved.
        known: The saves made so far.
        background: Completes them.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        group: Group,
        channel: Channel,
        directory: Directory,
        extractor: Extractor,
        topology: Topology,
        stats: Stats,
        patience_s: float,
        moe_mesh: DeviceMesh | None = None,
    ) -> None:
        self._config, self._group, self._directory = config, group, directory
        self._extractor, self._topology, self._stats = extractor, topology, stats
        self._patience_s = patience_s
        self._channel = channel
        self._contents = Contents(
            config,
            group,
            self._channel,
            topology.place.pp,
            keeps_ranges=keeps_ranges_apart(directory.root),
            moe_mesh=moe_mesh,
        )
        self._pool = BufferPool(pinned=torch.cuda.is_available())
        self._hooks = StepHooks(self._before_step)
        self._warm = threading.Event()
        self._warm.set()
        self.known = KnownSaves(group, channel, directory.root)
        self._weights = PublishedWeights(self._contents, channel)
        self._sampled = ""  # the last checkpoint, if its replicas were not compared in full
        self.left_out = LeftOut(config.write.unsaved, channel)
        self.background = Background(
            group.channel("save"), directory, self.known, self._weights, stats, is_async=config.write.is_async
        )

    def request(
        self, step: int, epoch: int, metrics: Mapping[str, Any] | None, is_final: bool, *, is_last: bool = False
    ) -> SaveRequest:
        """What a save with these arguments is to do; `is_last`: no other save may follow."""
        mode = self._config.write.consolidated
        consolidated = (
            mode is SaveConsolidatedMode.EVERY
            or (mode is SaveConsolidatedMode.FINAL and is_final)
            or self._config.write.is_peft  # an adapter is small, so every save writes it whole
        )
        request = SaveRequest(step, epoch, {} if metrics is None else metrics, consolidated, is_final)
        request.compares_fully = is_final or is_last
        request.adds_export = self.known.would_add_export(request)
        return request

    def wants(self, step: int, epoch: int) -> bool:
        """Whether a final save of this step would add anything to what is published."""
        request = self.request(step, epoch, None, is_final=True)
        return not self.known.has(request.name) or request.adds_export

    def begin(
        self, state: AppState, request: SaveRequest, deciding_metric: str, report: Callable[[], None]
    ) -> PendingSave:
        """Collective: capture and stage the state, and let the background write and publish it.

        Args:
            state: What to save.
            request: How to save it.
            deciding_metric: The metric that decides which checkpoint is best.
            report: Raises or logs the failure of the previous save; called on all ranks if it failed.

        Raises:
            CheckpointExistsError: The step is already published.
        """
        self.left_out.announce()
        captured, error = self._capture(state, request, deciding_metric)
        if self._contents.agree(captured, error, trouble=self.known.has_trouble):
            self.known.settle()
            report()
            request.adds_export = self.known.would_add_export(request)
        name = request.name
        if self.known.has(name) and not request.adds_export:
            raise CheckpointExistsError(f"{self._directory.root / name} is already published; each step is saved once")
        pending = PendingSave(request.step)
        self.left_out.check(() if captured is None else captured.omitted)
        full = request.compares_fully or not self._config.write.is_async
        if not request.adds_export:
            self._sampled = "" if full else request.name
        look, error = self._look(captured, error, full=full)
        drift = self._compare(look)
        from_shards = request.adds_export and self._weights.have_changed(name, request.step, captured)
        transaction: Transaction
        staged = Staged()
        try:
            if error is not None or captured is None:
                raise error or CheckpointError("the state could not be taken apart")
            if drift and self._config.write.raises_drift:
                raise CheckpointError(drift)
            content, sources = self._contents.make(
                captured,
                consolidated=request.consolidated,
                export_only=request.adds_export,
                from_shards=from_shards,
                made=SaveInfo(request.step, request.epoch, request.metrics, dict(self._config.hydra_texts)),
            )
            staged = self._stage(captured.optimizers, sources)
            pending.when_staged = staged.let_change
            transaction = self._transaction(request, content, staged, optimizer_classes(captured.optimizers))
        except Exception as failure:
            transaction = FailedSave(request.step, name, failure)
        if request.adds_export:
            self._stats.exports_added += 1
        else:
            self._stats.saves += 1
        self.known.begin(request, pending)  # only now: a save that never began would be waited for forever
        self.background.submit(pending, request, transaction, staged)
        return pending

    def spread_experts(self, moe_mesh: DeviceMesh) -> None:
        """Record the mesh of expert parallelism."""
        self._contents.comparer.expert_place = expert_place(moe_mesh)

    def begin_run(self, state: AppState) -> None:
        """Collective: record which parameters differ before the first step."""
        self._contents.comparer.begin(*plain_parameters(self._extractor, state))

    def recheck(self, state: AppState, step: int, epoch: int) -> None:
        """Collective: see `Checkpointer.recheck`; no save is under way.

        Raises:
            CheckpointError: Replicas differ, and `checkpoint.on_drift` is raise.
        """
        name, raises = self.request(step, epoch, None, is_final=True).name, self._config.write.raises_drift
        drift, is_mixed = self._find_drift(state, step, epoch)
        if is_mixed and raises:
            step_aside = partial(self._directory.withdraw, name)
            was_set_aside = self._channel.coordinator_step("setting a checkpoint aside", step_aside)
            what = "was set aside" if was_set_aside else "stays, because there is no other"
            drift += f". {name}, which holds values of both, {what}"
        if is_mixed:
            self.known.withdraw(name, is_made_again=not raises)
        if drift and raises:
            raise CheckpointError(drift)

    def _find_drift(self, state: AppState, step: int, epoch: int) -> tuple[str, bool]:
        """Collective: compare in full the replicas that the last save only sampled.

        Returns:
            The message about replicas that differ, empty if none do; and whether their weights are as saved.
        """
        request = self.request(step, epoch, None, is_final=True)
        if self._group.world_size == 1 or request.name != self._sampled or not self.known.has(request.name):
            return "", False
        self._sampled = ""
        captured, error = self._capture(state, request, metric.DEFAULT_KEY)
        self._channel.raise_together("taking the state apart", error)
        assert captured is not None  # raise_together has raised otherwise
        self._contents.agree(captured)
        # Before the comparison: once replicas are known to differ, other ranks would write them.
        saved_as = self.request(step, epoch, None, is_final=False)
        is_as_saved = self._weights.is_as_saved(request.name, captured, consolidated=saved_as.consolidated)
        look, error = self._look(captured, None, full=True)
        drift = self._compare(look)
        self._channel.raise_together("comparing replicas", error)
        return drift, bool(drift) and bool(self._channel.agree("comparing weights", is_as_saved, all))

    def _look(
        self, captured: Captured | None, error: Exception | None, *, full: bool
    ) -> tuple[Look | None, Exception | None]:
        """Digest what is compared; an error is returned, because the other ranks must be told."""
        if captured is None:
            return None, error
        try:
            return self._contents.look(captured, full=full), error
        except Exception as failure:
            return None, failure

    def _compare(self, look: Look | None) -> str:
        """Collective: check whether the ranks hold the same; the message about replicas that differ, or empty."""
        found = self._contents.compare(look)
        if found is None or not found.drift:
            return ""
        if self._group.rank == 0 and not self._config.write.raises_drift:
            log.warning(
                "%s. From now on the first of these ranks stores them whole, and the other ranks' values are not "
                "saved. Set checkpoint.on_drift=raise to make such a save fail",
                found.drift,
            )
        return found.drift

    def prepare(self, state: AppState) -> None:
        """Collective: agree on the layout, and let the background allocate the buffers of asynchronous saves."""
        request = self.request(0, 0, None, is_final=False)
        captured, error = self._capture(state, request, metric.DEFAULT_KEY)
        self._channel.raise_together("taking the state apart", error)
        assert captured is not None  # raise_together has raised otherwise
        self._contents.agree(captured)
        look, error = self._look(captured, None, full=True)
        self._compare(look)
        self._channel.raise_together("comparing replicas", error)
        self._channel.coordinator_step("looking at what exports need", lambda: self._contents.check(captured))
        if not self._config.write.is_async:
            return
        _, sources = self._contents.make(captured, consolidated=request.consolidated, export_only=False)
        nbytes = self._pool.layout(sources.tensors, sources.casts, sources.plan).nbytes
        self._warm.clear()
        self.background.afterwards(lambda: self._prewarm(nbytes))

    def _prewarm(self, nbytes: int) -> None:
        try:
            self._pool.prewarm(nbytes)
        finally:
            self._warm.set()

    def _capture(
        self, state: AppState, request: SaveRequest, deciding_metric: str
    ) -> tuple[Captured | None, Exception | None]:
        """Take the state apart; an error is returned, because the other ranks must be told."""
        try:
            request.check_metrics(deciding_metric)
            return self._extractor.capture(state), None
        except Exception as error:
            return None, error

    def _stage(self, optimizers: Sequence[Any], sources: Sources) -> Staged:
        """Copy what training may change before the next optimizer step; read the rest in place."""
        if not self._config.write.is_async:
            return Staged.borrowed(sources, self._pool)
        self._warm.wait()
        overlaps = self._hooks.hook(optimizers) and not self._config.write.wait_for_staging
        return Staged.copied(sources, self._pool, sources.deferred if overlaps else frozenset())

    def _transaction(
        self, request: SaveRequest, content: Content, staged: Staged, optimizers: list[str]
    ) -> Transaction:
        writer = DraftWriter(
            self._directory.files,
            self._group.rank,
            self._group.world_size,
            content,
            staged.snapshot,
            "export" if request.adds_export else "rank",
            self._patience_s,
            self._config.write.staging_dir,
        )
        fence = self._directory.fence
        if request.adds_export:
            return AddExport(writer, self._directory.root, request.step, request.name, fence)
        directory, topology = self._directory, self._topology.recorded()
        step, epoch, metrics = request.step, request.epoch, request.metrics
        launch = {"launch": self._config.launch} if self._config.launch is not None else {}
        unsaved = {"unsaved": list(content.omitted)} if content.omitted else {}
        full = request.compares_fully or not self._config.write.is_async
        replicas = {"replicas": "compared in full" if full else "sampled"} if self._group.world_size > 1 else {}
        details = {**directory.details, "optimizers": optimizers, **launch, **unsaved, **replicas}
        make_way = directory.make_way if self.known.takes_replaced(request.name) else None
        return Save(
            writer, directory.root, step, epoch, metrics, topology, fence, directory.point_to, details, make_way
        )

    def _before_step(self) -> None:
        if self.known.pending is not None:
            begun = time.monotonic()
            self.known.pending.wait_staged(self._config.write.timeout_s)
            self._stats.blocked_s += time.monotonic() - begun

    def close(self) -> None:
        """Finish what is under way and release threads, hooks, memory and connections."""
        self.background.close()
        self._hooks.remove()
        self._pool.clear()


def optimizer_classes(optimizers: Iterable[Any]) -> list[str]:
    """The optimizers' classes."""
    return [type(optimizer).__qualname__ for optimizer in optimizers]
