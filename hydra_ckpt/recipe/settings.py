"""The settings that the recipe reads from the composed configuration, typed and checked once; does not import torch.

Defaults live in conf/hydra_ckpt_train.yaml and conf/hydra_ckpt_model/ only.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_ckpt.errors import CheckpointConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from hydra_ckpt.config import CheckpointingConfig

__all__ = [
    "DataSettings",
    "MeshSettings",
    "ModelSettings",
    "OptimizerSettings",
    "PipelineSettings",
    "Settings",
    "TrainerSettings",
    "check_together",
    "read_settings",
]

log = logging.getLogger(__name__)


@dataclass
class ModelSettings:
    """The model's shape; names as in `transformers.LlamaConfig` and `MixtralConfig`.

    With `pretrained` it has that shape instead. `num_local_experts` and `num_experts_per_tok` are for a Mixtral.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    attention_dropout: float
    tie_word_embeddings: bool
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    pretrained: str | None = None


@dataclass
class LoraSettings:
    """A low-rank adapter, instead of training all weights; names as in `peft.LoraConfig`."""

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: list[str]


@dataclass
class DataSettings:
    """Where the text comes from and how it is cut."""

    path: str | None
    max_bytes: int
    seq_len: int
    val_fraction: float


@dataclass
class OptimizerSettings:
    """AdamW and its learning-rate schedule."""

    lr: float
    weight_decay: float
    betas: list[float]
    schedule: str
    warmup_steps: int


@dataclass
class TrainerSettings:
    """The loop. `batch_size` is that of one data-parallel rank; steps are optimizer steps."""

    max_steps: int
    batch_size: int
    grad_accumulation: int
    mixed_precision: str
    max_grad_norm: float
    validate_every: int
    validate_batches: int
    log_every: int
    num_workers: int
    tracker: str | None


@dataclass
class MeshSettings:
    """Ranks along each dimension of parallelism; one of them may be -1: whatever is left."""

    dp_replicate: int
    dp_shard: int
    tp: int
    pp: int
    ep: int


@dataclass
class PipelineSettings:
    """How the model and its batches are split if `mesh.pp` is above 1."""

    parts_per_rank: int
    microbatches: int


@dataclass
class Settings:
    """Everything but the checkpointing, which `instantiate` makes from its own part of the configuration."""

    seed: int
    model: ModelSettings
    data: DataSettings
    optimizer: OptimizerSettings
    trainer: TrainerSettings
    mesh: MeshSettings
    pipeline: PipelineSettings
    lora: LoraSettings | None = None


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "model.architecture": ("llama", "mixtral"),
    "trainer.mixed_precision": ("no", "bf16"),
    "trainer.tracker": (None, "tensorboard"),
    "optimizer.schedule": ("cosine", "linear", "constant"),
}
_AT_LEAST = {
    "data.max_bytes": 1,
    "data.seq_len": 2,
    "optimizer.warmup_steps": 0,
    "pipeline.parts_per_rank": 1,
    "pipeline.microbatches": 1,
    "trainer.max_steps": 1,
    "trainer.batch_size": 1,
    "trainer.grad_accumulation": 1,
    "trainer.validate_every": 0,
    "trainer.validate_batches": 1,
    "trainer.log_every": 1,
    "trainer.num_workers": 0,
}


def read_settings(cfg: DictConfig) -> Settings:
    """Takes the recipe's part out of the composed configuration.

    Raises:
        CheckpointConfigError: A value has the wrong type or is out of range; the message names the key.
    """
    plain = cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True))
    ours = {field.name: plain[field.name] for field in fields(Settings) if field.name in plain}
    try:
        settings = cast(Settings, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), ours)))
    except OmegaConfBaseException as error:
        raise CheckpointConfigError(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from None
    _check(settings)
    return settings


def check_together(settings: Settings, checkpoint: CheckpointingConfig) -> None:
    """Refuses what the recipe and its checkpoints cannot do together, before a model is built.

    Raises:
        CheckpointConfigError: One of them is for an adapter and the other is not.
    """
    if (settings.lora is not None) != checkpoint.is_peft and checkpoint.enabled:
        raise CheckpointConfigError(
            f"lora is {'null' if settings.lora is None else 'set'} and checkpoint.is_peft={checkpoint.is_peft}: an "
            "adapter is trained with both (experiment=hydra_ckpt_lora), a whole model with neither"
        )
    if settings.lora is not None and settings.model.pretrained is None:
        log.warning(
            "an adapter on top of random weights, which are not stored, is useless after this run; give "
            "model.pretrained=<a directory, or a hub id in the cache>"
        )


def _check(settings: Settings) -> None:
    for key, choices in _CHOICES.items():
        if (value := _at(settings, key)) not in choices:
            shown = ", ".join("null" if choice is None else choice for choice in choices)
            raise CheckpointConfigError(f"{key}={value} is not one of: {shown}")
    for key, least in _AT_LEAST.items():
        if (value := _at(settings, key)) < least:
            raise CheckpointConfigError(f"{key}={value} must be at least {least}")
    if settings.model.pretrained == "":
        raise CheckpointConfigError(
            "model.pretrained must be set: a directory, such as .../checkpoints/LATEST/model/consolidated of another "
            "run, or a hub id in the cache"
        )
    _check_mesh(settings)
    if settings.data.seq_len > settings.model.max_position_embeddings:
        raise CheckpointConfigError(
            f"data.seq_len={settings.data.seq_len} is longer than "
            f"model.max_position_embeddings={settings.model.max_position_embeddings}"
        )


def _check_mesh(settings: Settings) -> None:
    """Check what does not depend on the number of ranks."""
    for name, size in (("tp", settings.mesh.tp), ("pp", settings.mesh.pp), ("ep", settings.mesh.ep)):
        if size != 1 and settings.lora is not None:
            raise CheckpointConfigError(f"mesh.{name}={size}: this recipe does not split adapters; leave it at 1")
    if settings.mesh.pp > 1 and settings.trainer.batch_size % settings.pipeline.microbatches:
        raise CheckpointConfigError(
            f"pipeline.microbatches={settings.pipeline.microbatches} does not divide "
            f"trainer.batch_size={settings.trainer.batch_size}"
        )
    if settings.mesh.pp > 1 and settings.model.tie_word_embeddings:
        raise CheckpointConfigError(
            f"mesh.pp={settings.mesh.pp}: model.tie_word_embeddings=true would need one matrix on two stages"
        )


def _at(settings: Settings, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(settings, group), name)
