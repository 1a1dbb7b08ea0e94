"""The background threads of a Checkpointer."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable

from hydra_ckpt.errors import CheckpointError

log = logging.getLogger(__name__)

# How soon an idle thread notices that the program has ended without close().
_POLL_S = 0.25

Job = Callable[[], None]


class _Thread(threading.Thread):
    """A background thread. It is not a daemon, but it does not keep a program alive that has otherwise ended."""


class _WorkerThread(_Thread):
    """A thread of a `Worker`."""


def _program_runs() -> bool:
    """Whether the main thread, or any other thread that the program waits for, is still there; ours do not count.

    A program may train in a thread of its own and let the main thread end.
    """
    return threading.main_thread().is_alive() or any(
        thread.is_alive() and not thread.daemon and not isinstance(thread, _Thread) for thread in threading.enumerate()
    )


def _saves_run() -> bool:
    return any(isinstance(thread, _WorkerThread) and thread.is_alive() for thread in threading.enumerate())


class Worker:
    """One thread that does jobs in order. Any thread of the same process may call.

    It is no daemon: a program that ends without `close()` still gets its last save published. It watches the other
    threads instead, and leaves when they have ended and the jobs are done.

    Args:
        name: The thread's name.
        farewell: Called in the thread before it leaves.
    """

    def __init__(self, name: str, drain: Job | None = None) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._farewell = drain
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._has_left = False  # changed with the lock: no job is queued that will not be done
        self._ended = threading.Event()  # an interrupted Thread.join() marks a thread as ended that still runs
        self._thread = _WorkerThread(target=self._run, name=name, daemon=False)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; it must deal with its own errors.

        Raises:
            CheckpointError: The thread has left, or belongs to the process that this one was forked from.
        """
        if os.getpid() != self._pid:
            raise CheckpointError(
                f"this process was forked from process {self._pid}, whose background threads save; save there"
            )
        with self._lock:
            if not self._has_left:
                self._jobs.put(job)
                return
        raise CheckpointError(
            "the background thread that saves has ended, because the program has: save before the last thread that is "
            "not a daemon ends, and call close()"
        )

    def drain(self) -> None:
        """Return when all jobs queued so far are done."""
        done = threading.Event()
        try:
            self.submit(done.set)
        except CheckpointError:
            return  # nothing is left to be done
        done.wait()

    def close(self) -> None:
        """Do what is queued, then end the thread. Idempotent; if interrupted, call it again.

        Does nothing in a forked process: the thread is its parent's.
        """
        if os.getpid() != self._pid:
            return
        if not self._ended.is_set():
            self._jobs.put(None)
            self._ended.wait()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._ended.set()

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_POLL_S)
            except queue.Empty:
                if _program_runs() or not self._leaves():
                    continue
                break
            if job is None:
                break
            try:
                job()
            except Exception:
                log.exception("a background job of hydra_ckpt failed")
            del job  # what it holds (buffers, models) must not outlive it in an idle thread
        with self._lock:
            self._has_left = True
        if self._farewell is not None:
            self._farewell()

    def _leaves(self) -> bool:
        """Leave if there is still nothing to do; whether that is so."""
        with self._lock:
            self._has_left = self._jobs.empty()
            return self._has_left


class Heart:
    """A thread that calls `beat` now and then, until it is stopped, or the program and its saves have ended.

    Args:
        interval_s: Seconds between beats.
        beat: Called in the thread.
    """

    def __init__(self, interval_s: float, beat: Job) -> None:
        self._interval_s = interval_s
        self._beat = beat
        self._stopped = threading.Event()
        self._thread = _Thread(target=self._run, name="hydra_ckpt-heart", daemon=False)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        since = 0.0
        while not self._stopped.wait(_POLL_S) and (_program_runs() or _saves_run()):
            since += _POLL_S
            if since >= self._interval_s:
                since = 0.0
                self._beat()
