"""The frozen parts of a configuration: what each part of the engine is given. Nothing here imports torch."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra_ckpt.config import CheckpointingConfig, SaveConsolidatedMode, _normalize_save_consolidated, hub_cache
from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.jobs.run import HydraRun
from hydra_ckpt.values import word

__all__ = [
    "HubOptions",
    "KeepOptions",
    "ReadOptions",
    "ResolvedConfig",
    "Where",
    "WriteOptions",
    "refuse_unlike",
    "resolve",
]

log = logging.getLogger(__name__)

# Settings that may differ between hosts.
_OF_EACH_RANK = frozenset({"model_cache_dir", "original_model_root_dir", "staging_dir"})
_MAX_SHOWN = 80  # characters of a value
_MAX_RANKS = 8


@dataclass(frozen=True)
class Where:
    """The directory that contains all checkpoints of a run.

    Attributes:
        checkpoint_dir: Absolute; below Hydra's run directory where a relative one was given and Hydra runs.
        owner: Sweep directory and job number where the run is one job of a sweep, else None.
    """

    checkpoint_dir: Path
    owner: str | None


@dataclass(frozen=True)
class WriteOptions:
    """How a save is written.

    Attributes:
        enabled: Whether anything is written at all.
        format: "safetensors" or "torch_save".
        consolidated: When consolidated files are written; never with "torch_save".
        is_async: Whether training continues while the files are written.
        wait_for_staging: Whether `save()` waits until everything is copied.
        timeout_s: Longest wait of one rank for the others.
        single_rank_consolidation: Whether rank 0 alone writes the consolidated files.
        staging_dir: Where consolidated files are written before they are copied into place, absolute.
        is_peft: Whether only adapter weights are saved.
        state_dict_keys: The model's names before parallelization, in order, or None.
        shared_writes: Whether ranks may fill one file together; None: where the file system keeps them apart.
        raise_failures: Whether a save that failed ends training; if not, it is only logged.
        skips_when_busy: Whether a save that is due while another is under way is left out.
        unsaved: Patterns of dotted names of state that is left out.
        raises_drift: Whether a save fails if replicas differ; if not, their first one is stored.
    """

    enabled: bool
    format: str
    consolidated: SaveConsolidatedMode
    is_async: bool
    wait_for_staging: bool
    timeout_s: float
    single_rank_consolidation: bool
    staging_dir: Path | None
    is_peft: bool
    state_dict_keys: tuple[str, ...] | None
    shared_writes: bool | None
    raise_failures: bool
    skips_when_busy: bool
    raises_drift: bool
    unsaved: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadOptions:
    """What is resumed from, and how carefully.

    Attributes:
        restore_from: "auto", "latest", "best", a directory name or a path; None for a fresh start.
        parts: The parts to restore, or None for all.
        verify: Whether digests are compared while reading.
        allow_pickle: Whether pickled data of other tools may be read.
        on_conflict: "raise" or "set_aside", for published steps later than the one started from.
        strict: Whether what does not fit is an error, or left as it was built.
    """

    restore_from: str | None
    parts: tuple[str, ...] | None
    verify: bool
    allow_pickle: bool
    on_conflict: str
    strict: bool = True


@dataclass(frozen=True)
class HubOptions:
    """Hugging Face in and out.

    Attributes:
        repo_id: Hub id or local directory of the reference model, or None.
        cache_dir: The hub cache in which to look for the reference.
        dequantize: True permits, False forbids, None detects.
        original_model_root_dir: Where the original config, tokenizer and code come from, absolute, or None.
        skip_prefixes: Names beginning so keep their initialization in a base load.
        v4_compatible: Whether the original config.json is exported.
        diffusers_compatible: Whether files and index are named as diffusers names them.
        export_dtype: Element type of exported floating-point tensors, or None for the reference's, else the training's.
        model_card: Whether exports have a README.md that says how they were made.
    """

    repo_id: str | None
    cache_dir: Path
    dequantize: bool | None
    original_model_root_dir: Path | None
    skip_prefixes: tuple[str, ...]
    v4_compatible: bool
    diffusers_compatible: bool
    export_dtype: str | None
    model_card: bool


@dataclass(frozen=True)
class KeepOptions:
    """Which checkpoint is best, and which ones stay.

    Attributes:
        best_metric_key: The metric that decides.
        best_metric_mode: "min" or "max".
        max_recent: How many of the newest stay, or None for all.
        retention: Further rules as plain data, or None.
    """

    best_metric_key: str
    best_metric_mode: str
    max_recent: int | None
    retention: dict[str, Any] | None


@dataclass(frozen=True)
class ResolvedConfig:
    """The settings in the parts the engine hands down, with every path absolute.

    Attributes:
        where: For the store.
        write: For saving.
        read: For loading.
        hub: For the reference model and the export.
        keep: For pointers and retention.
        hydra_texts: File name and YAML text of Hydra's configuration; empty if Hydra does not run.
        launch: How the program of the Hydra run was started; None if Hydra does not run.
        settings: Key to what was configured, as text, of those that all ranks have to agree about.
    """

    where: Where
    write: WriteOptions
    read: ReadOptions
    hub: HubOptions
    keep: KeepOptions
    hydra_texts: tuple[tuple[str, str], ...] = ()
    launch: dict[str, Any] | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


def resolve(config: CheckpointingConfig) -> ResolvedConfig:
    """The settings as frozen parts, with paths made absolute for the run this process is part of."""
    run = HydraRun.current()
    base = Path.cwd() if run is None else run.output_dir
    return ResolvedConfig(
        where=Where(
            checkpoint_dir=base / Path(config.checkpoint_dir).expanduser(),
            owner=None if run is None else run.owner,
        ),
        write=_write_options(config),
        read=ReadOptions(
            restore_from=config.restore_source(),
            parts=_frozen(config.restore_parts),
            verify=config.verify_on_load,
            allow_pickle=config.allow_legacy_pickle_restore,
            on_conflict=config.on_conflict,
            strict=config.load_strict,
        ),
        hub=_hub_options(config),
        keep=KeepOptions(
            best_metric_key=config.best_metric_key,
            best_metric_mode=config.best_metric_mode,
            max_recent=config.max_recent_checkpoints,
            retention=copy.deepcopy(config.retention),
        ),
        hydra_texts=() if run is None else run.texts,
        launch=None if run is None else run.launch,
        settings=_settings(config),
    )


def _settings(config: CheckpointingConfig) -> dict[str, str]:
    names = [item.name for item in fields(CheckpointingConfig) if item.name not in _OF_EACH_RANK]
    values = {name: getattr(config, name) for name in names}
    values["save_consolidated"] = _normalize_save_consolidated(config.save_consolidated).value
    return {name: json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}


def refuse_unlike(settings: Mapping[str, str], gather: Callable[[Any], list[Any]]) -> None:
    """Collective: see that all ranks are configured alike. About `checkpoint_dir` rank 0 decides, with a warning.

    Args:
        settings: This rank's, see `ResolvedConfig`.
        gather: Hands a payload to all ranks and gives back those of all, by rank.

    Raises:
        CheckpointConfigError: They are not; on all ranks, with all the keys.
    """
    if len(set(gather(hashlib.sha256(json.dumps(dict(settings)).encode()).hexdigest()[:16]))) == 1:
        return
    rows: list[Mapping[str, str]] = gather(dict(settings))
    unlike = {}
    for name in settings:
        ranks = defaultdict(list)
        for rank, row in enumerate(rows):
            ranks[row.get(name, "missing")].append(rank)
        if len(ranks) > 1:
            unlike[name] = ", ".join(f"{value[:_MAX_SHOWN]} on {_ranks(found)}" for value, found in ranks.items())
    place = unlike.pop("checkpoint_dir", None)
    if unlike:
        lines = [f"\n  checkpoint.{name}: {text}" for name, text in unlike.items()]
        raise CheckpointConfigError(
            f"the ranks are configured differently:{''.join(lines)}\n  Give every rank the same configuration"
        )
    if place is not None:
        log.warning("checkpoint.checkpoint_dir differs between ranks; rank 0's is used: %s", place)


def _ranks(ranks: list[int]) -> str:
    noun = "rank" if len(ranks) == 1 else "ranks"
    more = f" and {len(ranks) - _MAX_RANKS} more" if len(ranks) > _MAX_RANKS else ""
    return f"{noun} {', '.join(map(str, ranks[:_MAX_RANKS]))}{more}"


def _write_options(config: CheckpointingConfig) -> WriteOptions:
    mode = _normalize_save_consolidated(config.save_consolidated)
    return WriteOptions(
        enabled=config.enabled,
        format=config.model_save_format,
        consolidated=SaveConsolidatedMode.FALSE if config.model_save_format == "torch_save" else mode,
        is_async=config.is_async,
        wait_for_staging=config.wait_for_staging,
        timeout_s=config.consolidation_timeout_minutes * 60.0,
        single_rank_consolidation=config.single_rank_consolidation,
        staging_dir=_absolute(config.staging_dir),
        is_peft=config.is_peft,
        state_dict_keys=_frozen(config.model_state_dict_keys),
        shared_writes={"auto": None, "true": True, "false": False}[word(config.shared_writes)],
        raise_failures=config.on_save_failure == "raise",
        skips_when_busy=config.when_busy == "skip",
        unsaved=tuple(config.allow_unsaved or ()),
        raises_drift=config.on_drift == "raise",
    )


def _hub_options(config: CheckpointingConfig) -> HubOptions:
    return HubOptions(
        repo_id=config.model_repo_id,
        cache_dir=Path(config.model_cache_dir or hub_cache()).expanduser().absolute(),
        dequantize=config.dequantize_base_checkpoint,
        original_model_root_dir=_absolute(config.original_model_root_dir),
        skip_prefixes=tuple(config.skip_task_head_prefixes_for_base_model or ()),
        v4_compatible=config.v4_compatible,
        diffusers_compatible=config.diffusers_compatible,
        export_dtype=config.export_dtype,
        model_card=config.model_card,
    )


def _frozen(names: list[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def _absolute(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser().absolute()
