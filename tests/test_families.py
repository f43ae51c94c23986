"""Which candidates there are without being asked: rows that sum to 1, names that are unique."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemblekit import families
from ensemblekit.averaging.ema import ema_row
from ensemblekit.averaging.lawa import last_row
from ensemblekit.candidates import BatchNorm, Candidate, mean_row
from ensemblekit.errors import UsageError
from ensemblekit.families import GROUPS, Wanted, wanted

POLICIES: list[BatchNorm] = ["none", "averaged", "recomputed"]


def every(count: int, policy: BatchNorm = "none") -> list[Candidate]:
    """All families over `count` snapshots."""
    found = families.singles([f"snap_{k}.pt" for k in range(count)])
    if policy == "recomputed":
        found += families.singles([f"snap_{k}.pt" for k in range(count)], policy)
    found += families.averages(count, policy)
    found += families.soup_ensembles(count, policy)
    if count > 2:
        found.append(families.swag(count, policy, seed=0))
    for k in families.ladder(count):
        found.append(families.ensemble(f"ensemble-first-{k}", range(k), count))
    found.append(families.ensemble("ensemble", range(count), count))
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 12, 13, 40, 120])
def test_rows_sum_to_one_and_names_are_unique(count: int, policy: BatchNorm) -> None:
    found = every(count, policy)
    names = [candidate.name for candidate in found]
    assert len(set(names)) == len(names)
    for candidate in found:
        assert len(candidate.batch_norm) == len(candidate.rows)
        assert (candidate.combiner is None) == (len(candidate.rows) == 1)
        for row, own in zip(candidate.rows, candidate.batch_norm, strict=True):
            assert len(row.coefficients) == count
            assert sum(row.weights) == pytest.approx(1, abs=1e-12)
            mixed = row.only is None
            assert not mixed or own == policy, "averaged weights have statistics of their own"
        again = Candidate.from_json(json.loads(json.dumps(candidate.to_json())))
        assert again.to_json() == candidate.to_json()
        assert again.members == candidate.members


def test_one_snapshot_has_no_averages() -> None:
    assert families.averages(1, "none") == []
    assert families.ladder(1) == families.ladder(2) == []
    (alone,) = families.singles(["a.pt"])
    assert (alone.kind, alone.members[0].row.only) == ("single", 0)


def test_names_say_where_statistics_come_from() -> None:
    for policy in POLICIES:
        end = families.RECOMPUTED if policy == "recomputed" else ""
        made = [*families.averages(4, policy), families.swag(4, policy, seed=0)]
        made += families.soup_ensembles(4, policy)
        assert all(candidate.name.endswith("+bn") == bool(end) for candidate in made)
    assert [c.name for c in families.singles(["a", "b"], "recomputed")] == ["a+bn", "b+bn"]
    assert [c.name for c in families.singles(["a", "b"])] == ["a", "b"]


def test_last_k() -> None:
    assert last_row(2, 4).weights == (0.0, 0.0, 0.5, 0.5)
    names = [candidate.name for candidate in families.averages(4, "none")]
    assert names == ["uniform", "last-2", "last-3", "ema"]
    by_name = {c.name: c for c in families.averages(4, "none")}
    assert by_name["uniform"].rows == (mean_row(4),)
    assert by_name["last-3"].rows[0].weights == pytest.approx((0, 1 / 3, 1 / 3, 1 / 3))


@given(count=st.integers(3, 60))
def test_the_moving_average_is_the_rule_s(count: int) -> None:
    """Half-life of a fifth of the run; the row is that of `--method ema`."""
    row = {c.name: c for c in families.averages(count, "none")}["ema"].rows[0]
    ratios = [new / old for old, new in pairwise(row.weights[1:])]
    assert ratios == pytest.approx([2 ** (1 / max(count / 5, 1))] * (count - 2))
    assert row == ema_row(count, 2 ** (-1 / max(count / 5, 1)))


@pytest.mark.parametrize("count", [4, 5, 6, 7, 9, 20])
def test_soup_ensembles_cut_the_run_in_parts(count: int) -> None:
    found = families.soup_ensembles(count, "none")
    assert [c.name for c in found] == [
        f"ensemble-of-{parts}-soups" for parts in (2, 3) if count >= 2 * parts
    ]
    for candidate in found:
        taken = np.array([row.coefficients for row in candidate.rows])
        assert (taken.sum(axis=0) == 1).all(), "each snapshot is in one part"
        firsts = [int(np.argmax(row)) for row in taken]
        assert firsts == sorted(firsts)
        assert (taken.sum(axis=1) >= 2).all(), "a part of one snapshot is no mean"
        for row, numbers in zip(candidate.rows, taken, strict=True):
            assert row.divisor == numbers.sum()


def test_too_few_snapshots_for_parts() -> None:
    assert families.soup_ensembles(3, "none") == []


def test_swag_draws() -> None:
    one, same, other = (families.swag(6, "none", seed=seed) for seed in (3, 3, 4))
    assert one == same
    assert one.rows != other.rows
    assert (one.seed, one.combiner, len(one.rows)) == (3, "mean", families.SWAG_SAMPLES)


def test_swag_has_the_covariance_of_the_snapshots() -> None:
    """Draws of w = sum_k row_k theta_k: mean of the snapshots, covariance D D' / (K - 1)."""
    count = 5
    theta_KD = np.random.default_rng(0).normal(size=(count, 3))
    drawn = families.swag(count, "none", seed=1, samples=40_000).rows
    w_SD = np.array([row.coefficients for row in drawn]) @ theta_KD
    np.testing.assert_allclose(w_SD.mean(0), theta_KD.mean(0), atol=0.03)
    np.testing.assert_allclose(np.cov(w_SD.T), np.cov(theta_KD.T), atol=0.04)


def test_an_ensemble_of_one_is_a_single_model() -> None:
    alone = families.ensemble("ensemble-greedy", [2], 4, chosen_on="val")
    assert (alone.kind, alone.combiner, alone.chosen_on) == ("single", None, "val")
    two = families.ensemble("two", [0, 2], 4)
    assert (two.kind, two.combiner, len(two.members)) == ("ensemble", "mean", 2)
    weighted = families.ensemble(
        "w", [0, 2], 4, combiner="weighted", params={"weights": [0.25, 0.75]}
    )
    assert weighted.params == {"weights": [0.25, 0.75]}


@pytest.mark.parametrize("count", [2, 3, 5, 12, 13, 50, 200])
def test_the_ladder_rises_and_stops_below_all(count: int) -> None:
    steps = families.ladder(count)
    assert steps == sorted(set(steps))
    assert all(2 <= k < count for k in steps)
    if count <= 12:
        assert steps == list(range(2, count))


# ------------------------------------------------------------------------- what is wanted


@pytest.mark.parametrize("text", [None, "all", " all "])
def test_everything_is_wanted(text: str | None) -> None:
    assert wanted(text) == Wanted()
    assert all(Wanted().keeps(group, "any") for group in GROUPS)


def test_groups_and_globs() -> None:
    found = wanted("singles, last-*,singles,uniform")
    assert found == Wanted(("singles",), ("last-*", "uniform"))
    assert found.keeps("singles", "snap_1.pt")
    assert found.keeps("averages", "last-3")
    assert not found.keeps("averages", "ema")
    assert not found.keeps("averages", "last")
    assert found.keeps("averages", "uniform")
    assert found.keeps("averages", "uniform+bn")  # the mark need not be written
    assert not wanted("uniform+bn").keeps("averages", "uniform")


@pytest.mark.parametrize("group", GROUPS)
def test_each_group_by_itself(group: str) -> None:
    found = wanted(group)
    assert [g for g in GROUPS if found.keeps(g, "x")] == [group]


@pytest.mark.parametrize("text", ["", " , ", ","])
def test_nothing_is_wanted(text: str) -> None:
    with pytest.raises(UsageError, match="names nothing") as caught:
        wanted(text)
    assert "singles" in str(caught.value.hint)


@pytest.mark.parametrize("word", ["singels", "averags", "Ensembles", "soup"])
def test_a_word_that_is_no_group_is_a_name(word: str) -> None:
    assert wanted(f"singles,{word}").patterns == (word,)  # whether any has it is known later
