"""Model cards: a README.md that records how an export was made, to be completed before publishing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import nn

from hydra_ckpt.hub.conversion import is_transformers_model, original_class
from hydra_ckpt.state.peft import is_peft_model
from hydra_ckpt.state.wrappers import unwrap

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PACKAGES = ("hydra-ckpt", "torch", "transformers", "peft", "diffusers")


@dataclass(frozen=True)
class SaveInfo:
    """The save that an export belongs to.

    Attributes:
        step: Completed optimizer steps.
        epoch: The epoch.
        metrics: Known at the save.
        texts: Hydra's configuration as YAML, by file name.
    """

    step: int
    epoch: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def model_card(model: nn.Module, made: SaveInfo, base_model: str | None) -> bytes:
    """A card with the front matter that the hub reads (https://huggingface.co/docs/hub/model-cards).

    Args:
        model: The exported model.
        made: The save it belongs to.
        base_model: The model it was trained from; named only if it looks like a hub id.
    """
    front = {"library_name": _library(model), "base_model": _hub_id(base_model), "tags": ["hydra_ckpt"]}
    # JSON is YAML, and quoted strings avoid YAML's special words.
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items() if value is not None), "---"]
    name = original_class(unwrap(model)).__name__
    lines += ["", f"# {name}", "", "To be completed: what this model is for, its data, its limits, its licence."]
    lines += ["", "## How it was made", "", "| | |", "|---|---|"]
    lines += [f"| step | {made.step} |", f"| epoch | {made.epoch} |"]
    lines += [f"| {_cell(key)} | {value:.6g} |" for key, value in sorted(made.metrics.items())]
    lines += [f"| {package} | {found} |" for package in _PACKAGES if (found := _version(package))]
    for file in ("overrides.yaml", "config.yaml"):
        if file in made.texts:
            lines += ["", f"`{file}`:", "", *(f"    {line}" for line in made.texts[file].splitlines())]
    return ("\n".join(lines) + "\n").encode()


def _library(model: nn.Module) -> str | None:
    if is_peft_model(model):
        return "peft"
    diffusers = sys.modules.get("diffusers")
    if diffusers is not None and isinstance(unwrap(model), diffusers.ModelMixin):
        return "diffusers"
    return "transformers" if is_transformers_model(model) else None


def _hub_id(name: str | None) -> str | None:
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _version(package: str) -> str | None:
    module = package.replace("-", "_")
    try:
        return version(package) if module in sys.modules else None
    except PackageNotFoundError:
        return None


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
