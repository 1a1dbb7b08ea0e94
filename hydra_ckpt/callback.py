"""Decides when a run saves: connects schedules, signals and metrics to a Checkpointer."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hydra_ckpt.checkpointer import Checkpointer
from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, SaveFailedError, SaveOutcomeUnknown
from hydra_ckpt.state.ranks import Ranks, warn_of_unused_mesh
from hydra_ckpt.sweeps.active import ActiveJob, active_job
from hydra_ckpt.triggers.best import BestMetric
from hydra_ckpt.triggers.progress import Progress
from hydra_ckpt.triggers.requests import RequestFiles
from hydra_ckpt.triggers.schedule import Schedule, checked_flag
from hydra_ckpt.triggers.signals import SignalWatch
from hydra_ckpt.triggers.watch import Verdict, Watch
from hydra_ckpt.values import exit_code

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from hydra_ckpt.config import CheckpointingConfig
    from hydra_ckpt.report import LoadReport
    from hydra_ckpt.saving.pending import PendingSave
    from hydra_ckpt.state.app_state import AppState
    from hydra_ckpt.store.catalog import Checkpoint

log = logging.getLogger(__name__)


class CheckpointCallback:
    """Hooks checkpointing into any training loop. Also a context manager.

    Collective: every rank calls every hook, with the same steps and epochs. Cadences and metrics are rank 0's; any rank
    may receive a signal. Without any cadence it saves every 30 minutes and at the end.

    Args:
        config: The settings.
        every_n_steps: Save when the step is a multiple of this.
        every_n_seconds: Save when this much time has passed since the last save, by rank 0's clock.
        every_n_epochs: Save at the end of every n-th epoch.
        at_steps: Save at these steps.
        on_improvement: Save when validation improves the deciding metric.
        save_on_exception: Save when the loop raises, if every rank gets there in time.
        max_run_time_s: Save and stop before this much time has passed since training began; this reserves the time of
            the longest save so far, two steps and five seconds.
        signals: Signals that save and stop: a name, a number, or a list of them. One on any rank is enough; all ranks
            save after the next step. Earlier handlers are also called.
        requeue_exit_code: The callback's `exit_code` after a signal or `max_run_time_s` has stopped the run, from 1 to
            255; see [clusters](clusters.md#exit-codes).
        checkpointer: A Checkpointer to use instead of one built from `config`.
    """

    def __init__(
        self,
        config: CheckpointingConfig,
        *,
        every_n_steps: int | None = None,
        every_n_seconds: float | None = None,
        every_n_epochs: int | None = None,
        at_steps: Iterable[int] | None = None,
        on_improvement: bool = False,
        save_on_exception: bool = False,
        max_run_time_s: float | None = None,
        signals: Iterable[str | int] | str | int | None = ("SIGTERM",),
        requeue_exit_code: int | None = None,
        checkpointer: Checkpointer | None = None,
    ) -> None:
        self.config = config
        self.checkpointer = checkpointer
        self._schedule = Schedule.of(
            every_n_steps=every_n_steps,
            every_n_seconds=every_n_seconds,
            every_n_epochs=every_n_epochs,
            at_steps=at_steps,
            on_improvement=on_improvement,
            max_run_time_s=max_run_time_s,
        )
        self._save_on_exception = checked_flag("save_on_exception", save_on_exception)
        self._watch = Watch(self._schedule, SignalWatch(signals))
        self._requeue_exit_code = exit_code(requeue_exit_code)
        self._state: AppState | None = None
        self._progress = Progress(checks=config.enabled)
        self._metrics: dict[str, float] = {}
        self._best = BestMetric(config.best_metric_key, config.best_metric_mode, enabled=config.enabled)
        self._agreed_best: float | None = None
        self._overtaken = False  # by a validation: the best metric sent at the previous step is out of date
        self._should_stop = self._yields = False
        self._prepared = False

    # -- for the loop to read ------------------------------------------------------------------------------------

    @property
    def should_stop(self) -> bool:
        """Whether the loop should end now: a signal or a STOP file came, or time is up. Equal on all ranks."""
        return self._should_stop

    @property
    def exit_code(self) -> int:
        """The program's exit code: `requeue_exit_code` if the run stopped to be continued, otherwise 0."""
        return (self._requeue_exit_code or 0) if self._yields else 0

    @property
    def best_metric(self) -> float | None:
        """The deciding metric's best value so far, of those passed on rank 0. Equal on all ranks.

        On several ranks, a step's metrics count from the next step on; if steps take less than 50 ms, they may count
        50 ms later.
        """
        return self._agreed_best

    @property
    def best(self) -> Checkpoint | None:
        """The checkpoint that BEST points to."""
        return None if not self._live else self._live.pointed("BEST")

    @property
    def latest(self) -> Checkpoint | None:
        """The checkpoint that LATEST points to."""
        return None if not self._live else self._live.pointed("LATEST")

    @property
    def _live(self) -> Checkpointer | None:
        """The Checkpointer; None if checkpointing is off or has not begun."""
        return self.checkpointer if self.checkpointer is not None and self.checkpointer.enabled else None

    # -- hooks ---------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, state: AppState, *, mesh: DeviceMesh | None = None, moe_mesh: DeviceMesh | None = None
    ) -> LoadReport | None:
        """Collective: begin the run and resume as configured.

        Args:
            state: The live objects; the callback keeps a reference.
            mesh: The training's device mesh; dimensions named tp and pp are tensor and pipeline parallel, all others
                data parallel. If that is wrong, build the Checkpointer with the right ranks and pass it.
            moe_mesh: The mesh of expert parallelism. Tensors of one name that differ between ranks with different
                coordinates along its dimensions named `ep` or with `expert` in their names (along all dimensions if
                there are none) are different experts, and stored once per rank.

        Returns:
            What was loaded, or None for a fresh start.
        """
        self._state = state
        if self.checkpointer is None:
            if mesh is None:
                warn_of_unused_mesh(module for modules in state.models.values() for module in modules)
            ranks = Ranks.of(mesh)
            self.checkpointer = self.config.build(ranks.dp, ranks.tp, ranks.pp, moe_mesh)
        elif moe_mesh is not None:
            self.checkpointer.spread_experts(moe_mesh)
        report = self.checkpointer.start(state)
        if report is not None:
            self._progress.resume(report)
        self._best.value, self._best.key = self.checkpointer.best_value, self.checkpointer.deciding_metric
        self._agreed_best = self._best.value
        job = active_job() or ActiveJob()
        job.trains = True
        if self._live is not None:
            job.checkpoint_dir = self._live.root
            self._schedule = self._schedule.agreed(self._live.on_rank_0)
            files = RequestFiles.of(self._live.root)
            self._watch.begin(self._live.group, self._schedule, files, self._progress.step, self._best)
        return report

    def on_step_end(self, step: int, epoch: int = 0, metrics: Mapping[str, Any] | None = None) -> PendingSave | None:
        """Collective: call after an optimizer step. Saves if a save is due.

        Args:
            step: Number of completed optimizer steps. A repeated step is ignored.
            epoch: The current epoch.
            metrics: Metrics of this step.

        Returns:
            The save, if one began.

        Raises:
            CheckpointConfigError: The step is smaller than an earlier one.
            SaveFailedError: An earlier save failed; on all ranks at the same step.
        """
        self._has_begun("on_step_end")
        step, epoch = self._progress.check(step, epoch)
        if step == self._progress.step:
            return None
        self._warn_of_absent_metric()
        self._progress.advance(step, epoch)
        # Only rank 0's metrics count.
        self._metrics = self._best.note(metrics) if self._live is None or self._live.group.rank == 0 else {}
        if self._live is None:
            self._agreed_best = self._best.known()
            return None
        verdict = self._ask(self._live) or Verdict()
        if verdict.failed:
            self._raise_failure(self._live)
        if verdict.refused:
            self._settle_best(self._live)
        if self._should_stop or verdict.due or self._schedule.is_due_at(step):
            return self._save()
        if not self._prepared and self._state is not None:
            # Only after the first step does all optimizer state exist.
            self._live.prepare(self._state)
        self._prepared = True
        return None

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, Any] | None = None) -> PendingSave | None:
        """Collective: call after an epoch. Saves if a save is due.

        Args:
            epoch: The epoch that ended; a run resumed from this save continues in the next one.
            metrics: Metrics of the last step.
        """
        self._has_begun("on_epoch_end")
        self._progress.end_epoch(epoch)
        saved = self.on_validation_end(metrics) if metrics else None
        if saved is not None:
            return saved
        if self._live is not None and self._schedule.is_due_after_epoch(epoch) and self._has_to_save(self._live):
            return self._save()
        return None

    def on_validation_end(self, metrics: Mapping[str, Any]) -> PendingSave | None:
        """Collective: call with metrics of the last step. If that step is already saved, they are added to it.

        Returns:
            The save, if the metrics improved and `on_improvement` is set.

        Raises:
            CheckpointConfigError: It is not clear which metric decides.
        """
        self._has_begun("on_validation_end")
        live = self._live
        if live is None:
            self._agreed_best = self._best.validate(metrics)["best"]
            return None
        found = live.on_rank_0(
            "metrics of a validation",
            lambda: {**self._best.validate(metrics), "lost": live.has_lost(self._progress.step)},
        )
        self._progress.forget_if(lambda _: found["lost"])
        self._metrics.update(found["values"])
        self._best.key, self._agreed_best = found["key"], found["best"]
        self._overtaken = live.group.world_size > 1
        live.decide_by(self._best.key)
        live.note_best(self._best.value)
        if self._progress.has_saved_step:
            live.add_metrics(self._progress.step, self._progress.saved_epoch, found["values"])
        elif self._schedule.on_improvement and found["improved"]:
            return self._save()
        return None

    def on_train_end(self) -> None:
        """Collective: call when training is complete. Saves the last step, and its export if configured, and waits.

        After `should_stop` the run is not complete: this only waits, and saves nothing.
        """
        if self._live is not None and self._state is not None:
            self._end_training(self._live, self._state)
        (active_job() or ActiveJob()).trains = False

    def on_exception(self, error: BaseException) -> None:
        """Call when the loop has raised. Waits for the save under way; starts one only with `save_on_exception`."""
        if self._live is None:
            return
        if self._save_on_exception and not self._progress.is_saved and isinstance(error, Exception):
            try:
                self._save()
            except CheckpointError as failure:
                log.error("saving after %s failed: %s", type(error).__name__, failure)
        self._live.wait()

    def close(self) -> None:
        """Finish what is under way and release everything. Idempotent.

        A signal that came after the last step, and so stopped nothing, takes its usual effect when this is done.
        """
        self._watch.end()
        self._warn_of_absent_metric()
        # An error being raised matters more than the signal, which may be a launcher's reaction to it.
        obeyed = self._should_stop or sys.exc_info()[0] is not None
        requeue = None
        try:
            if self.checkpointer is not None:
                self.checkpointer.close()
            requeue = self._watch.requeue(stopped=self._yields) if sys.exc_info()[0] is None else None
            obeyed = obeyed or requeue is not None
        except BaseException:
            obeyed = True
            raise
        finally:
            self._watch.let_signals_through(obeyed=obeyed)
        job = active_job()
        if requeue is not None and job is not None:
            job.requeue = requeue  # called if the job was stopped; otherwise the job has a result to return
        elif requeue is not None:
            requeue()

    def __enter__(self) -> CheckpointCallback:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                self.on_exception(error)
        finally:
            try:
                self.close()
            except (SaveFailedError, SaveOutcomeUnknown) as failure:
                if error is None:
                    raise
                log.error("%s", failure)

    # -- parts of hooks ------------------------------------------------------------------------------------------

    def _has_begun(self, hook: str) -> None:
        if self.config.enabled and self._state is None:
            raise CheckpointConfigError(
                f"{hook}() before on_train_begin(): call on_train_begin(state) first, or nothing would be saved"
            )
        if self._live is not None:
            self._live.refuse_closed(f"{hook}()")

    def _ask(self, live: Checkpointer) -> Verdict | None:
        """Collective: get what all ranks do at this step; None if nothing was said at the previous one."""
        verdict = self._watch.ask(self._progress.step, self._best, failed=live.has_trouble, save_s=live.longest_save_s)
        if verdict is None:
            return None
        if not self._overtaken:
            self._agreed_best = verdict.best
        self._overtaken = False
        self._yields = self._yields or verdict.yields
        self._should_stop = self._should_stop or verdict.yields or verdict.stop
        if self._should_stop:
            job = active_job() or ActiveJob()
            job.stopped = True
            job.exit_code = self.exit_code if self._yields else None
            job.reason = self._watch.reason or ("another rank was asked to" if self._yields else "by a STOP file")
        return verdict

    def _settle_best(self, live: Checkpointer) -> None:
        """Collective: get rank 0's best metric, or raise its error about the metrics."""
        self._agreed_best = live.on_rank_0("metrics of a step", self._best.known)

    def _end_training(self, live: Checkpointer, state: AppState) -> None:
        """Collective: save the last step unless it is saved, and wait."""
        live.refuse_closed("on_train_end()")
        self._settle_best(live)
        live.meet()
        progress = self._progress
        progress.forget_if(live.has_lost)
        if not self._should_stop and progress.step > 0:
            epoch = progress.saved_epoch if progress.is_saved else progress.next_epoch(state.dataloader)
            live.note_best(self._best.value)
            live.recheck(state, progress.step, epoch)
            if live.wants(progress.step, epoch):
                live.save(state, step=progress.step, epoch=epoch, metrics=self._metrics, is_final=True)
            progress.save(epoch)
        self._warn_of_absent_metric()
        live.drain()
        live.meet()
        live.report_failure()

    def _warn_of_absent_metric(self) -> None:
        """Rank 0: warn if the last saved step, which gets no more metrics, lacks the deciding one."""
        if self._live is not None and self._live.group.rank == 0 and self._progress.has_saved_step:
            self._best.warn_if_absent()

    def _raise_failure(self, live: Checkpointer) -> None:
        """Collective: settle the last save, and raise or report its error."""
        live.settle()
        self._progress.forget_if(live.has_lost)
        live.report_failure()

    def _has_to_save(self, live: Checkpointer) -> bool:
        """Collective: whether the last step is neither saved nor being saved; rank 0 decides."""
        step = self._progress.step
        if self._progress.is_saved and not self.config.is_async:
            has_lost = live.on_rank_0("looking at the last save", lambda: live.has_lost(step))
            self._progress.forget_if(lambda _: has_lost)
        return not self._progress.is_saved

    def _save(self) -> PendingSave | None:
        if self._live is None or self._state is None or self._progress.is_saved:
            return None
        epoch = self._progress.next_epoch(self._state.dataloader)
        self._live.note_best(self._best.value)
        pending = self._live.save(
            self._state,
            step=self._progress.step,
            epoch=epoch,
            metrics=self._metrics,
            skippable=not self._should_stop,
        )
        if not pending.skipped:
            self._progress.save(epoch)
        self._schedule.saved(time.monotonic())
        return pending
