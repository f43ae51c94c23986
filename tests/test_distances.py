"""Distances between snapshots, against numpy on the whole vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from ensemblekit.distances import distances
from ensemblekit.errors import DamagedError, NotFiniteError

from .helpers import Array, make_arrays, read_set, with_batch_norm, write_safetensors, write_torch


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    states = [torch.full((4,), float(k)) for k in (1, 3)]
    for k, tied in enumerate(states):
        write_torch(tmp_path / f"{k}.pt", {"a": tied, "b": tied})
    found = distances(read_set(tmp_path / "0.pt", tmp_path / "1.pt"))
    assert (found[1].to_previous, found[1].to_mean) == (4.0, 2.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    for k, last in enumerate((1.0, value)):
        write_torch(tmp_path / f"{k}.pt", {"w": torch.tensor([0.5, last])})
    with pytest.raises(NotFiniteError, match=r"1.pt: 'w' contains NaN or Inf"):
        distances(read_set(tmp_path / "0.pt", tmp_path / "1.pt"))


Change = Callable[[Array], Array]


def flat(arrays: dict[str, Array]) -> Array:
    """All parameters as one float64 vector; a complex number is two."""
    parts = []
    for key, array in arrays.items():
        if key.endswith(("running_mean", "running_var")) or array.dtype.kind == "i":
            continue
        plain = array.view(array.real.dtype) if array.dtype.kind == "c" else array
        parts.append(plain.astype(np.float64).reshape(-1))
    return np.concatenate(parts)


def check(paths: list[Path], members: list[dict[str, Array]]) -> None:
    vectors_KN = np.stack([flat(m) for m in members])
    found = distances(read_set(*paths))
    mean_N = vectors_KN.mean(axis=0)
    assert len(found) == len(members)
    assert (found[0].to_previous, found[0].cosine_to_previous) == (None, None)
    for k, distance in enumerate(found):
        own = vectors_KN[k]
        assert distance.to_mean == pytest.approx(np.linalg.norm(own - mean_N), rel=1e-9, abs=1e-12)
        if k:
            before = vectors_KN[k - 1]
            cosine = own @ before / np.linalg.norm(own) / np.linalg.norm(before)
            assert distance.to_previous == pytest.approx(np.linalg.norm(own - before), rel=1e-9)
            assert distance.cosine_to_previous == pytest.approx(cosine, rel=1e-9)


KINDS: dict[str, Change] = {
    "float32": lambda a: a,
    "float64": lambda a: a.astype(np.float64),
    "float16": lambda a: a.astype(np.float16),
    "bfloat16": lambda a: a.astype(ml_dtypes.bfloat16),
    "complex64": lambda a: (a + 1j * a[::-1]).astype(np.complex64),
}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_like_numpy(kind: str, count: int, tmp_path: Path) -> None:
    members = [
        {key: KINDS[kind](array) for key, array in make_arrays(k).items()} for k in range(count)
    ]
    paths = [write_safetensors(tmp_path / f"{k}.safetensors", m) for k, m in enumerate(members)]
    check(paths, members)


def test_without_running_statistics_and_counters(tmp_path: Path) -> None:
    members = [with_batch_norm(make_arrays(k), k) for k in range(3)]
    paths = [write_safetensors(tmp_path / f"{k}.safetensors", m) for k, m in enumerate(members)]
    check(paths, members)


def test_more_than_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemblekit.blocks.BLOCK_VALUES", 1024)
    members = [make_arrays(k, size=700) for k in range(3)]
    paths = [write_safetensors(tmp_path / f"{k}.safetensors", m) for k, m in enumerate(members)]
    check(paths, members)


def test_other_memory_formats(tmp_path: Path) -> None:
    """Transposed in one file, plain in the other: the same elements are compared."""
    tensors = [torch.randn(6, 5, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    stored = [tensors[0], tensors[1].T.contiguous().T]
    paths = [write_torch(tmp_path / f"{k}.pt", {"w": t}) for k, t in enumerate(stored)]
    check(paths, [{"w": t.numpy().copy()} for t in tensors])


@pytest.mark.parametrize("second, cosine", [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (-1.0, -1.0)])
def test_corners(second: float, cosine: float, tmp_path: Path) -> None:
    """A zero vector has no direction; it is said to be parallel."""
    members = [{"w": np.full(4, value, np.float32)} for value in (1.0, second)]
    paths = [write_safetensors(tmp_path / f"{k}.safetensors", m) for k, m in enumerate(members)]
    found = distances(read_set(*paths))
    assert found[1].cosine_to_previous == pytest.approx(cosine)
    assert found[1].to_previous == pytest.approx(2 * abs(1 - second))
    assert found[0].to_mean == pytest.approx(found[1].to_mean)


def test_nothing_but_integers(tmp_path: Path) -> None:
    paths = [write_torch(tmp_path / f"{k}.pt", {"w": torch.ones(1), "n": n()}) for k, n in LONE]
    assert distances(read_set(*paths))[1].to_previous == 0


LONE: list[tuple[int, Any]] = [(k, lambda k=k: torch.tensor([k, 2])) for k in (0, 1)]


def test_damage_is_found(tmp_path: Path) -> None:
    paths = [write_torch(tmp_path / f"{k}.pt", {"w": torch.full((64,), 1.5 + k)}) for k in (0, 1)]
    data = paths[1].read_bytes()
    place = data.index(torch.full((64,), 2.5).numpy().tobytes())
    paths[1].write_bytes(data[: place + 8] + b"\x01" + data[place + 9 :])
    with pytest.raises(DamagedError, match=r"1\.pt: 'w'"):
        distances(read_set(*paths))
