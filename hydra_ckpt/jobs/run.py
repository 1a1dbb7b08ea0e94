"""Information about the Hydra run that this process is part of, if any."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra_ckpt.jobs.command import program_of_this_process

__all__ = ["HydraRun", "LauncherKind", "goes_by_results", "run_directory"]

_TEXTS = ("config.yaml", "hydra.yaml", "overrides.yaml")


class LauncherKind(Enum):
    """How a launcher runs the jobs of a sweep."""

    ONE_BY_ONE = "in its own process, one after the other"
    SIDE_BY_SIDE = "in child processes, several at once"
    QUEUED = "each by itself, with a time limit of its own"

    @classmethod
    def of(cls, hydra: Any) -> LauncherKind:
        """The kind of the launcher in Hydra's own settings."""
        target = str(_given(hydra, "launcher._target_") or "")
        if target.endswith(".BasicLauncher"):
            return cls.ONE_BY_ONE
        return cls.QUEUED if "submitit" in target else cls.SIDE_BY_SIDE


@dataclass(frozen=True)
class HydraRun:
    """A running Hydra job.

    Attributes:
        output_dir: Its run directory, absolute.
        sweep_dir: The directory of the sweep it is a job of, absolute; None for a single run.
        number: Its number in the sweep; None for a single run.
        overrides: Its overrides from the command line, without Hydra's own settings.
        texts: File name and YAML text of the configuration it runs with.
        launch: How its program was started; see `program_of_this_process`.
        launcher: What runs it beside its siblings, or after them.
        is_judged: Whether it is a job of a sweep whose sweeper goes by what jobs return.
        name: What the job is called in its sweep: its directory, seen from the sweep's, or its number where all jobs
            have one directory. None for a single run.
    """

    output_dir: Path
    sweep_dir: Path | None
    number: int | None
    overrides: tuple[str, ...]
    texts: tuple[tuple[str, str], ...]
    launch: dict[str, Any]
    launcher: LauncherKind = LauncherKind.ONE_BY_ONE
    is_judged: bool = False
    name: str | None = None

    @classmethod
    def current(cls) -> HydraRun | None:
        """The job this process runs, or None outside one."""
        output_dir = run_directory()
        if output_dir is None:
            return None
        hydra = _hydra()
        number = _given(hydra, "job.num") if getattr(_given(hydra, "mode"), "name", None) == "MULTIRUN" else None
        sweep_dir = None if number is None else Path(hydra.runtime.cwd) / hydra.sweep.dir
        return cls(
            output_dir,
            sweep_dir,
            number,
            tuple(_given(hydra, "overrides.task") or ()),
            _texts(hydra, output_dir),
            program_of_this_process(),
            LauncherKind.ONE_BY_ONE if sweep_dir is None else LauncherKind.of(hydra),
            sweep_dir is not None and goes_by_results(hydra),
            None if sweep_dir is None else _name(hydra, sweep_dir, output_dir),
        )

    @property
    def owner(self) -> str | None:
        """Sweep directory and name of the job if it is one of several, else None."""
        return None if self.sweep_dir is None else f"{self.sweep_dir}, job {self.name}"


def goes_by_results(hydra: Any) -> bool:
    """Whether a sweeper chooses values by the results of jobs, as far as is known; Hydra's own does not.

    Args:
        hydra: Hydra's own settings.
    """
    return not str(_given(hydra, "sweeper._target_") or ".BasicSweeper").endswith(".BasicSweeper")


def run_directory() -> Path | None:
    """The run directory of the Hydra job this process runs, absolute; None outside one."""
    hydra = _hydra()
    output_dir = None if hydra is None else _given(hydra, "runtime.output_dir")
    return None if output_dir is None else Path(output_dir).absolute()


def _name(hydra: Any, sweep_dir: Path, output_dir: Path) -> str:
    """A job's name in its sweep. A job that keeps its directory is the same one, whatever number it has this time."""
    from omegaconf import OmegaConf

    if not OmegaConf.is_interpolation(hydra.sweep, "subdir"):
        return str(hydra.job.num)
    return os.path.relpath(output_dir, sweep_dir)


def _hydra() -> Any:
    """Hydra's own settings; None outside a job."""
    # Hydra cannot be running if it has not been imported, and importing it here would take time.
    module = sys.modules.get("hydra.core.hydra_config")
    return None if module is None or not module.HydraConfig.initialized() else module.HydraConfig.get()


def _given(node: Any, key: str) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.select(node, key, throw_on_missing=False)


def _texts(hydra: Any, output_dir: Path) -> tuple[tuple[str, str], ...]:
    """The files Hydra wrote for this job; where it wrote none, what it holds in memory."""
    subdir = _given(hydra, "output_subdir")
    texts = {} if subdir is None else _read_texts(output_dir / subdir)
    return tuple(sorted((texts or _dump_texts(hydra)).items()))


def _read_texts(directory: Path) -> dict[str, str]:
    texts = {}
    for name in _TEXTS:
        try:
            texts[name] = (directory / name).read_text(encoding="utf-8")
        except OSError:
            continue
    return texts


def _dump_texts(hydra: Any) -> dict[str, str]:
    from omegaconf import OmegaConf

    return {
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": OmegaConf.to_container(hydra)})),
        "overrides.yaml": OmegaConf.to_yaml(hydra.overrides.task),
    }
