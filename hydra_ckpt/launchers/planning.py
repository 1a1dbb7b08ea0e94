"""Which jobs Hydra's own sweeper will run, known before the first one begins."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from hydra_ckpt.jobs.run import goes_by_results
from hydra_ckpt.sweeps.planned import PlannedJob

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["planned_jobs"]

log = logging.getLogger(__name__)

_BY_NUMBER = "${hydra.job.num}"


def planned_jobs(config: DictConfig) -> list[PlannedJob]:
    """The jobs of a sweep, by number; none if the sweeper chooses them one after the other.

    Args:
        config: The configuration of the sweep.
    """
    if goes_by_results(config.hydra):
        return []
    try:
        jobs = _split(config)
    except Exception as error:  # noqa: BLE001 - the sweeper parses the same, and reports what is wrong
        log.debug("the jobs of the sweep are not known in advance: %s", error)
        return []
    raw: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    numbered = raw["subdir"] == _BY_NUMBER
    return [PlannedJob(str(number) if numbered else "", overrides) for number, overrides in enumerate(jobs)]


def _split(config: DictConfig) -> list[tuple[str, ...]]:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.utils import filter_overrides

    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides([*given, *map(str, config.hydra.overrides.task)])
    [batch] = BasicSweeper.split_arguments(overrides, None)
    return [tuple(filter_overrides(job)) for job in batch]
