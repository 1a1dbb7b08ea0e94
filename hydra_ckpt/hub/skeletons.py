"""Builds transformers models without data from their configuration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from hydra_ckpt.errors import CheckpointConfigError, CheckpointNotFoundError


def skeleton(kind: type[Any], config: Any) -> Any:
    """A model of a class on the meta device; the configuration is not changed.

    Raises:
        Exception: Any exception of the class, if it cannot be built without data.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        return kind(copy.deepcopy(config))


def configured(base: str, option: str, revision: str | None = None) -> tuple[type[Any], Any]:
    """The class and the configuration of a model on this machine. Custom code is not run.

    Args:
        base: A directory, or a hub id whose configuration is in the cache.
        option: The option that named it, for messages.
        revision: Which revision of a hub id; None for its main one.

    Raises:
        CheckpointConfigError: transformers is not installed, or has no such class because the model has its own code.
        CheckpointNotFoundError: There is no configuration.
    """
    try:
        import transformers
    except ImportError:
        raise CheckpointConfigError(f"{option} needs transformers: pip install 'hydra-ckpt[transformers]'") from None
    try:
        config = transformers.AutoConfig.from_pretrained(
            base, revision=revision or "main", local_files_only=True, trust_remote_code=False
        )
    except OSError as error:
        if Path(base).is_dir():
            raise CheckpointNotFoundError(f"{base} has no config.json that can be read: {error}") from None
        raise CheckpointNotFoundError(
            f"the base model {base} is not on this machine; name its directory, or a hub id in the cache, with {option}"
        ) from None
    except Exception as error:  # noqa: BLE001 - unknown model types, custom code, nonsensical settings
        raise CheckpointConfigError(
            f"the configuration of {base} cannot be used ({error}). This tool does not run models with their own code"
        ) from None
    name = (config.architectures or ["AutoModel"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise CheckpointConfigError(
            f"{base} is a {name}, which transformers {transformers.__version__} does not have: this tool does not run "
            "models with their own code"
        )
    return kind, config
