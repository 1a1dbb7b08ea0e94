"""Model cards: front matter that the hub takes, and how the export was made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.hub.card import SaveInfo, model_card
from hydra_ckpt.hub.offline import export_checkpoint
from tests.hub_models import make

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("transformers")


@pytest.mark.parametrize("mode", ["always", "false"])
def test_an_export_says_how_it_was_made(tmp_path: Path, mode: str) -> None:
    model = make("llama")
    model.config._name_or_path = "some-org/a-base"
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), save_consolidated=mode, model_card=True)
    with config.build(0, 0, 0) as engine:
        checkpoint = engine.save(AppState(model), step=7, epoch=2, metrics={"val|loss": 1.25}).result()
    export = export_checkpoint(checkpoint, tmp_path / "out").path
    if mode == "always":
        inline = (checkpoint.path / "model" / "consolidated" / "README.md").read_bytes()
        assert (export / "README.md").read_bytes() == inline
    card = hub.ModelCard.load(export / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "some-org/a-base"
    assert card.data.tags == ["hydra_ckpt"]
    assert "# LlamaForCausalLM" in card.text
    assert "| step | 7 |" in card.text
    assert "| epoch | 2 |" in card.text
    assert "| val\\|loss | 1.25 |" in card.text


def test_there_is_no_card_unless_one_is_wanted(tmp_path: Path) -> None:
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path / "run"), save_consolidated="always")
    with config.build(0, 0, 0) as engine:
        checkpoint = engine.save(AppState(make("llama")), step=1).result()
    assert not (checkpoint.path / "model" / "consolidated" / "README.md").exists()


def test_a_card_holds_hydras_configuration_and_names_no_local_base_model(tmp_path: Path) -> None:
    made = SaveInfo(3, 0, texts={"overrides.yaml": "- optimizer.lr=0.1\n", "config.yaml": "optimizer:\n  lr: 0.1\n"})
    (tmp_path / "org").mkdir()
    for base in (str(tmp_path), None):
        text = model_card(torch.nn.Linear(2, 2), made, base).decode()
        assert "base_model" not in text
        assert "library_name" not in text
    assert "    - optimizer.lr=0.1" in text
    assert "    optimizer:\n      lr: 0.1" in text
