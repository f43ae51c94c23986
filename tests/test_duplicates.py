"""The same weights under two names, and files that are the mean of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ensemblekit.discovery import read_snapshot
from ensemblekit.duplicates import content_digest, means_of_others, same_weights
from ensemblekit.snapshots import Snapshot
from ensemblekit.walk import Place

from .checkpoints import State, mean, save, state


def read(path: Path) -> Snapshot:
    return read_snapshot(Place(path, path.name, None, claims=True))


def snapshots(folder: Path, states: list[State]) -> list[Snapshot]:
    return [read(save(value, folder / f"net-{i}.pt")) for i, value in enumerate(states)]


# --- the same weights


def plain(value: State, path: Path) -> Path:
    return save(value, path.with_suffix(".pt"))


def below_a_key(value: State, path: Path) -> Path:
    return save({"model": value, "epoch": 3}, path.with_suffix(".pt"))


def with_prefix(value: State, path: Path) -> Path:
    return save({f"module.{key}": t for key, t in value.items()}, path.with_suffix(".pt"))


def in_another_order(value: State, path: Path) -> Path:
    return save(dict(reversed(value.items())), path.with_suffix(".pt"))


def as_safetensors(value: State, path: Path) -> Path:
    path = path.with_suffix(".safetensors")
    safetensors.torch.save_file(value, path)
    return path


def as_views(value: State, path: Path) -> Path:
    return save({k: torch.cat([t.flatten()] * 2)[t.numel() :].view(t.shape)
                 for k, t in value.items()}, path.with_suffix(".pt"))  # fmt: skip


def transposed(value: State, path: Path) -> Path:
    """Equal values, other strides: as channels_last leaves them."""
    return save({k: t.mT.contiguous().mT if t.dim() > 1 else t for k, t in value.items()},
                path.with_suffix(".pt"))  # fmt: skip


WRITERS = [plain, below_a_key, with_prefix, in_another_order, as_safetensors, as_views]


@pytest.mark.parametrize("write", WRITERS)
def test_same_weights(tmp_path: Path, write: Callable[[State, Path], Path]) -> None:
    one, other = read(save(state(1), tmp_path / "a.pt")), read(write(state(1), tmp_path / "b"))
    third = read(save(state(2), tmp_path / "c.pt"))
    assert same_weights([one, third, other]) == [[one, other], [third]]
    assert content_digest(one) == content_digest(other) != content_digest(third)


def test_same_weights_in_another_memory_format(tmp_path: Path) -> None:
    """The first look leaves strided tensors out, so the two seem to differ."""
    one, other = read(save(state(1), tmp_path / "a.pt")), read(transposed(state(1), tmp_path / "b"))
    assert content_digest(one) == content_digest(other)
    assert same_weights([one, other]) == [[one, other]]


@pytest.mark.parametrize("key", ["fc.bias", "conv.weight", "bn.running_mean"])
def test_one_bit_makes_a_difference(tmp_path: Path, key: str) -> None:
    changed = {k: t.clone() for k, t in state(1).items()}
    middle = changed[key].numel() // 3
    changed[key].view(-1).view(torch.int32)[middle] ^= 1
    pair = snapshots(tmp_path, [state(1), changed])
    assert len(same_weights(pair)) == 2
    assert content_digest(pair[0]) != content_digest(pair[1])


def test_counter_makes_a_difference(tmp_path: Path) -> None:
    changed = {**state(1), "bn.num_batches_tracked": torch.tensor(0)}
    assert len(same_weights(snapshots(tmp_path, [state(1), changed]))) == 2


def test_difference_beyond_the_first_block(tmp_path: Path) -> None:
    large = torch.zeros(700_000)
    changed = large.clone()
    changed[400_000] = 1
    assert len(same_weights(snapshots(tmp_path, [{"w": large}, {"w": changed}]))) == 2


def test_groups_keep_the_order(tmp_path: Path) -> None:
    items = snapshots(tmp_path, [state(i) for i in (3, 1, 3, 2, 1, 3)])
    found = same_weights(items)
    assert [[items.index(s) for s in group] for group in found] == [[0, 2, 5], [1, 4], [3]]


# --- means


def found_means(folder: Path, states: list[State]) -> list[tuple[int, list[int]]]:
    items = snapshots(folder, states)
    return [
        (items.index(s), sorted(items.index(m) for m in members))
        for s, members in means_of_others(items)
    ]


SETS = [[0, 1], [0, 1, 2], [1, 3], [0, 1, 2, 3, 4], [2, 3, 4, 5], list(range(9))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("members", SETS, ids=str)
def test_mean_of_others(tmp_path: Path, members: list[int], dtype: torch.dtype) -> None:
    """`dtype` is that of the arithmetic; the mean is saved in float32."""
    states = [state(i) for i in range(max(members) + 2)]
    average = mean([states[i] for i in members], dtype=dtype)
    assert found_means(tmp_path, [*states, average]) == [(len(states), members)]


def test_mean_in_the_middle_of_the_list(tmp_path: Path) -> None:
    states = [state(i) for i in range(5)]
    assert found_means(tmp_path, [*states[:2], mean(states), *states[2:]]) == [(2, [0, 1, 3, 4, 5])]


def test_running_mean_as_training_keeps_it(tmp_path: Path) -> None:
    """AveragedModel adds a fraction of the difference each time, in float32."""
    states = [state(i) for i in range(8)]
    average = {k: t.clone() for k, t in states[0].items()}
    for n, value in enumerate(states[1:], start=1):
        for key, tensor in average.items():
            if tensor.is_floating_point():
                tensor.add_((value[key] - tensor) / (n + 1))
    assert found_means(tmp_path, [*states, average]) == [(8, list(range(8)))]


def test_statistics_may_be_recomputed(tmp_path: Path) -> None:
    states = [state(i) for i in range(4)]
    average = mean(states)
    average["bn.running_mean"] += 1
    average["bn.running_var"] *= 2
    average["bn.num_batches_tracked"] *= 0
    assert found_means(tmp_path, [*states, average]) == [(4, [0, 1, 2, 3])]


def test_frozen_layers_do_not_matter(tmp_path: Path) -> None:
    states = [{**state(i), "conv.weight": state(0)["conv.weight"]} for i in range(4)]
    assert found_means(tmp_path, [*states, mean(states)]) == [(4, [0, 1, 2, 3])]


@pytest.mark.parametrize("sets", [([0, 1, 2, 3, 4], [3, 4]), ([0, 1], [2, 3]), ([0, 1, 2], [2, 3])])
def test_two_means(tmp_path: Path, sets: tuple[list[int], list[int]]) -> None:
    """With two dependencies the coefficients are not unique."""
    states = [state(i) for i in range(5)]
    means = [mean([states[i] for i in members]) for members in sets]
    found = found_means(tmp_path, [*states, *means])
    assert sorted(index for index, _ in found) == [5, 6]


def test_mean_of_a_very_small_network(tmp_path: Path) -> None:
    """Fewer than four values for each snapshot are not looked at."""
    states = [{"w": torch.randn(9), "b": torch.randn(3)} for _ in range(4)]
    assert found_means(tmp_path, [*states, mean(states)]) == [(4, [0, 1, 2, 3])]


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-4, 1e-5, 3e-6])
@pytest.mark.parametrize("count", [3, 5, 12])
def test_similar_is_not_a_mean(tmp_path: Path, count: int, noise: float) -> None:
    assert found_means(tmp_path, [state(i, noise=noise) for i in range(count)]) == []


def test_moving_average_is_not_a_mean(tmp_path: Path) -> None:
    states = [state(i) for i in range(5)]
    ema = dict(states[0])
    for value in states[1:]:
        ema = {k: 0.7 * t + 0.3 * value[k] if t.is_floating_point() else t for k, t in ema.items()}
    assert found_means(tmp_path, [*states, ema]) == []


def test_weighted_mean_is_not_the_mean(tmp_path: Path) -> None:
    states = [state(i) for i in range(3)]
    mix = {k: 0.2 * t + 0.8 * states[1][k] if t.is_floating_point() else t
           for k, t in states[0].items()}  # fmt: skip
    assert found_means(tmp_path, [*states, mix]) == []


def test_steps_on_a_line_are_snapshots(tmp_path: Path) -> None:
    """Unequal steps along one direction are dependent, but none is the mean of others."""
    start, way = state(0), state(1)
    states = [
        {k: t + part * way[k] if t.is_floating_point() else t for k, t in start.items()}
        for part in (0.0, 0.1, 0.5, 1.0)
    ]
    assert found_means(tmp_path, states) == []


def test_few_snapshots_and_no_weights(tmp_path: Path) -> None:
    assert found_means(tmp_path / "a", []) == []
    assert found_means(tmp_path / "b", [state(0), state(1)]) == []
    zeros = {k: torch.zeros_like(t) for k, t in state().items()}
    assert found_means(tmp_path / "c", [zeros] * 3) == []


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    states = [state(i) for i in range(4)]
    broken = mean(states)
    broken["fc.bias"][0] = float("nan")
    broken["fc.weight"][0, 0] = float("inf")
    assert found_means(tmp_path, [*states, broken]) == [(4, [0, 1, 2, 3])]
