"""What is printed where the output is not UTF-8, or where nobody reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_ckpt import CheckpointCallback, CheckpointingConfig
from tests.sweep_app import REPOSITORY, App
from tests.test_continuing import make_state

ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPOSITORY)}


def run(module: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, env={**os.environ, **ASCII}, check=False, timeout=100)


def test_the_tool_escapes_what_the_output_cannot_encode(tmp_path: Path) -> None:
    root = tmp_path / "größe"
    with CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(root)), every_n_steps=1) as callback:
        callback.on_train_begin(make_state())
        callback.on_step_end(1)
        callback.on_step_end(2, metrics={"größe": 1.0})
        callback.on_train_end()
    draft = root / "epoch_0_step_1"
    for verb in (["list"], ["show"], ["verify"], ["prune", "--newest", "1"], ["repair"], ["list", "--json"]):
        done = run("hydra_ckpt.cli", verb[0], root, *verb[1:])
        assert done.returncode == 0, done.stderr
    assert b"gr\\xf6\\xdfe 1" in run("hydra_ckpt.cli", "list", root).stdout
    exported = run("hydra_ckpt.cli", "export", root, tmp_path / "größe" / "out")
    assert (exported.returncode, b"gr\\xf6\\xdfe/out: 1 weight file" in exported.stdout) == (0, True), exported.stderr
    assert run("hydra_ckpt.cli", "diff", draft, draft).returncode == 0
    missing = run("hydra_ckpt.cli", "list", tmp_path / "größer")
    assert missing.returncode == 2
    assert b"gr\\xf6\\xdfer" in missing.stderr
    assert b"Traceback" not in missing.stderr


def test_a_summary_escapes_too_and_a_command_for_a_shell_does_not(tmp_path: Path) -> None:
    app = App(tmp_path / "größe")
    named = ["hydra.sweep.subdir='größe'", "+name='größe'"]
    done = app.sweep_over("hydra/callbacks=hydra_ckpt_summary", *named, **ASCII)
    assert (done.returncode, app.states) == (0, ["finished"]), done.stderr
    assert "gr\\xf6\\xdfe" in done.stdout
    assert "finished" in done.stdout
    listed = run("hydra_ckpt.cli", "list", app.sweep)
    assert (listed.returncode, b"gr\\xf6\\xdfe" in listed.stdout) == (0, True), listed.stderr
    command = run("hydra_ckpt.cli", "show", app.sweep / "größe", "--command")
    assert command.returncode == 0, command.stderr
    assert "größe".encode() in command.stdout


@pytest.mark.parametrize("reader", ["", "closed"])
def test_a_sweep_whose_output_nobody_reads_ends_as_usual(tmp_path: Path, reader: str) -> None:
    app = App(tmp_path / "app")
    arguments = ["-m", "hydra.sweep.dir=sweep", "hydra/callbacks=hydra_ckpt_summary", "lr=0.3"]
    redirect = ">&- 2>&-" if reader else "2>&1 | true"
    environment = {**os.environ, "RUNS": str(app.root / "runs"), "PYTHONPATH": str(REPOSITORY)}
    line = f"set -o pipefail; {sys.executable} app.py {' '.join(arguments)} {redirect}"
    subprocess.run(["bash", "-c", line], cwd=app.root, env=environment, check=False, timeout=100)
    assert app.states == ["finished"]


def test_the_tool_works_with_closed_streams(tmp_path: Path) -> None:
    root, out, missing = tmp_path / "run", tmp_path / "out", tmp_path / "missing"
    with CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(root)), every_n_steps=1) as callback:
        callback.on_train_begin(make_state())
        callback.on_step_end(1)
        callback.on_train_end()
    saved = root / "epoch_0_step_1"
    commands = {f"list {root}": 0, f"export {root} {out}": 0, f"diff {saved} {saved}": 0, f"list {missing}": 2}
    runs = {f"{item} >&-": code for item, code in commands.items()}
    runs |= {f"verify {root} <&- >&- 2>&-": 0, f"list {missing} 2>&-": 2}
    line = "\n".join(f"{sys.executable} -m hydra_ckpt.cli {item}; echo $? >> codes" for item in runs)
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, check=False)
    assert (tmp_path / "codes").read_text().split() == [str(code) for code in runs.values()], done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""  # errors do not become output


def test_a_summary_is_not_printed_to_a_closed_stream(tmp_path: Path) -> None:
    app = App(tmp_path / "app")
    arguments = ["-m", "hydra.sweep.dir=sweep", "hydra/callbacks=hydra_ckpt_summary", "lr=0.3"]
    environment = {**os.environ, "RUNS": str(app.root / "runs"), "PYTHONPATH": str(REPOSITORY)}
    line = f"{sys.executable} app.py {' '.join(arguments)} >&-"
    done = subprocess.run(["bash", "-c", line], cwd=app.root, env=environment, capture_output=True, check=False)
    assert (done.returncode, app.states) == (0, ["finished"]), done.stderr
    assert b"AttributeError" not in done.stderr
