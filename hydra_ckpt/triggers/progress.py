"""How far a run has come, and what of it is saved; equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.saving.request import non_negative_int
from hydra_ckpt.state.dataloader import ResumableLoader

if TYPE_CHECKING:
    from hydra_ckpt.report import LoadReport


class Progress:
    """The last completed step and epoch of a run, and the last saved ones.

    Args:
        checks: Whether to check the numbers; without checkpointing, they may be anything.

    Attributes:
        step: Number of completed optimizer steps.
        epoch: The current epoch; after the end of an epoch, the next one.
        saved_epoch: The epoch of the last save.
    """

    def __init__(self, *, checks: bool) -> None:
        self._checks = checks
        self.step = self.epoch = 0
        self.saved_epoch = 0
        self._saved_step = 0
        self._epoch_has_ended = False

    def resume(self, report: LoadReport) -> None:
        """Continue where a checkpoint was saved."""
        self.step = self._saved_step = report.step
        self.epoch = self.saved_epoch = report.epoch

    def check(self, step: int, epoch: int) -> tuple[int, int]:
        """The numbers of a completed step, which may be the last one again.

        Raises:
            CheckpointConfigError: The step is smaller than an earlier one, or a number is not whole.
        """
        if not self._checks:
            return step, epoch
        step, epoch = non_negative_int("step", step), non_negative_int("epoch", epoch)
        if step < self.step:
            raise CheckpointConfigError(
                f"on_step_end(step={step}) after step {self.step}: pass the number of completed optimizer steps, "
                "continuing after the step that on_train_begin returned"
            )
        return step, epoch

    def advance(self, step: int, epoch: int) -> None:
        """Complete a step."""
        self.step, self.epoch, self._epoch_has_ended = step, epoch, False

    def end_epoch(self, epoch: int) -> None:
        """Complete an epoch."""
        self.epoch = (non_negative_int("epoch", epoch) if self._checks else epoch) + 1
        self._epoch_has_ended = True

    def next_epoch(self, dataloader: Any) -> int:
        """The epoch in which a run resumed here continues: the next one if the data has been used up."""
        is_used_up = isinstance(dataloader, ResumableLoader) and dataloader.is_between_epochs
        return self.epoch + 1 if is_used_up and not self._epoch_has_ended else self.epoch

    @property
    def is_saved(self) -> bool:
        """Whether the last step is saved or being saved, or there is none yet."""
        return self._saved_step == self.step

    @property
    def has_saved_step(self) -> bool:
        """Whether there is a last step, and it is saved or being saved."""
        return 0 < self.step == self._saved_step

    def save(self, epoch: int) -> None:
        """Record that the last step is being saved."""
        self._saved_step, self.saved_epoch = self.step, epoch

    def forget_if(self, has_lost: Callable[[int], bool]) -> None:
        """Record that the last save failed, if `has_lost` says so about its step."""
        if has_lost(self._saved_step):
            self._saved_step = 0
