"""Makes calls that may block forever without blocking their caller.

Example: with a limit of 10 seconds, a rank asks for a key while rank 0 is paused. PyTorch's `get` blocks in a thread
of the courier, and `call` raises `TimeoutError` after 10 seconds. If rank 0 continues 5 seconds later, the `get`
returns, its value is dropped, and the next call works. Calls wait in one queue: one that is submitted meanwhile, with
a limit of 3 seconds, is cancelled without having been made.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from typing import TypeVar

_T = TypeVar("_T")


class Courier:
    """Makes the calls of one connection in a daemon thread, one after the other. Any thread may submit.

    PyTorch's store keeps its timeouts only while its server answers: if rank 0 is paused, or packets are dropped, a
    call stays in recv(2) forever. TCP_USER_TIMEOUT would fix the second case but not the first, because the kernel of
    a paused process still acknowledges packets. Our own transport over sockets would fix both, but it would have to
    serve thousands of ranks from Python. So the call gets a thread, and the caller stops waiting at its limit. The
    thread is left waiting; if the answer arrives after all, the connection can be used again.

    Args:
        name: The thread's name.
        beat: Called every `beat_s` seconds while `beating`, unless a call is being made. None: never.
        beat_s: Seconds between beats.
    """

    def __init__(self, name: str, beat: Callable[[], None] | None = None, beat_s: float | None = None) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = queue.SimpleQueue()
        self._beat = beat
        self._beat_s = beat_s if beat is not None else None
        self._is_beating = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, call: Callable[[], _T]) -> Future[_T]:
        """Queue a call; nothing has to wait for it."""
        future: Future[_T] = Future()
        self._jobs.put((future, call))  # type: ignore[arg-type]
        return future

    def call(self, call: Callable[[], _T], limit_s: float) -> _T:
        """Make a call and return its answer.

        Raises:
            TimeoutError: No answer within `limit_s` seconds. A call that has not begun by then is cancelled.
        """
        future = self.submit(call)
        try:
            return future.result(limit_s)
        except FutureTimeoutError as error:
            future.cancel()
            raise TimeoutError(f"no answer within {limit_s:.0f} s") from error

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beat while the block runs."""
        self._is_beating = True
        try:
            yield
        finally:
            self._is_beating = False

    def close(self) -> None:
        """Let the thread end after the calls queued so far. Idempotent; does not wait."""
        self._jobs.put(None)

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=self._beat_s)
            except queue.Empty:
                self._beat_once()
                continue
            if job is None:
                return
            _make(*job)
            del job  # an idle thread must not keep the call's objects alive

    def _beat_once(self) -> None:
        if self._is_beating and self._beat is not None:
            _make(Future(), self._beat)  # a beat that fails is simply not heard


def _make(future: Future[object], call: Callable[[], object]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001 - raised where the answer is waited for
        future.set_exception(error)


def bounded(call: Callable[[], _T], limit_s: float) -> _T:
    """Make a single call in a thread of its own, and return its answer.

    Raises:
        TimeoutError: No answer within `limit_s` seconds.
    """
    courier = Courier("hydra_ckpt-call")
    try:
        return courier.call(call, limit_s)
    finally:
        courier.close()
