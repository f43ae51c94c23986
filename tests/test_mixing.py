"""The quick sums against the careful ones to the bit, and both against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ensemblekit import state
from ensemblekit.candidates import Row, mean_row, one_hot
from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import NotFiniteError
from ensemblekit.mixing import Moments, NotRegular, Scratch, careful, is_quick, quick
from ensemblekit.state import materialize

from .helpers import Array, read_set, write_safetensors
from .reference.test_weights_reference import FORMATS, exact_sum, nearest

QUICK = ["bfloat16", "float16", "float32"]
TARGETS = [None, "bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
few = settings(max_examples=60, deadline=None)


def both(values_KN: Array, row: Row, target: str | None = None) -> tuple[bytes, bytes]:
    """What the quick and the careful way make of the same block."""
    kind = values_KN.dtype
    block_KB = np.ascontiguousarray(values_KN).view(np.uint8)
    wanted = None if target is None else DTYPES[target]
    none = Moments.none(len(values_KN))
    assert is_quick(kind, [row])
    wide_KN = values_KN.astype(np.float64)
    if is_quick(kind, [row], wanted):
        [fast] = quick(block_KB, kind, [row], none, Scratch(), wanted)
    else:
        [fast] = careful(block_KB, wide_KN, kind, [row], none, wanted)
    [slow] = careful(block_KB, wide_KN, kind, [row], Moments.none(len(values_KN)), wanted)
    return fast.tobytes(), slow.tobytes()


@st.composite
def blocks(draw: st.DrawFn) -> Array:
    """K x N values: ordinary, subnormal, huge and zero ones; some equal in all snapshots."""
    kind = DTYPES[draw(st.sampled_from(QUICK))].numpy
    count, size = draw(st.integers(2, 6)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):  # any finite bits
        top = {2: 1 << 16, 4: 1 << 32}[kind.itemsize]
        bits = rng.integers(0, top, (count, size), dtype=np.uint64).astype(f"u{kind.itemsize}")
        found = bits.view(kind)
        with np.errstate(invalid="ignore"):
            wide = found.astype(np.float64)
        limit = 1e18 if kind.itemsize == 4 else np.inf  # beyond it the quick way gives up
        found = np.where(np.isfinite(wide) & (np.abs(wide) < limit), found, kind.type(0))
    else:
        found = (rng.normal(size=(count, size)) * rng.choice([1e-3, 1, 40], size)).astype(kind)
    found[rng.random((count, size)) < 0.1] = kind.type(-0.0)
    same = rng.random(size) < 0.3
    found[:, same] = found[0, same]
    return found.astype(kind)


def positive_rows(count: int) -> st.SearchStrategy[Row]:
    """Rows without negative coefficients, some of them 0, with and without a divisor of 1."""
    some = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 0.1, 0.3, 1 / 3, 0.7, 1e-6, 3.75])
    lists = st.lists(some, min_size=count, max_size=count).filter(any)
    return st.one_of(st.just(mean_row(count)), lists.map(lambda c: Row(tuple(c), math.fsum(c))))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, Row]:
    values_KN = draw(blocks())
    return values_KN, draw(positive_rows(len(values_KN)))


ZEROS = np.array([[5.0], [-0.0], [-0.0]], np.float32), Row((0.0, 1.0, 1.0), 2.0)
EQUALS = np.full((3, 1), 0.3, np.float32), Row((0.1, 0.2, 0.4), math.fsum((0.1, 0.2, 0.4)))


@few
@given(cases())
@example(ZEROS)
def test_quick_is_careful(case: tuple[Array, Row]) -> None:
    fast, slow = both(*case)
    assert fast == slow


@few
@given(cases(), st.sampled_from(TARGETS[1:]))
@example(EQUALS, "float64")
def test_quick_is_careful_into_another_type(case: tuple[Array, Row], target: str) -> None:
    fast, slow = both(*case, target)
    assert fast == slow


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", QUICK)
def test_quick_is_careful_in_large_blocks(kind: str, target: str | None) -> None:
    """Where the moments are summed in float32, the weights are not."""
    rng = np.random.default_rng(1)
    values_KN = (rng.normal(size=(3, 40_000)) * 0.1).astype(DTYPES[kind].numpy)
    fast, slow = both(values_KN, Row((1.0, 2.0, 5.0), 8.0), target)
    assert fast == slow


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float64"])
def test_equal_values_are_converted_as_they_are(target: str) -> None:
    """At the middle of two neighbours the last bit of float64 decides the result."""
    coefficients = (0.1, 0.2, 0.3, 0.4, 0.7)
    bits = np.random.default_rng(2).integers(0x3F000000, 0x40000000, 500).astype(np.uint32)
    middle = 0x8000 if target == "bfloat16" else 0x1000
    bits = (bits & ~np.uint32(2 * middle - 1)) | np.uint32(middle)
    values_KN = np.stack([bits.view(np.float32)] * 5)
    values_KN[0, 0] = 7  # the others are equal in all
    row = Row(coefficients, math.fsum(coefficients))
    fast, slow = both(values_KN, row, target)
    form = DTYPES[target].numpy
    plain = values_KN[1].astype(np.float64).astype(form)  # one rounding: float32 holds them
    assert np.frombuffer(slow, form)[1:].tobytes() == plain[1:].tobytes()
    assert fast == slow


@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_uniform_rows_are_the_exact_mean_rounded_once(kind: str, count: int) -> None:
    rng = np.random.default_rng(count)
    form = DTYPES[kind].numpy
    signs = rng.choice([-1, 0, 1], p=[0.45, 0.1, 0.45], size=(count, 300))
    values_KN = (signs * rng.uniform(0.05, 4, (count, 300))).astype(form)
    row = mean_row(count)
    columns = values_KN.T.astype(np.float64).tolist()
    for target in (None, *FORMATS):
        if target == "float64":  # whose digits are those of the sum itself
            continue
        expected = [nearest(exact_sum(v, row), target or kind) for v in columns]
        for found in both(values_KN, row, target):
            values = np.frombuffer(found, DTYPES[target or kind].numpy).astype(np.float64)
            assert values.tolist() == expected, target


@few
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=5),
)
@example([2.0**-149, 0.0])
@example([2.0**-149, 2.0**-149 * 2])
@example([3.0e38, 3.4e38, 3.2e38])
def test_any_float32_mean_is_within_half_a_unit(values: list[float]) -> None:
    """Whatever the magnitudes: float64 holds the sum of a few to far below float32's last place."""
    values_KN = np.array(values, np.float32)[:, None]
    row = mean_row(len(values))
    exact = exact_sum([float(v) for v in values_KN[:, 0]], row)
    largest = Fraction(max(abs(v) for v in values))
    slack = largest * Fraction(2) ** -50  # of float64, where large values cancel
    wide_KN = values_KN.astype(np.float64)
    args = (values_KN.view(np.uint8), wide_KN, values_KN.dtype, [row])
    [made] = careful(*args, Moments.none(len(values)), None)
    found = Fraction(float(made.view(np.float32)[0]))
    wanted = Fraction(nearest(exact, "float32"))
    step = Fraction(float(np.spacing(np.float32(abs(float(wanted))))))
    assert abs(found - exact) <= step / 2 + slack


def test_float64_target_is_the_plain_formula() -> None:
    """Summed in order, divided once: what numpy does in float64."""
    rng = np.random.default_rng(4)
    values_KN = rng.normal(size=(7, 200)).astype(np.float32)
    total = values_KN[0].astype(np.float64)
    for values in values_KN[1:]:
        total = total + values
    for found in both(values_KN, mean_row(7), "float64"):
        assert np.frombuffer(found, np.float64).tolist() == (total / 7).tolist()


@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_quick_leaves_what_is_not_finite(kind: str, bad: float, place: int) -> None:
    values_KN = np.ones((3, 5), DTYPES[kind].numpy)
    values_KN[place, 3] = bad
    for row in (mean_row(3), one_hot(0, 3), Row((0.0, 1.0, 0.0), 1.0), Row((1.0, 2.0, 0.0), 3.0)):
        moments = Moments.none(3)
        with pytest.raises(NotRegular):
            quick(values_KN.view(np.uint8), values_KN.dtype, [row], moments, Scratch(), None)
        assert not moments.squares_K.any(), "nothing was done"


@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize("bad, word", [(np.nan, "NaN"), (np.inf, "Inf")])
@pytest.mark.parametrize(
    "row", [mean_row(3), Row((1.0, 0.0, 1.0), 2.0), one_hot(2, 3)], ids=["mean", "zero", "one"]
)
def test_not_finite_names_file_and_key(
    tmp_path: Path, kind: str, bad: float, word: str, row: Row
) -> None:
    """Also in a snapshot that does not count: a run that diverged is worth knowing of."""
    paths = []
    for k in range(3):
        values = np.full(300, k, DTYPES[kind].numpy)
        values[200] = bad if k == 1 else 1
        arrays = {"fine": np.full(9, k, np.float32), "head.weight": values}
        paths.append(write_safetensors(tmp_path / f"snap_{k}.safetensors", arrays))
    with pytest.raises(NotFiniteError, match=rf"snap_1.safetensors: 'head.weight' contains {word}"):
        materialize(read_set(*paths), [row])


@pytest.mark.parametrize(
    "kind, row, expected",
    [
        ("float32", mean_row(2), True),
        ("bfloat16", Row((0.0, 3.0), 3.0), True),
        ("float32", Row((-1.0, 2.0), 1.0), False),
        ("float64", mean_row(2), False),
        ("float8_e4m3fn", mean_row(2), False),
    ],
)
def test_where_quick_is_used(kind: str, row: Row, *, expected: bool) -> None:
    assert is_quick(DTYPES[kind].numpy, [row]) == expected


@pytest.mark.parametrize("kind", QUICK)
def test_several_rows_are_made_in_one_go(kind: str) -> None:
    rng = np.random.default_rng(7)
    values_KN = rng.normal(size=(3, 70)).astype(DTYPES[kind].numpy)
    block_KB, rows = (
        values_KN.view(np.uint8),
        [mean_row(3), one_hot(1, 3), Row((1.0, 0.0, 3.0), 4.0)],
    )
    made = quick(block_KB, values_KN.dtype, rows, Moments.none(3), Scratch(), None)
    together = [one.tobytes() for one in made]
    assert together == [both(values_KN, row)[0] for row in rows]


@pytest.mark.parametrize("kind", QUICK)
def test_moments_agree(kind: str) -> None:
    rng = np.random.default_rng(8)
    for size in (50, 30_000):
        values_KN = rng.normal(size=(3, size)).astype(DTYPES[kind].numpy)
        wide_KN, row = values_KN.astype(np.float64), mean_row(3)
        fast, slow = Moments.none(3), Moments.none(3)
        quick(values_KN.view(np.uint8), values_KN.dtype, [row], fast, Scratch(), None)
        careful(values_KN.view(np.uint8), wide_KN, values_KN.dtype, [row], slow, None)
        np.testing.assert_allclose(fast.squares_K, slow.squares_K, rtol=1e-4)
        np.testing.assert_allclose(fast.products_K, slow.products_K, rtol=1e-4)
        assert fast.square == pytest.approx(slow.square, rel=1e-4)
        assert Moments.from_json(fast.to_json()).to_json() == fast.to_json()


@pytest.mark.parametrize("kind", QUICK)
def test_same_weights_whichever_way_they_go(tmp_path: Path, kind: str) -> None:
    """Through files and blocks: the whole average with the quick way closed."""
    rng = np.random.default_rng(9)
    paths = []
    for k in range(3):
        values: Any = rng.normal(size=(30, 40)).astype(DTYPES[kind].numpy)
        values[:10] = 1.5
        paths.append(write_safetensors(tmp_path / f"snap_{k}.safetensors", {"w": values}))
    rows = [mean_row(3), Row((0.0, 0.4, 0.6), 1.0)]
    fast, _ = materialize(read_set(*paths), rows)
    with mock.patch.object(state, "is_quick", return_value=False):
        slow, _ = materialize(read_set(*paths), rows)
    assert [one["w"].tobytes() for one in fast] == [one["w"].tobytes() for one in slow]
