"""Containers of OmegaConf in state, as Hydra's `instantiate` hands them over."""

from __future__ import annotations

import enum
import pickle
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from hydra_ckpt import AppState, CheckpointError, CheckpointingConfig, LoadReport
from tests.holders import Holder


class Colour(enum.Enum):
    RED = 1


@dataclass
class Typed:
    rate: float = 0.1
    sizes: list[int] = field(default_factory=lambda: [1, 2])


def save_and_load(root: Path, saved: AppState, fresh: AppState) -> LoadReport:
    config = CheckpointingConfig(checkpoint_dir=str(root))
    with config.build(0, 0, 0) as checkpointer:
        checkpointer.save(saved, step=1).result()
    with config.build(0, 0, 0) as checkpointer:
        report = checkpointer.load(fresh, restore_from="latest")
    assert report is not None
    return report


def tree(node: Any) -> Any:
    """A node with everything that OmegaConf knows about it, except for what is around it."""
    content = node.__dict__.get("_content")
    if isinstance(content, dict):
        inside: Any = [(key, tree(item)) for key, item in content.items()]
    else:
        inside = [tree(item) for item in content] if isinstance(content, list) else repr(node._value())
    return type(node), sorted((key, repr(value)) for key, value in vars(node._metadata).items()), inside


def full() -> DictConfig:
    config = OmegaConf.create(
        {
            "list": [1, 2.5, float("nan"), -0.0, "text", None, True, b"bytes", {"missing": "???"}],
            3: {"nested": ["${list.0}", "${.1}"], "enum": Colour.RED, "path": PurePosixPath("a/b")},
            "~": {"kind": "dict", "~": "tensor"},
        },
        flags={"allow_objects": True},
    )
    OmegaConf.set_struct(config, True)
    OmegaConf.set_readonly(config["list"], True)
    config._set_flag("allow_objects", None)
    config.__dict__["_content"]["none"] = DictConfig(None, key="none", parent=config)
    config.__dict__["_content"]["later"] = ListConfig("???", key="later", parent=config)
    return config


@pytest.mark.parametrize(
    "make", [full, lambda: ListConfig([]), lambda: DictConfig(None), lambda: ListConfig("???"), lambda: full()["list"]]
)
def test_a_container_comes_back_as_it_was(tmp_path: Path, make: Any) -> None:
    config = make()
    fresh = Holder()
    report = save_and_load(
        tmp_path,
        AppState(nn.Linear(1, 1), extras={"box": Holder([config, config])}),
        AppState(nn.Linear(1, 1), extras={"box": fresh}),
    )
    assert "extras.box" in report.exact
    one, two = fresh.held
    assert one is two
    expected = pickle.loads(pickle.dumps(config))
    if config._get_parent() is not None:
        expected = ListConfig(config, flags={"readonly": True, "struct": True})
    assert tree(one) == tree(expected)


def test_milestones_from_hydra_continue(tmp_path: Path) -> None:
    schedulers = torch.optim.lr_scheduler
    config = OmegaConf.create({"_target_": "torch.optim.lr_scheduler.SequentialLR", "milestones": [2, 4]})

    def made() -> AppState:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        optimizer.param_groups[0]["beside"] = instantiate(OmegaConf.create({"_target_": "builtins.dict", "a": [1]}))
        inner = [schedulers.ConstantLR(optimizer), *(schedulers.ExponentialLR(optimizer, rate) for rate in (0.9, 0.8))]
        return AppState(model, optimizer, instantiate(config, optimizer=optimizer, schedulers=inner))

    def train(state: AppState) -> None:
        for _ in range(3):
            state.optimizer.zero_grad()
            state.model(torch.ones(1, 2)).square().sum().backward()
            state.optimizer.step()
            state.lr_scheduler.step()

    state, fresh = made(), made()
    train(state)
    save_and_load(tmp_path, state, fresh)
    assert type(fresh.lr_scheduler._milestones) is ListConfig
    assert type(fresh.optimizer.param_groups[0]["beside"]["a"]) is ListConfig
    assert fresh.lr_scheduler._milestones._get_flag("allow_objects") is True
    train(state)
    train(fresh)
    assert torch.equal(state.model.weight, fresh.model.weight)


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (OmegaConf.structured(Typed), "it is typed"),
        (OmegaConf.create({"in": Typed()})["in"], "it is typed"),
        (OmegaConf.create({"in": Typed}), "its value in is typed"),
        (OmegaConf.create({"a": 1, "b": {"c": "${a}"}}).b, r"its value c is the interpolation \$\{a\}"),
        (OmegaConf.create({"a": [1], "b": {"c": "${a}"}}).__dict__["_content"]["b"], "interpolation"),
        (DictConfig({"a": [torch.ones(1)]}, flags={"allow_objects": True}), "its value a.0 is a Tensor"),
    ],
)
def test_what_is_typed_or_needs_its_surroundings_is_refused_with_the_way_out(
    tmp_path: Path, held: Any, why: str
) -> None:
    state = AppState(nn.Linear(1, 1), extras={"box": Holder({"config": held})})
    with pytest.raises(CheckpointError, match=rf"extras\.box\.held\.config: .*{why}.*to_container.*_convert_: all"):
        save_and_load(tmp_path, state, state)
