"""Settings that cannot be meant are refused before a model is built, in one line with the key and its choices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hydra_ckpt.recipe.refusals import refusal
from hydra_ckpt.recipe.settings import check_together, read_settings
from tests.programs import run

REPOSITORY = Path(__file__).resolve().parents[1]


def refused(directory: str | None, config_name: str, *overrides: str) -> str:
    """Does what the application does before it builds anything; the line that ends it, empty if nothing does."""
    start = initialize_config_module if directory is None else initialize_config_dir
    with start(directory or "hydra_ckpt.conf", version_base="1.3"):
        try:
            cfg: Any = compose(config_name, overrides=list(overrides))
            settings = read_settings(cfg)
            with instantiate(cfg.callbacks.checkpoint) as callback:
                check_together(settings, callback.config)
        except Exception as error:  # noqa: BLE001 - what is raised is the question
            return refusal(error) or f"not a refusal: {error!r}"
    return ""


WRONG = [
    ("checkpoint.save_consolidate=final", ["checkpoint.save_consolidate: there is no such key; did you mean save_con"]),
    ("+checkpoint.save_consolidate=final", ["did you mean save_consolidated", "more, see docs/configuration.md"]),
    ("checkpoint.is_async=perhaps", ["checkpoint.is_async='perhaps'", "true or false"]),
    ("checkpoint.is_async=1.5", ["checkpoint.is_async=1.5", "true or false"]),
    ("checkpoint.save_consolidated=sometimes", ["checkpoint.save_consolidated='sometimes'", "every", "final", "false"]),
    ("checkpoint.save_consolidated=null", ["checkpoint.save_consolidated=None", "every", "final", "false"]),
    ("checkpoint.model_save_format=pickle", ["checkpoint.model_save_format='pickle'", "safetensors or torch_save"]),
    ("checkpoint.retention=3", ["checkpoint.retention=3", "a mapping like {newest: 3"]),
    ("checkpoint.retention={newst:3}", ["checkpoint.retention.newst: there is no such rule; choose from newest, best"]),
    ("checkpoint.retention={newest:0}", ["checkpoint.retention.newest=0", "a whole number of at least 1"]),
    ("checkpoint.retention={any_of:[{newst:3}]}", ["checkpoint.retention.any_of[0].newst: there is no such rule"]),
    ("callbacks.checkpoint.every_n_step=3", ["callbacks.checkpoint.every_n_step: there is", "mean every_n_steps?"]),
    ("callbacks.checkpoint.every_n_steps=many", ["callbacks.checkpoint.every_n_steps", "many"]),
    ("callbacks.checkpoint.every_n_steps=0", ["callbacks.checkpoint.every_n_steps=0: expected a positive number"]),
    ("callbacks.checkpoint.on_improvement=perhaps", ["callbacks.checkpoint.on_improvement", "perhaps"]),
    ("callbacks.checkpoint.signals=[SIGFOO]", ["callbacks.checkpoint.signals: there is no signal 'SIGFOO'"]),
    ("trainer.max_stepz=1", ["trainer.max_stepz: there is no such key; did you mean max_steps"]),
    ("trainer.max_steps=many", ["trainer.max_steps: Value 'many'"]),
    ("trainer.mixed_precision=fp16", ["trainer.mixed_precision=fp16 is not one of: no, bf16"]),
]
ONLY_WITH_OPTIONS = [
    ("checkpoint=asink", ["checkpoint=asink: there is no such option; did you mean async? checkpoint takes async"]),
    ("checkpoint/schedule=step", ["checkpoint/schedule=step: there is no such option; did you mean steps?"]),
    ("chekpoint=async", ["chekpoint: there is no such key; did you mean checkpoint?"]),
    ("checkpoint=peft", ["lora is null and checkpoint.is_peft=True"]),
]


@pytest.mark.parametrize(("override", "says"), WRONG + ONLY_WITH_OPTIONS, ids=lambda value: str(value)[:40])
def test_what_is_typed_wrong_is_refused(override: str, says: list[str]) -> None:
    line = refused(None, "hydra_ckpt_train", override)
    assert all(text in line for text in says), line
    assert "\n" not in line


@pytest.mark.parametrize(("override", "says"), WRONG, ids=lambda value: str(value)[:40])
def test_so_it_is_when_a_saved_run_is_opened_that_has_lost_its_schema(
    tmp_path: Path, override: str, says: list[str]
) -> None:
    with initialize_config_module("hydra_ckpt.conf", version_base="1.3"):
        OmegaConf.save(compose("hydra_ckpt_train"), tmp_path / "config.yaml")
    assert refused(str(tmp_path), "config") == ""
    line = refused(str(tmp_path), "config", override)
    assert all(text in line for text in says), line


def test_a_saved_run_edited_by_hand_is_refused_by_the_key(tmp_path: Path) -> None:
    with initialize_config_module("hydra_ckpt.conf", version_base="1.3"):
        cfg = compose("hydra_ckpt_train")
    text = OmegaConf.to_yaml(cfg)
    for old, new, says in [
        ("is_async: false", "is_asink: false", "checkpoint.is_asink: there is no such key; did you mean is_async?"),
        ("on_improvement: false", "on_improvement: 'no'", "callbacks.checkpoint.on_improvement='no': expected true"),
        ("every_n_epochs:", "every_n_eons:", "callbacks.checkpoint.every_n_eons: there is no such key"),
    ]:
        (tmp_path / "config.yaml").write_text(text.replace(old, new))
        assert says in refused(str(tmp_path), "config")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["checkpoint=torch_save", "checkpoint.save_consolidated=every"], "save_consolidated=every has no effect"),
        (["checkpoint=off", "checkpoint.restore_from=best"], "restore_from=best is ignored"),
        (["experiment=hydra_ckpt_lora", "checkpoint.model_save_format=torch_save"], "it becomes safetensors"),
    ],
)
def test_where_a_warning_is_promised_it_is_one_and_comes_once(
    caplog: pytest.LogCaptureFixture, overrides: list[str], says: str
) -> None:
    assert refused(None, "hydra_ckpt_train", *overrides) == ""
    assert len([record for record in caplog.records if says in record.message]) == 1


def test_what_is_no_refusal_keeps_its_stack() -> None:
    assert refusal(RuntimeError("out of memory")) is None
    assert refusal(KeyError("loss")) is None


# --- on the command line


def command(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}
    return run([sys.executable, "-m", "hydra_ckpt.recipe", *arguments], cwd=cwd, env=environment)


@pytest.mark.parametrize("mode", [[], ["-m"]], ids=["run", "sweep"])
def test_a_typo_ends_the_application_at_once_in_one_line(tmp_path: Path, mode: list[str]) -> None:
    done = command(*mode, "checkpoint.is_asink=true", cwd=tmp_path)
    assert done.returncode == 1
    assert "checkpoint.is_asink: there is no such key; did you mean is_async?" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.yaml"))


def test_settings_that_do_not_fit_end_it_in_one_line(tmp_path: Path) -> None:
    done = command("mesh.dp_shard=2", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.count("TopologyError: mesh.dp_replicate=1, mesh.dp_shard=2") == 1
    assert not done.stderr


@pytest.mark.slow
def test_a_sweep_says_it_for_the_job_and_runs_the_others(tmp_path: Path) -> None:
    refuses = "checkpoint.save_consolidated=sometimes,final"
    done = command("-m", refuses, "data.path=/nowhere", "run_name=sweep", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.count("CheckpointConfigError: checkpoint.save_consolidated='sometimes'") == 1
    assert done.stdout.count("CheckpointConfigError: data.path=/nowhere") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "sometimes" in (tmp_path / "multirun/hydra_ckpt/sweep/0/hydra_ckpt_train.log").read_text()


def test_the_stack_can_be_had(tmp_path: Path) -> None:
    done = command("checkpoint.is_asink=true", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
