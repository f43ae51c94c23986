"""What holds for every row over any snapshots, whatever their dtype and memory layout."""

from __future__ import annotations

from collections.abc import Mapping
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ensemblekit import bfloat16, blocks
from ensemblekit.candidates import Row, mean_row, one_hot
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.state import array_sink, materialize, weighted_sums

from .strategies import FLOATS, Network, awkward, bits, laid_out, networks, on_disk, rows, widened

Made = dict[str, bytes]
quick = settings(max_examples=15, deadline=None)


def made(snapshots: SnapshotSet, *wanted: Row) -> list[Made]:
    arrays, _ = materialize(snapshots, wanted)
    return [{key: array.tobytes() for key, array in one.items()} for one in arrays]


def unlike(one: Made, other: Made) -> dict[str, int]:
    """How many bytes differ, by key; a short answer instead of two long byte strings."""
    assert one.keys() == other.keys()
    pairs = ((key, one[key], other[key]) for key in one)
    found = {k: sum(x != y for x, y in zip(a, b, strict=True)) for k, a, b in pairs}
    return {key: count for key, count in found.items() if count}


def stored(state: Mapping[str, torch.Tensor]) -> Made:
    return {key: bits(tensor) for key, tensor in state.items()}


@quick
@given(networks(), st.data())
def test_one_hot_rows_are_the_snapshots(network: Network, data: st.DataObject) -> None:
    count = len(network.states)
    picked = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3))
    with on_disk(network.states) as snapshots:
        results = made(snapshots, *(one_hot(k, count) for k in picked))
    for k, result in zip(picked, results, strict=True):
        assert not unlike(result, stored(network.states[k]))


@quick
@given(networks(least=1, most=1))
def test_mean_of_one_is_itself(network: Network) -> None:
    with on_disk(network.states) as snapshots:
        [result] = made(snapshots, mean_row(1))
    assert not unlike(result, stored(network.first))


@quick
@given(networks(least=1, most=1), st.integers(2, 11), st.data())
def test_mean_of_equals_is_each_of_them(network: Network, count: int, data: st.DataObject) -> None:
    row = data.draw(st.one_of(st.just(mean_row(count)), rows(count)))
    with on_disk(network.states * count) as snapshots:
        [result] = made(snapshots, row)
    assert not unlike(result, stored(network.first))


@quick
@given(st.sampled_from(sorted(FLOATS)), st.integers(2, 11), st.integers(0, 2**20), st.booleans())
def test_an_element_that_is_equal_in_all_stays(
    dtype: str, count: int, seed: int, uniform: bool
) -> None:
    """Also where its neighbours differ: a block of memory is no unit of meaning."""
    base = awkward(seed, (400,), FLOATS[dtype])
    states = [{"w": base.clone()} for _ in range(count)]
    for k, state in enumerate(states):
        state["w"][:100] = awkward(seed + 1 + k, (100,), FLOATS[dtype])
    row = mean_row(count) if uniform else Row((0.3,) * (count - 1) + (0.9,), 0.3 * count + 0.6)
    with on_disk(states) as snapshots:
        [result] = made(snapshots, row)
    start = 100 * base.element_size()
    assert not unlike({"w": result["w"][start:]}, {"w": bits(base[100:])})


@quick
@given(networks(forms=False), st.data())
def test_positive_rows_stay_between_the_members(network: Network, data: st.DataObject) -> None:
    count = len(network.states)
    row = data.draw(st.one_of(st.just(mean_row(count)), rows(count, signed=False)))
    with on_disk(network.states) as snapshots:
        [arrays], _ = materialize(snapshots, [row])
    for key, array in arrays.items():
        takes_part = [k for k, c in enumerate(row.coefficients) if c]
        members = np.stack([widened(network.states[k][key]) for k in takes_part])
        result = array.reshape(-1).view(snapshots.first.tensors[key].type.real).astype(np.float64)
        result = result.reshape(members.shape[1:])
        assert (result >= members.min(axis=0)).all(), key
        assert (result <= members.max(axis=0)).all(), key


@quick
@given(st.integers(2, 6), st.integers(0, 2**20), st.data())
def test_linear_in_the_row(count: int, seed: int, data: st.DataObject) -> None:
    """With whole numbers and divisors that are powers of two nothing is rounded."""
    rng = np.random.default_rng(seed)
    tensors = [torch.from_numpy(rng.integers(-500, 500, 300)).float() for _ in range(count)]

    def row() -> Row:
        free = data.draw(st.lists(st.integers(-4, 4), min_size=count - 1, max_size=count - 1))
        return Row((*map(float, free), float(8 - sum(free))), 8.0)

    one, other = row(), row()
    both = tuple(a + b for a, b in zip(one.coefficients, other.coefficients, strict=True))
    with on_disk([{"w": tensor} for tensor in tensors]) as snapshots:
        (a, b, c), _ = materialize(snapshots, [one, other, Row(both, 16.0)])
    assert np.array_equal((a["w"] + b["w"]) / 2, c["w"])


@quick
@given(networks(), st.integers(-3, 3), st.data())
def test_coefficients_count_relative_to_their_sum(
    network: Network, power: int, data: st.DataObject
) -> None:
    doubles = (torch.float64, torch.complex128)  # their subnormals lose bits in the accumulator
    assume(all(tensor.dtype not in doubles for tensor in network.states[0].values()))
    row = data.draw(rows(len(network.states), signed=False))
    scaled = Row(tuple(c * 2.0**power for c in row.coefficients), row.divisor * 2.0**power)
    with on_disk(network.states) as snapshots:
        one, other = made(snapshots, row, scaled)
    assert not unlike(one, other)


@quick
@given(networks(), st.data())
def test_rows_made_together_equal_rows_made_alone(network: Network, data: st.DataObject) -> None:
    count = len(network.states)
    kinds = st.one_of(
        rows(count, signed=False), st.integers(0, count - 1).map(lambda k: one_hot(k, count))
    )
    wanted = data.draw(st.lists(kinds, min_size=2, max_size=5))
    with on_disk(network.states) as snapshots:
        together = made(snapshots, *wanted)
        for row, result in zip(wanted, together, strict=True):
            assert not unlike(result, made(snapshots, row)[0])


@quick
@given(networks(), st.sampled_from([1, 2, 4]), st.data())
def test_neither_blocks_nor_threads_matter(
    network: Network, threads: int, data: st.DataObject
) -> None:
    row = data.draw(rows(len(network.states), signed=False))
    with on_disk(network.states) as snapshots:
        [expected] = made(snapshots, row)
        arrays, sink = array_sink(snapshots.first.signature)
        with (
            mock.patch.object(blocks, "BLOCK_VALUES", 1),
            mock.patch.object(bfloat16, "BLOCK_VALUES", 1),
        ):
            weighted_sums(snapshots, [row], [sink], threads=threads)
    assert not unlike({key: array.tobytes() for key, array in arrays.items()}, expected)


@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_where_a_block_ends_does_not_matter(dtype: str) -> None:
    """The second block holds the same bits in all snapshots, the first does not."""
    states = [{"w": awkward(k, (1024,), FLOATS[dtype])} for k in range(9)]
    for state in states:
        state["w"][256:] = states[0]["w"][256:]
    with on_disk(states) as snapshots:
        [whole] = made(snapshots, mean_row(9))
        with (
            mock.patch.object(blocks, "BLOCK_VALUES", 1),
            mock.patch.object(bfloat16, "BLOCK_VALUES", 1),
        ):
            [in_parts] = made(snapshots, mean_row(9))
    assert not unlike(whole, in_parts)


WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@quick
@given(st.sampled_from(WHOLE), st.sampled_from(["plain", "transposed", "strided", "inside"]))
def test_integers_are_copied(dtype: torch.dtype, form: str) -> None:
    table = torch.arange(60).remainder(7).to(dtype).reshape(12, 5)
    states = [
        {"w": torch.full((2,), float(k)), "table": laid_out(table, form), "count": torch.tensor(k)}
        for k in range(1, 4)
    ]
    with on_disk(states) as snapshots:
        [result, first] = made(snapshots, mean_row(3), one_hot(0, 3))
    assert result["table"] == bits(table)
    assert result["count"] == bits(torch.tensor(3)), "a counter takes the newest"
    assert first["count"] == bits(torch.tensor(1))


@quick
@given(networks(forms=False), st.data())
def test_tied_tensors_stay_tied(network: Network, data: st.DataObject) -> None:
    for state in network.states:
        state["twin"] = state["layer0.weight"]
    row = data.draw(rows(len(network.states), signed=False))
    with on_disk(network.states) as snapshots:
        [result] = made(snapshots, row)
    assert result["twin"] == result["layer0.weight"]
