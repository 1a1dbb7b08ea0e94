"""Runs a training command and kills all of its processes once it is past a step and a checkpoint is published.

Usage: _demo_interrupt.py CHECKPOINT_DIR STEP COMMAND...
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psutil


def main(checkpoint_dir: Path, step: int, command: list[str]) -> None:
    """Shows the command's output while it runs, and kills it in mid-flight."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None
        for line in training.stdout:
            print(line, end="", flush=True)
            reached = re.search(r"step +(\d+)/\d+  loss", line)
            if reached and int(reached[1]) > step and (checkpoint_dir / "LATEST").exists():
                kill_with_children(training.pid)
                print(f"\n   Killed at step {reached[1]}; LATEST is {(checkpoint_dir / 'LATEST').resolve().name}.")
                return
    sys.exit(f"the training ended by itself, with exit code {training.returncode}, before it could be killed")


def kill_with_children(pid: int) -> None:
    """SIGKILL for the launcher and the ranks at once: torchrun gives each rank a session of its own."""
    launcher = psutil.Process(pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        process.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
