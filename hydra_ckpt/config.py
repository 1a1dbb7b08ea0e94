"""The settings a user types, checked once.

`CheckpointingConfig` is what Hydra, YAML and Python callers fill in. It checks itself, because a configuration read
back from plain YAML has lost its schema. `CheckpointingConfig.resolve` turns it into a `ResolvedConfig`: only the top
level reads the flat settings; each part gets the few values it needs. Nothing here imports torch.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.values import (
    EXPORT_DTYPES,
    Check,
    choice,
    count,
    directory,
    minutes,
    optional,
    place,
    positive,
    refuse,
    rules,
    switch,
    switch_or,
    text,
    texts,
    word,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from hydra_ckpt.checkpointer import Checkpointer
    from hydra_ckpt.resolved import ResolvedConfig

__all__ = ["CheckpointingConfig", "SaveConsolidatedMode"]

_log = logging.getLogger(__name__)

_SAFETENSORS, _TORCH_SAVE = "safetensors", "torch_save"
_FRESH_START = frozenset({"none", "null", "no", "false", "off"})
_SELECTORS = frozenset({"auto", "latest", "best"})
_PARTS = ("model", "optimizer", "lr_scheduler", "dataloader", "rng", "extras", "progress")

_CHECKS: dict[str, Check] = {
    "enabled": switch,
    "checkpoint_dir": directory,
    "model_save_format": choice(_SAFETENSORS, _TORCH_SAVE),
    "model_cache_dir": directory,
    "model_repo_id": optional(place),
    "is_peft": switch,
    "model_state_dict_keys": optional(texts()),
    "is_async": switch,
    "dequantize_base_checkpoint": optional(switch),
    "original_model_root_dir": optional(directory),
    "skip_task_head_prefixes_for_base_model": optional(texts()),
    "single_rank_consolidation": switch,
    "staging_dir": optional(directory),
    "v4_compatible": switch,
    "diffusers_compatible": switch,
    "best_metric_key": text,
    "restore_from": optional(place),
    "restore_parts": optional(texts(*_PARTS)),
    "on_conflict": choice("raise", "set_aside"),
    "best_metric_mode": choice("min", "max"),
    "max_recent_checkpoints": optional(count),
    "retention": optional(rules("any_of", newest=count, best=count, every_n_steps=count, younger_than_s=positive)),
    "wait_for_staging": switch,
    "cpu_offload": switch,
    "consolidation_timeout_minutes": minutes,
    "allow_legacy_pickle_restore": switch,
    "verify_on_load": switch,
    "shared_writes": switch_or("auto"),
    "on_save_failure": choice("raise", "warn"),
    "when_busy": choice("wait", "skip"),
    "export_dtype": optional(choice(*EXPORT_DTYPES.values(), short=EXPORT_DTYPES)),
    "model_card": switch,
    "load_strict": switch,
    "allow_unsaved": optional(texts()),
    "on_drift": choice("warn", "raise"),
}


class SaveConsolidatedMode(Enum):
    """When whole-tensor Hugging Face files are written."""

    FALSE = "false"
    FINAL = "final"
    EVERY = "every"


_MODES = {
    "true": SaveConsolidatedMode.EVERY,
    "every": SaveConsolidatedMode.EVERY,
    "always": SaveConsolidatedMode.EVERY,
    "final": SaveConsolidatedMode.FINAL,
    "false": SaveConsolidatedMode.FALSE,
    "no": SaveConsolidatedMode.FALSE,
    "off": SaveConsolidatedMode.FALSE,
    "never": SaveConsolidatedMode.FALSE,
    "none": SaveConsolidatedMode.FALSE,
}


def _normalize_save_consolidated(value: bool | str | SaveConsolidatedMode) -> SaveConsolidatedMode:
    """The mode meant by what a user wrote.

    Args:
        value: A mode, a bool, or one of the words, in any case and with surrounding space.

    Returns:
        The mode.

    Raises:
        CheckpointConfigError: Another value (a ValueError too).
    """
    if isinstance(value, SaveConsolidatedMode):
        return value
    mode = _MODES.get(word(value))
    if mode is None:
        refuse("save_consolidated", value, "every (also true, always), final, or false (also no, off, never, none)")
    return mode


def _is_geq_torch_2_9() -> bool:
    """Whether torch is 2.9 or newer, pre-releases of 2.9 included; False if there is none."""
    # Reading the version of the installed package avoids the import; if torch is imported, its own version is more
    # reliable.
    from importlib import metadata

    torch = sys.modules.get("torch")
    try:
        version = torch.__version__ if torch is not None else metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
    release = re.match(r"(\d+)\.(\d+)", str(version))
    return release is not None and (int(release[1]), int(release[2])) >= (2, 9)


@dataclass
class CheckpointingConfig:
    """All settings of checkpointing. The texts here are also those of docs/configuration.md (scripts/reference.py).

    Attributes:
        enabled: `false`: nothing is written or resumed, no directory is created, and every hook returns at once. A
            `restore_from` other than `auto` then causes a warning.
        checkpoint_dir: Where checkpoints are stored. A relative path is below Hydra's run directory if Hydra runs, else
            below the working directory. `~` is expanded, and parents are created; variables such as `$SCRATCH` are
            refused (write `${oc.env:SCRATCH}`). Rank 0 decides for all ranks. A URL
            (`s3://…`) is refused: object stores are not supported yet.
        model_save_format: `safetensors`, or `torch_save`: PyTorch's own `.distcp` files for model and optimizer.
        model_cache_dir: Where to look for the reference model; null means the Hugging Face hub cache.
        model_repo_id: The reference model: a local directory, or a hub id that is in the cache (its `main` revision;
            nothing is downloaded). A base load reads its weights. Exports follow its assignment of tensors to files and
            the element type of each tensor, and copy its tokenizer and code. Null: exports use the place from which
            `from_pretrained` loaded the model, if it still exists.
        save_consolidated: When the model is written as a Hugging Face directory: `false` (also `no`, `off`, `never`,
            `none`): never, `final`: by the save at the end of training, `every` (also `true`, `always`): by every save.
            Other saves write one file of shards per rank. With `torch_save` it has no effect, and a warning says so.
        is_peft: Save only the adapter of a `PeftModel` (and its `modules_to_save`), at every save, in the form that
            `peft` loads. With `torch_save`, the format becomes `safetensors` and the mode `final`, with a warning. A
            `PeftModel` with `false`, or another model with `true`, is an error.
        model_state_dict_keys: The model's names in the order of the exported files, for models of which each rank sees
            only a part. All ranks together must hold exactly these names.
        is_async: Training continues while a background thread writes; see
            [concepts](concepts.md#saving-in-the-background). With torch older than 2.9 it is switched off, and an error
            is logged.
        dequantize_base_checkpoint: Whether `load_base_model` may convert FP8 weights to the model's element type:
            `true` allows it, `false` forbids it, null allows it if the reference is quantized.
        original_model_root_dir: Where the export gets the original configuration, tokenizer and code, if not from the
            reference model.
        skip_task_head_prefixes_for_base_model: `load_base_model` leaves tensors whose names start with one of these
            prefixes as they were initialized, e.g. `[classifier., score.]`.
        single_rank_consolidation: Only rank 0 writes the consolidated files: the ranks write shards, and rank 0 merges
            them.
        staging_dir: Rank 0 first merges the consolidated files in this directory, then copies them to their place from
            front to back: for file systems without random writes.
        v4_compatible: Export the original `config.json`, without its quantization settings; the live one becomes
            `config.v5.json`.
        diffusers_compatible: Exported files are named `diffusion_pytorch_model*.safetensors`, and so is their index.
        best_metric_key: The metric that decides which checkpoint is best. `default`: the metric with that name, else
            the only metric given; if there are several, an error lists them.
        restore_from: `auto`: the checkpoint that LATEST names if it is complete and undamaged, else the newest one that
            is, else a fresh start. `null` (also `none`, `no`, `false`, `off`): a fresh start. `latest`, `best`, the
            name of a directory, or a path (relative to `checkpoint_dir`, then to the working directory): that
            checkpoint, or an error. A run that began from it and is started again continues from its own newest one,
            see [starting again](configuration.md#starting-again).
        restore_parts: Which parts to load, a list of `model`, `optimizer`, `lr_scheduler`, `dataloader`, `rng`,
            `extras`, `progress`; null: all. Without `progress` the run starts at step 0: `[model]` loads only the
            weights.
        on_conflict: What to do if a run starts below published steps: `raise` an error, or `set_aside` the later
            checkpoints (they are renamed, not deleted). This is decided at the start, never in the middle of training.
        best_metric_mode: Whether the smallest (`min`) or the largest (`max`) value is best. NaN and infinities never
            are.
        max_recent_checkpoints: How many of the newest checkpoints to keep; null: all. Short for `retention: {newest:
            …}`.
        retention: More rules, see [retention](configuration.md#retention).
        wait_for_staging: With `is_async`: `save()` returns only after everything is copied, instead of letting the copy
            overlap with the next forward and backward pass.
        cpu_offload: *No effect.* Tensors of an accelerator are always moved to host memory one by one; the setting is
            accepted for configurations that have it.
        consolidation_timeout_minutes: The longest time that one rank waits for the others, at any step of a save or
            load. If rank 0 shows that it is at work, they wait longer for it.
        allow_legacy_pickle_restore: Allow reading what other tools have pickled: see [checkpoints of other
            tools](concepts.md#checkpoints-of-other-tools). Also allows `.bin` files in `load_base_model`, from which
            only tensors are unpickled.
        verify_on_load: Compare every byte with its digest while it is loaded; the ranks divide the bytes that no rank
            needs among themselves.
        shared_writes: Whether ranks on several hosts may fill one file together. `auto`: not on NFS, SMB, FUSE and
            similar file systems, which may lose neighbouring ranges; always on one host. If not, each rank writes its
            own files, and rank 0 merges the consolidated ones.
        on_save_failure: A failed save ends training (`raise`), or is logged while training continues (`warn`). The
            final save raises in any case, if it has certainly failed.
        when_busy: A save that is due while the previous one is still being written waits for it (`wait`) or is left out
            (`skip`); rank 0 decides for all. The last save of a run, and the one before it stops, always wait.
        export_dtype: Element type of the floating-point tensors of exports: `float32`, `float16` or `bfloat16` (also
            `fp32`, `fp16`, `bf16`); null: the reference model's type of each tensor, else the type used in training.
            Other tensors are unchanged. If it differs from the training type, shards for resuming are written beside
            the export.
        model_card: Exports have a `README.md`, a model card for you to complete: library, base model, step, metrics
            known at the save, versions, Hydra's overrides and configuration. Check that these contain nothing secret
            before you publish it.
        load_strict: Names that a stored object lacks, names that the live one lacks, and different shapes are errors.
            `false`: what matches is loaded, the rest stays as it was built, and `LoadReport.missing` and `skipped` list
            it. An object that is completely absent from the checkpoint is never an error.
        allow_unsaved: State that may be left out of checkpoints, a list of dotted names and patterns such as
            `[optimizer.slow_step, "model.cache.*"]`. A warning at every start, the manifest and `LoadReport.missing`
            list it. Errors about state that cannot be saved print the line to use.
        on_drift: What to do if ranks that should hold the same values (replicas) do not: `warn`: the first of them
            stores the whole replica from then on, and one warning names the tensors; `raise`: the save fails on all
            ranks. See [replicas that differ](parallelism.md#ranks-that-disagree).
    """

    enabled: bool = True
    checkpoint_dir: str | Path = "checkpoints/"
    model_save_format: str = _SAFETENSORS
    model_cache_dir: str | Path | None = None
    model_repo_id: str | None = None
    save_consolidated: bool | str | SaveConsolidatedMode = "final"
    is_peft: bool = False
    model_state_dict_keys: list[str] | None = None
    is_async: bool = False
    dequantize_base_checkpoint: bool | None = None
    original_model_root_dir: str | None = None
    skip_task_head_prefixes_for_base_model: list[str] | None = None
    single_rank_consolidation: bool = False
    staging_dir: str | None = None
    v4_compatible: bool = False
    diffusers_compatible: bool = False
    best_metric_key: str = "default"
    restore_from: str | None = "auto"
    restore_parts: list[str] | None = None
    on_conflict: str = "raise"
    best_metric_mode: str = "min"
    max_recent_checkpoints: int | None = None
    retention: dict[str, Any] | None = None
    wait_for_staging: bool = False
    cpu_offload: bool = False
    consolidation_timeout_minutes: float = 30
    allow_legacy_pickle_restore: bool = False
    verify_on_load: bool = True
    shared_writes: bool | str = "auto"
    on_save_failure: str = "raise"
    when_busy: str = "wait"
    export_dtype: str | None = None
    model_card: bool = False
    load_strict: bool = True
    allow_unsaved: list[str] | None = None
    on_drift: str = "warn"

    def __post_init__(self) -> None:
        """Check every value and settle what excludes each other.

        Raises:
            CheckpointConfigError: A value is of the wrong type or not among the choices, or two contradict.
        """
        if self.model_cache_dir is None:
            self.model_cache_dir = hub_cache()
        if word(self.restore_from) == "false":  # what YAML makes of a bare `no`, as a bool or through the schema
            self.restore_from = None
        for name, check in _CHECKS.items():
            setattr(self, name, check(name, getattr(self, name)))
        self.save_consolidated = _normalize_save_consolidated(self.save_consolidated)
        self._check_limits()
        self._settle()

    def build(
        self,
        dp_rank: int,
        tp_rank: int,
        pp_rank: int,
        moe_mesh: DeviceMesh | None = None,
        *,
        process_group: ProcessGroup | None = None,
        pp_group: ProcessGroup | None = None,
    ) -> Checkpointer:
        """Make the engine. Collective where a process group is up: every rank of it.

        Args:
            dp_rank: This process's data-parallel rank.
            tp_rank: Its tensor-parallel rank.
            pp_rank: Its pipeline-parallel rank.
            moe_mesh: The mesh experts are spread over, if any.
            process_group: The ranks that save together; None: all.
            pp_group: Accepted because other systems have it; pipeline stages find each other without it.

        Returns:
            The engine, to be closed after use.
        """
        from hydra_ckpt.checkpointer import Checkpointer
        from hydra_ckpt.disabled import DisabledCheckpointer

        config = self.resolve()
        place: dict[str, Any] = {"dp_rank": dp_rank, "tp_rank": tp_rank, "pp_rank": pp_rank}
        if not config.write.enabled:
            return DisabledCheckpointer(config, **place, process_group=process_group)
        return Checkpointer(config, **place, moe_mesh=moe_mesh, process_group=process_group, pp_group=pp_group)

    def resolve(self) -> ResolvedConfig:
        """The settings as frozen parts, with paths made absolute for the run this process is part of."""
        from hydra_ckpt.resolved import resolve  # what Hydra loads at every start stays small

        return resolve(self)

    def restore_source(self) -> str | None:
        """What to resume from, with the several words for a fresh start and for the selectors made one."""
        source = word(self.restore_from)
        if self.restore_from is None or source in _FRESH_START:
            return None
        return source if source in _SELECTORS else self.restore_from

    def _check_limits(self) -> None:
        most, newest = self.max_recent_checkpoints, (self.retention or {}).get("newest")
        if most is not None and newest is not None and most != newest:
            raise CheckpointConfigError(
                f"checkpoint.max_recent_checkpoints={most} and checkpoint.retention.newest={newest} contradict each "
                "other; set only one of them."
            )

    def _settle(self) -> None:
        """Settle settings that exclude each other. What is changed no longer warns the next time."""
        if self.is_peft and self.model_save_format == _TORCH_SAVE:
            _log.warning(
                "checkpoint.model_save_format=torch_save cannot hold an adapter in the form peft loads: with "
                "checkpoint.is_peft=true it becomes safetensors, and checkpoint.save_consolidated becomes final."
            )
            self.model_save_format, self.save_consolidated = _SAFETENSORS, SaveConsolidatedMode.FINAL
        if self.model_save_format == _TORCH_SAVE and self.save_consolidated is not SaveConsolidatedMode.FALSE:
            _log.warning(
                "checkpoint.save_consolidated=%s has no effect with checkpoint.model_save_format=torch_save; convert "
                "such a checkpoint to a Hugging Face directory with `hydra-ckpt export`.",
                _normalize_save_consolidated(self.save_consolidated).value,
            )
        if self.is_async and not _is_geq_torch_2_9():
            _log.error("checkpoint.is_async=true needs torch 2.9 or newer and is switched off; saves will block.")
            self.is_async = False
        if not self.enabled and self.restore_source() not in {None, "auto"}:
            _log.warning(
                "checkpoint.restore_from=%s is ignored: with checkpoint.enabled=false nothing is resumed.",
                self.restore_from,
            )


def hub_cache() -> str:
    """The Hugging Face hub cache, by the rules of huggingface_hub and without importing it."""
    given = os.environ.get
    home = given("HF_HOME") or f"{given('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = given("HF_HUB_CACHE") or given("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return os.path.expandvars(os.path.expanduser(cache))  # noqa: PTH111 - pathlib expands no variables
