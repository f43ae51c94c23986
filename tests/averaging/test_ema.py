"""`ema` against torch's own moving averages, and what its options mean."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from ensemblekit.averaging.ema import ema, ema_row
from ensemblekit.errors import UsageError
from ensemblekit.snapshots import SnapshotSet

from ..helpers import Array
from .series import at_steps, mixed

COUNT = 7


def walk(count: int = COUNT) -> list[Array]:
    rng = np.random.default_rng(3)
    return list(np.cumsum(rng.normal(size=(count, 40)), axis=0))


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> SnapshotSet:
    return at_steps(tmp_path_factory.mktemp("ema"), range(10, 80, 10))


class Holder(nn.Module):
    def __init__(self, values: Array) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.from_numpy(values.copy()))


def of_torch(weights: list[Array], decay: float, *, multi: bool) -> Array:
    """Each snapshot is one update of torch's averaged model, in float64."""
    model = Holder(weights[0])
    if multi:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
    else:
        averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(decay))  # type: ignore[no-untyped-call]
    for values in weights:
        with torch.no_grad():
            model.w.copy_(torch.from_numpy(values))
        averaged.update_parameters(model)
    found: Array = averaged.module.state_dict()["w"].numpy()
    return found


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_against_torch(seven: SnapshotSet, decay: float, *, multi: bool) -> None:
    weights = walk()
    found = mixed(ema(seven, decay=decay), weights)
    np.testing.assert_allclose(found, of_torch(weights, decay, multi=multi), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("half_life", [0.3, 1.0, 2.5, 40.0])
def test_half_life_is_a_decay(seven: SnapshotSet, half_life: float) -> None:
    """As many snapshots later, what an old one counts has halved."""
    row = ema(seven, half_life=half_life)
    assert row == ema(seven, decay=0.5 ** (1 / half_life))
    weights = row.weights
    for later, earlier in zip(weights[2:], weights[1:-1], strict=True):
        assert earlier / later == pytest.approx(0.5 ** (1 / half_life))


@pytest.mark.parametrize("count, half_life", [(1, 1.0), (3, 1.0), (5, 1.0), (15, 3.0)])
def test_default(tmp_path: Path, count: int, half_life: float) -> None:
    snapshots = at_steps(tmp_path, range(1, count + 1))
    assert ema(snapshots) == ema(snapshots, half_life=half_life)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1 - 2**-40])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_sums_to_one(count: int, decay: float) -> None:
    row = ema_row(count, decay)
    assert math.fsum(row.weights) == pytest.approx(1, abs=1e-15)
    assert min(row.weights) >= 0


def test_no_decay_is_the_newest_alone(seven: SnapshotSet) -> None:
    assert ema(seven, decay=0.0).only == COUNT - 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"decay": 1.0}, "--decay 1:"),
        ({"decay": -0.1}, "--decay -0.1:"),
        ({"decay": math.nan}, "--decay nan:"),
        ({"decay": math.inf}, "--decay inf:"),
        ({"half_life": 0.0}, "--half-life 0:"),
        ({"half_life": -2.0}, "--half-life -2:"),
        ({"half_life": math.nan}, "--half-life nan:"),
        ({"half_life": math.inf}, "--half-life inf:"),
        ({"decay": 0.5, "half_life": 1.0}, "one of them"),
    ],
)
def test_refused(seven: SnapshotSet, options: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ema(seven, **options)
