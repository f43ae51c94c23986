"""Owns the making of weights out of snapshots: the only place where tensors are averaged.

Input: a `SnapshotSet` and rows over it. Everything streams: a block of each snapshot at a time
goes through a float64 accumulator, so memory grows neither with K nor with the model.
"""

import glob
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit.blocks import TensorBlocks, check_shared_storages
from ensemblekit.candidates import Row
from ensemblekit.dtypes import narrow
from ensemblekit.errors import IncompatibleError, InputError, NotFiniteError
from ensemblekit.snapshots import SnapshotSet

Sink = Callable[[str, int, npt.NDArray[np.uint8]], None]
"""`sink(key, offset, data)`: takes bytes of a finished tensor, C order, from a byte offset on."""

_OUTLIER = 10.0
_OUTLIER_SIZE = 64  # the norm of a few biases says little


@dataclass
class Similarity:
    """How alike the snapshots are, from the same read that averages them.

    Attributes:
        cosines: Of each snapshot to the mean of the others in the first row, over all parameters;
            1 is parallel. (To the mean itself two orthogonal snapshots still have 0.71.)
        outliers: (snapshot name, key, ratio of its norm to the median norm of its siblings).
    """

    cosines: tuple[float, ...]
    outliers: tuple[tuple[str, str, float], ...] = ()


@dataclass
class _Moments:
    """Per tensor: squared norms of the snapshots, their products with the mean, its norm."""

    squares_K: npt.NDArray[np.float64]
    products_K: npt.NDArray[np.float64]
    square: float = 0.0


@dataclass
class _Tally:
    """What the workers report, by key."""

    moments: dict[str, _Moments] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


def weighted_sums(
    snapshots: SnapshotSet,
    rows: Sequence[Row],
    sinks: Sequence[Sink],
    *,
    replaced: frozenset[str] = frozenset(),
    threads: int | None = None,
) -> Similarity:
    """Make the weights of every row in one read of the snapshots.

    Sums run in canonical order in float64 (float64 sources: compensated), are divided once and
    rounded once to the source dtype. Rows that take one snapshot and blocks that are bitwise
    equal in all are copied. Integer tensors must be equal, but for counters of one element,
    which take the newest value. Tied tensors are computed once and given to every key.

    Args:
        snapshots: K snapshots.
        rows: M rows of K coefficients.
        sinks: M receivers; called from several threads, in order within a key.
        replaced: Keys whose values the caller replaces; they need not make sense.
        threads: Workers; default: one for each core, at most 4.

    Returns:
        How alike the snapshots are, seen from the first row.

    Raises:
        NotFiniteError: NaN or Inf in a snapshot or, by overflow, in a result.
        IncompatibleError: Integer tensors that differ.
        InputError: A negative variance.
        DamagedError: A checksum does not match, or a file changed.
    """
    assert len(rows) == len(sinks)
    assert all(len(row.coefficients) == len(snapshots) for row in rows)
    check_shared_storages(snapshots.snapshots)
    tally = _Tally()
    twins = {group[0]: group for group in snapshots.ties}
    followers = {key for group in snapshots.ties for key in group[1:]}
    jobs = [key for key in snapshots.first.tensors if key not in followers]
    jobs.sort(key=lambda key: -snapshots.first.tensors[key].nbytes)  # long ones first
    workers = threads or min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        futures = [
            pool.submit(
                _average_tensor,
                snapshots,
                key,
                rows,
                [_fan_out(sink, twins.get(key, (key,))) for sink in sinks],
                tally,
                replaced=replaced,
            )
            for key in jobs
        ]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also when interrupted: leaving the pool waits for what is not cancelled
            for future in futures:
                future.cancel()
    for future in futures:
        if not future.cancelled():
            future.result()
    for snapshot in snapshots.snapshots:
        for source in snapshot.sources:
            source.check_unchanged()
    return _similarity(snapshots, rows[0], tally)


def array_sink(snapshots: SnapshotSet) -> tuple[dict[str, npt.NDArray[Any]], Sink]:
    """Empty arrays of the snapshots' signature, and a sink that fills them."""
    arrays = {key: np.empty(s.shape, s.type.numpy) for key, s in snapshots.first.tensors.items()}
    flat = {key: array.reshape(-1).view(np.uint8) for key, array in arrays.items()}

    def sink(key: str, offset: int, data: npt.NDArray[np.uint8]) -> None:
        flat[key][offset : offset + data.size] = data

    return arrays, sink


def materialize(
    snapshots: SnapshotSet, rows: Sequence[Row], *, replaced: frozenset[str] = frozenset()
) -> tuple[list[dict[str, npt.NDArray[Any]]], Similarity]:
    """The weights of every row as arrays in memory, in torch's dtypes seen by numpy."""
    targets = [array_sink(snapshots) for _ in rows]
    similarity = weighted_sums(snapshots, rows, [sink for _, sink in targets], replaced=replaced)
    return [arrays for arrays, _ in targets], similarity


def _fan_out(sink: Sink, keys: Sequence[str]) -> Sink:
    def all_of_them(_: str, offset: int, data: npt.NDArray[np.uint8]) -> None:
        for key in keys:
            sink(key, offset, data)

    return all_of_them


def _average_tensor(
    snapshots: SnapshotSet,
    key: str,
    rows: Sequence[Row],
    sinks: Sequence[Sink],
    tally: _Tally,
    *,
    replaced: frozenset[str],
) -> None:
    specs = [snapshot.tensors[key] for snapshot in snapshots.snapshots]
    spec = specs[0]
    if spec.size == 0:
        return
    reader = TensorBlocks(key, snapshots.snapshots)
    collect = reader.permutation is not None
    parts: list[list[npt.NDArray[np.uint8]]] = [[] for _ in rows]
    moments = _Moments(np.zeros(len(specs)), np.zeros(len(specs)))
    for offset, block_KB in reader:
        if spec.type.kind in ("float", "complex"):
            results = _mix_floats(snapshots, key, block_KB, rows, moments, replaced=replaced)
        else:
            results = _pick_integers(snapshots, key, block_KB, rows)
        for m, result in enumerate(results):
            if collect:
                parts[m].append(result.copy())
            else:
                sinks[m](key, offset, result)
    if collect:
        for m, pieces in enumerate(parts):
            sinks[m](key, 0, reader.in_c_order(np.concatenate(pieces)))
    with tally.lock:
        tally.moments[key] = moments


def _mix_floats(
    snapshots: SnapshotSet,
    key: str,
    block_KB: npt.NDArray[np.uint8],
    rows: Sequence[Row],
    moments: _Moments,
    *,
    replaced: frozenset[str],
) -> list[npt.NDArray[np.uint8]]:
    real = snapshots.first.tensors[key].type.real
    bits_KN = block_KB.view(f"u{real.itemsize}")
    same_N = (bits_KN == bits_KN[0]).all(axis=0)
    equal = bool(same_N.all())
    with np.errstate(invalid="ignore"):  # NaN is reported below, with its key
        values_KN = block_KB.view(real).astype(np.float64)
    _check_values(snapshots, key, values_KN, constant=equal)
    results = []
    for m, row in enumerate(rows):
        only = 0 if equal else row.only
        if only is not None:
            mixed_N, result = values_KN[only], block_KB[only]
        else:
            mixed_N = _mix_within_range(values_KN, row, compensated=real == np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                narrowed = narrow(mixed_N, real)
            np.copyto(narrowed.view(bits_KN.dtype), bits_KN[0], where=same_N)
            result = narrowed.view(np.uint8)
            if key not in replaced:
                _check_result(key, narrowed)
        if m == 0:
            with np.errstate(invalid="ignore", over="ignore"):
                moments.squares_K += np.einsum("kn,kn->k", values_KN, values_KN)
                moments.products_K += np.einsum("kn,n->k", values_KN, mixed_N)
                moments.square += float(np.einsum("n,n->", mixed_N, mixed_N))
        results.append(result)
    return results


_SHRINK = 2.0**-100


def _mix_within_range(
    values_KN: npt.NDArray[np.float64], row: Row, *, compensated: bool
) -> npt.NDArray[np.float64]:
    """The sum of large float64 values can overflow where their mean does not."""
    with np.errstate(over="ignore", invalid="ignore"):
        mixed_N = _mix(values_KN, row, compensated=compensated)
        far_N = ~np.isfinite(mixed_N)
        if far_N.any():
            near = _mix(values_KN[:, far_N] * _SHRINK, row, compensated=compensated)
            mixed_N[far_N] = near / _SHRINK
    return mixed_N


def _mix(
    values_KN: npt.NDArray[np.float64], row: Row, *, compensated: bool
) -> npt.NDArray[np.float64]:
    total_N = np.zeros(values_KN.shape[1])
    lost_N = np.zeros_like(total_N)
    for values_N, coefficient in zip(values_KN, row.coefficients, strict=True):
        if coefficient == 0:
            continue
        term_N = values_N if coefficient == 1 else values_N * coefficient
        if not compensated:
            total_N += term_N
            continue
        if coefficient != 1:
            lost_N += _product_error(values_N, coefficient, term_N)
        new_N = total_N + term_N  # Knuth's two-sum: what the addition lost, exactly
        part_N = new_N - total_N
        lost_N += (total_N - (new_N - part_N)) + (term_N - part_N)
        total_N = new_N
    if not compensated:
        total_N /= row.divisor
        return total_N
    mean_N = (total_N + lost_N) / row.divisor
    back_N = mean_N * row.divisor  # one step of long division: what the quotient left over
    left_N = (total_N - back_N) - _product_error(mean_N, row.divisor, back_N) + lost_N
    mean_N += left_N / row.divisor
    return mean_N


def _product_error(
    values_N: npt.NDArray[np.float64], factor: float, product_N: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """What rounding took from `values * factor`, exactly (Dekker 1971); 0 near overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        high_N = values_N * 134217729.0
        high_N -= high_N - values_N
        low_N = values_N - high_N
        high = factor * 134217729.0
        high -= high - factor
        low = factor - high
        error_N = ((high_N * high - product_N) + high_N * low + low_N * high) + low_N * low
        return np.where(np.isfinite(error_N), error_N, 0.0)


def _pick_integers(
    snapshots: SnapshotSet, key: str, block_KB: npt.NDArray[np.uint8], rows: Sequence[Row]
) -> list[npt.NDArray[np.uint8]]:
    spec = snapshots.first.tensors[key]
    same_K = (block_KB == block_KB[0]).all(axis=1)
    counts = spec.size == 1 or key.endswith("_extra_state")  # counters, and a layer's own notes
    if not same_K.all() and not counts and any(row.only is None for row in rows):
        odd = snapshots.snapshots[int(np.argmin(same_K))]
        raise IncompatibleError(
            f"{odd.path}: '{key}' ({spec.dtype}, shape {spec.shape}) differs from the one in "
            f"{snapshots.first.path}; the mean of two index tables is not an index table",
            hint="if they are quantised weights, average the float ones; if they are another "
            f"network's, leave the file out: --exclude '{glob.escape(odd.name)}'",
        )
    return [block_KB[row.newest if row.only is None else row.only] for row in rows]


def _check_values(
    snapshots: SnapshotSet, key: str, values_KN: npt.NDArray[np.float64], *, constant: bool
) -> None:
    """NaN and Inf are errors; a mask of Inf that is the same in all snapshots is not."""
    finite_K = np.isfinite(values_KN).all(axis=1)
    if not finite_K.all() and not (constant and not np.isnan(values_KN[0]).any()):
        bad = int(np.argmin(finite_K))
        what = "NaN" if np.isnan(values_KN[bad]).any() else "Inf"
        raise NotFiniteError(
            f"{snapshots.snapshots[bad].path}: '{key}' contains {what}",
            hint="the training diverged there; leave it out: "
            f"--exclude '{glob.escape(snapshots.snapshots[bad].name)}'",
        )
    if key.endswith("running_var") and (values_KN < 0).any():
        bad = int(np.argmax((values_KN < 0).any(axis=1)))
        raise InputError(
            f"{snapshots.snapshots[bad].path}: '{key}' contains a negative variance",
            hint=f"leave it out: --exclude '{glob.escape(snapshots.snapshots[bad].name)}'",
        )


def _check_result(key: str, values: npt.NDArray[Any]) -> None:
    with np.errstate(invalid="ignore"):  # float8 has NaN that numpy warns of
        wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        raise NotFiniteError(
            f"'{key}': the average does not fit into {values.dtype}",
            hint="coefficients far from a mean extrapolate; choose smaller ones",
        )
    if key.endswith("running_var") and (wide < 0).any():
        raise InputError(
            f"'{key}': negative coefficients made a variance negative",
            hint="recompute the statistics: --model TARGET --train-data TARGET --bn recompute",
        )


def _similarity(snapshots: SnapshotSet, row: Row, tally: _Tally) -> Similarity:
    count = len(snapshots)
    squares_K, products_K, square = np.zeros(count), np.zeros(count), 0.0
    outliers: list[tuple[str, str, float]] = []
    for key in sorted(tally.moments):  # a fixed order, whatever the threads did
        if key.endswith(("running_mean", "running_var")):
            continue
        moments = tally.moments[key]
        if np.isfinite(moments.squares_K).all():
            squares_K += moments.squares_K
            products_K += moments.products_K
            square += moments.square
            if snapshots.first.tensors[key].size >= _OUTLIER_SIZE:
                outliers += _outliers(snapshots, key, moments.squares_K)
    shares_K = np.array(row.weights)  # what the others sum to: the mean less one's own share
    with_others_K = products_K - shares_K * squares_K
    others_K = square - 2 * shares_K * products_K + shares_K**2 * squares_K
    lengths_K = np.sqrt(squares_K * np.maximum(others_K, 0))
    alone_K = (lengths_K <= 1e-12 * max(square, 1e-300)) | (shares_K == 0)
    cosines_K = np.divide(with_others_K, lengths_K, out=np.ones(count), where=~alone_K)
    return Similarity(tuple(float(c) for c in cosines_K), tuple(outliers))


def _outliers(
    snapshots: SnapshotSet, key: str, squares_K: npt.NDArray[np.float64]
) -> list[tuple[str, str, float]]:
    """A tensor whose norm is ten times its siblings', or a tenth; three are needed to tell."""
    norms_K = np.sqrt(squares_K)
    middle = float(np.median(norms_K))
    if len(norms_K) < 3 or middle == 0:
        return []
    return [
        (snapshots.snapshots[k].name, key, float(norm / middle))
        for k, norm in enumerate(norms_K)
        if norm > _OUTLIER * middle or norm * _OUTLIER < middle
    ]
