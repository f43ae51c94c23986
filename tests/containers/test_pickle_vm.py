"""The inert machine returns what pickle would, where that is a plain value, and runs nothing."""

from __future__ import annotations

import argparse
import collections
import datetime
import fractions
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemblekit.containers import Extent, Inert, Unusable, pickle_vm
from ensemblekit.errors import DamagedError, HostileError

from ..faults.forge import Code, build, call, named, pickled, push, stack_named

PROTOCOLS = range(6)


def load(data: bytes) -> Any:
    def no_storage(key: str, nbytes: int, *_: int) -> Extent | Unusable:
        return Unusable(f"lies in storage {key} of {nbytes} bytes")

    return pickle_vm.load(data, where="file", storage=no_storage)


def same(ours: Any, theirs: Any) -> bool:
    """Equal in type and value at every depth; sets stay lists of their members."""
    if isinstance(theirs, set | frozenset):
        members = ours.items or list(ours.args) if isinstance(ours, Inert) else ours
        return isinstance(members, list) and sorted(map(repr, members)) == sorted(map(repr, theirs))
    if type(ours) is not type(theirs):
        return False
    if isinstance(theirs, float):
        return ours == theirs or (math.isnan(ours) and math.isnan(theirs))
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in theirs)
    return bool(ours == theirs)


TEXTS = st.text(max_size=12)
ASCII = st.text(st.characters(max_codepoint=126), max_size=12)
NUMBERS = st.integers() | st.integers(-(2**80), 2**80) | st.floats()
ATOMS = st.none() | st.booleans() | NUMBERS | TEXTS | st.binary(min_size=1, max_size=12)
KEYS = TEXTS | st.integers() | st.binary(min_size=1, max_size=4) | st.tuples(st.integers(), TEXTS)
SETS = st.frozensets(st.integers(), max_size=4) | st.sets(ASCII, max_size=4)


def nested(atoms: st.SearchStrategy[Any], keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        atoms,
        lambda inner: (
            st.lists(inner, max_size=5)
            | st.lists(inner, max_size=5).map(tuple)
            | st.dictionaries(keys, inner, max_size=5)
        ),
        max_leaves=20,
    )


@settings(max_examples=150, deadline=None)
@given(nested(ATOMS | SETS, KEYS), st.integers(2, 5))
def test_plain_values_come_back(value: Any, protocol: int) -> None:
    assert same(load(pickle.dumps(value, protocol)), value)


@settings(max_examples=80, deadline=None)
@given(
    nested(st.none() | st.booleans() | NUMBERS | ASCII | SETS, ASCII | st.integers()),
    st.integers(0, 1),
)
def test_plain_values_of_the_oldest_protocols(value: Any, protocol: int) -> None:
    assert same(load(pickle.dumps(value, protocol)), value)


@pytest.mark.parametrize(
    "text", ["é", "Ã©", "\x80\xff", "日本", "\\", "\n\r", "\U0001f600", "\x1a"]
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_texts_beyond_ascii(text: str, protocol: int) -> None:
    """A line holds latin-1 bytes; it is decoded as UTF-8 first."""
    assert load(pickle.dumps({text: text}, protocol)) == {text: text}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_empty_bytes(protocol: int) -> None:
    """Protocols 0 to 2: `bytes()` is a call of `__builtin__.bytes`, which stays inert."""
    assert load(pickle.dumps(b"", protocol)) == b""


@pytest.mark.parametrize("protocol", [0, 1])
def test_bytes_of_the_oldest_protocols(protocol: int) -> None:
    """Bytes are latin-1 text, and so have the fault of texts."""
    value = {"bytes": bytes(range(1, 256)), "metric": np.float64(0.3), "count": np.int64(-7)}
    assert load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_long_texts(protocol: int) -> None:
    """A log or a config of more than 10,000 characters is one line."""
    value = {"log": "x" * 30_000, "blob": b"y" * 70_000 if protocol > 2 else None}
    assert load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        [[]] * 300,
        list(range(3000)),
        {i: str(i) for i in range(3000)},
        [True, False, None, 0, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**63, -(2**200)],
        [0.0, -0.0, 1e-320, math.inf, -math.inf, 0.1],
        ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        collections.OrderedDict([("b", 1), ("a", 2)]),
        collections.defaultdict(list, {"a": [1]}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_collections(value: Any, protocol: int) -> None:
    expected = dict(value) if isinstance(value, dict) else value
    assert same(load(pickle.dumps(value, protocol)), expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_and_recursive_values(protocol: int) -> None:
    shared: list[Any] = [1]
    shared.append(shared)
    loop = load(pickle.dumps({"a": shared, "b": shared}, protocol))
    assert loop["a"] is loop["b"]
    assert loop["a"][1] is loop["a"]


@pytest.mark.parametrize("protocol", PROTOCOLS[1:])
@pytest.mark.parametrize(
    "value, expected",
    [
        (np.float64(0.5), 0.5),
        (np.float32(0.25), 0.25),
        (np.int64(-7), -7),
        (np.bool_(True), True),
        (Path("a") / "b.txt", "a/b.txt"),
        (complex(1, 2), complex(1, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_scalars_and_paths(value: Any, expected: Any, protocol: int) -> None:
    assert load(pickle.dumps([value], protocol)) == [expected]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_stay_lifeless(protocol: int) -> None:
    found = load(pickle.dumps(argparse.Namespace(lr=0.1, layers=[1, 2]), protocol))
    assert isinstance(found, Inert)
    assert found.attributes() == {"lr": 0.1, "layers": [1, 2]}
    day = load(pickle.dumps(datetime.date(2024, 2, 29), protocol))
    assert isinstance(day, Inert)
    assert day.cls == "datetime.date"


class Base:
    """Pickled by the tests; unpickling it would be seen."""

    loaded = 0

    def __setstate__(self, state: Any) -> None:
        Base.loaded += 1


class Slotted(Base):
    __slots__ = ("b",)


class OwnList(list[int]):
    pass


class OwnDict(dict[str, int]):
    pass


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_own_classes_are_not_made(protocol: int) -> None:
    item = OwnList([1, 2])
    item.name = "list"  # type: ignore[attr-defined]
    found = load(pickle.dumps([Base(), item, OwnDict(a=1)], protocol))
    assert Base.loaded == 0
    if protocol >= 2:
        assert found[1].items == [1, 2]
        assert found[1].attributes() == {"name": "list"}
        assert found[2].mapping == [("a", 1)]


def test_nothing_is_imported(tmp_path: Path) -> None:
    """A module that leaves a mark when imported, named in every way that a pickle can."""
    marker = tmp_path / "imported"
    (tmp_path / "trap.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\ndef f(*a): pass\nclass C: pass\n"
    )
    ways = [
        named("trap.f"),
        stack_named("trap.f"),
        call("trap.f", 1),
        build(call("trap.C"), {"x": 1}),
        Code(named("trap.C") + push(()) + b"\x81"),
        Code(b"(itrap\nC\n"),
        Code(b"(" + named("trap.C") + b"o"),
        Code(b"(" + named("trap.C") + push("storage") + b"tQ"),
    ]
    paths = [tmp_path / f"{i}.pkl" for i, _ in enumerate(ways)]
    for path, way in zip(paths, ways, strict=True):
        path.write_bytes(pickled([way]))
    program = (
        "import sys, pathlib\n"
        "from ensemblekit.containers import pickle_vm\n"
        "for path in sys.argv[1:]:\n"
        "    data = pathlib.Path(path).read_bytes()\n"
        "    pickle_vm.load(data, where=path, storage=lambda *_: None)\n"
        "assert 'trap' not in sys.modules and 'torch' not in sys.modules\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).resolve().parents[2]}"}
    command = [sys.executable, "-c", program, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "ends without STOP"),
        (b"\x80\x02", "ends without STOP"),
        (b"\x80\x06.", "protocol 6"),
        (b".", "empty stack"),
        (b"(.", "a mark as a value"),
        (b"NN.", "1 values are left over"),
        (b"\xff.", "opcode 0xff"),
        (b"\x82\x01.", "extension registry"),
        (b"h\x00.", "never written"),
        (b"Np-1\n.", "memo entry"),
        (b"t.", "a mark that is not there"),
        (b"X\xff\xff\xff\x7f.", "runs past the end"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff.", "runs past the end"),
        (b"\x8b\xff\xff\xff\xff.", "a length of -1"),
        (b"\x95\xff\x00\x00\x00\x00\x00\x00\x00.", "a frame runs past the end"),
        (b"Iabc\n.", "not what its opcode says"),
        (b"I" + b"9" * 5000 + b"\n.", "not what its opcode says"),
        (b"I" + b"9" * 4300 + b"\n.", "not what its opcode says"),
        (b"I-" + b"9" * 2000 + b"\n.", "not what its opcode says"),
        (b"L" + b"9" * 2001 + b"L\n.", "not what its opcode says"),
        (
            b"\x8b" + (1025).to_bytes(4, "little") + b"\x01" * 1025 + b".",
            "an integer of 1025 bytes",
        ),
        (
            b"\x8b" + (2077).to_bytes(4, "little") + b"\xff" * 2077 + b".",
            "an integer of 2077 bytes",
        ),
        (b"NNa.", "appends to"),
        (b"}]Ns.", "a list as a key"),
        (b"}(Nu.", "without a value"),
        (b"N)R.", "calls a NoneType"),
        (b"c_codecs\nencode\n](K\x01e\x85R.", "_codecs.encode with unusable arguments"),
        (b"\x8c\x01\xff.", "utf-8"),
        (b"(" * 1_000_002, "values on the stack"),
    ],
    ids=lambda value: repr(value)[:24] if isinstance(value, bytes) else "",
)
def test_malformed(data: bytes, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        load(data)


@pytest.mark.parametrize(
    "data, value",
    [
        (b"\x8b" + (1024).to_bytes(4, "little") + b"\xff" * 1024 + b".", -1),
        (pickle.dumps(2 ** (8 * 1024 - 1) - 1, 2), 2 ** (8 * 1024 - 1) - 1),
        (pickle.dumps(-(2 ** (8 * 255 - 1)), 2), -(2 ** (8 * 255 - 1))),
        (b"I" + b"9" * 2000 + b"\n.", 10**2000 - 1),
        (b"L-" + b"9" * 1999 + b"L\n.", 1 - 10**1999),
    ],
    ids=["LONG4 of ones", "LONG4", "LONG1", "I", "L"],
)
def test_large_integers(data: bytes, value: int) -> None:
    """As far as Python would write their digits."""
    assert load(data) == value
    assert str(load(data))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), nested(ATOMS, KEYS), st.integers(0, 5), st.data())
def test_any_bytes_end_in_a_value_or_an_error(
    noise: bytes, value: Any, protocol: int, data: st.DataObject
) -> None:
    sound = pickle.dumps(value, protocol)
    place = data.draw(st.integers(0, len(sound)))
    for stream in (noise, sound[:place], sound[:place] + noise + sound[place:]):
        try:
            load(stream)
        except (DamagedError, HostileError) as error:
            assert "file" in error.message  # noqa: PT017


def test_pickled_fractions_are_data() -> None:
    found = load(pickle.dumps(fractions.Fraction(1, 3)))
    assert isinstance(found, Inert)
