"""A batch through the model and back: in one piece, or from stage to stage of a pipeline.

The loop treats both alike: both learn from a batch, evaluate one, and clip gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import Accelerator
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from hydra_ckpt.recipe.settings import Settings

__all__ = ["InOnePiece", "Pass", "Pipelined"]


class Pass(Protocol):
    """How a rank takes part in a step."""

    @property
    def modules(self) -> Sequence[nn.Module]:
        """What is switched between training and evaluation."""

    @property
    def seen_by(self) -> float:
        """The share of the ranks that see losses; the others are given zeros."""

    def learn(self, batch: Tensor) -> Tensor:
        """Forward and backward. Collective: every rank of the launch.

        Args:
            batch: Token ids, shape (batch, seq_len).

        Returns:
            The mean loss, a scalar.
        """

    def evaluate(self, batch: Tensor) -> Tensor:
        """The mean loss without gradients. Collective: every rank of the launch."""

    def clip(self, max_norm: float) -> None:
        """Scale gradients down to a norm over all of the model. Collective: every rank of the launch."""


class InOnePiece:
    """The whole model, or each rank's shards of it.

    Args:
        accelerator: Drives precision, accumulation and clipping.
        model: What holds the parameters.
        forward: What is called: `model`, or accelerate's wrapper of it.
    """

    seen_by = 1.0

    def __init__(self, accelerator: Accelerator, model: nn.Module, forward: nn.Module) -> None:
        self._accelerator, self._model, self._forward = accelerator, model, forward
        self.modules: Sequence[nn.Module] = [forward]

    def learn(self, batch: Tensor) -> Tensor:
        """See `Pass`."""
        loss = self.evaluate(batch)
        self._accelerator.backward(loss)
        return loss.detach()

    def evaluate(self, batch: Tensor) -> Tensor:
        """See `Pass`."""
        with self._accelerator.autocast():
            loss: Tensor = self._forward(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def clip(self, max_norm: float) -> None:
        """See `Pass`."""
        self._accelerator.clip_grad_norm_(self._model.parameters(), max_norm)


class Pipelined:
    """Some stages of a pipeline; the batch is cut into microbatches that follow each other through all stages.

    Args:
        accelerator: Drives precision and accumulation.
        parts: The stages that this rank holds: number r, r + pp, r + 2 pp, ...
        pipeline: The mesh's dimension `pp`.
        settings: Sizes and numbers.
    """

    def __init__(
        self, accelerator: Accelerator, parts: Sequence[nn.Module], pipeline: DeviceMesh, settings: Settings
    ) -> None:
        self._accelerator, self.modules, self._group = accelerator, parts, pipeline.get_group()
        rank, ranks = pipeline.get_local_rank(), pipeline.size()
        self._is_first, self._is_last = rank == 0, rank == ranks - 1
        self.seen_by = 1.0 / ranks
        count = settings.pipeline.microbatches
        self._batches, self._microbatches = settings.trainer.grad_accumulation, count
        stages: list[Any] = []
        for position, part in enumerate(parts):
            number = rank + position * ranks
            # Said beforehand: to find out, torch would run each stage once, and dropout would draw numbers.
            entering, leaving = _examples(part, settings, number, ranks * len(parts))
            stage = PipelineStage(
                _Stage(part),
                number,
                ranks * len(parts),
                accelerator.device,
                input_args=entering,
                output_args=leaving,
                group=self._group,
            )
            stages.append(stage)
        if len(stages) == 1:
            self._schedule: Any = Schedule1F1B(stages[0], count, loss_fn=self._loss, scale_grads=False)
        else:
            self._schedule = ScheduleInterleaved1F1B(stages, count, loss_fn=self._loss, scale_grads=False)

    def learn(self, batch: Tensor) -> Tensor:
        """See `Pass`."""
        return self._run(self._schedule.step, batch)

    def evaluate(self, batch: Tensor) -> Tensor:
        """See `Pass`."""
        return self._run(self._schedule.eval, batch)

    def clip(self, max_norm: float) -> None:
        """See `Pass`."""
        parameters = [parameter for part in self.modules for parameter in part.parameters()]
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        squares = norm.square()
        dist.all_reduce(squares, group=self._group)
        clip_grads_with_norm_(parameters, max_norm, squares.sqrt())

    def _run(self, work: Any, batch: Tensor) -> Tensor:
        losses: list[Tensor] = []
        inputs = (batch,) if self._is_first else ()
        with self._accelerator.autocast():
            if self._is_last:
                work(*inputs, target=batch, losses=losses)
            else:
                work(*inputs)
        found = torch.stack(losses).sum() * self._batches if losses else batch.new_zeros((), dtype=torch.float32)
        return found.detach()

    def _loss(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """A microbatch's share of the mean over an optimizer step.

        The schedule's own scaling would scale what has been accumulated before once more.
        """
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        return loss / (self._batches * self._microbatches)


class _Stage(nn.Module):
    """What is called of a part: tokens in and hidden states out, or hidden states in and out, or logits out."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs are token ids, shape (batch, seq_len), or hidden states, shape (batch, seq_len, hidden)."""
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        outputs: Tensor = self.part(**{name: inputs}, use_cache=False).logits
        return outputs


def _examples(part: Any, settings: Settings, number: int, stages: int) -> tuple[Tensor, Tensor]:
    """What goes into a stage and comes out of it, without memory."""
    rows = settings.trainer.batch_size // settings.pipeline.microbatches
    tokens = torch.empty(rows, settings.data.seq_len, dtype=torch.int64, device="meta")
    hidden = torch.empty(*tokens.shape, part.config.hidden_size, device="meta", requires_grad=True)
    logits = torch.empty(*tokens.shape, part.config.vocab_size, device="meta", requires_grad=True)
    return tokens if number == 0 else hidden, logits if number == stages - 1 else hidden
