"""The options inside Hydra: composed, overridden, swept, instantiated, and read back without their schema."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hydra_ckpt import CheckpointConfigError, CheckpointingConfig, SaveConsolidatedMode, register
from hydra_ckpt.registry import CallbackSchema, CheckpointSchema

FALSE, FINAL, EVERY = SaveConsolidatedMode.FALSE, SaveConsolidatedMode.FINAL, SaveConsolidatedMode.EVERY
CONF = Path(__file__).parents[1] / "conf"

APP = """
import json
import sys

import hydra
from hydra.utils import instantiate
from omegaconf import OmegaConf


@hydra.main(version_base="1.3", config_path=".", config_name=sys.argv.pop(1))
def main(cfg):
    config = instantiate(cfg.checkpoint)
    resolved = config.resolve()
    print("RESULT " + json.dumps({
        "type": type(config).__name__,
        "is_async": config.is_async,
        "save_consolidated": config.save_consolidated.value,
        "format": config.model_save_format,
        "enabled": config.enabled,
        "checkpoint_dir": str(resolved.where.checkpoint_dir),
        "owner": resolved.where.owner,
        "texts": dict(resolved.hydra_texts),
        "callback": OmegaConf.to_container(cfg.callbacks.checkpoint, resolve=False),
        "same": OmegaConf.to_container(cfg.callbacks.checkpoint.config) == OmegaConf.to_container(cfg.checkpoint),
        "torch": "torch" in sys.modules,
    }))


main()
"""
LISTED = {"defaults": [{"checkpoint": "default"}, {"callbacks": "hydra_ckpt"}, "_self_"], "lr": 0.1}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """A stranger's application; `listed` names our options in its defaults, `bare` does not."""
    directory = tmp_path_factory.mktemp("app")
    (directory / "app.py").write_text(APP)
    (directory / "listed.yaml").write_text(yaml.safe_dump(LISTED))
    (directory / "bare.yaml").write_text("lr: 0.1\n")
    return directory / "app.py"


def run(app, cwd, *arguments):
    return subprocess.run([sys.executable, str(app), *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def results(process):
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


@pytest.fixture
def composed(tmp_path):
    """A function composing the application that lists our options, with overrides."""
    (tmp_path / "listed.yaml").write_text(yaml.safe_dump(LISTED))
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield lambda *overrides: compose("listed", overrides=list(overrides))


# ---------------------------------------------------------------- composed


def test_the_default_option_is_the_dataclass_with_its_defaults(composed):
    config = instantiate(composed().checkpoint)
    assert type(config) is CheckpointingConfig
    assert config == CheckpointingConfig()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["checkpoint.save_consolidated=always"], {"save_consolidated": EVERY}),
        (["checkpoint.save_consolidated=Final"], {"save_consolidated": FINAL}),
        (["checkpoint.save_consolidated=true"], {"save_consolidated": EVERY}),
        (["checkpoint.save_consolidated=false"], {"save_consolidated": FALSE}),
        (["checkpoint.save_consolidated=no"], {"save_consolidated": FALSE}),
        (["checkpoint.save_consolidated=off"], {"save_consolidated": FALSE}),
        (["checkpoint.save_consolidated=never"], {"save_consolidated": FALSE}),
        (["checkpoint.save_consolidated=none"], {"save_consolidated": FALSE}),
        (["checkpoint=async"], {"is_async": True, "save_consolidated": FINAL}),
        (["checkpoint=every"], {"save_consolidated": EVERY}),
        (["checkpoint=off"], {"enabled": False}),
        (["checkpoint=torch_save"], {"model_save_format": "torch_save", "save_consolidated": FALSE}),
        (["checkpoint=async", "checkpoint.save_consolidated=every"], {"is_async": True, "save_consolidated": EVERY}),
        (["checkpoint.checkpoint_dir=/data/run1"], {"checkpoint_dir": "/data/run1"}),
        (["checkpoint.restore_from=null"], {"restore_from": None}),
        (["checkpoint.restore_from=false"], {"restore_from": None}),
        (["checkpoint.restore_from=none"], {"restore_from": "none"}),
        (["checkpoint.restore_from=epoch_0_step_20"], {"restore_from": "epoch_0_step_20"}),
        (["checkpoint.restore_parts=[model]"], {"restore_parts": ["model"]}),
        (["checkpoint.model_state_dict_keys=[a,b]"], {"model_state_dict_keys": ["a", "b"]}),
        (["checkpoint.retention={newest:3,best:2}"], {"retention": {"newest": 3, "best": 2}}),
        (["+checkpoint.retention.newest=3"], {"retention": {"newest": 3}}),
        (["checkpoint.dequantize_base_checkpoint=false"], {"dequantize_base_checkpoint": False}),
        (["checkpoint.consolidation_timeout_minutes=2"], {"consolidation_timeout_minutes": 2.0}),
        (["checkpoint.max_recent_checkpoints=2"], {"max_recent_checkpoints": 2}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "is",
)
def test_overrides_reach_the_dataclass(composed, overrides, expected):
    config = instantiate(composed(*overrides).checkpoint)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config == dataclasses.replace(CheckpointingConfig(), **expected)
    assert not any(OmegaConf.is_config(value) for value in vars(config).values())


@pytest.mark.parametrize(
    "override",
    ["checkpoint.save_consolidate=final", "checkpoint.is_asynch=true", "callbacks.checkpoint.every_n_step=3"],
)
def test_a_typo_in_a_key_is_refused_by_name(composed, override):
    with pytest.raises(ConfigCompositionException) as caught:
        composed(override)
    assert override.split("=", maxsplit=1)[0].rsplit(".", maxsplit=1)[1] in str(caught.value.__cause__)


@pytest.mark.parametrize(
    "override", ["checkpoint.save_consolidated=null", "checkpoint.save_consolidated=1", "checkpoint.is_async=perhaps"]
)
def test_a_wrong_type_is_refused_when_composed(composed, override):
    with pytest.raises(ConfigCompositionException):
        composed(override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("checkpoint.save_consolidated=sometimes", ["save_consolidated", "sometimes", "every", "final", "false"]),
        ("checkpoint.model_save_format=pickle", ["model_save_format", "pickle", "safetensors", "torch_save"]),
    ],
)
def test_a_wrong_value_is_refused_when_instantiated(composed, override, words):
    node = composed(override).checkpoint
    with pytest.raises(Exception, match=words[1]) as caught:
        instantiate(node)
    # Hydra 1.3 wraps what the target raises, Hydra 1.4 does not.
    assert isinstance(caught.value.__cause__ or caught.value, CheckpointConfigError)
    assert all(word in str(caught.value) for word in words)


def test_every_option_composes_and_instantiates(composed):
    options = sorted(path.stem for path in (CONF / "checkpoint").glob("*.yaml"))
    assert set(options) >= {"default", "async", "every", "off", "torch_save"}
    for option in options:
        assert isinstance(instantiate(composed(f"checkpoint={option}").checkpoint), CheckpointingConfig)


def test_the_callback_sits_at_callbacks_checkpoint_with_the_settings_interpolated(composed):
    node = composed("checkpoint.is_async=true", "callbacks.checkpoint.every_n_steps=20").callbacks.checkpoint
    assert node._target_ == "hydra_ckpt.CheckpointCallback"
    assert OmegaConf.to_container(node, resolve=False)["config"] == "${checkpoint}"
    assert node.every_n_steps == 20
    assert node.signals == ["SIGTERM"]
    assert instantiate(node.config) == CheckpointingConfig(is_async=True)


def test_the_callback_is_instantiated_with_the_settings(composed):
    from hydra_ckpt import CheckpointCallback

    callback = instantiate(composed("callbacks.checkpoint.every_n_steps=20").callbacks.checkpoint)
    assert type(callback) is CheckpointCallback
    callback.close()


def test_the_callback_s_schema_is_its_signature():
    from hydra_ckpt import CheckpointCallback

    parameters = dict(inspect.signature(CheckpointCallback).parameters)
    del parameters["checkpointer"]
    schema = {field.name: field for field in dataclasses.fields(CallbackSchema) if not field.name.startswith("_")}
    assert list(schema) == list(parameters)
    for name in list(schema)[1:]:
        default = getattr(CallbackSchema(), name)
        assert (tuple(default) if isinstance(default, list) else default) == parameters[name].default, name


def test_the_schema_adds_only_what_instantiate_needs():
    ours = {field.name for field in dataclasses.fields(CheckpointingConfig)}
    assert {field.name for field in dataclasses.fields(CheckpointSchema)} - ours == {"_target_", "_convert_"}


def test_settings_read_back_from_plain_yaml_are_the_same(composed, tmp_path):
    cfg = composed("checkpoint=async", "checkpoint.retention={newest:3}", "checkpoint.restore_parts=[model,rng]")
    path = tmp_path / "saved.yaml"
    OmegaConf.save(cfg, path)
    plain = yaml.safe_load(path.read_text())["checkpoint"]
    assert instantiate(plain) == instantiate(cfg.checkpoint)
    assert instantiate(OmegaConf.load(path).checkpoint) == instantiate(cfg.checkpoint)
    assert not any(isinstance(value, SaveConsolidatedMode) for value in plain.values())


def test_a_saved_run_opens_again_as_configuration(composed, tmp_path):
    """What `-cp <run>/.hydra -cn config` does: the same values, but without a schema."""
    OmegaConf.save(composed("checkpoint.save_consolidated=always"), tmp_path / "saved.yaml")
    config = instantiate(compose("saved", overrides=["checkpoint.is_async=true"]).checkpoint)
    assert (config.save_consolidated, config.is_async) == (EVERY, True)
    with pytest.raises(Exception, match=r"checkpoint\.is_async='perhaps'"):
        instantiate(compose("saved", overrides=["checkpoint.is_async=perhaps"]).checkpoint)


def test_registering_twice_changes_nothing(composed):
    before = OmegaConf.to_yaml(composed())
    register()
    register()
    assert OmegaConf.to_yaml(composed()) == before


def test_texts_come_from_memory_where_hydra_wrote_no_files(composed, tmp_path):
    cfg = compose(
        "listed",
        overrides=["lr=0.5", f"hydra.runtime.output_dir={tmp_path / 'out'}", "hydra.output_subdir=null"],
        return_hydra_config=True,
    )
    HydraConfig.instance().set_config(cfg)
    try:
        resolved = CheckpointingConfig().resolve()
    finally:
        HydraConfig.instance().cfg = None
    assert resolved.where.checkpoint_dir == tmp_path / "out/checkpoints"
    assert dict(resolved.hydra_texts).keys() == {"hydra.yaml", "overrides.yaml"}
    assert yaml.safe_load(dict(resolved.hydra_texts)["overrides.yaml"]) == ["lr=0.5"]


# ---------------------------------------------------------------- a real application


def test_an_application_that_lists_the_options(app, tmp_path):
    [result] = results(run(app, tmp_path, "listed", "checkpoint=async", "checkpoint.save_consolidated=always"))
    [run_dir] = (tmp_path / "outputs").glob("*/*")
    assert result["type"] == "CheckpointingConfig"
    assert (result["is_async"], result["save_consolidated"]) == (True, "every")
    assert result["checkpoint_dir"] == str(run_dir / "checkpoints")
    assert result["owner"] is None
    assert result["same"]
    assert result["callback"]["config"] == "${checkpoint}"
    assert result["torch"] is False, "settings are read without paying for torch"
    assert result["texts"].keys() == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert yaml.safe_load(result["texts"]["overrides.yaml"]) == [
        "checkpoint=async",
        "checkpoint.save_consolidated=always",
    ]
    assert yaml.safe_load(result["texts"]["config.yaml"])["checkpoint"]["is_async"] is True


def test_an_application_that_has_never_heard_of_us(app, tmp_path):
    arguments = ["+checkpoint=default", "+callbacks=hydra_ckpt", "checkpoint.checkpoint_dir=/data/run1"]
    [result] = results(run(app, tmp_path, "bare", *arguments))
    assert result["checkpoint_dir"] == "/data/run1"
    assert result["same"]


def test_a_sweep_gives_every_job_its_own_directory_and_owner(app, tmp_path):
    jobs = results(run(app, tmp_path, "listed", "-m", "checkpoint.is_async=true,false"))
    [sweep_dir] = (tmp_path / "multirun").glob("*/*")
    assert [job["is_async"] for job in jobs] == [True, False]
    assert [job["checkpoint_dir"] for job in jobs] == [str(sweep_dir / f"{n}/checkpoints") for n in (0, 1)]
    assert [job["owner"] for job in jobs] == [f"{sweep_dir}, job {n}" for n in (0, 1)]
    assert [yaml.safe_load(job["texts"]["overrides.yaml"]) for job in jobs] == [
        ["checkpoint.is_async=True"],
        ["checkpoint.is_async=False"],
    ]


def test_a_run_that_changes_directory_keeps_its_checkpoints_in_place(app, tmp_path):
    [result] = results(run(app, tmp_path, "listed", "hydra.job.chdir=true", "hydra.run.dir=here"))
    assert result["checkpoint_dir"] == str(tmp_path / "here/checkpoints")
    assert result["texts"].keys() == {"config.yaml", "hydra.yaml", "overrides.yaml"}


def test_a_typo_ends_the_application_with_the_key_named(app, tmp_path):
    process = run(app, tmp_path, "listed", "checkpoint.save_consolidate=final")
    assert process.returncode == 1
    assert "save_consolidate" in process.stderr
    assert not list(tmp_path.iterdir())


def test_a_wrong_value_ends_the_application_with_the_choices(app, tmp_path):
    process = run(app, tmp_path, "listed", "checkpoint.save_consolidated=sometimes")
    assert process.returncode == 1
    assert "checkpoint.save_consolidated='sometimes'" in process.stderr
    assert "final" in process.stderr


def test_the_configuration_is_printed_as_it_was_typed(app, tmp_path):
    process = run(app, tmp_path, "listed", "--cfg", "job", "--resolve")
    printed = yaml.safe_load(process.stdout)
    assert printed["checkpoint"]["save_consolidated"] == "final"
    assert printed["checkpoint"]["model_cache_dir"] is None
    assert printed["callbacks"]["checkpoint"]["config"] == printed["checkpoint"]
    assert "!!python" not in process.stdout
