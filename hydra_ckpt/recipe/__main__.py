"""`python -m hydra_ckpt.recipe` and `hydra-ckpt-train`: the command line of the recipe.

Nothing heavy is imported before the configuration is composed, so `--help`, `--cfg` and completion answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from hydra_ckpt.errors import CheckpointConfigError, prepare_streams
from hydra_ckpt.recipe.refusals import refusal
from hydra_ckpt.registry import register
from hydra_ckpt.sweeps.job import resumable_job

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

__all__ = ["main"]

log = logging.getLogger(__name__)

_FULL_ERROR = "HYDRA_FULL_ERROR"
_said: set[str] = set()  # what jobs have logged themselves; texts, because an error would keep its job's tensors alive


@hydra.main(version_base="1.3", config_path=None, config_name="hydra_ckpt_train")
@resumable_job
def _job(cfg: DictConfig) -> float:
    try:
        return _training()(cfg)
    except Exception as error:
        line = refusal(error)
        if line is None:
            raise
        log.error(line)
        _said.add(line)
        # In a sweep Hydra has to see the error itself, or the following jobs would not run.
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        sys.exit(1)


def _training() -> Callable[[DictConfig], float]:
    try:
        from hydra_ckpt.recipe.train import train
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise CheckpointConfigError("this recipe needs transformers: pip install 'hydra-ckpt[transformers]'") from error
    return train


def main() -> None:
    """Composes the configuration and trains; see `--help`.

    A refused setting is reported in one line. Any other error, or HYDRA_FULL_ERROR=1, shows the stack trace.
    """
    register()
    prepare_streams()
    if os.environ.get(_FULL_ERROR) == "1":
        _job()
        return
    os.environ[_FULL_ERROR] = "1"  # Hydra's own report would hide the exception; so asked, it raises it
    try:
        _job()
    except Exception as error:
        line = refusal(error)
        if line is None:
            raise
        if line not in _said:
            log.error(line)
        sys.exit(1)
    finally:
        del os.environ[_FULL_ERROR]


if __name__ == "__main__":
    main()
