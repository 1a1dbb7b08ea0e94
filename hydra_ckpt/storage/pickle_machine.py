"""Reads pickles without creating any object that they name.

A pickle is a program for a small machine. This one knows the instructions that DCP's indices and the files of single
tensors consist of, builds nothing but plain data, and records calls instead of making them; so the input need not be
trusted. Source: `pickletools`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PERSISTENT", "Noted", "run"]

PERSISTENT = "(persistent)"
"""The name of an object outside the pickle."""
_MARK = object()


@dataclass(eq=False)
class Noted:
    """Something that a pickle refers to by name, or an object that it wants to create from that.

    Attributes:
        what: The name, without the module's.
        arguments: The arguments of the call; None if it is not called.
        state: The state that it is then given.
    """

    what: str
    arguments: tuple[Any, ...] | None = None
    state: Any = field(default=None)


class _Machine:
    """A stack, a memory, and the instructions that are needed."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memory: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in _PUSHED:
            self.stack.append(_PUSHED[name]())
        elif name in _CONSTANTS:
            self.stack.append(argument)
        elif name in _COLLECTED:
            self._collect(name)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self._memory[len(self._memory) if argument is None else argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memory[argument])
        elif name == "BINPERSID":
            self.stack.append(Noted(PERSISTENT, tuple(self._popped(1))))
        elif name in ("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"):
            self._note(name, argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"it has the instruction {name}, which is not needed here")

    def _collect(self, name: str) -> None:
        """Make a tuple, or fill a list or dictionary."""
        count = _COLLECTED[name]
        items = self._since_mark() if count is None else self._popped(count)
        if name.startswith("TUPLE"):
            self.stack.append(tuple(items))
        elif name.startswith("APPEND"):
            self._top(list).extend(items)
        else:
            self._top(dict).update(_pairs(items))

    def _note(self, name: str, argument: Any) -> None:
        """Record a name, or what is to be done with it."""
        if name == "GLOBAL":
            self.stack.append(Noted(argument.split(" ")[-1]))
        elif name == "STACK_GLOBAL":
            _, what = self._popped(2)
            self.stack.append(Noted(str(what)))
        elif name == "BUILD":
            [state] = self._popped(1)
            self._top(Noted).state = state
        else:
            called, arguments = self._popped(2)
            if not isinstance(called, Noted) or called.arguments is not None or not isinstance(arguments, tuple):
                raise ValueError("it calls something that is not a class")
            self.stack.append(arguments[0] if called.what == "Size" else Noted(called.what, arguments))

    def _popped(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count:
            raise ValueError("it takes more than there is")
        del self.stack[-count:]
        return items

    def _top(self, kind: type[Any]) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise TypeError(f"it uses something else as a {kind.__name__}")
        return self.stack[-1]

    def _since_mark(self) -> list[Any]:
        position = max(place for place, item in enumerate(self.stack) if item is _MARK)
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items


_PUSHED: dict[str, Any] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
# How many items these take; None for all since the mark.
_COLLECTED: dict[str, int | None] = {
    "TUPLE": None,
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "APPEND": 1,
    "APPENDS": None,
    "SETITEM": 2,
    "SETITEMS": None,
}
_CONSTANTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"} | {
    f"{size}BINUNICODE{bits}" for size, bits in (("SHORT_", ""), ("", ""), ("", "8"))
}


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int, Noted):  # a nest of tuples would take for ever to be hashed
            raise TypeError(f"it has a {type(key).__name__} for a key")
        yield key, value


def run(data: bytes) -> Any:
    """What a pickle describes.

    Raises:
        Exception: Of any kind, where it is damaged or asks for more than this machine does.
    """
    machine = _Machine()
    for instruction, argument, _ in pickletools.genops(data):
        machine.step(instruction.name, argument)
    if len(machine.stack) != 1:
        raise ValueError("it ends in the middle")
    return machine.stack[0]
