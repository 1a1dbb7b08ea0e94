"""Other people's applications after `pip install`: Hydra finds the options without importing this package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from tests.test_packaging import ROOT, SOURCES, install, run, succeeded


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree, target = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir"]
    succeeded(run(*build, target, tree, cwd=target))
    [wheel] = target.glob("*.whl")
    return wheel


def environment(directory: Path) -> tuple[Path, Path]:
    """A fresh environment: its Python, and where its packages lie."""
    succeeded(run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=directory.parent))
    python = directory / "bin/python"
    asked = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory)
    return python, Path(succeeded(asked).strip())


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment into which the wheel is installed; torch and the like come from the one that runs the tests."""
    python, site = environment(tmp_path_factory.mktemp("strangers") / "venv")
    # Only the path: the editable install that lies there is not followed from here.
    (site / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install(wheel, python)
    found = succeeded(run(python, "-c", "import hydra_ckpt; print(hydra_ckpt.__file__)", cwd=site))
    assert Path(found.strip()).is_relative_to(site)
    return python


def add(python: Path, *requirements: str) -> None:
    """Installs from the package index; without one the test is skipped."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *requirements]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(requirements)} cannot be installed here: {done.stderr[-300:]}")


LOOP = """
import torch

from hydra_ckpt import AppState


def fit(ckpt, lr, steps):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    with ckpt:
        start = ckpt.on_train_begin(AppState(model, optimizer))
        begun = start.step if start else 0
        for step in range(begun + 1, steps + 1):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            ckpt.on_step_end(step)
        ckpt.on_train_end()
    print(f"steps {begun} to {steps}")
"""


def written(directory: Path, files: dict[str, str]) -> Path:
    for name, text in {"loop.py": LOOP, **files}.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def test_a_bare_application_with_its_own_configuration(python: Path, tmp_path: Path) -> None:
    app = """
import hydra
from hydra.utils import instantiate
from loop import fit


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    fit(instantiate(cfg.callbacks.checkpoint), cfg.optimizer.lr, cfg.steps)


main()
"""
    config = {"defaults": [{"optimizer": "adam"}, "_self_"], "steps": 4}
    files = {"app.py": app, "conf/config.yaml": yaml.safe_dump(config), "conf/optimizer/adam.yaml": "lr: 0.1\n"}
    written(tmp_path, files)
    command = [python, "app.py", "+checkpoint=async", "+callbacks=hydra_ckpt", "+checkpoint/schedule=steps"]
    command += ["hydra.run.dir=run", "callbacks.checkpoint.every_n_steps=2"]
    assert "steps 0 to 4" in succeeded(run(*command, cwd=tmp_path))
    assert "steps 4 to 6" in succeeded(run(*command, "steps=6", cwd=tmp_path))
    assert (tmp_path / "run/checkpoints/LATEST").resolve().name == "epoch_0_step_6"


def test_callbacks_as_a_group_as_lightning_hydra_template_has_them(python: Path, tmp_path: Path) -> None:
    app = """
import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from loop import fit


class Progress:
    def __init__(self, every):
        print("progress every", every)


def instantiate_callbacks(callbacks_cfg):
    return [instantiate(cb) for cb in callbacks_cfg.values() if isinstance(cb, DictConfig) and "_target_" in cb]


@hydra.main(version_base="1.3", config_path="configs", config_name="train.yaml")
def main(cfg):
    callbacks = instantiate_callbacks(cfg.callbacks)
    print([type(callback).__name__ for callback in callbacks])
    fit(next(item for item in callbacks if hasattr(item, "on_step_end")), 0.1, 4)


main()
"""
    train = {"defaults": ["_self_", {"callbacks": "default"}, {"checkpoint": "default"}, {"experiment": None}]}
    ours = {"defaults": ["hydra_ckpt", "progress", "_self_"], "checkpoint": {"every_n_steps": 2}}
    experiment = "# @package _global_\ndefaults:\n  - override /checkpoint: every\n  - override /callbacks: default\n"
    files = {
        "app.py": app,
        "configs/train.yaml": yaml.safe_dump(train),
        "configs/callbacks/default.yaml": yaml.safe_dump(ours),
        "configs/callbacks/progress.yaml": "progress:\n  _target_: __main__.Progress\n  every: 10\n",
        "configs/experiment/best.yaml": experiment,
    }
    written(tmp_path, files)
    printed = succeeded(run(python, "app.py", "experiment=best", "hydra.run.dir=run", cwd=tmp_path))
    assert "['CheckpointCallback', 'Progress']" in printed
    assert (tmp_path / "run/checkpoints/epoch_0_step_2/model/consolidated").is_dir()


@pytest.mark.slow
def test_hydra_zen_builds_both_classes(python: Path, tmp_path: Path) -> None:
    add(python, "hydra-zen>=0.13")
    app = """
from hydra_zen import builds, instantiate, launch
from loop import fit

from hydra_ckpt import CheckpointCallback, CheckpointingConfig

Config = builds(CheckpointingConfig, populate_full_signature=True)
Callback = builds(
    CheckpointCallback, config=Config(is_async=True), every_n_steps=2, populate_full_signature=True,
    zen_exclude=["checkpointer"],
)
Job = builds(dict, ckpt=Callback, lr=0.1)


def task(cfg):
    fit(instantiate(cfg).pop("ckpt"), cfg.lr, 4)


launch(Job, task, overrides=["ckpt.config.save_consolidated=always", "hydra.run.dir=run"], version_base="1.3")
"""
    written(tmp_path, {"app.py": app})
    assert "steps 0 to 4" in succeeded(run(python, "app.py", cwd=tmp_path))
    assert (tmp_path / "run/checkpoints/epoch_0_step_2/model/consolidated").is_dir()


@pytest.mark.slow
def test_hydra_1_4_finds_the_options_and_gives_the_settings(wheel: Path, tmp_path: Path) -> None:
    python, _ = environment(tmp_path / "venv")
    add(python, "--pre", "hydra-core>=1.4.0rc3,<1.5")
    install(wheel, python)
    app = """
import sys

import hydra
from hydra.utils import instantiate


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    config = instantiate(cfg.checkpoint)
    print(config.save_consolidated, config.is_peft, cfg.callbacks.checkpoint.every_n_epochs, "torch" in sys.modules)


main()
"""
    written(tmp_path, {"app.py": app})
    groups = ["+checkpoint=peft", "+callbacks=hydra_ckpt", "+checkpoint/schedule=epochs", "hydra/output=hydra_ckpt"]
    command = [python, "app.py", *groups, "hydra/job_logging=hydra_ckpt", "checkpoint/retention=best"]
    printed = succeeded(run(*command, "checkpoint.save_consolidated=always", cwd=tmp_path))
    assert printed == "SaveConsolidatedMode.EVERY True 1 False\n"
    [directory] = tmp_path.glob("outputs/*/*")
    assert (directory / ".hydra").is_dir()
    swept = succeeded(run(*command, "-m", "checkpoint.is_peft=true,false", cwd=tmp_path))
    assert "FINAL True 1 False" in swept
    assert "FINAL False 1 False" in swept
    refused = run(*command, "checkpoint.save_consolidate=final", cwd=tmp_path)
    assert refused.returncode == 1
    assert "save_consolidate" in refused.stderr
    assert "Traceback" not in refused.stderr
