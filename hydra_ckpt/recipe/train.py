"""The training loop that the library requires, for a small language model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from torch.utils.data import DataLoader

from hydra_ckpt.recipe.data import load_windows
from hydra_ckpt.recipe.mesh import plan_parallelism, shard_model
from hydra_ckpt.recipe.model import add_adapter, build_model, load_pretrained
from hydra_ckpt.recipe.optimization import build_optimizer, build_schedule
from hydra_ckpt.recipe.passes import InOnePiece, Pass, Pipelined
from hydra_ckpt.recipe.pipeline import cut
from hydra_ckpt.recipe.reporting import Report
from hydra_ckpt.recipe.session import seed_everything, session, world_size
from hydra_ckpt.recipe.settings import check_together, read_settings
from hydra_ckpt.recipe.tokenizer import byte_tokenizer
from hydra_ckpt.state.app_state import AppState, as_list
from hydra_ckpt.state.dataloader import resumable

if TYPE_CHECKING:
    from accelerate import Accelerator
    from omegaconf import DictConfig
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import AdamW
    from torch.optim.lr_scheduler import LambdaLR

    from hydra_ckpt.callback import CheckpointCallback
    from hydra_ckpt.config import CheckpointingConfig
    from hydra_ckpt.recipe.data import Windows
    from hydra_ckpt.recipe.mesh import Parallelism
    from hydra_ckpt.recipe.settings import Settings
    from hydra_ckpt.state.dataloader import ResumableLoader

__all__ = ["train"]


def train(cfg: DictConfig) -> float:
    """Trains according to the configuration, and continues from a checkpoint if there is one.

    Collective: every rank of the launch.

    Returns:
        The best validation metric, which is the objective of a sweep; NaN if none was measured.
    """
    settings = read_settings(cfg)
    parallelism = plan_parallelism(settings.mesh, world_size(), settings.model)
    checkpoints: CheckpointCallback = instantiate(cfg.callbacks.checkpoint)  # refuses before anything is built
    check_together(settings, checkpoints.config)
    with session(settings.trainer, Path(HydraConfig.get().runtime.output_dir)) as accelerator:
        run = _prepare(settings, parallelism, accelerator, checkpoints.config)
        with Report(settings.trainer.max_steps, is_main=accelerator.is_main_process) as report, checkpoints:
            _train(run, checkpoints, report)
            best = checkpoints.best_metric
    return float("nan") if best is None else float(best)


@dataclass(frozen=True)
class _Run:
    """Everything the loop works on.

    Attributes:
        settings: The recipe's part of the configuration.
        accelerator: Drives device, precision, gradient accumulation, clipping and trackers.
        place: Data-parallel rank, number among the ranks that see equal batches, and stage.
        model: The object that holds the parameters and that checkpoints save; in a pipeline, the parts that this rank
            has.
        passing: How a batch goes through it and back.
        optimizer: The optimizer that checkpoints save.
        stepper: The optimizer as accelerate wraps it: it does nothing while gradients accumulate.
        schedule: The learning-rate schedule, one step per optimizer step.
        training: Shuffled batches of this data-parallel rank, without end over the epochs.
        validation: The batches of this rank, in order.
    """

    settings: Settings
    accelerator: Accelerator
    place: tuple[int, int, int]
    model: Any
    passing: Pass
    optimizer: AdamW
    stepper: Any
    schedule: LambdaLR
    training: ResumableLoader[Tensor]
    validation: ResumableLoader[Tensor]

    def app_state(self) -> AppState:
        return AppState(
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.schedule,
            dataloader=self.training,
            tokenizer=byte_tokenizer(),
        )

    def mean_over_ranks(self, loss: Tensor) -> float:
        return float(self.accelerator.reduce(loss, reduction="mean")) / self.passing.seen_by


def _prepare(
    settings: Settings, parallelism: Parallelism, accelerator: Accelerator, checkpoint: CheckpointingConfig
) -> _Run:
    mesh = parallelism.device_mesh(accelerator.device.type)
    model = _model(settings, parallelism, mesh, accelerator, checkpoint)
    passing = _passing(model, settings, parallelism, mesh, accelerator)
    optimizer = build_optimizer(as_list(model), settings.optimizer)
    train_windows, val_windows = load_windows(settings.data)
    data_rank = parallelism.data_rank(accelerator.process_index)
    seed_everything(settings.seed, data_rank)
    accelerator.init_trackers("hydra_ckpt")
    return _Run(
        settings=settings,
        accelerator=accelerator,
        place=parallelism.place(accelerator.process_index),
        model=model,
        passing=passing,
        optimizer=optimizer,
        stepper=accelerator.prepare_optimizer(optimizer),
        schedule=build_schedule(optimizer, settings.optimizer, settings.trainer.max_steps),
        training=_batches(train_windows, settings, data_rank, parallelism, shuffle=True),
        validation=_batches(val_windows, settings, data_rank, parallelism, shuffle=False),
    )


def _model(
    settings: Settings,
    parallelism: Parallelism,
    mesh: DeviceMesh | None,
    accelerator: Accelerator,
    checkpoint: CheckpointingConfig,
) -> Any:
    """The model on its device, sharded if there is a mesh to shard it over; a list of its parts in a pipeline."""
    model: Any = build_model(settings.model, settings.seed)
    pretrained = settings.model.pretrained
    if pretrained is not None and settings.lora is not None:
        load_pretrained(model, pretrained, checkpoint)  # whole: adapters are made beside weights that exist
    if settings.lora is not None:
        model = add_adapter(model, settings.lora, settings.seed)
    waits = pretrained is not None and settings.lora is None
    if parallelism.pp > 1 and mesh is not None:
        stages, first = parallelism.pp * settings.pipeline.parts_per_rank, mesh["pp"].get_local_rank()
        model = cut(model, stages, list(range(first, stages, parallelism.pp)))
    parts = as_list(model)
    if not waits:
        for part in parts:
            part.to(accelerator.device)
    if mesh is not None and parallelism.is_sharded:
        # accelerate refuses to shard on a CPU; so that it is the same everywhere, it never sees the sharded model.
        for part in parts:
            shard_model(part, mesh)
    if waits and pretrained is not None:
        load_pretrained(model, pretrained, checkpoint)  # each rank its shards
        for part in parts:
            part.to(accelerator.device)
    return model


def _passing(
    model: Any, settings: Settings, parallelism: Parallelism, mesh: DeviceMesh | None, accelerator: Accelerator
) -> Pass:
    if parallelism.pp > 1 and mesh is not None:
        return Pipelined(accelerator, model, mesh["pp"], settings)
    return InOnePiece(accelerator, model, model if parallelism.is_sharded else accelerator.prepare_model(model))


def _batches(
    windows: Windows, settings: Settings, data_rank: int, parallelism: Parallelism, *, shuffle: bool
) -> ResumableLoader[Tensor]:
    workers = settings.trainer.num_workers if shuffle else 0
    loader = DataLoader(
        windows,
        batch_size=settings.trainer.batch_size,
        shuffle=shuffle,
        # Ranks average their losses, so every batch has to weigh the same...
        drop_last=shuffle or parallelism.pp > 1,  # and what goes through a pipeline has one shape
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return resumable(loader, settings.seed, rank=data_rank, world_size=parallelism.data_ranks)


def _train(run: _Run, checkpoints: CheckpointCallback, report: Report) -> None:
    # Not from the mesh's names: those along `ep` see equal batches here, which is not so in every program.
    checkpoints.checkpointer = checkpoints.config.build(*run.place)
    start = checkpoints.on_train_begin(run.app_state())
    step = start.step if start else 0
    report.begin(step)
    meter = _Meter(run, report)
    trainer = run.settings.trainer
    while step < trainer.max_steps and not checkpoints.should_stop:
        epoch = run.training.epoch
        for batch in run.training:
            if not _train_on(batch, run, meter):
                continue
            step += 1
            checkpoints.on_step_end(step, epoch)
            meter.step(step)
            if trainer.validate_every and step % trainer.validate_every == 0:
                checkpoints.on_validation_end({"val_loss": _validate(run, step, report)})
            if step == trainer.max_steps or checkpoints.should_stop:
                break
        else:
            checkpoints.on_epoch_end(epoch)
    checkpoints.on_train_end()
    if checkpoints.checkpointer is not None:
        stats = checkpoints.checkpointer.stats
        written = torch.tensor(stats.written_bytes, device=run.accelerator.device)
        report.summary(step, stats, int(run.accelerator.reduce(written, reduction="sum")))


def _train_on(batch: Tensor, run: _Run, meter: _Meter) -> bool:
    """Learns from one micro-batch; True if that completed an optimizer step."""
    accelerator = run.accelerator
    with accelerator.accumulate(*run.passing.modules):
        meter.add(run.passing.learn(batch.to(accelerator.device)))
        if accelerator.sync_gradients:
            run.passing.clip(run.settings.trainer.max_grad_norm)
        run.stepper.step()
        run.stepper.zero_grad()
    if accelerator.sync_gradients:
        run.schedule.step()
    return bool(accelerator.sync_gradients)


@torch.no_grad()
def _validate(run: _Run, step: int, report: Report) -> float:
    """Mean loss over the first validation batches of all ranks; the same ones each time, without dropout."""
    for module in run.passing.modules:
        module.eval()
    batches = islice(run.validation, run.settings.trainer.validate_batches)
    losses = [run.passing.evaluate(batch.to(run.accelerator.device)) for batch in batches]
    for module in run.passing.modules:
        module.train()
    loss = run.mean_over_ranks(torch.stack(losses).mean())
    run.accelerator.log({"val_loss": loss}, step=step)
    report.validated(step, loss)
    return loss


class _Meter:
    """The training loss since it was last shown. Losses stay on their device until then."""

    def __init__(self, run: _Run, report: Report) -> None:
        self._run = run
        self._report = report
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        self._losses.append(loss)

    def step(self, step: int) -> None:
        self._report.step(step)
        if step % self._run.settings.trainer.log_every:
            return
        loss = self._run.mean_over_ranks(torch.stack(self._losses).mean())
        self._losses.clear()
        lr = float(self._run.schedule.get_last_lr()[0])
        speed = self._report.losses(step, loss, lr)
        self._run.accelerator.log({"loss": loss, "lr": lr, "steps_per_s": speed}, step=step)
