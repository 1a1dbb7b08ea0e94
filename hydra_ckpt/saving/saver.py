"""The saving half of the conductor: from a request to a save that ends by itself in the background."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hydra_ckpt import metrics as metric
from hydra_ckpt.config import SaveConsolidatedMode
from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.distributed.group import Group
from hydra_ckpt.errors import CheckpointError, CheckpointExistsError, SaveOutcomeUnknown
from hydra_ckpt.files import keeps_ranges_apart
from hydra_ckpt.hub.card import Made
from hydra_ckpt.report import Stats
from hydra_ckpt.resolved import ResolvedConfig
from hydra_ckpt.saving.beginning import plain_parameters
from hydra_ckpt.saving.comparing import Look, expert_place
from hydra_ckpt.saving.contents import Contents, Sources, model_sources
from hydra_ckpt.saving.exporting import AddExport
from hydra_ckpt.saving.known import KnownSaves
from hydra_ckpt.saving.left_out import LeftOut
from hydra_ckpt.saving.pending import PendingSave
from hydra_ckpt.saving.request import SaveRequest
from hydra_ckpt.saving.save import Content, DraftWriter, Save
from hydra_ckpt.saving.staged import Staged
from hydra_ckpt.saving.transaction import FailedSave, Transaction, perform
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.capture import Captured, Extractor
from hydra_ckpt.state.ranks import Topology
from hydra_ckpt.storage.digests import Digested
from hydra_ckpt.storage.pool import BufferPool
from hydra_ckpt.storage.staging import borrow
from hydra_ckpt.storage.write import digests_below
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.directory import Directory
from hydra_ckpt.worker import Worker

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)


class Saver:
    """Carries saves out, one at a time, and knows which this run has made.

    Args:
        config: The settings, resolved.
        group: The ranks.
        channel: To them, for the training thread.
        directory: Where checkpoints lie.
        extractor: Takes states apart.
        topology: How the ranks are arranged.
        stats: What saving has cost; kept up to date.
        patience_s: How long to look for the coordinator's draft, in seconds.
        moe_mesh: The mesh of expert parallelism, or None.

    Attributes:
        left_out: Says what is not saved.
        known: The saves made so far.
        longest_save_s: The longest time from a save's beginning to its end, in seconds.
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
        self._save_channel = group.channel("save")
        self._contents = Contents(
            config,
            group,
            self._channel,
            topology.place.pp,
            keeps_ranges=keeps_ranges_apart(directory.root),
            moe_mesh=moe_mesh,
        )
        self._pool = BufferPool(pinned=torch.cuda.is_available())
        self._worker = Worker("hydra_ckpt-save", self._save_channel.farewell)
        self._hooked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._hooks: list[Any] = []
        self._warm = threading.Event()
        self._warm.set()
        self.known = KnownSaves(group, channel, directory.root)
        self._weights: dict[str, frozenset[Digested]] = {}
        self._warned_of_strangers = False
        self.left_out = LeftOut(config.write.unsaved, channel)
        self.longest_save_s = 0.0

    def request(
        self, step: int, epoch: int, metrics: Mapping[str, Any] | None, is_final: bool, *, is_last: bool = False
    ) -> SaveRequest:
        """What a save with these arguments is to do; `is_last`: no other may follow it."""
        mode = self._config.write.consolidated
        consolidated = (
            mode is SaveConsolidatedMode.EVERY
            or (mode is SaveConsolidatedMode.FINAL and is_final)
            or self._config.write.is_peft  # an adapter is small; it is written whole at every save
        )
        request = SaveRequest(step, epoch, dict(metrics or {}), consolidated, is_final)
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
            request: As what.
            deciding_metric: The metric that decides which checkpoint is best.
            report: Raises or logs how the save before has failed; called where it has, on all ranks.

        Raises:
            CheckpointExistsError: The step is published already.
        """
        self.left_out.announce()
        captured, error = self._capture(state, request, deciding_metric)
        if self._contents.agree(state, captured, error, trouble=self.known.has_trouble):
            self.known.settle()
            report()
            request.adds_export = self.known.would_add_export(request)
        name = request.name
        if self.known.has(name) and not request.adds_export:
            raise CheckpointExistsError(f"{self._directory.root / name} is published already; a step is saved once")
        pending = PendingSave(request.step)
        self.left_out.check(() if captured is None else captured.omitted)
        look, error = self._look(captured, error, full=request.compares_fully or not self._config.write.is_async)
        drift = self._compare(state, look)
        from_shards = request.adds_export and self._has_changed(state, captured, request)
        transaction: Transaction
        staged = Staged()
        try:
            if error is not None or captured is None:
                raise error or CheckpointError("the state could not be taken apart")
            if drift and self._config.write.raises_drift:
                raise CheckpointError(drift)
            content, sources = self._contents.make(
                state,
                captured,
                consolidated=request.consolidated,
                export_only=request.adds_export,
                from_shards=from_shards,
                made=Made(request.step, request.epoch, request.metrics, dict(self._config.hydra_texts)),
            )
            staged = self._stage(state, sources)
            pending.when_staged = staged.let_change
            transaction = self._transaction(request, content, staged, kinds(state))
        except Exception as failure:
            transaction = FailedSave(request.step, name, failure)
        self._stats.saves += 1
        self.known.begin(request, pending)  # only now: one that never began would be waited for for ever
        try:
            self._worker.submit(lambda: self._carry_out(pending, request, transaction, staged))
        except CheckpointError as failure:
            staged.release()
            self.known.forget(request)
            pending.fail(failure)  # nobody else would, and close() waits for it
            pending.seen()
            raise
        return pending

    def spread_experts(self, moe_mesh: DeviceMesh) -> None:
        """Take note of the mesh of expert parallelism."""
        self._contents.comparer.expert_place = expert_place(moe_mesh)

    def begin_run(self, state: AppState) -> None:
        """Collective: take note of which parameters are unequal before the first step."""
        self._contents.comparer.begin(*plain_parameters(self._extractor, state))

    def _look(
        self, captured: Captured | None, error: Exception | None, *, full: bool
    ) -> tuple[Look | None, Exception | None]:
        """Digest what is compared; an error is handed on, because the other ranks have to hear of it."""
        if captured is None:
            return None, error
        try:
            return self._contents.look(captured, full=full), error
        except Exception as failure:
            return None, failure

    def _compare(self, state: AppState, look: Look | None) -> str:
        """Collective: see whether the ranks hold the same; what to say of replicas that do not, else nothing."""
        found = self._contents.compare(state, look)
        if found is None or not found.drift:
            return ""
        if self._group.rank == 0 and not self._config.write.raises_drift:
            log.warning(
                "%s. From now on the first of these ranks stores them whole; what the others hold is not saved. "
                "checkpoint.on_drift=raise makes such a save fail",
                found.drift,
            )
        return found.drift

    def _has_changed(self, state: AppState, captured: Captured | None, request: SaveRequest) -> bool:
        """Collective: whether the weights differ from those published under the step, or it is not known.

        Averages swapped in, or batch statistics measured anew, belong to no step; an export of them beside that
        step's shards would be another model under the same name.
        """
        saved = self._weights.get(request.name)
        live = None if captured is None or saved is None else self._weights_now(state, captured)
        answers = [live is None, live is not None and live != saved]
        unknown, changed = self._channel.agree("comparing weights", answers, _any)
        if changed and self._group.rank == 0:
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
        """Collective: agree on the layout, and let the background allocate the buffers of asynchronous saves."""
        request = self.request(0, 0, None, is_final=False)
        captured, error = self._capture(state, request, metric.DEFAULT_KEY)
        self._channel.raise_together("taking the state apart", error)
        assert captured is not None  # raise_together has raised otherwise
        self._contents.agree(state, captured)
        look, error = self._look(captured, None, full=True)
        self._compare(state, look)
        self._channel.raise_together("comparing replicas", error)
        self._channel.coordinator_step("looking at what exports need", lambda: self._contents.check(state))
        if not self._config.write.is_async:
            return
        _, sources = self._contents.make(state, captured, consolidated=request.consolidated, export_only=False)
        nbytes = self._pool.layout(sources.tensors, sources.casts, sources.plan).nbytes
        self._warm.clear()
        self._worker.submit(lambda: self._prewarm(nbytes))

    def _prewarm(self, nbytes: int) -> None:
        try:
            self._pool.prewarm(nbytes)
        finally:
            self._warm.set()

    def _capture(
        self, state: AppState, request: SaveRequest, deciding_metric: str
    ) -> tuple[Captured | None, Exception | None]:
        """Take the state apart; an error is handed on, because the other ranks have to hear of it."""
        try:
            request.check_metrics(deciding_metric)
            return self._extractor.capture(state), None
        except Exception as error:
            return None, error

    def _stage(self, state: AppState, sources: Sources) -> Staged:
        """Copy what training may change before the next optimizer step; look at the rest where it lies."""
        if not self._config.write.is_async:
            return Staged.borrowed(sources, self._pool)
        self._warm.wait()
        overlaps = self._hook(state) and not self._config.write.wait_for_staging
        return Staged.copied(sources, self._pool, sources.late if overlaps else frozenset())

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
        return Save(writer, self._directory.root, step, epoch, metrics, topology, fence, directory.point_to, details)

    def _carry_out(self, pending: PendingSave, request: SaveRequest, transaction: Transaction, staged: Staged) -> None:
        """In the background: finish staging, write, publish, prune."""
        begun = time.monotonic()
        try:
            staged.finish()
            pending.staged()
            staged.watch()
        except Exception as failure:
            transaction = FailedSave(request.step, request.name, failure)  # the other ranks have to hear of it
        try:
            perform(transaction, self._save_channel)
        except Exception as error:
            self._tell(request, error)
            staged.release()
            pending.fail(error)
            return
        staged.release()
        if isinstance(transaction, Save | AddExport):
            self._stats.written_bytes += transaction.writer.content.plan.nbytes
        if isinstance(transaction, Save) and not request.consolidated:
            self._weights = {request.name: transaction.writer.weights}
        self.longest_save_s = max(self.longest_save_s, time.monotonic() - begun)
        pending.finish(Checkpoint(self._directory.root / request.name, request.step, request.epoch))
        if self._group.rank == 0:
            self._prune()

    def _tell(self, request: SaveRequest, error: Exception) -> None:
        """In the background: take note of a save that has not ended well."""
        unknown = isinstance(error, SaveOutcomeUnknown)
        if self._config.write.is_async:
            # Raised at the next hook; said here as well, because a program may end before there is one.
            how = "may have failed; rank 0 knows, and cannot be reached" if unknown else "has failed"
            log.warning("the save of step %d %s (in the background)", request.step, how)
        if not unknown:
            self.known.forget(request)

    def _prune(self) -> None:
        try:
            self._directory.prune()
        except (OSError, CheckpointError) as error:
            log.warning("old checkpoints could not be pruned: %s", error)

    def _hook(self, state: AppState) -> bool:
        """Let every optimizer's step wait for the copies it would spoil; whether all of them will."""
        for optimizer in state.optimizers:
            if optimizer not in self._hooked and _takes_hooks(optimizer):
                self._hooks.append(optimizer.register_step_pre_hook(_untraced(self._before_step)))
                self._hooked.add(optimizer)
        strangers = [type(optimizer).__qualname__ for optimizer in state.optimizers if optimizer not in self._hooked]
        if strangers and not self._warned_of_strangers:
            self._warned_of_strangers = True
            log.warning(
                "%s takes no hooks (it was made without torch.optim.Optimizer.__init__), so that save() copies "
                "everything before it returns",
                ", ".join(strangers),
            )
        return not strangers

    def _before_step(self, *_: Any) -> None:
        if self.known.pending is not None:
            begun = time.monotonic()
            self.known.pending.wait_staged(self._config.write.timeout_s)
            self._stats.blocked_s += time.monotonic() - begun

    def afterwards(self, step: Callable[[], None]) -> None:
        """Do something in the background, behind the saves begun so far."""
        self._worker.submit(step)

    def drain(self) -> None:
        """Return when everything begun in the background is done."""
        self._worker.drain()

    def close(self) -> None:
        """Finish what is under way and let go of threads, hooks, memory and connections."""
        self._worker.close()
        for hook in self._hooks:
            hook.remove()
        self._pool.clear()
        self._save_channel.close()


def _takes_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether step() will call hooks: PyTorch wraps it, and makes the place for them, in Optimizer.__init__."""
    return "_optimizer_step_pre_hooks" in vars(optimizer) and bool(getattr(type(optimizer).step, "hooked", False))


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook as torch.compile calls it: as it is. Traced, it would break a compiled step into many graphs.

    torch.compiler imports torch._dynamo, which takes seconds; to make an optimizer has done so already.
    """
    untraced: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return untraced


def kinds(state: AppState) -> list[str]:
    """The optimizers' classes."""
    return [type(optimizer).__qualname__ for optimizer in state.optimizers]


def _any(rows: Sequence[Sequence[bool]]) -> list[bool]:
    """Coordinator only: for each question whether any rank says yes."""
    return [any(answers) for answers in zip(*rows, strict=True)]
