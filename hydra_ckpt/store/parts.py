"""The parts of a checkpoint: which of them are models, and which of these are exports.

A part is a folder of the checkpoint: `model`, or `model/<name>` if there are several models, `optim`, `extras`. What is
in a part has a name that begins with the part's: the file `model/shard-00001.safetensors`, the label `model/fc.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from hydra_ckpt.store import names


def part_of(model: str) -> str:
    """The part that holds a model, by its name; the name is empty if there is only one."""
    return f"{names.MODEL}/{model}" if model else names.MODEL


def is_of_models(name: str) -> bool:
    """Whether a part is a model, or a file or a label belongs to one."""
    return name.split("/", maxsplit=1)[0] == names.MODEL


def models_in(parts: Iterable[str]) -> list[str]:
    """The parts that are models, in their order."""
    return [part for part in parts if is_of_models(part)]


def is_export(files: Iterable[str]) -> bool:
    """Whether these files of a model are an export, and so have the names of Hugging Face."""
    return all(PurePosixPath(file).parent.name == names.CONSOLIDATED for file in files)
