"""What has changed since a checkpoint was saved: shown setting by setting, with a warning if it matters."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_ckpt.errors import CheckpointError, CorruptCheckpointError
from hydra_ckpt.jobs.differences import Difference, about_saving, differences, shown
from hydra_ckpt.jobs.yaml_text import MAX_BYTES, parse_config
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.small_files import read_small_file

log = logging.getLogger(__name__)

CONFIG_TEXT = "config.yaml"


def changes(checkpoint: Path, texts: Mapping[str, str], optimizers: Sequence[str], world_size: int) -> list[Difference]:
    """The settings, and the facts about the run, that differ from a checkpoint's; none if it has no manifest.

    Args:
        checkpoint: Its directory.
        texts: Hydra's configuration of this run: file name to YAML.
        optimizers: Classes of this run's optimizers.
        world_size: Ranks of this run.
    """
    try:
        manifest = Checkpoint.open(checkpoint).manifest
    except CheckpointError:
        return []  # another tool wrote it
    found = []
    saved = manifest.details.get("optimizers")
    if isinstance(saved, list) and saved and optimizers and [*map(str, saved)] != [*optimizers]:
        found.append(Difference("optimizer", _listed(saved), _listed(optimizers), "optimizer type"))
    if manifest.world_size != world_size:
        found.append(Difference("world size", str(manifest.world_size), str(world_size), "number of ranks"))
    before, now = saved_config(checkpoint), parse_config(texts.get(CONFIG_TEXT, ""))
    return found if before is None or now is None else [*found, *differences(before, now)]


def differing(checkpoint: Path, texts: Mapping[str, str]) -> list[Difference]:
    """The settings that differ from a checkpoint's, those about saving aside.

    Args:
        checkpoint: Its directory.
        texts: Hydra's configuration of this run: file name to YAML.
    """
    before, now = saved_config(checkpoint), parse_config(texts.get(CONFIG_TEXT, ""))
    if before is None or now is None:
        return []
    return [found for found in differences(before, now) if not about_saving(found.key)]


def saved_config(checkpoint: Path) -> Any:
    """Hydra's configuration of the run that saved a checkpoint, as plain data; None if there is none."""
    path = checkpoint / names.CONFIG / CONFIG_TEXT
    try:
        return parse_config(read_small_file(path, MAX_BYTES).decode())
    except (OSError, CorruptCheckpointError, UnicodeDecodeError):
        return None


def log_changes(checkpoint: Path, found: Sequence[Difference]) -> None:
    """Log the differences once; those that prevent an exact continuation are a warning."""
    harmless = [str(item) for item in found if not item.kind]
    if harmless:
        log.info("settings that differ from those of %s: %s", checkpoint.name, shown(harmless))
    decisive = [f"{item} ({item.kind})" for item in found if item.kind]
    if decisive:
        log.warning(
            "this run does not continue from %s exactly as the original run would have, because of: %s",
            checkpoint.name,
            shown(decisive),
        )


def _listed(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items))
