"""Called by Hydra when a sweep begins: prepares directories, studies and signals.

Hydra imports this module in every run with `callbacks=hydra_ckpt`. So it imports no torch, and it imports what only
sweeps need when a sweep begins.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

from hydra_ckpt.jobs.run import LauncherKind, goes_by_results
from hydra_ckpt.jobs.signal_names import parse_signals

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

__all__ = ["SweepHook"]

log = logging.getLogger(__name__)

_SETTINGS = "callbacks.checkpoint"


def _directory(first: int, name: str, *, _root_: DictConfig) -> str:
    from hydra_ckpt.launchers.claims import Start
    from hydra_ckpt.launchers.places import directory_of

    return directory_of(Start(name, first), _root_)


# Launchers send the callback to the job processes, which registers the resolver there before it is needed.
OmegaConf.register_new_resolver("hydra_ckpt.job_directory", _directory, replace=True)


class SweepHook(Callback):
    """Part of `callbacks=hydra_ckpt`: lets a sweep continue where an earlier start was stopped."""

    _launcher: int | None = None  # the process that launches the jobs

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called when a sweep begins, in the process that launches its jobs."""
        from hydra_ckpt.launchers.places import keep_directories
        from hydra_ckpt.launchers.planning import planned_jobs
        from hydra_ckpt.launchers.spawning import shield_workers
        from hydra_ckpt.launchers.studies import give_back
        from hydra_ckpt.sweeps.planned import write_plan
        from hydra_ckpt.sweeps.stopping import begin_sweep

        self._launcher = os.getpid()
        sweep_dir = Path(config.hydra.runtime.cwd, config.hydra.sweep.dir)
        is_first, is_judged = os.environ.get("RANK", "0") == "0", goes_by_results(config.hydra)
        if is_first and is_judged:
            _hold(sweep_dir)
        begin_sweep(sweep_dir)
        if not is_first:
            return
        write_plan(sweep_dir, planned_jobs(config))
        if is_judged:
            give_back(config.hydra, sweep_dir, keep_directories(config, sweep_dir))
        if LauncherKind.of(config.hydra) is LauncherKind.SIDE_BY_SIDE:
            shield_workers(_signals(config))
            _hand_signals_on(config, sweep_dir)

    def on_job_start(self, config: DictConfig, *, task_function: Any = None, **_: Any) -> None:
        """Called when a job begins, in the process that runs it."""
        if LauncherKind.of(config.hydra) is not LauncherKind.SIDE_BY_SIDE or self._launcher == os.getpid():
            return
        from hydra_ckpt.sweeps.active import RESUMABLE, let_through

        if not getattr(task_function, RESUMABLE, False):  # such a job lets them through once it has its own handlers
            let_through(_signals(config))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Called when a job has ended, in the process that ran it."""
        ended = job_return._return_value  # noqa: SLF001 - the public way raises it
        if not isinstance(ended, Exception):
            return
        from hydra_ckpt.launchers.returning import StoppedReturn
        from hydra_ckpt.sweeps.stopping import JobStopped, arrived

        if isinstance(ended, JobStopped):
            job_return.__class__ = StoppedReturn
        # joblib runs jobs in the launcher's own process if it runs one at a time.
        is_alone = LauncherKind.of(config.hydra) is LauncherKind.ONE_BY_ONE or self._launcher == os.getpid()
        if isinstance(ended, JobStopped) and is_alone:
            job_return.return_value = arrived(str(ended), ended.exit_code, str(ended.sweep_dir))


def _signals(config: DictConfig) -> list[signal.Signals]:
    """The signals that stop a run."""
    return list(parse_signals(OmegaConf.select(config, f"{_SETTINGS}.signals", default="SIGTERM")))


def _hold(sweep_dir: Path) -> None:
    """Become the sweep's only launcher, or end the program: Hydra turns the exceptions of callbacks into warnings."""
    from hydra_ckpt.errors import CheckpointExistsError
    from hydra_ckpt.launchers.holding import hold_sweep

    try:
        hold_sweep(sweep_dir)
    except CheckpointExistsError as error:
        raise SystemExit(str(error)) from None


def _hand_signals_on(config: DictConfig, sweep_dir: Path) -> None:
    """Make a signal to the launcher stop its jobs; without a handler it would die, and its jobs with it, unsaved."""
    from hydra_ckpt.sweeps.stopping import Halt, halt_jobs

    if threading.current_thread() is not threading.main_thread():
        return
    code = OmegaConf.select(config, f"{_SETTINGS}.requeue_exit_code") or 0
    process = os.getpid()
    for number in _signals(config):
        before = signal.getsignal(number)

        def stop(came: int, frame: Any, earlier: Any = before) -> None:
            signal.signal(came, signal.SIG_DFL if earlier is None else earlier)  # the next signal has its usual effect
            if os.getpid() != process:
                signal.raise_signal(came)
                return
            why = f"the launcher received {signal.Signals(came).name}"
            log.warning("%s: running jobs save and stop, and no more jobs start", why)
            try:
                sweep_dir.mkdir(parents=True, exist_ok=True)
                halt_jobs(sweep_dir, os.getpid(), Halt(why, int(code), running=True))
            except OSError as error:
                log.error("the jobs could not be told: %s", error)
            if callable(earlier) and earlier is not signal.default_int_handler:
                earlier(came, frame)

        signal.signal(number, stop)
