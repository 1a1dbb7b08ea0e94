"""The config groups in combination: every pair of options composes, and the result can be instantiated."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.utils import instantiate

from hydra_ckpt import CheckpointConfigError
from hydra_ckpt.recipe.settings import check_together, read_settings

CONF = Path(__file__).resolve().parents[1] / "conf"
ABSENT = "null"
Row = dict[str, str]


def options(group: str) -> list[str]:
    found = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    assert found, group
    return found


GROUPS = {group: options(group) for group in ("checkpoint", "checkpoint/retention", "checkpoint/schedule")}
HYDRA = {group: ["default", *options(group)] for group in ("hydra/output", "hydra/job_logging")}
OURS = {"experiment": [ABSENT, *options("experiment")], "hydra_ckpt_model": options("hydra_ckpt_model")}


def pairwise(groups: dict[str, list[str]]) -> Iterator[Row]:
    """Few rows in which every two options of different groups meet."""
    todo = {
        ((one, first), (other, second))
        for one, other in combinations(groups, 2)
        for first in groups[one]
        for second in groups[other]
    }
    while todo:
        row = dict(min(todo))
        for group, choices in groups.items():
            if group not in row:
                row[group] = max(choices, key=lambda option: len(todo & met({**row, group: option})))
        todo -= met({group: row[group] for group in groups})
        yield {group: row[group] for group in groups}


def met(row: Row) -> set[Any]:
    order = [group for group in (*GROUPS, *HYDRA, *OURS) if group in row]
    return set(combinations([(group, row[group]) for group in order], 2))


def name(row: Row) -> str:
    return " ".join(row.values())


def expected_of(cfg: Any, row: Row) -> None:
    """What the options say has arrived."""
    retention = yaml.safe_load((CONF / f"checkpoint/retention/{row['checkpoint/retention']}.yaml").read_text())
    assert cfg.checkpoint.retention == retention
    if row["checkpoint/schedule"] != ABSENT:
        schedule = yaml.safe_load((CONF / f"checkpoint/schedule/{row['checkpoint/schedule']}.yaml").read_text())
        assert {key: cfg.callbacks.checkpoint[key] for key in schedule} == schedule
    saved = yaml.safe_load((CONF / f"checkpoint/{row['checkpoint']}.yaml").read_text())
    del saved["defaults"]
    assert {key: cfg.checkpoint[key] for key in saved} == saved


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stranger")
    defaults = [{"checkpoint": "default"}, {"callbacks": "hydra_ckpt"}, "_self_"]
    callbacks = {"checkpoint": {"every_n_steps": 7}}
    (directory / "listed.yaml").write_text(yaml.safe_dump({"defaults": defaults, "callbacks": callbacks}))
    (directory / "bare.yaml").write_text("lr: 0.1\n")
    return directory


def test_every_pair_composes_in_a_stranger_s_application(stranger: Path) -> None:
    rows = list(pairwise({**GROUPS, "checkpoint/schedule": [ABSENT, *GROUPS["checkpoint/schedule"]], **HYDRA}))
    assert len(rows) < 60
    with initialize_config_dir(str(stranger), version_base="1.3"):
        for row in rows:
            overrides = [f"{group}={option}" for group, option in row.items() if group != "checkpoint/schedule"]
            if row["checkpoint/schedule"] != ABSENT:
                overrides.append(f"+checkpoint/schedule={row['checkpoint/schedule']}")
            cfg = compose("listed", overrides=overrides)
            expected_of(cfg, row)
            with instantiate(cfg.callbacks.checkpoint) as callback:
                assert callback.config == instantiate(cfg.checkpoint)


def test_every_cadence_can_be_added_to_an_application_that_lists_nothing(stranger: Path) -> None:
    with initialize_config_dir(str(stranger), version_base="1.3"):
        for schedule in GROUPS["checkpoint/schedule"]:
            added = ["+checkpoint=default", "+callbacks=hydra_ckpt", f"+checkpoint/schedule={schedule}"]
            cfg = compose("bare", overrides=added)
            expected_of(cfg, {"checkpoint": "default", "checkpoint/retention": "all", "checkpoint/schedule": schedule})


def test_every_pair_composes_in_our_application() -> None:
    rows = list(pairwise({**GROUPS, "checkpoint/schedule": [ABSENT, *GROUPS["checkpoint/schedule"]], **HYDRA, **OURS}))
    assert len(rows) < 80
    with initialize_config_module("hydra_ckpt.conf", version_base="1.3"):
        for row in rows:
            overrides = [f"{group}={option}" for group, option in row.items() if option != ABSENT]
            cfg = compose("hydra_ckpt_train", overrides=[*overrides, "model.pretrained=some/model"])
            settings = read_settings(cfg)
            adapter = row["experiment"] == "hydra_ckpt_lora"
            with instantiate(cfg.callbacks.checkpoint) as callback:
                if (row["checkpoint"] == "peft") and not adapter:
                    with pytest.raises(CheckpointConfigError, match=r"lora is null and checkpoint\.is_peft=True"):
                        check_together(settings, callback.config)
                    continue
                check_together(settings, callback.config)
            expected_of(cfg, row)
