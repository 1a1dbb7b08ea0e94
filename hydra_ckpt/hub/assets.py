"""The small files of an export: config.json, generation_config.json, the tokenizer's."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from hydra_ckpt.state.model import unwrap
from hydra_ckpt.state.peft import adapter_config, is_peft_model


def model_assets(model: nn.Module) -> dict[str, bytes]:
    """Configuration files of a transformers model or a PEFT adapter; none for any other model.

    They are what `save_pretrained` would write. The live model's configuration is not touched.
    """
    if is_peft_model(model):
        return _saved(adapter_config(model))
    model = unwrap(model)
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return {}
    config = copy.deepcopy(model.config)
    config.architectures = [_class_name(model)]
    config.dtype = next(
        (str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()), None
    )
    found = _saved(config)
    if model.can_generate() and model.generation_config is not None:
        found.update(_saved(copy.deepcopy(model.generation_config)))
    return found


def _class_name(model: nn.Module) -> str:
    name = type(model).__name__
    # fully_shard gives a module a class of its own, named after the original.
    return name.removeprefix("FSDP") if isinstance(model, FSDPModule) else name


def tokenizer_assets(tokenizer: Any) -> dict[str, bytes]:
    """The files a tokenizer or processor saves; none where there is no tokenizer."""
    return {} if tokenizer is None else _saved(tokenizer)


def _saved(thing: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        thing.save_pretrained(directory)
        return {str(path.relative_to(directory)): path.read_bytes() for path in _files_below(Path(directory))}


def _files_below(directory: Path) -> Iterable[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())
