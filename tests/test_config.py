"""The settings: what is accepted, what is refused and how, and what the engine is given."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import hydra_ckpt
from hydra_ckpt import config as config_module
from hydra_ckpt.config import CheckpointingConfig, SaveConsolidatedMode, _is_geq_torch_2_9, _normalize_save_consolidated
from hydra_ckpt.errors import CheckpointConfigError

FALSE, FINAL, EVERY = SaveConsolidatedMode.FALSE, SaveConsolidatedMode.FINAL, SaveConsolidatedMode.EVERY
NAMES = [field.name for field in dataclasses.fields(CheckpointingConfig)]

# One valid instance for each thing a user may do to a field.
VALID = [
    {},
    {"checkpoint_dir": Path("runs/a"), "model_cache_dir": Path("cache")},
    {"save_consolidated": "always", "is_async": True, "wait_for_staging": True},
    {"model_save_format": "torch_save", "save_consolidated": False},
    {"model_save_format": "torch_save", "save_consolidated": "every"},
    {"is_peft": True, "model_save_format": "torch_save"},
    {"model_state_dict_keys": ["a.weight", "b.weight"], "skip_task_head_prefixes_for_base_model": ["lm_head."]},
    {"restore_from": None}, {"restore_from": "no"}, {"restore_from": "epoch_0_step_200"},
    {"restore_parts": ["model", "rng"], "on_conflict": "set_aside", "best_metric_mode": "max"},
    {"retention": {"newest": 3, "best": 2, "every_n_steps": 1000, "any_of": [{"younger_than_s": 2.5}, {"best": 1}]}},
    {"max_recent_checkpoints": 3, "retention": {"newest": 3}},
    {"dequantize_base_checkpoint": False, "model_repo_id": "org/name", "staging_dir": "/fast"},
    {"consolidation_timeout_minutes": 1, "enabled": False},
]  # fmt: skip


@pytest.fixture(params=VALID, ids=str)
def valid(request):
    return CheckpointingConfig(**request.param)


# ---------------------------------------------------------------- the fields


def test_the_fields_and_their_defaults_are_the_published_ones():
    config = CheckpointingConfig(model_cache_dir="c")
    assert [(name, getattr(config, name)) for name in NAMES[:17]] == [
        ("enabled", True),
        ("checkpoint_dir", "checkpoints/"),
        ("model_save_format", "safetensors"),
        ("model_cache_dir", "c"),
        ("model_repo_id", None),
        ("save_consolidated", FINAL),
        ("is_peft", False),
        ("model_state_dict_keys", None),
        ("is_async", False),
        ("dequantize_base_checkpoint", None),
        ("original_model_root_dir", None),
        ("skip_task_head_prefixes_for_base_model", None),
        ("single_rank_consolidation", False),
        ("staging_dir", None),
        ("v4_compatible", False),
        ("diffusers_compatible", False),
        ("best_metric_key", "default"),
    ]


def test_every_field_is_checked():
    assert [*config_module._CHECKS] == [name for name in NAMES if name != "save_consolidated"]


def test_the_public_names_of_the_module():
    assert config_module.__all__ == ["CheckpointingConfig", "SaveConsolidatedMode"]
    assert {mode.name: mode.value for mode in SaveConsolidatedMode} == {
        "FALSE": "false",
        "FINAL": "final",
        "EVERY": "every",
    }


def test_the_package_hides_nothing_and_knows_no_other_names():
    assert set(hydra_ckpt.__all__) <= set(dir(hydra_ckpt))
    assert hydra_ckpt.CheckpointingConfig is CheckpointingConfig
    assert hydra_ckpt.CheckpointConfigError is CheckpointConfigError
    with pytest.raises(AttributeError, match="no attribute 'Checkpoints'"):
        _ = hydra_ckpt.Checkpoints  # type: ignore[attr-defined]


def test_importing_the_settings_imports_no_heavy_package():
    script = (
        "import sys, hydra_ckpt; from hydra_ckpt import CheckpointingConfig, SaveConsolidatedMode\n"
        "CheckpointingConfig(is_async=True).resolve()\n"
        "print(sorted({'torch', 'numpy', 'omegaconf', 'hydra', 'huggingface_hub', 'accelerate'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---------------------------------------------------------------- save_consolidated


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        (True, EVERY), ("true", EVERY), ("every", EVERY), ("always", EVERY), (" Always ", EVERY), ("EVERY", EVERY),
        ("final", FINAL), ("Final\n", FINAL),
        (False, FALSE), ("false", FALSE), ("no", FALSE), ("off", FALSE), ("never", FALSE), ("none", FALSE),
        (EVERY, EVERY), (FINAL, FINAL), (FALSE, FALSE),
    ],
)  # fmt: skip
def test_save_consolidated_is_understood(value, mode):
    assert _normalize_save_consolidated(value) is mode
    assert CheckpointingConfig(save_consolidated=value).save_consolidated is mode


@pytest.mark.parametrize("value", ["sometimes", "", "yes please", 0, 1, None, 1.0, ["final"], "1"])
def test_save_consolidated_is_refused_with_value_and_choices(value):
    with pytest.raises(ValueError, match="final") as caught:
        _normalize_save_consolidated(value)
    assert isinstance(caught.value, CheckpointConfigError)
    assert repr(value) in str(caught.value)
    for choice in ("every", "always", "true", "final", "false", "no", "off", "never", "none"):
        assert choice in str(caught.value)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enabled", "true"), ("enabled", 1), ("enabled", None), ("is_async", "yes"), ("is_peft", 0),
        ("verify_on_load", "false"), ("checkpoint_dir", ""), ("checkpoint_dir", None), ("checkpoint_dir", 3),
        ("model_save_format", "pickle"), ("model_save_format", None), ("model_cache_dir", " "),
        ("model_repo_id", ""), ("model_repo_id", 7), ("model_state_dict_keys", "weight"),
        ("model_state_dict_keys", [1]), ("dequantize_base_checkpoint", "auto"), ("staging_dir", False),
        ("skip_task_head_prefixes_for_base_model", {"a": 1}), ("best_metric_key", None), ("best_metric_key", ""),
        ("restore_from", True), ("restore_from", ""), ("restore_from", 200),
        ("restore_parts", []), ("restore_parts", ["weights"]), ("restore_parts", "model"),
        ("on_conflict", "overwrite"), ("best_metric_mode", "lowest"), ("max_recent_checkpoints", 0),
        ("max_recent_checkpoints", True), ("max_recent_checkpoints", 2.0), ("retention", ["newest"]),
        ("retention", {1: 2}), ("retention", {"newest": 0}), ("retention", {"best": "two"}),
        ("consolidation_timeout_minutes", 0), ("consolidation_timeout_minutes", -1.0),
        ("consolidation_timeout_minutes", float("nan")), ("consolidation_timeout_minutes", float("inf")),
        ("consolidation_timeout_minutes", "30"), ("consolidation_timeout_minutes", True),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(field, value):
    with pytest.raises(CheckpointConfigError, match=rf"checkpoint\.{field}") as caught:
        CheckpointingConfig(**{field: value})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("model_save_format", ["safetensors", "torch_save"]),
        ("on_conflict", ["raise", "set_aside"]),
        ("best_metric_mode", ["min", "max"]),
        ("restore_parts", ["model", "optimizer", "lr_scheduler", "dataloader", "rng", "extras", "progress"]),
    ],
)
def test_the_choices_are_listed(field, choices):
    with pytest.raises(CheckpointConfigError) as caught:
        CheckpointingConfig(**{field: "wrong"} if field != "restore_parts" else {field: ["wrong"]})
    assert "wrong" in str(caught.value)
    assert all(choice in str(caught.value) for choice in choices)


def test_two_limits_that_say_different_things_are_refused():
    with pytest.raises(CheckpointConfigError, match=r"max_recent_checkpoints=2 .*retention\.newest=3"):
        CheckpointingConfig(max_recent_checkpoints=2, retention={"newest": 3})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(field=st.sampled_from(NAMES), value=ANYTHING)
def test_whatever_a_field_is_given_it_is_taken_or_refused_by_name(field, value):
    with contextlib.suppress(CheckpointConfigError):
        config = CheckpointingConfig(**{field: value})
        assert dataclasses.replace(config) == config
        config.resolve()
        return
    with pytest.raises(CheckpointConfigError, match=rf"checkpoint\.{field}"):
        CheckpointingConfig(**{field: value})


# ---------------------------------------------------------------- copies and round trips


def test_checking_again_changes_nothing(valid):
    before = copy.deepcopy(valid)
    valid.__post_init__()
    assert valid == before


def test_copies_are_equal(valid):
    assert dataclasses.replace(valid) == valid
    assert copy.copy(valid) == valid
    assert copy.deepcopy(valid) == valid
    assert pickle.loads(pickle.dumps(valid)) == valid


def test_a_round_trip_through_omegaconf_and_yaml(valid):
    node = OmegaConf.structured(valid)
    assert OmegaConf.to_object(node) == valid
    text = OmegaConf.to_yaml(node)
    assert CheckpointingConfig(**OmegaConf.create(text)) == valid
    with_schema = OmegaConf.merge(OmegaConf.structured(CheckpointingConfig), OmegaConf.create(text))
    assert OmegaConf.to_object(with_schema) == valid


def test_containers_of_omegaconf_become_plain_ones():
    node = OmegaConf.create(
        {"keys": ["a", "b"], "rules": {"newest": 2, "any_of": [{"best": 1}]}, "two": "${rules.newest}"}
    )
    config = CheckpointingConfig(
        model_state_dict_keys=node["keys"],
        restore_parts=OmegaConf.create(["model"]),
        retention={"every_n_steps": node.two, "any_of": [node.rules]},
    )
    assert type(config.model_state_dict_keys) is list
    assert type(config.restore_parts) is list
    assert config.retention == {"every_n_steps": 2, "any_of": [{"newest": 2, "any_of": [{"best": 1}]}]}
    assert type(config.retention["any_of"][0]) is dict


def test_the_settings_do_not_share_the_caller_s_containers():
    keys, rules = ["a"], {"newest": 2, "any_of": [{"best": 1}]}
    config = CheckpointingConfig(model_state_dict_keys=keys, retention=rules)
    resolved = config.resolve()
    keys.append("b")
    rules["any_of"][0]["best"] = 2
    config.retention["newest"] = 9
    assert config.model_state_dict_keys == ["a"]
    assert config.retention["any_of"] == [{"best": 1}]
    assert resolved.keep.retention == {"newest": 2, "any_of": [{"best": 1}]}


# ---------------------------------------------------------------- settings that exclude each other


def messages(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_torch_save_warns_that_nothing_is_consolidated_and_keeps_the_setting(caplog):
    config = CheckpointingConfig(model_save_format="torch_save", save_consolidated="always")
    [message] = messages(caplog, logging.WARNING)
    assert "hydra-ckpt export" in message
    assert "save_consolidated=every" in message
    assert config.save_consolidated is EVERY
    assert config.resolve().write.consolidated is FALSE


def test_torch_save_is_silent_where_nothing_was_to_be_consolidated(caplog):
    CheckpointingConfig(model_save_format="torch_save", save_consolidated="never")
    assert not caplog.records


def test_an_adapter_is_never_saved_as_torch_save(caplog):
    config = CheckpointingConfig(
        is_peft=True, model_save_format="torch_save", save_consolidated="every", is_async=True, staging_dir="s"
    )
    assert len(messages(caplog, logging.WARNING)) == 1
    assert (config.model_save_format, config.save_consolidated) == ("safetensors", FINAL)
    assert (config.is_async, config.staging_dir) == (True, "s")
    dataclasses.replace(config)
    assert len(caplog.records) == 1, "the situation is resolved, so a copy has nothing to warn about"


def test_async_needs_torch_2_9(caplog, monkeypatch):
    monkeypatch.setattr(config_module, "_is_geq_torch_2_9", lambda: False)
    config = CheckpointingConfig(is_async=True)
    assert config.is_async is False
    [message] = messages(caplog, logging.ERROR)
    assert "2.9" in message
    dataclasses.replace(config)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.9.0", True), ("2.9.0+cpu", True), ("2.10.1", True), ("2.13.0+cu130", True), ("3.0", True),
        ("2.9.0a0+git1234", True), ("2.8.0", False), ("2.8.1+cu128", False), ("1.13.1", False), ("unknown", False),
    ],
)  # fmt: skip
def test_the_version_of_torch_is_compared_by_release(monkeypatch, version, fits):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version))
    assert _is_geq_torch_2_9() is fits


def test_the_version_of_an_installed_torch_is_known_without_importing_it():
    script = "import sys; from hydra_ckpt.config import _is_geq_torch_2_9 as f; print(f(), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]


def test_without_torch_the_version_does_not_fit(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(metadata, "version", missing)
    assert _is_geq_torch_2_9() is False


@pytest.mark.parametrize("source", ["latest", "some_directory"])
def test_an_explicit_source_is_not_ignored_silently(caplog, source):
    CheckpointingConfig(enabled=False, restore_from=source)
    [message] = messages(caplog, logging.WARNING)
    assert f"checkpoint.restore_from={source}" in message


@pytest.mark.parametrize("source", ["auto", None, "none", "no"])
def test_switched_off_is_silent_otherwise(caplog, source):
    CheckpointingConfig(enabled=False, restore_from=source)
    assert not caplog.records


# ---------------------------------------------------------------- the hub cache


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "{home}/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg", "HF_HOME": "/hf"}, "/hf/hub"),
        ({"HF_HOME": "~/hf"}, "{home}/hf/hub"),
        ({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "$HOME/new"}, "{home}/new"),
    ],
)
def test_thehub_cache_is_found_as_huggingface_hub_finds_it(monkeypatch, tmp_path, environment, expected):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    config = CheckpointingConfig()
    assert config.model_cache_dir == expected.format(home=tmp_path)
    theirs = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    result = subprocess.run([sys.executable, "-c", theirs], capture_output=True, text=True, check=True)
    assert config.model_cache_dir == result.stdout.strip()


def test_a_given_cache_is_kept_as_text_so_that_any_yaml_reader_understands_it():
    config = CheckpointingConfig(model_cache_dir=Path("mine"), checkpoint_dir=Path("a/b"))
    assert (config.model_cache_dir, config.checkpoint_dir) == ("mine", "a/b")
    assert yaml.safe_load(OmegaConf.to_yaml(OmegaConf.structured(config)))["checkpoint_dir"] == "a/b"


# ---------------------------------------------------------------- the parts


def test_paths_are_absolute_and_relative_ones_lie_below_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    resolved = CheckpointingConfig(staging_dir="fast", original_model_root_dir="~/model", model_cache_dir="c").resolve()
    assert resolved.where.checkpoint_dir == tmp_path / "checkpoints"
    assert resolved.where.owner is None
    assert resolved.write.staging_dir == tmp_path / "fast"
    assert resolved.hub.original_model_root_dir == Path("/home/me/model")
    assert resolved.hub.cache_dir == tmp_path / "c"
    assert resolved.hydra_texts == ()
    assert CheckpointingConfig(checkpoint_dir="/data/run1").resolve().where.checkpoint_dir == Path("/data/run1")
    assert CheckpointingConfig(checkpoint_dir="~/run").resolve().where.checkpoint_dir == Path("/home/me/run")
    assert not list(tmp_path.iterdir()), "resolving creates nothing"


def test_the_parts_are_frozen_and_carry_the_values():
    resolved = CheckpointingConfig(
        model_state_dict_keys=["b", "a"],
        restore_parts=["model"],
        consolidation_timeout_minutes=0.5,
        max_recent_checkpoints=4,
        skip_task_head_prefixes_for_base_model=["head."],
        allow_legacy_pickle_restore=True,
        verify_on_load=False,
    ).resolve()
    assert resolved.write.state_dict_keys == ("b", "a")
    assert resolved.write.timeout_s == 30.0
    assert resolved.read.parts == ("model",)
    assert (resolved.read.allow_pickle, resolved.read.verify) == (True, False)
    assert resolved.keep.max_recent == 4
    assert resolved.hub.skip_prefixes == ("head.",)
    for part in (resolved, resolved.where, resolved.write, resolved.read, resolved.hub, resolved.keep):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)
    assert pickle.loads(pickle.dumps(resolved)) == resolved


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None), ("none", None), ("No", None), ("false", None), ("False", None), (" null ", None), (False, None),
        ("auto", "auto"), ("AUTO", "auto"), ("LATEST", "latest"), ("best", "best"),
        ("epoch_0_step_200", "epoch_0_step_200"), ("/data/Run1/epoch_0_step_2", "/data/Run1/epoch_0_step_2"),
    ],
)  # fmt: skip
def test_what_is_resumed_from(given, meant):
    assert CheckpointingConfig(restore_from=given).resolve().read.restore_from == meant
