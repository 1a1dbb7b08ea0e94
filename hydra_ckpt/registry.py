"""What this package registers with Hydra: the schemas and resolvers for its options, and where the options are."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from hydra_ckpt.config import CheckpointingConfig
from hydra_ckpt.jobs.launch import register_resolvers

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath

__all__ = ["offer", "register"]

_PROVIDER = "hydra_ckpt"


@dataclass
class _CheckpointTarget:
    """Names what `instantiate` makes of the group; a separate base, so that these keys are printed first."""

    _target_: str = "hydra_ckpt.CheckpointingConfig"
    # Containers of omegaconf would leak into what is saved, and weights_only loading refuses them.
    _convert_: str = "all"


@dataclass
class CheckpointSchema(CheckpointingConfig, _CheckpointTarget):
    """Schema of the group ``checkpoint``: the runtime dataclass itself, so the two cannot drift apart."""

    # An optional mapping that is null cannot be overridden by a mapping on the command line; the dataclass checks it.
    retention: Any = None


@dataclass
class CallbackSchema:
    """Schema of ``callbacks.checkpoint``: the arguments of `CheckpointCallback` that can be written down."""

    _target_: str = "hydra_ckpt.CheckpointCallback"
    _convert_: str = "all"
    config: Any = "${checkpoint}"
    every_n_steps: int | None = None
    every_n_seconds: float | None = None
    every_n_epochs: int | None = None
    at_steps: list[int] | None = None
    on_improvement: bool = False
    save_on_exception: bool = False
    max_run_time_s: float | None = None
    # A name, a number, or a list of them.
    signals: Any = field(default_factory=lambda: ["SIGTERM"])
    requeue_exit_code: int | None = None


class HydraCkptSearchPath(SearchPathPlugin):
    """Appends our options to Hydra's search path, after the application's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the directory of options once.

        Args:
            search_path: Hydra's search path while it is being put together.
        """
        if all(element.provider != _PROVIDER for element in search_path.get_path()):
            search_path.append(_PROVIDER, _options_location())


def offer() -> None:
    """Put the schemas into Hydra's ConfigStore, and the resolvers into OmegaConf; doing so again changes nothing.

    Classes are stored, not instances: an instance would have run its validation, and the enum and the resolved
    cache directory would show up in every printed configuration.
    """
    store = ConfigStore.instance()
    store.store(group="checkpoint", name="base_checkpoint", node=CheckpointSchema, provider=_PROVIDER)
    store.store(group="callbacks", name="base_hydra_ckpt_callback", node=CallbackSchema, provider=_PROVIDER)
    register_resolvers()


def register() -> None:
    """Make ``checkpoint=`` and ``callbacks=hydra_ckpt`` known to Hydra; calling it again changes nothing.

    An installed package is found by Hydra itself. Call this before ``@hydra.main`` runs where it is only on the
    Python path, as in a bare checkout.
    """
    offer()
    Plugins.instance().register(HydraCkptSearchPath)


def _options_location() -> str:
    if find_spec("hydra_ckpt.conf") is not None:
        return "pkg://hydra_ckpt.conf"
    # In a bare checkout, nothing maps that package to the directory next to ours.
    return f"file://{Path(__file__).resolve().parents[1] / 'conf'}"
