"""`weighted_sums`: exact cases by hand, what it refuses, and what it notices on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemblekit.candidates import Row, mean_row, one_hot
from ensemblekit.dtypes import DTYPES, narrow
from ensemblekit.errors import DamagedError, IncompatibleError, InputError, NotFiniteError
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.state import array_sink, materialize, sums, weighted_sums

from .helpers import Array, read_set, write_safetensors, write_torch

FIRST_LAST = Row((1.0, 0.0, 1.0), 2.0)


def saved(folder: Path, *values: object, key: str = "w") -> SnapshotSet:
    """Snapshots with one tensor each beside a weight that all of them have."""
    paths = [folder / f"snap_{k}.pt" for k in range(len(values))]
    for path, value in zip(paths, values, strict=True):
        write_torch(path, {key: torch.as_tensor(value), "anchor": torch.ones(1)})
    return read_set(*paths)


def mixed(snapshots: SnapshotSet, row: Row | None = None, key: str = "w") -> Array:
    [arrays], _ = materialize(snapshots, [row or mean_row(len(snapshots))])
    return arrays[key]


@pytest.mark.parametrize(
    "values, row, expected",
    [
        ([[1.0, 2.0], [3.0, 6.0]], mean_row(2), [2.0, 4.0]),
        ([[1.0], [2.0], [6.0]], mean_row(3), [3.0]),
        ([[1.0], [2.0], [6.0]], Row((1.0, 2.0, 1.0), 4.0), [2.75]),
        ([[1.0], [2.0], [6.0]], FIRST_LAST, [3.5]),
        ([[1.0], [2.0]], Row((-1.0, 2.0), 1.0), [3.0]),
        ([[1.0], [2.0]], Row((-1.0, -1.0), -2.0), [1.5]),
        ([[2.0**100], [-(2.0**100)]], mean_row(2), [0.0]),
        ([[-0.0], [-0.0]], mean_row(2), [-0.0]),
        ([[2.0**127], [2.0**127 * 1.5]], mean_row(2), [2.0**127 * 1.25]),
    ],
)
def test_by_hand(tmp_path: Path, values: list[object], row: Row, expected: list[float]) -> None:
    result = mixed(saved(tmp_path, *values), row)
    assert result.tobytes() == np.array(expected, np.float32).tobytes()


def test_largest_float64_values_have_a_mean(tmp_path: Path) -> None:
    large = [torch.full((4,), x, dtype=torch.float64) for x in (1.7e308, 1.6e308, 1.5e308)]
    assert np.allclose(mixed(saved(tmp_path, *large)), 1.6e308)


def test_cancellation_in_float64_keeps_what_is_small(tmp_path: Path) -> None:
    values = [torch.tensor([x], dtype=torch.float64) for x in (1e16, 1.0, -1e16)]
    assert mixed(saved(tmp_path, *values)) == np.float64(1) / 3


def test_counters_take_the_newest_that_takes_part(tmp_path: Path) -> None:
    snapshots = saved(tmp_path, 10, 30, 20)
    assert mixed(snapshots) == 20
    assert mixed(snapshots, Row((1.0, 1.0, 0.0), 2.0)) == 30
    assert mixed(snapshots, one_hot(0, 3)) == 10


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool])
def test_tables_that_differ_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    tables = [torch.tensor(x).to(kind) for x in ([0, 1], [0, 1], [1, 0])]
    with pytest.raises(IncompatibleError, match=r"snap_2.pt: 'w'"):
        mixed(saved(tmp_path, *tables))
    assert mixed(saved(tmp_path, *tables), one_hot(2, 3)).tolist() == [1, 0]


@pytest.mark.parametrize("bad, word", [(float("nan"), "NaN"), (float("inf"), "Inf")])
@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "complex64"])
def test_not_finite(tmp_path: Path, bad: float, word: str, kind: str) -> None:
    values = [torch.tensor([1.0, x]).to(getattr(torch, kind)) for x in (1.0, bad, 2.0)]
    with pytest.raises(NotFiniteError, match=rf"snap_1.pt: 'w' contains {word}"):
        mixed(saved(tmp_path, *values))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_mask_of_infinities_is_copied(tmp_path: Path, count: int) -> None:
    """An attention mask is the same in all snapshots, also where there is only one."""
    mask = torch.full((3, 3), -torch.inf).triu(1)
    assert np.array_equal(mixed(saved(tmp_path, *[mask] * count)), mask.numpy())


@pytest.mark.parametrize("kind", ["float16", "float8_e4m3fn", "float8_e5m2", "float32"])
def test_a_result_that_does_not_fit(tmp_path: Path, kind: str) -> None:
    dtype = getattr(torch, kind)
    largest = torch.tensor([1.0, torch.finfo(dtype).max])
    values = [x.to(dtype) for x in (largest, largest * torch.tensor([1.0, -1.0]))]
    with pytest.raises(NotFiniteError, match="does not fit"):
        mixed(saved(tmp_path, *values), Row((3.0, -2.0), 1.0))


def test_variances(tmp_path: Path) -> None:
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 2.0])
    good = saved(tmp_path, one, other, key="bn.running_var")
    with pytest.raises(InputError, match="variance"):
        mixed(good, Row((2.0, -1.0), 1.0), key="bn.running_var")
    [arrays], sink = [array_sink(good.first.signature)[0]], array_sink(good.first.signature)[1]
    weighted_sums(good, [Row((2.0, -1.0), 1.0)], [sink], replaced=frozenset({"bn.running_var"}))
    assert arrays
    bad = saved(tmp_path, one, -other, key="bn.running_var")
    with pytest.raises(InputError, match=r"snap_1.pt: 'bn.running_var' .* negative variance"):
        mixed(bad, key="bn.running_var")


def test_ties_hold_only_where_all_snapshots_have_them(tmp_path: Path) -> None:
    """One run may mix files that tie two tensors with files that keep two copies."""
    tied = torch.ones(3)
    write_torch(tmp_path / "snap_0.pt", {"a": tied, "b": tied})
    write_torch(tmp_path / "snap_1.pt", {"a": torch.full((3,), 3.0), "b": torch.full((3,), 5.0)})
    for names in (("snap_0.pt", "snap_1.pt"), ("snap_1.pt", "snap_0.pt")):
        snapshots = read_set(*(tmp_path / name for name in names))
        assert mixed(snapshots, key="a").tolist() == [2.0] * 3
        assert mixed(snapshots, key="b").tolist() == [3.0] * 3


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("second", sorted(FORMATS))
@pytest.mark.parametrize("first", sorted(FORMATS))
def test_a_flipped_bit_is_noticed(tmp_path: Path, first: str, second: str) -> None:
    """Whatever way the tensors are read, the checksums of the zip records are compared."""
    for k, name in enumerate((first, second)):
        values = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(k))
        write_torch(tmp_path / f"{k}.pt", {"w": values.contiguous(memory_format=FORMATS[name])})
    last = values.contiguous(memory_format=FORMATS[second])
    raw = bytearray((tmp_path / "1.pt").read_bytes())
    needle = last.permute(0, 2, 3, 1) if second == "channels_last" else last
    place = raw.find(needle.numpy().tobytes())
    assert place > 0
    raw[place + 5] ^= 1
    (tmp_path / "1.pt").write_bytes(raw)
    with pytest.raises(DamagedError, match=r"1.pt: 'w'"):
        mixed(read_set(tmp_path / "0.pt", tmp_path / "1.pt"))


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    snapshots = saved(tmp_path, [1.0], [2.0])
    path = tmp_path / "snap_1.pt"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DamagedError, match=r"snap_1.pt: changed"):
        mixed(snapshots)


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    snapshots = saved(tmp_path, torch.empty(0, 3), torch.empty(0, 3))
    assert mixed(snapshots).shape == (0, 3)
    scalars = mixed(saved(tmp_path, torch.tensor(1.0), torch.tensor(2.0)))
    assert (scalars.shape, float(scalars)) == ((), 1.5)


def cosine(one: Array, other: Array) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize(
    "row", [mean_row(3), Row((1.0, 2.0, 3.0), 6.0), FIRST_LAST], ids=["mean", "weighted", "two"]
)
def test_cosines_are_to_the_mean_of_the_others(tmp_path: Path, row: Row) -> None:
    rng = np.random.default_rng(5)
    states = [
        {"a.weight": rng.normal(size=(40, 9)), "bn.running_mean": rng.normal(size=50) * 100}
        for _ in range(3)
    ]
    paths = [write_safetensors(tmp_path / f"{k}.safetensors", s) for k, s in enumerate(states)]
    [_], similarity = materialize(read_set(*paths), [row])
    flat = [state["a.weight"].ravel() for state in states]  # statistics are no direction
    for k, weight in enumerate(row.weights):
        others = sum(w * flat[j] for j, w in enumerate(row.weights) if j != k)
        expected = cosine(flat[k], others) if weight else 1.0
        assert similarity.cosines[k] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("coefficients", [(-1.0, 0.0, 2.0), (-1.0, 1.0, 1.0), (1e-9, 1e-6, 1.0)])
def test_snapshots_of_one_basin_are_never_far_apart(
    tmp_path: Path, coefficients: tuple[float, ...]
) -> None:
    """Neither where coefficients extrapolate nor where one of them is nearly all."""
    rng = np.random.default_rng(3)
    centre = rng.normal(size=100_000)
    states = [(centre + 0.05 * rng.normal(size=centre.size)).astype(np.float32) for _ in range(3)]
    row = Row(coefficients, sum(coefficients))
    _, similarity = materialize(saved(tmp_path, *map(torch.from_numpy, states)), [row])
    assert min(similarity.cosines) > 0.99


def test_a_part_of_a_large_tensor_stands_for_all_of_it(tmp_path: Path) -> None:
    """Small tensors, which are looked at whole, do not outweigh it."""
    rng = np.random.default_rng(4)
    large = rng.normal(size=(2000, 1050)).astype(np.float32)
    paths, flat = [], []
    for k in range(3):
        small = {f"{n}": rng.normal(size=(256, 256)).astype(np.float32) for n in range(10)}
        paths.append(write_safetensors(tmp_path / f"{k}.safetensors", {"large": large, **small}))
        flat.append(np.concatenate([large.ravel(), *(s.ravel() for s in small.values())]))
    _, similarity = materialize(read_set(*paths), [mean_row(3)])
    wide = [values.astype(np.float64) for values in flat]
    for k in range(3):
        others = sum(wide[j] for j in range(3) if j != k)
        assert similarity.cosines[k] == pytest.approx(cosine(wide[k], others), abs=2e-3)


def test_sums_that_overflow_on_the_way(tmp_path: Path) -> None:
    """Coefficients may be as large as they like."""
    row = Row((3e306,) * 5, 1.5e307)
    (arrays,), _ = materialize(saved(tmp_path, *([100.0 + k] * 70 for k in range(5))), [row])
    assert arrays["w"].tolist() == [102.0] * 70


def test_what_is_replaced_need_not_be_finite(tmp_path: Path) -> None:
    states = [
        {"w": torch.ones(3), "bn.running_mean": torch.full((2,), v)} for v in (1.0, float("nan"))
    ]
    paths = [write_torch(tmp_path / f"{k}.pt", state) for k, state in enumerate(states)]
    replaced = frozenset({"bn.running_mean"})
    (arrays,), _ = materialize(read_set(*paths), [mean_row(2)], replaced=replaced)
    assert arrays["w"].tolist() == [1.0] * 3
    with pytest.raises(NotFiniteError, match="running_mean"):
        materialize(read_set(*paths), [mean_row(2)])


def test_one_snapshot_is_parallel_to_itself(tmp_path: Path) -> None:
    _, similarity = materialize(saved(tmp_path, [1.0, 2.0]), [mean_row(1)])
    assert similarity.cosines == (1.0,)


@pytest.mark.parametrize("factor, seen", [(100.0, True), (0.01, True), (2.0, False)])
def test_a_tensor_far_from_its_siblings(tmp_path: Path, factor: float, seen: bool) -> None:
    rng = np.random.default_rng(1)
    tensors = [torch.from_numpy(rng.normal(size=200)) * (factor if k == 1 else 1) for k in range(4)]
    _, similarity = materialize(saved(tmp_path, *tensors), [mean_row(4)])
    assert [(name, key) for name, key, _ in similarity.outliers] == [("snap_1.pt", "w")] * seen


NARROW: Mapping[str, list[tuple[float, float]]] = {
    "bfloat16": [(1 + 2**-8, 1.0), (1 + 2**-8 + 2**-40, 1.0078125), (-1 - 2**-8 - 2**-40, -1.0078125)],
    "float8_e4m3fn": [(1.0625, 1.0), (1.0625 + 2**-40, 1.125), (2**-10 + 2**-50, 2**-9)],
    "float8_e5m2": [(1.125, 1.0), (1.125 + 2**-40, 1.25), (2**-17 + 2**-60, 2**-16)],
    "float16": [(1 + 2**-11, 1.0), (1 + 2**-11 + 2**-40, 1 + 2**-10)],
    "float32": [(1 + 2**-24, 1.0), (1 + 2**-24 + 2**-50, 1 + 2**-23)],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(NARROW))
def test_one_rounding(name: str) -> None:
    """Values just beside the middle of two neighbours: going through float32 loses the side."""
    values, expected = map(np.array, zip(*NARROW[name], strict=True))
    found: Any = narrow(values.astype(np.float64), DTYPES[name].numpy)
    assert found.astype(np.float64).tolist() == expected.tolist()


def many(folder: Path, count: int = 12) -> SnapshotSet:
    """Two snapshots of several tensors."""
    rng = np.random.default_rng(0)
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    for path in paths:
        tensors = {f"w{n}": rng.standard_normal((5, 7)).astype(np.float32) for n in range(count)}
        write_safetensors(path, tensors)
    return read_set(*paths)


class TestSharedCores:
    """Workers hold back while other threads want their cores."""

    @staticmethod
    def run(
        snapshots: SnapshotSet, others: Callable[[], int], threads: int
    ) -> tuple[dict[str, Array], set[int]]:
        """What came out, and how many threads made it."""
        arrays, sink = array_sink(snapshots.first.signature)
        makers = set()

        def noted(key: str, offset: int, data: Array) -> None:
            makers.add(threading.get_ident())
            time.sleep(0.002)
            sink(key, offset, data)

        sums(snapshots, [mean_row(2)], [noted], threads=threads, others=others)
        return arrays, makers

    @pytest.mark.parametrize("others", [0, 1, 2, 5])
    @pytest.mark.parametrize("threads", [1, 2, 3, 4])
    def test_while_others_are_at_work(self, tmp_path: Path, threads: int, others: int) -> None:
        snapshots = many(tmp_path)
        arrays, makers = self.run(snapshots, lambda: others, threads)
        assert len(makers) <= max(1, threads - others)
        for key, value in materialize(snapshots, [mean_row(2)])[0][0].items():
            np.testing.assert_array_equal(arrays[key], value)

    def test_when_others_are_done(self, tmp_path: Path) -> None:
        """The first worker says so, and goes on when the second one has come."""
        done, came, first = threading.Event(), threading.Event(), list[int]()

        def noted(key: str, offset: int, data: Array) -> None:
            first[:] = first or [threading.get_ident()]
            done.set()
            if threading.get_ident() != first[0]:
                came.set()
            assert came.wait(10)

        sums(many(tmp_path), [mean_row(2)], [noted], threads=2, others=lambda: not done.is_set())

    @pytest.mark.parametrize("kind", [RuntimeError, IndexError])
    def test_an_error_ends_those_that_wait(self, tmp_path: Path, kind: type[Exception]) -> None:
        snapshots, begun = many(tmp_path), []

        def broken(key: str, offset: int, data: Array) -> None:
            begun.append(key)
            raise kind("the sink is broken")

        with pytest.raises(kind, match="the sink is broken"):
            sums(snapshots, [mean_row(2)], [broken], threads=4, others=lambda: 2)
        assert len(begun) <= 2  # nobody goes on with what comes to nothing
