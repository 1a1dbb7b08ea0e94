"""Which start of which job this process is, by its scheduler, its launcher and its run directory."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from hydra_ckpt.jobs.run import run_directory

__all__ = [
    "ELASTIC",
    "SLURM",
    "agent_restarts",
    "job_of_this_process",
    "launch_of_this_process",
    "restarts_of_this_process",
]

SLURM, ELASTIC = "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"
# Identity of a job that schedulers keep when they start it again.
_JOB_VARIABLES = (SLURM, "PBS_JOBID", "LSB_JOBID", "JOB_ID", ELASTIC)
# How often it has been started again, if that is counted.
_COUNTS = {SLURM: "SLURM_RESTART_COUNT", ELASTIC: "TORCHELASTIC_RESTART_COUNT"}


def _given(environment: Mapping[str, str], name: str) -> str:
    """A variable's value; torchrun without --rdzv-id says none."""
    value = environment.get(name, "")
    return "" if value == "none" else value


def job_of_this_process(environment: Mapping[str, str] = os.environ) -> str:
    """A scheduler's or launcher's name of the job, kept when it is started again; empty if there is none."""
    found = (f"{name}={value}" for name in _JOB_VARIABLES if (value := _given(environment, name)))
    return next(found, "")


def restarts_of_this_process(environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """How often each scheduler or launcher has started its job again, by `NAME=identity`."""
    found = {}
    for name, count in _COUNTS.items():
        value, text = _given(environment, name), environment.get(count, "0")
        if value and text.isdecimal():
            found[f"{name}={value}"] = int(text)
    return found


def agent_restarts(environment: Mapping[str, str] = os.environ) -> int | None:
    """How often torchrun's agent, this process's parent, has restarted the ranks; None outside torchrun."""
    text = environment.get(_COUNTS[ELASTIC], "")
    return int(text) if text.isdecimal() else None


def launch_of_this_process() -> str:
    """A digest of what stays the same when a run is started again: its run directory, else its command."""
    directory = run_directory()
    parts = [str(directory)] if directory is not None else [str(Path.cwd()), *sys.argv]
    return hashlib.blake2b("\0".join(parts).encode(errors="surrogateescape"), digest_size=6).hexdigest()
