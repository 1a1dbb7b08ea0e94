"""Exports and base loads of transformers' architectures, all that can be made tiny by cutting down their sizes.

For each: the export has the names, types and bits of `save_pretrained`, `from_pretrained` opens it without anything
missing or left over, a model on the meta device gets the same from `load_base_model`, and a run resumes from it.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hydra_ckpt import AppState, CheckpointingConfig

transformers = pytest.importorskip("transformers")

from tests.tiny_configs import tiny_models  # noqa: E402 - needs transformers

PARTS = 8
MIN_CHECKED = 500  # with the release of transformers that the constraints name


def _random(kind: type[Any], config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = kind(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _state(model: Any) -> dict[str, torch.Tensor]:
    return {**model.state_dict(), **dict(model.named_buffers())}


def _unequal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """Names that are in one only, and of tensors that differ in a bit."""
    common = found.keys() & wanted.keys()
    return sorted(found.keys() ^ wanted.keys()) + sorted(
        name for name in common if not _same(found[name], wanted[name])
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _unlike(ours: Path, theirs: Path, kind: type[Any]) -> list[str]:
    """Configuration files that differ; two classes add to theirs in a `save_pretrained` of their own."""
    if kind.save_pretrained is not transformers.PreTrainedModel.save_pretrained:
        return []
    files = {path.name for place in (ours, theirs) for path in place.glob("*config.json")}
    texts = {
        name: [json.loads((place / name).read_text()) for place in (ours, theirs) if (place / name).exists()]
        for name in files
    }
    return sorted(name for name, found in texts.items() if len(found) != 2 or found[0] != found[1])


def _check(kind: type[Any], config: Any, root: Path) -> dict[str, list[str]] | None:
    """What differs, by where; None for a model that transformers itself does not build, or opens otherwise."""
    try:
        model = _random(kind, config, 1)
        model.save_pretrained(root / "theirs")
        opened, info = kind.from_pretrained(root / "theirs", output_loading_info=True)
    except Exception:  # noqa: BLE001 - not ours
        return None
    if _unequal(opened.state_dict(), model.state_dict()) or info["missing_keys"] or info["unexpected_keys"]:
        return None
    options = {"checkpoint_dir": str(root / "run"), "save_consolidated": "always"}
    with CheckpointingConfig(**options, model_repo_id=str(root / "theirs")).build(0, 0, 0) as engine:
        export = engine.save(AppState(model), step=1).result().path / "model" / "consolidated"
        with torch.device("meta"):
            fresh = kind(copy.deepcopy(config))
        report = engine.load_base_model(fresh)
        other = _random(kind, config, 2)
        engine.load(AppState(other))
    again, info = kind.from_pretrained(export, output_loading_info=True)
    found = {
        "export": _unequal(_tensors(export), _tensors(root / "theirs")),
        "opened": _unequal(_state(again), _state(opened)) + sorted(info["missing_keys"]),
        "base": _unequal(_state(fresh), _state(opened)) + list(report.unexpected),
        "resumed": _unequal(other.state_dict(), model.state_dict()),
        "settings": _unlike(export, root / "theirs", kind),
    }
    return {place: names for place, names in found.items() if names}


def _check_all(models: list[tuple[str, type[Any], Any]], root: Path) -> int:
    different, checked = {}, 0
    for name, kind, config in models:
        try:
            found = _check(kind, config, root / name)
        except Exception as error:  # noqa: BLE001 - all are told at once
            found = {"error": [f"{type(error).__name__}: {error}"]}
        shutil.rmtree(root / name, ignore_errors=True)
        checked += found is not None
        if found:
            different[f"{name} ({kind.__name__})"] = found
    assert not different, "\n".join(f"{name}: {found}" for name, found in different.items())
    return checked


def test_every_fortieth_architecture_goes_out_and_comes_in_as_in_transformers(tmp_path: Path) -> None:
    assert _check_all(list(tiny_models(step=40)), tmp_path) > MIN_CHECKED // 40


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_all_architectures_go_out_and_come_in_as_in_transformers(tmp_path: Path, part: int) -> None:
    assert _check_all(list(tiny_models(part, PARTS)), tmp_path) > MIN_CHECKED // PARTS
