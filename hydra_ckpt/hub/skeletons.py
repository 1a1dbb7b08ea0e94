"""transformers models without data, from what their configuration says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from hydra_ckpt.errors import CheckpointConfigError, CheckpointNotFoundError


def skeleton(kind: type[Any], config: Any) -> Any:
    """A model of a class on the meta device; the configuration is not touched.

    Raises:
        Exception: Whatever the class raises, where it cannot be built without data.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        return kind(copy.deepcopy(config))


def configured(base: str, option: str) -> tuple[type[Any], Any]:
    """The class and the configuration of a model on this machine.

    Args:
        base: A directory, or a hub id of which the cache has the configuration.
        option: What it was named with, for messages.

    Raises:
        CheckpointConfigError: transformers is not installed, or has no such class: the model brings its own code.
        CheckpointNotFoundError: There is no configuration.
    """
    try:
        import transformers
    except ImportError:
        raise CheckpointConfigError(f"{option} needs transformers: pip install 'hydra-ckpt[transformers]'") from None
    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        why = "" if Path(base).is_absolute() and not Path(base).exists() else f" ({error})"
        raise CheckpointNotFoundError(
            f"the base model {base} is not on this machine; name its directory, or a hub id in the cache, with "
            f"{option}{why}"
        ) from None
    name = (config.architectures or ["AutoModel"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise CheckpointConfigError(
            f"{base} is a {name}, which transformers {transformers.__version__} does not have: models that bring their "
            "own code are not run by this tool"
        )
    return kind, config
