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
from hydra.errors import InstantiationException
from hydra.types import RunMode

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError
from hydra_ckpt.registry import register

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

__all__ = ["main"]

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=None, config_name="hydra_ckpt_train")
def _job(cfg: DictConfig) -> float:
    try:
        return _training()(cfg)
    except (CheckpointError, InstantiationException) as error:
        meant = _checkpoint_error_in(error)
        # In a sweep Hydra has to see the error itself, or the jobs behind this one would not run.
        if meant is None or HydraConfig.get().mode == RunMode.MULTIRUN or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        # The message says all there is to say; a traceback would hide it.
        log.error("%s: %s", type(meant).__name__, meant)
        sys.exit(1)


def _training() -> Callable[[DictConfig], float]:
    try:
        from hydra_ckpt.recipe.train import train
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise CheckpointConfigError("this recipe needs transformers: pip install 'hydra-ckpt[transformers]'") from error
    return train


def _checkpoint_error_in(error: BaseException | None) -> CheckpointError | None:
    """The error raised on purpose, which `instantiate` wraps when it comes from a constructor."""
    while error is not None and not isinstance(error, CheckpointError):
        error = error.__cause__
    return error


def main() -> None:
    """Composes the configuration and trains; see `--help`."""
    register()
    _job()


if __name__ == "__main__":
    main()
