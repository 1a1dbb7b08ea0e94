"""Python programs that start at once: they fork from a server that has imported torch and this package already.

A new interpreter needs four seconds of CPU for these imports; a test that starts a dozen programs pays a dozen times.
A program started here has its own process, command line, environment, standard streams, signals and exit code. Three
things differ: its modules are imported already, `hash(str)` is the same in all of them, and its parent is the server.
Tests of imports, of the end of the interpreter, or of what a parent sees start `sys.executable` with `subprocess`.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import reduction, set_start_method
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hydra_ckpt.testing.processes import PATIENCE, forkserver


class Program(subprocess.Popen):
    """A `subprocess.Popen` for `[sys.executable, ...]` with the path of a script, `-c CODE` or `-m MODULE`."""

    # The arguments are those of Popen's own method, the same from Python 3.10 to 3.13.
    def _execute_child(
        self, args: Sequence[Any], _exe, _preexec, _close, _pass, cwd, env, _info, _flags, _shell, *rest: Any
    ) -> None:
        pipes, session = rest[:6], rest[11]
        assert args[0] == sys.executable, "subprocess starts other programs"
        start = _Start(
            [str(argument) for argument in args[1:]],
            os.fspath(cwd or Path.cwd()),
            dict(env if env is not None else os.environ),
            session,
        )
        streams = [own if end == -1 else end for own, end in enumerate((pipes[0], pipes[3], pipes[5]))]
        self._process = forkserver().Process(target=_become, args=(start, _Streams(streams)), daemon=False)
        self._process.start()
        self.pid, self._child_created = self._process.pid, True
        self._close_pipe_fds(*pipes)

    def communicate(self, *said: str, timeout: float | None = None) -> tuple[str, str]:
        return super().communicate(*said, timeout=timeout * PATIENCE if timeout is not None else None)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        self._process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def run(command: Sequence[Any], *, timeout: float = 200.0, **options: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with captured text, for a `Program`; its exit code is left to the caller."""
    pipe = subprocess.PIPE
    with Program(command, stdout=pipe, stderr=pipe, text=True, **options) as program:
        try:
            output, errors = program.communicate(timeout=timeout)
        except BaseException:
            program.kill()
            raise
    return subprocess.CompletedProcess(command, program.returncode, output, errors)


def ranks(command: Sequence[Any], count: int, *, env: dict[str, str], **options: Any) -> list[Program]:
    """One program for each rank, with the variables by which any launcher tells it; nobody starts them again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    each = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [Program(command, env=own, **options) for own in each]


@dataclass(frozen=True)
class _Start:
    """What a program begins with."""

    arguments: list[str]
    cwd: str
    environment: dict[str, str]
    new_session: bool


class _Streams:
    """Descriptors that become the standard streams of the process that gets this."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers

    def __getstate__(self) -> list[Any]:
        return [reduction.DupFd(number) for number in self._numbers]

    def __setstate__(self, handles: list[Any]) -> None:
        self._numbers = [handle.detach() for handle in handles]

    def install(self, encoding: str | None) -> None:
        for standard, number in enumerate(self._numbers):
            os.dup2(number, standard)
        for number in self._numbers:
            os.close(number)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False, encoding=encoding)
        sys.stderr = os.fdopen(2, "w", closefd=False, encoding=encoding, errors="backslashreplace", buffering=1)


def _become(start: _Start, streams: _Streams) -> None:
    """Turn this process, fresh from the server, into the program."""
    streams.install(start.environment.get("PYTHONIOENCODING"))
    if start.new_session:
        os.setsid()
    os.chdir(start.cwd)
    os.environ.clear()
    os.environ.update(start.environment)
    sys.path[:0] = start.environment.get("PYTHONPATH", "").split(os.pathsep)
    set_start_method(None, force=True)  # the child has inherited the server's
    torch.set_num_threads(int(start.environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    np.random.seed()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = _status_of(_main_of(start.arguments))
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _main_of(arguments: list[str]) -> Callable[[], Any]:
    """What the interpreter would do for a command line."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    first, *others = arguments
    if first == "-m":
        sys.argv, sys.path[:0] = ["-m", *others[1:]], [str(Path.cwd())]
        return lambda: runpy._run_module_as_main(others[0])
    if first == "-c":
        sys.argv, sys.path[:0] = ["-c", *others[1:]], [""]
        code = compile(others[0], "<string>", "exec")
    else:
        sys.argv, sys.path[:0] = arguments, [str(Path(first).resolve().parent)]
        code, main.__file__ = compile(Path(first).read_text(), first, "exec"), first
    return lambda: exec(code, main.__dict__)


def _status_of(work: Callable[[], Any]) -> int:
    """The exit code that the interpreter would have."""
    try:
        work()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 255
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
