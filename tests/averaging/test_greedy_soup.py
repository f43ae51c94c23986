"""`greedy_soup` against the recipe written down plainly, with made-up and with real figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ensemblekit import ModelOptions, average
from ensemblekit.averaging.greedy_soup import greedy_soup
from ensemblekit.candidates import Row
from ensemblekit.errors import UsageError
from ensemblekit.snapshots import SnapshotSet

from ..comparing import Problem, Weights, figures, mlp, points, save, trained
from .series import at_steps


class Figures:
    """An objective that is a function of the set of snapshots that take part."""

    def __init__(self, function: Callable[[frozenset[int]], float]) -> None:
        self.function = function
        self.asked: list[frozenset[int]] = []

    def value(self, row: Row) -> float:
        taken = frozenset(k for k, c in enumerate(row.coefficients) if c)
        assert row == Row(
            tuple(float(k in taken) for k in range(len(row.coefficients))), len(taken)
        )
        self.asked.append(taken)
        return self.function(taken)

    def gradient(self, row: Row) -> tuple[float, npt.NDArray[np.float64]]:
        raise AssertionError("a greedy soup follows no gradient")


def recipe(count: int, value: Callable[[frozenset[int]], float]) -> set[int]:
    """Wortsman 2022, recipe 1: sorted by their own figure, each stays if the soup gets no worse."""
    order = sorted(range(count), key=lambda k: (value(frozenset({k})), k), reverse=True)
    soup: list[int] = []
    for k in order:
        if not soup or value(frozenset([*soup, k])) >= value(frozenset(soup)):
            soup.append(k)
    return set(soup)


def taken(row: Row) -> set[int]:
    return {k for k, c in enumerate(row.coefficients) if c}


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> SnapshotSet:
    return at_steps(tmp_path_factory.mktemp("soup"), [1, 2, 3, 4, 5])


@pytest.mark.parametrize("seed", range(30))
def test_recipe(five: SnapshotSet, seed: int) -> None:
    """Figures of few digits, so that there are ties."""
    rng = np.random.default_rng(seed)
    known: dict[frozenset[int], float] = {}

    def value(members: frozenset[int]) -> float:
        return known.setdefault(members, round(float(rng.uniform(0.3, 0.9)), 1))

    objective = Figures(value)
    row = greedy_soup(five, objective=objective)
    assert taken(row) == recipe(5, value)
    assert len(objective.asked) == 9, "each alone, then each of the others once"


def test_ties_take_the_newest_first_and_all_of_them(five: SnapshotSet) -> None:
    objective = Figures(lambda _: 0.5)
    assert greedy_soup(five, objective=objective) == Row((1.0,) * 5, 5.0)
    assert objective.asked[5:] == [frozenset(range(k, 5)) for k in (3, 2, 1, 0)]


def test_the_best_alone_where_every_mean_is_worse(five: SnapshotSet) -> None:
    row = greedy_soup(five, objective=Figures(lambda s: float(2 in s) - len(s)))
    assert row == Row((0.0, 0.0, 1.0, 0.0, 0.0), 1.0)


def test_needs_data(five: SnapshotSet) -> None:
    with pytest.raises(UsageError, match="chosen on data") as raised:
        greedy_soup(five)
    assert "--val-data" in (raised.value.hint or "")


# ------------------------------------------------------------------- on a network and data


def problem(*, norm: bool) -> Problem:
    data = {split: points(split) for split in ("train", "val", "test")}
    run = trained(Problem("classification", lambda: mlp(norm=norm), data), snapshots=4, lr=0.3)
    other = {k: v + 0.8 * torch.randn_like(v) for k, v in run.weights[1].items() if v.ndim > 1}
    spoilt = run.weights[1] | other  # one that no soup wants
    weights = (run.weights[0], spoilt, *run.weights[2:])
    return Problem(run.task, run.make, run.data, weights)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(11)


def mean(members: Sequence[Weights]) -> Weights:
    return {
        key: torch.stack([m[key].double() for m in members]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else members[-1][key]
        for key, value in members[0].items()
    }


def accuracy(one: Problem, members: set[int] | frozenset[int]) -> float:
    soup = mean([one.weights[k] for k in sorted(members)])
    return figures(one, [soup], "val")["accuracy"]


def soup_of(one: Problem, folder: Path, *splits: str, bn: str = "auto") -> set[int]:
    run = save(folder / "run", one.weights)
    data = {f"{split}_data": one.data[split] for split in splits}
    options = ModelOptions(model=one.make(), device="cpu", **data)
    result = average(run, method="greedy-soup", model=options, bn=bn)
    return {k for k, item in enumerate(result.snapshots) if item["coefficient"]}


def test_of_a_network(tmp_path: Path) -> None:
    one = problem(norm=False)
    found = soup_of(one, tmp_path, "val")
    assert found == recipe(4, lambda members: accuracy(one, members))
    assert 1 not in found
    assert len(found) > 1


def test_of_a_network_with_averaged_statistics(tmp_path: Path) -> None:
    one = problem(norm=True)
    found = soup_of(one, tmp_path, "train", "val", bn="average")
    assert found == recipe(4, lambda members: accuracy(one, members))


def refreshed(one: Problem, members: frozenset[int]) -> float:
    """Accuracy with the statistics of one pass over the training data; a member's own alone."""
    if len(members) == 1:
        return accuracy(one, members)
    model = one.make()
    model.load_state_dict(mean([one.weights[k] for k in sorted(members)]))
    x, _ = one.data["train"]
    with torch.no_grad():
        hidden = model[0](x).double()  # type: ignore[index]
    soup = model.state_dict()
    soup["1.running_mean"], soup["1.running_var"] = hidden.mean(0), hidden.var(0, unbiased=False)
    return figures(one, [soup], "val")["accuracy"]


def test_of_a_network_with_recomputed_statistics(tmp_path: Path) -> None:
    one = problem(norm=True)
    found = soup_of(one, tmp_path, "train", "val")
    assert found == recipe(4, lambda members: refreshed(one, members))


def test_without_an_order(tmp_path: Path) -> None:
    """Who takes part is a matter of figures: nothing has to say which snapshot came first."""
    one = problem(norm=False)
    (tmp_path / "run").mkdir()
    for letter, state in zip("pqrs", one.weights, strict=True):
        torch.save(state, tmp_path / "run" / f"{letter}.pt")
    options = ModelOptions(model=one.make(), device="cpu", val_data=one.data["val"])
    result = average(tmp_path / "run", method="greedy-soup", model=options)
    names = {Path(s["path"]).stem for s in result.snapshots if s["coefficient"]}
    expected = recipe(4, lambda members: accuracy(one, members))
    assert names == {"pqrs"[k] for k in expected}
