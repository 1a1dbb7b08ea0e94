"""What is neither a tensor nor JSON is restored as it was, type included, or refused by name."""

from __future__ import annotations

import datetime as dt
import enum
import json
import re
import sys
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from hydra_ckpt import AppState, CheckpointError
from hydra_ckpt.storage.decoding import decode
from hydra_ckpt.storage.encoding import encode
from tests.test_state import Box, load, save


class Color(enum.Enum):
    RED = "red"
    PAIR = (1, 2.5)
    CRIMSON = "red"  # noqa: PIE796 - another name of RED


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 10


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Text(str, enum.Enum):
    A = "a"


class Point(NamedTuple):
    x: float
    y: Any


class Outer:
    class Inner(enum.Enum):
        ONE = 1


Pair = namedtuple("Pair", ["left", "right"])  # noqa: PYI024 - the older way to make one


def through_json(value: Any) -> Any:
    """A value after it was stored and read."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(value, "place", tensors), separators=(",", ":"))
    return decode(json.loads(text), {name: tensor.clone() for name, tensor in tensors.items()})


def assert_exact(one: Any, other: Any) -> None:
    """Equal to the last bit, types and memory orders included."""
    assert type(one) is type(other), (one, other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
        assert one.shape == other.shape
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        assert one.flags.f_contiguous == other.flags.f_contiguous
    elif isinstance(one, np.generic):
        assert (one.dtype, one.tobytes()) == (other.dtype, other.tobytes())
    elif isinstance(one, dict | MappingProxyType):
        assert_exact(list(one.items()), list(other.items()))
        assert getattr(one, "default_factory", None) is getattr(other, "default_factory", None)
    elif isinstance(one, enum.Enum):
        assert one is other
    elif isinstance(one, list | tuple | deque):
        assert len(one) == len(other)
        assert getattr(one, "maxlen", None) == getattr(other, "maxlen", None)
        for left, right in zip(one, other, strict=True):
            assert_exact(left, right)
    elif isinstance(one, torch.Generator):
        assert_exact(one.get_state(), other.get_state())
    else:
        assert repr(one) == repr(other) or one == other


EXAMPLES: list[Any] = [
    [Color.RED, Color.PAIR, Color.CRIMSON, Level.HIGH, Access.READ | Access.WRITE, Access(0), Text.A, Outer.Inner.ONE],
    {Level.LOW: Color.RED, Text.A: 1},
    [Point(1.5, torch.arange(3)), Pair([Point(0.0, None)], right=(1,))],
    [deque([1, 2], maxlen=5), deque(), deque([torch.ones(2)])],
    [frozenset({1, (2, "a")}), {frozenset({3})}, {frozenset({4}): "key"}],
    [complex(0.0, -0.0), complex(float("inf"), -1), range(1, 9, 3), slice(None, 4), slice(1, 2, 3)],
    [Path("/a/b"), PurePosixPath("c"), PureWindowsPath("C:/d")],
    [defaultdict(list, a=[1]), defaultdict(None, b=2), defaultdict(int), MappingProxyType({"c": 3})],
    [dt.datetime(2026, 1, 2, 3, 4, 5, 6), dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc), dt.date(2026, 1, 2)],  # noqa: DTZ001
    [dt.time(1, 2, 3), dt.timedelta(days=-1, microseconds=3)],
    [bytearray(b"\x00\xff"), b"\x00", torch.float16, torch.complex32, torch.strided, torch.channels_last],
    [np.dtype("f4"), np.dtype(">i8"), np.dtype("<M8[ns]")],
    [np.array(["a", "bc"]), np.array([b"x"]), np.array([1 + 2j]), np.arange(6.0).reshape(2, 3).T, np.array(3.5)],
    [np.array([1, 2], ">i4"), np.array(["2026-01-01", "NaT"], "M8[D]"), np.zeros((0, 3), "U5")],
    [np.datetime64("NaT"), np.datetime64("2026-01-01", "ns"), np.timedelta64(5, "us"), np.float16(0.1), np.str_("a")],
    [np.complex64(1 - 2j), np.bool_(True), np.uint64(2**64 - 1), np.bytes_(b"ab")],
    [torch.Generator().manual_seed(7)],
    {"~": "enum", "v": [1]},
    {"text": '{"~":"enum"}'},
]


@pytest.mark.parametrize("value", EXAMPLES, ids=range(len(EXAMPLES)))
def test_a_value_comes_back_with_its_type(value: Any) -> None:
    assert_exact(through_json(value), value)


_DTYPES = st.sampled_from([*"?bBhHiIlLfdFD", "e", ">f4", ">i8", "M8[ns]", "m8[s]", "U3", "S2"])
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=8),
    st.complex_numbers(),
    st.sampled_from([*Color, *Level, *Access, Access.READ | Access.WRITE]),
    st.dates(),
    st.datetimes(),
    st.datetimes(timezones=st.just(dt.timezone.utc)),
    st.times(),
    st.timedeltas(),
    st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 4)),
    st.builds(PurePosixPath, st.text(st.characters(blacklist_characters="\0"), max_size=5)),
    _DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))),
    _DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, 1)).map(lambda array: array[0]),
    hnp.arrays("f4", (2, 3)).map(torch.from_numpy),
)
_KEYS = st.one_of(
    st.text("ab~", max_size=3), st.integers(0, 9), st.sampled_from([*Color]), st.tuples(st.integers(0, 9))
)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Point, inner, inner),
        st.builds(deque, st.lists(inner, max_size=3), st.sampled_from([None, 3, 9])),
        st.dictionaries(_KEYS, inner, max_size=3),
        st.dictionaries(_KEYS, inner, max_size=3).map(OrderedDict),
        st.dictionaries(_KEYS, inner, max_size=3).map(lambda items: defaultdict(list, items)),
        st.dictionaries(_KEYS, inner, max_size=3).map(MappingProxyType),
        st.frozensets(_KEYS, max_size=3),
        st.dictionaries(st.text(max_size=2), st.integers(0, 9), max_size=3).map(Counter),
    )


@settings(max_examples=300, deadline=None)
@given(st.recursive(_LEAVES, _containers, max_leaves=8))
def test_any_plain_data_comes_back_exactly_or_is_refused_by_name(value: Any) -> None:
    refusal = ""
    try:
        found = through_json(value)
    except CheckpointError as error:
        refusal = str(error)
    if refusal:  # two tensors may come to have one name, such as those of the keys 1 and "1"
        assert re.match(r"place.*: two tensors would have this name", refusal), refusal
    else:
        assert_exact(found, value)


# -- what is refused -----------------------------------------------------------------------------------------------


def _local() -> Any:
    class Hidden(enum.Enum):
        A = 1

    return Hidden.A


class Wide(NamedTuple):
    a: int


class Attributed(Wide):
    pass


def _attributed() -> Any:
    value = Attributed(1)
    value.b = 2
    return value


REFUSED: dict[str, tuple[Any, str]] = {
    "function": (len, "builtin_function_or_method"),
    "object": (object(), "builtins.object"),
    "local enum": (_local(), "define it at the top of a module"),
    "attributes": (_attributed(), "attributes besides its fields"),
    "structured array": (np.zeros(2, [("a", "f4")]), "its element type"),
    "object array": (np.array([None, {}]), "its element type is object"),
    "structured scalar": (np.zeros(2, [("a", "f4")])[0], "its element type"),
    "wide float": (np.longdouble(1), "its element type"),
    "zone": (dt.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")), "convert it to UTC"),
    "factory": (defaultdict(lambda: 1), "its factory is"),
    "mask": (np.ma.masked_array([1, 2], [True, False]), "MaskedArray"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_exact_is_refused_by_its_place(case: str) -> None:
    value, words = REFUSED[case]
    with pytest.raises(CheckpointError, match=r"box:options\.key\.1: ") as refused:
        encode({"options": {"key": [0, value]}}, "box:", {})
    assert words in str(refused.value)


def test_classes_are_looked_up_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "not_imported_yet.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for tag in ("enum", "namedtuple"):
        with pytest.raises(CheckpointError, match="import not_imported_yet before the load"):
            decode({"~": tag, "v": ["not_imported_yet", "Kind", ["A"], ["x"]]}, {})
    trap = ModuleType("trap")
    trap.__getattr__ = lambda _: pytest.fail("it was called")  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "trap", trap)
    with pytest.raises(CheckpointError, match=r"trap\.Kind"):
        decode({"~": "enum", "v": ["trap", "Kind", "A", 1]}, {})
    with pytest.raises(CheckpointError, match="has not imported"):
        decode({"~": "enum", "v": ["os", "system", "A", 1]}, {})


@pytest.mark.parametrize("changed", ["member", "value", "fields"])
def test_a_class_that_has_changed_is_refused(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = Point(1, 2) if changed == "fields" else Level.HIGH
    encoded = encode(value, "place", {})
    if changed == "fields":
        new: Any = namedtuple("Point", ["x", "z"])  # noqa: PYI024
        monkeypatch.setattr(sys.modules[__name__], "Point", new)
    else:
        members = {"LOW": 1} if changed == "member" else {"LOW": 1, "HIGH": 11}
        monkeypatch.setattr(sys.modules[__name__], "Level", enum.IntEnum("Level", members))
    with pytest.raises(CheckpointError, match="restore the class as it was"):
        decode(encoded, {})


# -- formats -------------------------------------------------------------------------------------------------------


class Options(torch.optim.SGD):
    """An optimizer with options of many kinds."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0].update(mode=Color.RED, window=deque([1.0], maxlen=3), at=Point(1, 2), kinds=frozenset("a"))


@pytest.mark.parametrize("plain", [True, False])
def test_options_and_extras_of_any_kind_come_back_from_a_checkpoint(tmp_path: Path, plain: bool) -> None:
    def build() -> AppState:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if plain else Options(model.parameters())
        return AppState(model, optimizer, extras={"box": Box(None)})

    state = build()
    state.extras["box"].value = {"a": (1, 2)} if plain else {"path": Path("a"), "state": EXAMPLES[:-2]}
    kept = [dict(state.optimizers[0].param_groups[0], params=None), state.extras["box"].value]
    save(tmp_path, state)
    state.optimizers[0].param_groups[0].update(lr=9.0)
    again = build()
    again.optimizers[0].param_groups[0].update(lr=7.0)
    load(tmp_path, again)
    assert_exact([dict(again.optimizers[0].param_groups[0], params=None), again.extras["box"].value], kept)
