"""What users install: wheel and editable install, in environments with hydra-core and this package only, no torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pyproject_hooks import BuildBackendHookCaller

ROOT = Path(__file__).parents[1]
SOURCES = ("hydra_ckpt", "conf", "pyproject.toml", "setup.py", "LICENSE", "README.md")

APP = """
import sys

if "register" in sys.argv:
    sys.argv.remove("register")
    from hydra_ckpt import register
    register()

import hydra


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    print(cfg.checkpoint.save_consolidated if "checkpoint" in cfg else "no checkpoint group", "torch" in sys.modules)


main()
"""

DISCOVERY = """
import importlib.util, json, sys
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

plugins = Plugins.instance()
print(json.dumps({
    "plugins": [plugin.__name__ for plugin in plugins.discover(SearchPathPlugin)],
    "seconds": plugins.get_stats().modules_import_time.get("hydra_plugins.hydra_ckpt_plugin"),
    "loaded": sorted({"torch", "numpy", "safetensors", "accelerate"} & set(sys.modules)),
    "torch": importlib.util.find_spec("torch") is not None,
    "ours": sorted(name for name in sys.modules if name.split(".")[0] == "hydra_ckpt"),
}))
"""


def run(*command, cwd, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**environment, **variables}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def succeeded(process):
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of what is packaged: building leaves files behind, and others work in the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, tree / name)
    return tree


@pytest.fixture(scope="session")
def wheel(tree, tmp_path_factory):
    """The wheel, built as a release is: from the source distribution, not from the checkout."""
    target = tmp_path_factory.mktemp("dist")
    succeeded(run(sys.executable, "-m", "build", "--no-isolation", "--outdir", target, tree, cwd=target))
    [wheel] = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def editable_wheel(tree, tmp_path_factory):
    """What `pip install --editable` builds and then installs."""
    target = tmp_path_factory.mktemp("editable")
    hooks = BuildBackendHookCaller(str(tree), "setuptools.build_meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an editable install is not a release
        return target / hooks.build_editable(str(target))


def needed_by(name, found=None):
    """A distribution and all it depends on, by name."""
    found = {} if found is None else found
    if name not in found:
        found[name] = metadata.distribution(name)
        for requirement in map(Requirement, found[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed_by(requirement.name, found)
    return found


def environment_with_hydra_only(directory):
    """A fresh environment into which the installed hydra-core is linked, so that nothing is downloaded."""
    succeeded(run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=directory.parent))
    python = directory / "bin/python"
    asked = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory)
    site = Path(succeeded(asked).strip())
    for distribution in needed_by("hydra-core").values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(distribution.locate_file(top))
    return python


def install(wheel, python):
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    succeeded(run(*pip, wheel, cwd=wheel.parent))


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """An environment with hydra-core and without us."""
    return environment_with_hydra_only(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture(scope="session", params=["wheel", "editable"])
def installed(request, tmp_path_factory):
    """An environment with hydra-core and us only."""
    python = environment_with_hydra_only(tmp_path_factory.mktemp(request.param) / "venv")
    install(request.getfixturevalue("wheel" if request.param == "wheel" else "editable_wheel"), python)
    return python


@pytest.fixture
def app(tmp_path):
    """A Hydra application that has nothing to do with us."""
    (tmp_path / "app.py").write_text(APP)
    return tmp_path / "app.py"


# ---------------------------------------------------------------- installed


def test_hydra_discovers_the_plugin_without_torch_and_at_little_cost(installed, tmp_path):
    found = json.loads(succeeded(run(installed, "-c", DISCOVERY, cwd=tmp_path)))
    print(f"\nimporting the plugin took {found['seconds'] * 1000:.1f} ms")
    assert found["plugins"].count("HydraCkptSearchPath") == 1
    assert found["torch"] is False, "this environment was to hold no torch"
    assert found["loaded"] == []
    assert found["ours"] == [
        "hydra_ckpt", "hydra_ckpt.config", "hydra_ckpt.errors", "hydra_ckpt.jobs", "hydra_ckpt.jobs.launch",
        "hydra_ckpt.registry", "hydra_ckpt.values",
    ]  # fmt: skip


def test_the_options_appear_in_an_unrelated_application(installed, app):
    options = sorted(path.stem for path in (ROOT / "conf/checkpoint").glob("*.yaml"))
    for option in options:
        printed = succeeded(run(installed, app, f"+checkpoint={option}", "--cfg", "job", cwd=app.parent))
        assert yaml.safe_load(printed)["checkpoint"]["_target_"] == "hydra_ckpt.CheckpointingConfig"
    printed = yaml.safe_load(
        succeeded(run(installed, app, "+checkpoint=default", "+callbacks=hydra_ckpt", "--cfg", "job", cwd=app.parent))
    )
    assert printed["callbacks"]["checkpoint"]["config"] == "${checkpoint}"


def test_the_unrelated_application_runs_and_shows_where_the_options_come_from(installed, app):
    arguments = ["+checkpoint=async", "checkpoint.save_consolidated=always"]
    assert succeeded(run(installed, app, *arguments, cwd=app.parent)) == "always False\n"
    assert succeeded(run(installed, app, cwd=app.parent)) == "no checkpoint group False\n"
    searched = succeeded(run(installed, app, "--info", "searchpath", cwd=app.parent))
    assert len(re.findall(r"hydra_ckpt\s*\|\s*pkg://hydra_ckpt\.conf", searched)) == 1


def test_the_shell_completes_the_options(installed, app):
    line = f"python {app.name} +checkpoint="
    completed = succeeded(
        run(installed, app, "-sc", "query=bash", cwd=app.parent, COMP_LINE=line, COMP_POINT=str(len(line)))
    )
    assert {f"+checkpoint={name}" for name in ("async", "default", "every", "off", "torch_save")} <= set(
        completed.split()
    )


def test_a_failure_of_ours_is_a_warning_in_a_stranger_s_application(installed, app, tmp_path):
    broken = tmp_path / "broken/hydra_ckpt"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("")
    (broken / "registry.py").write_text("raise RuntimeError('something nobody thought of')\n")
    process = run(installed, app, cwd=tmp_path, PYTHONPATH=str(broken.parent))
    assert succeeded(process) == "no checkpoint group False\n"
    assert "something nobody thought of" in process.stderr


# ---------------------------------------------------------------- a bare checkout


def test_a_bare_checkout_registers_itself(bare, app, tree):
    arguments = ["+checkpoint=every", "+callbacks=hydra_ckpt"]
    unknown = run(bare, app, *arguments, cwd=app.parent, PYTHONPATH=str(tree))
    assert unknown.returncode != 0
    assert "checkpoint" in unknown.stderr
    known = run(bare, app, "register", *arguments, cwd=app.parent, PYTHONPATH=str(tree))
    assert succeeded(known) == "every False\n"


def test_registering_where_hydra_found_us_already_changes_nothing(installed, app):
    searched = succeeded(run(installed, app, "register", "--info", "searchpath", cwd=app.parent))
    assert searched.count("pkg://hydra_ckpt.conf") == 1


# ---------------------------------------------------------------- the wheel


def test_everything_in_the_tree_is_in_the_wheel(tree, wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    mapped = {tree / "hydra_ckpt/_hydra_plugins": "hydra_plugins", tree / "conf": "hydra_ckpt/conf"}

    def packed_name(path):
        for directory, name in mapped.items():
            if path.is_relative_to(directory):
                return f"{name}/{path.relative_to(directory).as_posix()}"
        return path.relative_to(tree).as_posix()

    files = [path for folder in ("hydra_ckpt", "conf") for path in (tree / folder).rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert packed == {packed_name(path) for path in files}


def test_every_module_of_the_wheel_can_be_imported(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "import hydra_ckpt, importlib, pkgutil\n"
        "names = [m.name for m in pkgutil.walk_packages(hydra_ckpt.__path__, 'hydra_ckpt.')]\n"
        "files = [importlib.import_module(name).__file__ for name in names]\n"
        "print(hydra_ckpt.__file__, *files, sep='\\n')"
    )
    printed = succeeded(run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path))).splitlines()
    assert len(printed) > 4
    assert all(Path(line).is_relative_to(tmp_path) for line in printed)


def test_the_metadata_says_what_is_needed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
        scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "Requires-Python: <3.14,>=3.10" in text
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Dist: torch>=2.9" in text
    assert {"bench", "dev", "docs", "launchers", "peft", "sweeps", "trackers", "transformers"} == set(
        re.findall(r"Provides-Extra: (\S+)", text)
    )
    assert "hydra-ckpt = hydra_ckpt.cli:main" in scripts
    assert "hydra-ckpt-train = hydra_ckpt.recipe.__main__:main" in scripts
    assert "[hydra.plugins]" in scripts


def test_what_the_scripts_install_is_pinned():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==[^ ;]+", line) for line in lines)
    assert "torch==2.13.0" in lines
    pinned = {line.split("==")[0] for line in lines}
    ours = metadata.distribution("hydra-ckpt").requires or []
    assert {canonicalize_name(Requirement(line).name) for line in ours} <= pinned
