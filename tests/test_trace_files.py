"""scripts/trace_files counts what it says it counts."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import FrameType

from hydra_ckpt.testing.processes import PATIENCE

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "trace_files.py"


def test_the_files_of_a_save_and_a_load_are_listed_and_counted() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--calls"], capture_output=True, text=True, timeout=120 * PATIENCE, check=True
    ).stdout
    for title, entries in (
        ("save", ("checkpointer.py", "state/capture.py", "files.py")),
        ("load", ("checkpointer.py",)),
    ):
        head = re.search(rf"^{title}: (\d+) files .*\n((?:  .*\n)+)", done, re.MULTILINE)
        assert head is not None, done
        files = re.findall(r"^ +\d+ (\S+\.py)  \d+$", head[2], re.MULTILINE)
        assert len(files) == len(set(files)) == int(head[1])
        assert files[0] == "checkpointer.py"
        assert set(entries) <= set(files)
        calls = re.search(rf"^{title}: AppState handed over (\d+) times.*\n((?:  .*\n)*)", done, re.MULTILINE)
        assert calls is not None, done
        listed = re.findall(r"^ +(\d+) (\S+) -> (\S+) \w+", calls[2], re.MULTILINE)
        assert sum(int(count) for count, _, _ in listed) == int(calls[1]) > 0
        assert all(caller != callee for _, caller, callee in listed)


def test_hand_overs_after_the_capture_are_counted_apart() -> None:
    script = runpy.run_path(str(SCRIPT))
    trace, capture = script["Trace"](), script["CAPTURE"]
    state = script["trained"]()
    trace._call(frame_of(state), "saver.py", "contents.py")
    trace._call(frame_of(None), "saver.py", "contents.py")
    trace._call(frame_of(state), "saver.py", "saver.py")
    assert (trace.hand_overs.total(), trace.late.total(), len(trace.steps)) == (1, 0, 1)
    assert capture.co_name == "capture"  # not that of its decorator, which would never match
    trace._has_captured = True
    trace._call(frame_of(state), "saver.py", "contents.py")
    assert (trace.hand_overs.total(), trace.late.total()) == (2, 1)


def frame_of(state: object) -> FrameType:
    return sys._getframe()
