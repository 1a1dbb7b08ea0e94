"""Weights of an older version of a model, whose names its own loading takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm as older_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from hydra_ckpt import AppState, CheckpointingConfig, KeyMismatchError, LoadReport


def _moved(root: Path, saved: nn.Module, fresh: nn.Module, **options: Any) -> LoadReport:
    config = CheckpointingConfig(checkpoint_dir=str(root), **options)
    with config.build(0, 0, 0) as checkpointer:
        checkpointer.save(AppState(saved), step=1).result()
    with config.build(0, 0, 0) as checkpointer:
        return checkpointer.load(AppState(fresh), restore_from="latest")


class _Named(nn.Module):
    """A layer whose weight had the name `old`, and whose hook renames or drops that."""

    def __init__(self, *, renames: bool) -> None:
        super().__init__()
        self.new, self.scale = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
        self.renames = renames
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        old = state.pop(f"{prefix}old", None)
        if old is not None:
            state[f"{prefix}new"] = old if module.renames else module.new.detach()


class _Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.old, self.scale = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm(tmp_path: Path) -> None:
    """PyTorch's hook renames what the older weight_norm has saved."""
    saved = nn.Sequential(older_weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    fresh = nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    report = _moved(tmp_path, saved, fresh)
    assert torch.equal(fresh(torch.ones(4)), saved(torch.ones(4)))
    assert report.trusted == ("model",)
    assert "0.parametrizations.weight.original0 (made from entries of other names)" in report.notes[0]
    assert not report.missing


def test_own_hook(tmp_path: Path) -> None:
    """Only the layer whose weight is renamed needs its hook; the rest is loaded as usual."""
    saved, fresh = nn.Sequential(_Old(), nn.Linear(2, 2)), nn.Sequential(_Named(renames=True), nn.Linear(2, 2))
    report = _moved(tmp_path, saved, fresh)
    expected = [item.detach() for item in saved.parameters()]
    assert all(map(torch.equal, expected, fresh.parameters()))
    assert report.trusted == ("model",)


def test_a_hook_that_drops_a_weight_is_no_renaming(tmp_path: Path) -> None:
    fresh = nn.Sequential(_Named(renames=False), nn.Linear(2, 2))
    before = [item.detach().clone() for item in fresh.parameters()]
    with pytest.raises(KeyMismatchError, match="takes the older names") as raised:
        _moved(tmp_path, nn.Sequential(_Old(), nn.Linear(2, 2)), fresh)
    assert raised.value.missing == ["0.new"]
    assert all(map(torch.equal, before, fresh.parameters()))
