"""When a run saves: schedules, signals and metrics in front of a Checkpointer."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from hydra_ckpt import metrics as metric
from hydra_ckpt.checkpointer import Checkpointer
from hydra_ckpt.distributed import StepVote
from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, SaveFailedError
from hydra_ckpt.state.ranks import Ranks
from hydra_ckpt.triggers.schedule import Schedule
from hydra_ckpt.triggers.signals import SignalWatch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from hydra_ckpt.config import CheckpointingConfig
    from hydra_ckpt.report import LoadReport
    from hydra_ckpt.saving.pending import PendingSave
    from hydra_ckpt.state.app_state import AppState
    from hydra_ckpt.store.catalog import Checkpoint

log = logging.getLogger(__name__)


class _Flag(IntEnum):
    """What ranks tell each other at every step."""

    STOP = 0
    DUE = 1
    FAILED = 2


class CheckpointCallback:
    """Hooks checkpointing into any training loop. Also a context manager.

    Collective: every rank calls every hook, with the same steps and epochs. Without any cadence it saves every 30
    minutes and at the end.

    Args:
        config: The settings.
        every_n_steps: Save when the step is a multiple of this.
        every_n_seconds: Save when this much time has passed since the last save, by rank 0's clock.
        every_n_epochs: Save at the end of every n-th epoch.
        at_steps: Save at these steps.
        on_improvement: Save when validation improves the metric that decides.
        save_on_exception: Save when the loop raises, if every rank gets there in time.
        max_run_time_s: Save and stop before this much time has passed since training began.
        signals: Names or numbers of signals that save and stop the run.
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
        if not isinstance(save_on_exception, bool):  # a text would count as true
            raise CheckpointConfigError(
                f"callbacks.checkpoint.save_on_exception={save_on_exception!r}: expected true or false"
            )
        self._save_on_exception = save_on_exception
        self._signals = SignalWatch(signals)
        self._state: AppState | None = None
        self._vote: StepVote | None = None
        self._step = self._epoch = 0
        self._saved_step = self._saved_epoch = 0
        self._metrics: dict[str, float] = {}
        self._validated: dict[str, float] = {}
        self._key = config.best_metric_key
        self._best: float | None = None
        self._should_stop = False
        self._prepared = False

    # -- what the loop may ask -----------------------------------------------------------------------------------

    @property
    def should_stop(self) -> bool:
        """Whether the loop should end now: a signal came, or time is up. Equal on all ranks."""
        return self._should_stop

    @property
    def best_metric(self) -> float | None:
        """The best value so far of the metric that decides."""
        return self._best

    @property
    def best(self) -> Checkpoint | None:
        """The checkpoint BEST leads to."""
        return None if not self._live else self._live.pointed("BEST")

    @property
    def latest(self) -> Checkpoint | None:
        """The checkpoint LATEST leads to."""
        return None if not self._live else self._live.pointed("LATEST")

    @property
    def _live(self) -> Checkpointer | None:
        """The Checkpointer, unless checkpointing is off or has not begun."""
        return self.checkpointer if self.checkpointer is not None and self.checkpointer.enabled else None

    # -- hooks ---------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, state: AppState, *, mesh: DeviceMesh | None = None, moe_mesh: DeviceMesh | None = None
    ) -> LoadReport | None:
        """Collective: begin the run and resume as configured.

        Args:
            state: The live objects; the callback keeps them.
            mesh: The training's device mesh; ranks are taken from its dimensions named dp*, tp and pp.
            moe_mesh: The mesh of expert parallelism.

        Returns:
            What was loaded, or None for a fresh start.
        """
        self._state = state
        if self.checkpointer is None:
            ranks = Ranks.of(mesh)
            self.checkpointer = self.config.build(ranks.dp, ranks.tp, ranks.pp, moe_mesh)
        report = self.checkpointer.start(state)
        if report is not None:
            self._step, self._epoch = report.step, report.epoch
            self._saved_step, self._saved_epoch = report.step, report.epoch
        self._best, self._key = self.checkpointer.best_value, self.checkpointer.deciding_metric
        if self._live is not None:
            self._vote = StepVote(self._live.group, len(_Flag))
            self._signals.install()
        self._schedule.begin(time.monotonic())
        return report

    def on_step_end(self, step: int, epoch: int = 0, metrics: Mapping[str, Any] | None = None) -> PendingSave | None:
        """Collective: an optimizer step is done. Saves if one is due.

        Args:
            step: Number of completed optimizer steps. A repeated one is ignored.
            epoch: The epoch it was done in.
            metrics: Metrics of this step.

        Returns:
            The save, if one began.

        Raises:
            CheckpointConfigError: The step is smaller than one before.
            SaveFailedError: An earlier save failed; on all ranks at the same step.
        """
        if step < self._step and self.config.enabled:
            raise CheckpointConfigError(
                f"on_step_end(step={step}) after step {self._step}: pass the number of completed optimizer steps, "
                "beginning behind the step that on_train_begin returned"
            )
        if step == self._step or self._vote is None or self._live is None:
            self._step = step
            return None
        self._step, self._epoch = step, epoch
        self._metrics, self._validated = metric.as_floats(metrics), {}
        self._consider(self._metrics)
        raised = self._vote.collect()
        self._should_stop = self._should_stop or raised[_Flag.STOP]
        due = self._should_stop or raised[_Flag.DUE] or self._schedule.is_due_at(step)
        if due:
            self._schedule.saved(time.monotonic())  # before the vote, which would call for the same save once more
        self._vote.post(self._flags(self._live))
        if raised[_Flag.FAILED]:
            self._raise_failure(self._live)
        if due:
            return self._save()
        if not self._prepared and self._state is not None:
            # Only now does all of the optimizer's state exist.
            self._live.prepare(self._state)
        self._prepared = True
        return None

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, Any] | None = None) -> PendingSave | None:
        """Collective: an epoch is done. Saves if one is due.

        Args:
            epoch: The epoch that ended; a run resumed from this save goes on in the next.
            metrics: Metrics of the last step.
        """
        if metrics:
            self.on_validation_end(metrics)
        self._epoch = epoch + 1
        if self._live is not None and self._schedule.is_due_after_epoch(epoch) and self._saved_step < self._step:
            return self._save()
        return None

    def on_validation_end(self, metrics: Mapping[str, Any]) -> PendingSave | None:
        """Collective: metrics of the last step have arrived. If it is saved already they are added to it.

        Returns:
            The save, if the metrics improved and `on_improvement` is set.

        Raises:
            CheckpointConfigError: It cannot be told which metric decides.
        """
        values = metric.as_floats(metrics)
        self._metrics.update(values)
        self._validated.update(values)
        improved = self._consider(self._validated, decisive=self.config.enabled)
        if self._live is None:
            return None
        self._live.decide_by(self._key)
        if self._saved_step == self._step and self._step > 0:
            self._live.add_metrics(self._step, self._saved_epoch, values)
        elif self._schedule.on_improvement and self._live.from_rank_0("improvement", improved):
            return self._save()
        return None

    def on_train_end(self) -> None:
        """Collective: training is complete. Saves the last step, and its export if one is wanted; waits for both.

        After `should_stop` the run is not complete: nothing is saved, only waited for.
        """
        if self._live is None or self._state is None:
            return
        if not self._should_stop and self._step > 0:
            epoch = self._saved_epoch if self._saved_step == self._step else self._epoch
            self._live.wait()
            if self._live.wants(self._step, epoch):
                self._live.save(self._state, step=self._step, epoch=epoch, metrics=self._metrics, is_final=True)
        self._live.drain()
        self._live.raise_failure()

    def on_exception(self, error: BaseException) -> None:
        """The loop has raised. Waits for the save under way; saves anew only with `save_on_exception`."""
        if self._live is None:
            return
        if self._save_on_exception and self._saved_step < self._step and isinstance(error, Exception):
            try:
                self._save()
            except CheckpointError as failure:
                log.error("saving after %s failed: %s", type(error).__name__, failure)
        self._live.wait()

    def close(self) -> None:
        """Finish what is under way and let go of everything. Idempotent."""
        self._signals.remove()
        if self._vote is not None and self._live is not None:
            self._vote = None
        if self.checkpointer is not None:
            self.checkpointer.close()

    def __enter__(self) -> CheckpointCallback:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                self.on_exception(error)
        finally:
            try:
                self.close()
            except SaveFailedError as failure:
                if error is None:
                    raise
                log.error("%s", failure)

    # -- parts of hooks ------------------------------------------------------------------------------------------

    def _flags(self, live: Checkpointer) -> list[bool]:
        now = time.monotonic()
        coordinator = live.group.rank == 0
        stop = self._signals.received or (coordinator and self._schedule.is_time_up(now, live.longest_save_s))
        due = coordinator and self._schedule.is_due_by_time(now)
        return [stop, due, live.has_failed]

    def _raise_failure(self, live: Checkpointer) -> None:
        live.wait()
        live.report_failure()

    def _save(self) -> PendingSave | None:
        if self._live is None or self._state is None or self._saved_step == self._step:
            return None
        pending = self._live.save(
            self._state,
            step=self._step,
            epoch=self._epoch,
            metrics=self._metrics,
            skippable=not self._should_stop,
        )
        if not pending.skipped:
            self._saved_step, self._saved_epoch = self._step, self._epoch
        self._schedule.saved(time.monotonic())
        return pending

    def _consider(self, values: Mapping[str, float], *, decisive: bool = False) -> bool:
        """Whether these metrics improve on the best.

        Args:
            values: What was measured.
            decisive: Whether one of them must be the metric that decides. Where none is configured, the one that
                validation gives decides from then on, whatever a step's own metrics were.
        """
        key = self._key
        if key not in values:
            settled = key != metric.DEFAULT_KEY or (not self.config.enabled and len(values) > 1)
            learned = settled and self.config.best_metric_key == metric.DEFAULT_KEY
            if settled and (learned or not decisive):
                return False
            found = metric.deciding_key(values, self._key, required=decisive)
            if found is None:
                return False
            key = found
        if decisive and key != self._key:
            self._key, self._best = key, None
        if not metric.is_better(values[key], self._best, self.config.best_metric_mode):
            return False
        self._best = values[key]
        return True
