"""What can be learned from the Hydra run this process is part of, if it is part of one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["HydraRun"]

_TEXTS = ("config.yaml", "hydra.yaml", "overrides.yaml")


@dataclass(frozen=True)
class HydraRun:
    """A running Hydra job.

    Attributes:
        output_dir: Its run directory, absolute.
        owner: Sweep directory and job number where the job is one of several, else None.
        texts: File name and YAML text of the configuration it runs with.
    """

    output_dir: Path
    owner: str | None
    texts: tuple[tuple[str, str], ...]

    @classmethod
    def current(cls) -> HydraRun | None:
        """The job this process runs, or None outside one."""
        # Hydra cannot be running where nobody imported it, and importing it here would cost time.
        module = sys.modules.get("hydra.core.hydra_config")
        if module is None or not module.HydraConfig.initialized():
            return None
        hydra = module.HydraConfig.get()
        output_dir = _given(hydra, "runtime.output_dir")
        if output_dir is None:
            return None
        return cls(Path(output_dir).absolute(), _owner(hydra), _texts(hydra, Path(output_dir)))


def _given(node: Any, key: str) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.select(node, key, throw_on_missing=False)


def _owner(hydra: Any) -> str | None:
    mode, number = _given(hydra, "mode"), _given(hydra, "job.num")
    if getattr(mode, "name", None) != "MULTIRUN" or number is None:
        return None
    return f"{Path(hydra.runtime.cwd) / hydra.sweep.dir}, job {number}"


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
