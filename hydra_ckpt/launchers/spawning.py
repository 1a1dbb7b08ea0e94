"""Workers of joblib's launcher survive a signal to their process group from their first moment on."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

__all__ = ["shield_workers"]

log = logging.getLogger(__name__)

_blocked: set[signal.Signals] = set()


def shield_workers(signals: Iterable[signal.Signals]) -> None:
    """From now on, worker processes that joblib starts in this process begin with these signals blocked.

    joblib starts all its workers at once. If one dies, it kills the others, unsaved; and a worker without a job has no
    handler yet. A worker lets the signals through when its first job begins: see `hydra_ckpt.sweeps.active`.

    Args:
        signals: The signals that stop a run.
    """
    try:
        from joblib.externals.loky.backend import fork_exec as starting  # type: ignore[import-untyped]
    except ImportError as error:
        log.debug("joblib's workers cannot be protected from signals: %s", error)
        return
    if not _blocked:
        starting.fork_exec = _blocking(starting.fork_exec)
    _blocked.update(signals)


def _blocking(start: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(start)
    def blocking(*args: Any, **kwargs: Any) -> Any:
        # Only in this thread, and only while it starts the process, which inherits the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _blocked)
        try:
            return start(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    return blocking
