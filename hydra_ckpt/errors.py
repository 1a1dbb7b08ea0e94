"""Every error that this package raises deliberately.

    CheckpointError
    ├── CheckpointConfigError    (ValueError)         names the key, the value, the choices
    ├── CheckpointNotFoundError  (FileNotFoundError)  lists what exists
    ├── CheckpointExistsError    (FileExistsError)    names what is in the way
    ├── CorruptCheckpointError                        file, byte range, expected, found
    ├── CheckpointFormatError                         file, its format, the version that wrote it
    ├── KeyMismatchError         (KeyError)           all missing, all unexpected, all shapes
    ├── SaveFailedError                               step, {rank: cause}; raised on every rank
    ├── TakenOverError                                who holds the directory now; this process should end
    ├── SaveOutcomeUnknown                            step; on a rank that was cut off from the others
    └── TopologyError            (ValueError)         what the mesh or the ranks disagree about

Each message says what happened, where, and what to do.
"""

from __future__ import annotations

import glob
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "CheckpointConfigError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointFormatError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "KeyMismatchError",
    "SaveFailedError",
    "SaveOutcomeUnknown",
    "TakenOverError",
    "TopologyError",
]

_LISTED = 20


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:most]) + (" and more" if len(names) > most else "")


def leave_out(dotted: str) -> str:
    """The last remedy of every refusal: how to continue training without a value in the checkpoint."""
    return f'or, if it may be lost, leave it out: checkpoint.allow_unsaved=["{glob.escape(dotted)}"]'


def printable(text: str) -> str:
    """A text that is safe to print: characters that control a terminal, or cannot be encoded, become escapes.

    Newlines are kept.
    """
    return "".join(letter if letter == "\n" or not _steers(letter) else _escape(letter) for letter in text)


def one_line(text: str) -> str:
    """A printable text on one line, for logs and tables, where a line break could forge a line."""
    return printable(text).replace("\n", "\\n")


def _steers(letter: str) -> bool:
    # Control characters, bidirectional marks, lone surrogates, private use, line separators.
    return not letter.isprintable() and letter != " "


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def prepare_streams() -> None:
    """Let this process's standard streams write letters that their encoding lacks as escapes, and not raise.

    For programs of our own. Python does so for stderr only; `PYTHONIOENCODING` may say otherwise. A stream that was
    closed at the start (`>&-`), which Python replaces by None, becomes the null device, so that no other file gets its
    descriptor.
    """
    # Each gets the lowest free descriptor: its own, in this order.
    sys.stdin = sys.stdin or _nowhere("r")
    sys.stdout = sys.stdout or _nowhere("w")
    sys.stderr = sys.stderr or _nowhere("w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _nowhere(mode: str) -> Any:
    return open(os.devnull, mode, encoding="utf-8")  # noqa: PTH123 - open until the process ends


def counted(number: int, noun: str) -> str:
    """A number with its noun, for messages: 1 rank, 2 ranks."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class CheckpointError(Exception):
    """Base class: catch this to catch everything raised deliberately."""

    # OSError would rebuild the text from errno and file name, KeyError would show its repr.
    def __str__(self) -> str:
        # A message may quote a hostile file.
        return printable(Exception.__str__(self))

    # Errors travel between ranks and processes; the default would call __init__ with the text alone.
    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (type(self), str(self), vars(self))


_Error = TypeVar("_Error", bound=CheckpointError)


def rebuild(kind: type[_Error], text: str, attributes: Mapping[str, Any]) -> _Error:
    """An error from another process, or with another text.

    Args:
        kind: The error's class.
        text: The error's message.
        attributes: The error's other attributes.
    """
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    vars(error).update(attributes)
    return error


class CheckpointConfigError(CheckpointError, ValueError):
    """A setting is wrong, or two settings exclude each other."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The requested checkpoint or file does not exist."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """Something that must not be overwritten is in the way."""


class CorruptCheckpointError(CheckpointError):
    """The bytes on disk are not what was written.

    Attributes:
        file: The damaged file.
        byte_range: Half-open range of bytes in ``file``, or None for the whole file.
    """

    def __init__(
        self,
        file: str | Path,
        problem: str,
        *,
        byte_range: tuple[int, int] | None = None,
        expected: object = None,
        found: object = None,
    ) -> None:
        self.file = str(file)
        self.byte_range = byte_range
        where = self.file if byte_range is None else f"{self.file}, bytes {byte_range[0]} to {byte_range[1]}"
        detail = "" if expected is None and found is None else f" (expected {expected}, found {found})"
        super().__init__(f"{where}: {problem}{detail}")


class CheckpointFormatError(CheckpointError):
    """A newer version wrote this checkpoint, in a format that this one cannot read. The checkpoint is not damaged.

    Attributes:
        file: The manifest.
        format: The number of its format.
        writer: The version that wrote it; None if unknown.
    """

    def __init__(self, file: str | Path, format_number: int, known: Iterable[int], writer: str | None = None) -> None:
        self.file = str(file)
        self.format = format_number
        self.writer = writer
        by = f"hydra_ckpt {writer}" if writer else "a newer hydra_ckpt"
        super().__init__(
            f"{self.file}: has format {format_number}, written by {by}; this version reads formats "
            f"{' and '.join(map(str, known))}. It is not damaged, and nothing was changed. Install a newer hydra_ckpt"
        )


class KeyMismatchError(CheckpointError, KeyError):
    """Names, shapes or dtypes in a checkpoint and in the live objects differ.

    Attributes:
        missing: Names the live objects need and the checkpoint lacks.
        unexpected: Names the checkpoint holds and the live objects lack.
        mismatched: Name to a description of the shapes or dtypes that differ.
    """

    def __init__(
        self,
        where: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Mapping[str, str] | None = None,
        remedy: str = "",
    ) -> None:
        self.missing = sorted(missing)
        self.unexpected = sorted(unexpected)
        self.mismatched = dict(sorted((mismatched or {}).items()))
        lines = [f"{where}: the names or shapes differ; nothing was changed."]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"  {title} ({len(names)}): " + ", ".join(names))
        if self.mismatched:
            lines.append(f"  different ({len(self.mismatched)}):")
            lines += [f"    {name}: {text}" for name, text in self.mismatched.items()]
        if remedy:
            lines.append(f"  {remedy}")
        super().__init__("\n".join(lines))


class SaveFailedError(CheckpointError):
    """A save failed on at least one rank; raised on every rank. Published checkpoints are kept.

    Attributes:
        step: The step whose save failed.
        causes: Rank to a one-line description of its error.
    """

    def __init__(self, step: int, causes: Mapping[int, str], *, remedy: str = "") -> None:
        self.step = step
        self.causes = dict(sorted(causes.items()))
        shown = [f"rank {rank}: {cause}" for rank, cause in list(self.causes.items())[:_LISTED]]
        more = len(self.causes) - _LISTED
        if more > 0:
            shown.append(f"and {counted(more, 'more rank')}")
        tail = remedy or "Checkpoints published before are untouched; fix the cause and save again."
        super().__init__(f"saving step {step} failed: " + "; ".join(shown) + f". {tail}")


class TakenOverError(CheckpointError):
    """Another run holds the directory now: this process was presumed dead, and must not publish. It should end."""

    remedy = (
        "The other run continues here, and published checkpoints are untouched: end this process. To train beside that "
        "run, start again with another checkpoint.checkpoint_dir."
    )


class SaveOutcomeUnknown(CheckpointError):  # noqa: N818 - not an error of the save, which may be published
    """This rank wrote its part of a save and was then cut off: the save may be published, or may have failed.

    The other ranks know the outcome. This rank gets it when the ranks next communicate: at the next step, save or end
    of training.

    Attributes:
        step: The step that was saved.
    """

    def __init__(self, step: int, cause: str) -> None:
        self.step = step
        super().__init__(
            f"this rank does not know whether step {step} is published: it heard nothing from rank 0 after writing its "
            f"part: {cause}. It finds out when the ranks next meet; `hydra-ckpt list` shows what is published"
        )


class TopologyError(CheckpointError, ValueError):
    """The ranks or the mesh do not fit the checkpoint, the model, or each other."""
