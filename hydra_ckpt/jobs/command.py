"""The command that continues a Hydra run: the start of its program is recorded, and its overrides are used again."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["program_of_this_process", "resume_command"]

# The run's directory and its number of jobs are set again.
_REPLACED = ("hydra.run.dir=", "hydra.sweep.", "hydra.mode=", "hydra/launcher=", "hydra/sweeper=", "hydra.launcher.")
_FOUND_ANEW = "checkpoint.restore_from="


def program_of_this_process() -> dict[str, Any]:
    """How this process was started, as plain data: program, ranks, and those of them on this host."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None:
        program = ["-m", spec.name.removesuffix(".__main__")]
    else:
        given = sys.argv[0]
        is_script = not given.endswith(".py") and Path(given).parent == Path(sys.executable).parent
        program = [Path(given).name if is_script else given]
    ranks = {"world_size": int(os.environ.get("WORLD_SIZE", "1"))}
    ranks["local_world_size"] = int(os.environ.get("LOCAL_WORLD_SIZE", ranks["world_size"]))
    return {"program": program, **ranks}


def resume_command(launch: Mapping[str, Any], hydra: Mapping[str, Any], run_dir: Path) -> str:
    """The command, quoted for a shell.

    Args:
        launch: What `program_of_this_process` said in the run.
        hydra: The run's `hydra.yaml`, below its key `hydra`.
        run_dir: The run's current directory.
    """
    job, runtime = hydra.get("job") or {}, hydra.get("runtime") or {}
    typed = hydra.get("overrides") or {}
    words = [*_launcher(launch), *map(str, launch["program"])]
    for source in runtime.get("config_sources") or []:
        if source.get("provider") == "command-line":
            words += ["--config-dir", str(source["path"])]
    if job.get("config_name"):
        words += ["--config-name", str(job["config_name"])]
    words += _replayed([*(typed.get("hydra") or []), *(typed.get("task") or [])])
    words.append(f"hydra.run.dir={_quoted(str(run_dir))}")
    command = shlex.join(words)
    return f"cd {shlex.quote(str(runtime['cwd']))} && {command}" if runtime.get("cwd") else command


def _launcher(launch: Mapping[str, Any]) -> list[str]:
    ranks, local = int(launch.get("world_size", 1)), max(1, int(launch.get("local_world_size", 1)))
    if ranks == 1:
        is_script = len(launch["program"]) == 1 and not str(launch["program"][0]).endswith(".py")
        return [] if is_script else ["python"]
    if ranks == local:
        return ["torchrun", "--standalone", "--nproc-per-node", str(local)]
    return ["torchrun", "--nnodes", str(ranks // local), "--nproc-per-node", str(local), "--rdzv-backend", "c10d"]


def _replayed(overrides: Iterable[object]) -> list[str]:
    """The original overrides, but for the run's directory; a run that went back now continues from its newest."""
    texts = [str(item) for item in overrides]
    return [text for text in texts if not text.startswith((*_REPLACED, _FOUND_ANEW))]


def _quoted(text: str) -> str:
    """A value of an override, in quotes if Hydra's grammar requires them."""
    if all(letter.isalnum() or letter in "/_-.:" for letter in text):
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
