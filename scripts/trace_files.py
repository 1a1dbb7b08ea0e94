"""Count the files of hydra_ckpt that one save and one load pass through, and how often the AppState changes hands.

    scripts/trace_files [--async] [--first] [--calls]

One process saves a model, its optimizer and a moving average of the weights (an extra), and loads them again, while
every call is recorded in all threads. Printed are, for the save and for the load:

- the files in the order in which they are entered, each with the number of calls into it from other files, and the
  number of steps: different pairs of a calling and a called file;
- the hand-overs: calls from one file into another that pass the AppState as an argument, and those of them that come
  after `Extractor.capture` has returned. From then on only frozen values should travel.

The second save and load are counted, because the first ones also fill caches; `--first` counts the first ones.
`--calls` lists the hand-overs.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hydra_ckpt
from hydra_ckpt import AppState, CheckpointingConfig
from hydra_ckpt.state.capture import Extractor

PACKAGE = f"{Path(hydra_ckpt.__file__).parent}/"
AIMS = {"save": 30, "load": 25}
HAND_OVERS_AIM = 10
CAPTURE: CodeType = inspect.unwrap(Extractor.capture).__code__


class Trace:
    """What is recorded of one save or load. Its methods are called from all threads.

    Attributes:
        files: Calls into each file from other files; in the order of the first call.
        steps: The pairs of a calling and a called file.
        hand_overs: Calls that pass the AppState to another file, by caller and callee.
        late: Those of them that come after the capture.
        reads: How often the AppState's own properties are read.
    """

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.steps: set[tuple[str, str]] = set()
        self.hand_overs: Counter[str] = Counter()
        self.late: Counter[str] = Counter()
        self.reads = 0
        self._has_captured = False
        self._generators: set[FrameType] = set()

    def record(self, frame: FrameType, event: str) -> None:
        """Record a call or a return, as `sys.setprofile` reports it."""
        callee = file_of(frame.f_code)
        if callee is None or frame.f_code.co_name == "<module>":
            return
        if event == "return" and frame.f_code is CAPTURE:
            self._has_captured = True
        if event == "call" and not self._continues(frame):
            self._call(frame, caller_of(frame), callee)

    def _continues(self, frame: FrameType) -> bool:
        """Whether this is a generator that has been called before."""
        if not frame.f_code.co_flags & inspect.CO_GENERATOR:
            return False
        known = frame in self._generators
        self._generators.add(frame)
        return known

    def _call(self, frame: FrameType, caller: str | None, callee: str) -> None:
        if caller == callee:
            return
        self.files[callee] += 1
        if caller is None:
            return
        self.steps.add((caller, callee))
        self.reads += isinstance(frame.f_locals.get("self"), AppState)
        if passes_state(frame):
            what = f"{caller} -> {callee} {frame.f_code.co_name}"
            self.hand_overs[what] += 1
            self.late[what] += self._has_captured


def file_of(code: CodeType) -> str | None:
    """The file of the package that this code is in, relative to the package; None for other code."""
    name = code.co_filename
    return name[len(PACKAGE) :] if name.startswith(PACKAGE) else None


def caller_of(frame: FrameType) -> str | None:
    """The nearest calling file of the package."""
    above = frame.f_back
    while above is not None:
        found = file_of(above.f_code)
        if found is not None:
            return found
        above = above.f_back
    return None


def passes_state(frame: FrameType) -> bool:
    """Whether an argument of this call, other than `self`, is the AppState."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return any(isinstance(frame.f_locals.get(name), AppState) for name in names if name != "self")


class Recorder:
    """Passes what happens in this thread, and in threads that begin from now on, to the current trace, if any."""

    def __init__(self) -> None:
        self._trace: Trace | None = None
        threading.setprofile(self._profile)

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if self._trace is not None:
            self._trace.record(frame, event)

    @contextmanager
    def recording(self) -> Iterator[Trace]:
        """Record what happens inside the `with` block."""
        trace = self._trace = Trace()
        sys.setprofile(self._profile)
        try:
            yield trace
        finally:
            sys.setprofile(None)
            self._trace = None


def trained() -> AppState:
    """A model after one step, its optimizer, and the average of its weights."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return AppState(model=model, optimizer=optimizer, extras={"ema": torch.optim.swa_utils.AveragedModel(model)})


def traces(directory: Path, *, is_async: bool, times: int) -> dict[str, Trace]:
    """Save and load `times` times; the traces of the last save and load."""
    recorder, state, found = Recorder(), trained(), {}
    config = CheckpointingConfig(checkpoint_dir=directory, save_consolidated="always", is_async=is_async)
    with config.build(dp_rank=0, tp_rank=0, pp_rank=0) as checkpointer:
        checkpointer.start(state)
        for step in range(1, times + 1):
            with recorder.recording() as found["save"]:
                checkpointer.save(state, step=step).result()
            checkpointer.drain()
    for _ in range(times):
        with config.build(dp_rank=0, tp_rank=0, pp_rank=0) as checkpointer:
            with recorder.recording() as found["load"]:
                report = checkpointer.load(state)
            assert report is not None
            assert "extras.ema" in report.exact
    threading.setprofile(None)
    return found


def show(title: str, trace: Trace, *, calls: bool) -> None:
    """Print one trace."""
    print(f"{title}: {len(trace.files)} files (aim {AIMS[title]}), {len(trace.steps)} steps")
    for number, (file, count) in enumerate(trace.files.items(), 1):
        print(f"  {number:3} {file}  {count}")
    total, late = trace.hand_overs.total(), trace.late.total()
    aim = f" (aim {HAND_OVERS_AIM}, none after capture)" if title == "save" else ""
    after = f", {late} of them after capture" if title == "save" else ""
    print(f"{title}: AppState handed over {total} times{aim}{after}; its properties are read {trace.reads} times")
    for what, count in sorted(trace.hand_overs.items()) if calls else ():
        print(f"  {count:3} {what}" + (f"  ({trace.late[what]} after capture)" if trace.late[what] else ""))


def main() -> None:
    """Parse, trace, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--async", action="store_true", dest="is_async", help="save in the background")
    parser.add_argument("--first", action="store_true", help="count the first save and load, not the second")
    parser.add_argument("--calls", action="store_true", help="list the hand-overs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = traces(Path(directory), is_async=options.is_async, times=1 if options.first else 2)
    for title, trace in found.items():
        show(title, trace, calls=options.calls)


if __name__ == "__main__":
    main()
