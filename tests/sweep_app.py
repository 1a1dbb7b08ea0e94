"""A third-party application for tests of sweeps, and the code that drives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.programs import run

REPOSITORY = Path(__file__).parents[1]

APP = """
import os, signal, sys, time
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

import hydra_ckpt


def happen(out, step):
    time.sleep(float(os.environ.get("STEP_S", 0)))
    if os.environ.get("HOLD") == f"{out.name} {step}":
        while not any('"stopped"' in path.read_text() for path in out.parent.glob("*/hydra_ckpt_job.json")):
            time.sleep(0.05)
    if os.environ.get("KILL") != f"{out.name} {step}":
        return
    while len(Path(os.environ["RUNS"]).read_text().splitlines()) < int(os.environ.get("AFTER", 0)):
        time.sleep(0.05)
    record = out.parent / os.environ.get("WAIT_FOR", out.name) / "hydra_ckpt_job.json"
    while "WAIT_FOR" in os.environ and '"finished"' not in record.read_text():
        time.sleep(0.05)
    how, _, whom = os.environ["HOW"].partition(" ")
    if how == "STOP":
        (out / whom / how).touch()
        time.sleep(1.1)  # rank 0 looks once a second
    elif whom == "group":
        time.sleep(0.5)  # the job that has finished hands its result on
        os.killpg(os.getpgrp(), getattr(signal, how))
    else:
        os.kill(os.getppid() if whom == "launcher" else os.getpid(), getattr(signal, how))


@hydra.main(version_base="1.3", config_path="conf", config_name="app")
@hydra_ckpt.resumable_job
def main(cfg):
    out = Path(HydraConfig.get().runtime.output_dir)
    torch.manual_seed(cfg.seed)
    if "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr)
    with instantiate(cfg.callbacks.checkpoint) as ckpt:
        start = ckpt.on_train_begin(hydra_ckpt.AppState(model, optimizer))
        begin = start.step if start else 0
        with open(os.environ["RUNS"], "a") as runs:
            runs.write(f"{out.name} {begin}\\n")
        if cfg.fail:
            raise RuntimeError("no such luck")
        for step in range(begin + 1, cfg.steps + 1):
            loss = (model(torch.ones(8, 4)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            happen(out, step)
            ckpt.on_step_end(step)
            if step % 2 == 0:
                ckpt.on_validation_end({"loss": cfg.lr + 1 / step})
            if ckpt.should_stop:
                return ckpt.best_metric
        ckpt.on_train_end()
        return float("nan") if cfg.nan else ckpt.best_metric


main()
"""
CONF = {
    "defaults": [{"checkpoint": "default"}, {"callbacks": "hydra_ckpt"}, "_self_"],
    "lr": 0.1,
    "seed": 0,
    "steps": 6,
    "fail": False,
    "nan": False,
    "callbacks": {"checkpoint": {"every_n_steps": 2}},
}


class App:
    """The application in a directory of its own.

    Args:
        root: The directory.
        resumable: Whether its function is a `resumable_job`.
    """

    def __init__(self, root: Path, *, resumable: bool = True) -> None:
        self.root, self.sweep = root, root / "sweep"
        (root / "conf").mkdir(parents=True)
        (root / "app.py").write_text(APP if resumable else APP.replace("@hydra_ckpt.resumable_job\n", ""))
        (root / "conf" / "app.yaml").write_text(yaml.safe_dump(CONF))

    def run(
        self, *arguments: str, kill: str = "", how: str = "SIGKILL", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run it.

        Args:
            *arguments: Its command line.
            kill: Job and step at which something happens.
            how: What: a signal for the job's process; `SIG... launcher` for its parent; `SIG... group` for all
                processes; `STOP DIRECTORY`, a file.
            **environment: AFTER: so many jobs have begun to train before that. HOLD: job and step at which a job waits
                until another has been stopped. WAIT_FOR: a job that has finished before. STEP_S: how long a step takes.
        """
        environment = {**os.environ, "RUNS": str(self.root / "runs"), "KILL": kill, "HOW": how, **environment}
        environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "app.py", *arguments]
        return run(command, cwd=self.root, env=environment, start_new_session=how.endswith("group"))

    def sweep_over(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "hydra.sweep.dir=sweep", *arguments, **options)

    @property
    def runs(self) -> list[str]:
        """Job and first step of every time the function was called, since this was asked last."""
        path = self.root / "runs"
        found = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.sweep / "checkpoints_summary.json").read_text())

    @property
    def states(self) -> list[str]:
        return [job["state"] for job in self.summary["jobs"]]
