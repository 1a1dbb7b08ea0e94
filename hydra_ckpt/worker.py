"""The background thread of a Checkpointer."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

# How soon an idle thread notices that the program has ended without close().
_POLL_S = 0.25

Job = Callable[[], None]


class Worker:
    """One thread that does jobs in order.

    It is no daemon: a program that ends without `close()` still gets its last save published. It watches the main
    thread instead, and leaves when that has ended and the jobs are done.

    Args:
        name: The thread's name.
        farewell: Called in the thread before it leaves.
    """

    def __init__(self, name: str, farewell: Job | None = None) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._farewell = farewell
        self._thread = threading.Thread(target=self._run, name=name, daemon=False)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; it must deal with its own errors."""
        self._jobs.put(job)

    def drain(self) -> None:
        """Return when all jobs queued so far are done."""
        done = threading.Event()
        self.submit(done.set)
        done.wait()

    def close(self) -> None:
        """Do what is queued, then end the thread. Idempotent."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_POLL_S)
            except queue.Empty:
                if threading.main_thread().is_alive():
                    continue
                job = None
            if job is None:
                break
            try:
                job()
            except Exception:
                log.exception("a background job of hydra_ckpt failed")
            del job  # what it holds (buffers, models) must not outlive it in an idle thread
        if self._farewell is not None:
            self._farewell()


class Heart:
    """A thread that calls `beat` now and then, until it is stopped or the program ends.

    Args:
        interval_s: Seconds between beats.
        beat: Called in the thread.
    """

    def __init__(self, interval_s: float, beat: Job) -> None:
        self._interval_s = interval_s
        self._beat = beat
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hydra_ckpt-heart", daemon=False)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        since = 0.0
        while not self._stopped.wait(_POLL_S) and threading.main_thread().is_alive():
            since += _POLL_S
            if since >= self._interval_s:
                since = 0.0
                self._beat()
