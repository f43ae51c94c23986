"""Owns the making of weights out of snapshots: the only place where tensors are averaged.

Input: a `SnapshotSet` and rows over it. Everything streams: a block of each snapshot at a time
goes through a float64 accumulator, so memory grows neither with K nor with the model.
"""

import contextlib
import glob
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit import bfloat16
from ensemblekit.blocks import TensorBlocks, check_shared_storages
from ensemblekit.candidates import Row
from ensemblekit.dtypes import DTYPES, DType
from ensemblekit.errors import IncompatibleError, InputError, NotFiniteError
from ensemblekit.machine import usable_cores
from ensemblekit.mixing import Moments, NotRegular, Scratch, careful, is_quick, quick
from ensemblekit.snapshots import Signature, SnapshotSet

Sink = Callable[[str, int, npt.NDArray[np.uint8]], None]
"""`sink(key, offset, data)`: takes bytes of a finished tensor, C order, from a byte offset on."""

_TELLING = 8  # of so many blocks of a tensor one is looked at for norms and angles
_OUTLIER = 10.0
_PATIENCE_S = 0.01  # between looks at whether others still want the cores
_LOST = 1e-3  # shares of a square below which a difference of float32 sums says nothing
_OUTLIER_SIZE = 64  # the norm of a few biases says little


@dataclass
class Similarity:
    """How alike the snapshots are, from the same read that averages them.

    Attributes:
        cosines: Of each snapshot to the mean of the others in the first row, over all parameters
            (of large tensors over every eighth block, in float32, which stand for the others);
            1 is parallel. (To the mean itself two orthogonal snapshots still have 0.71.) Also 1
            where the others are next to nothing in that row, or cancel.
        outliers: (snapshot name, key, ratio of its norm to the median norm of its siblings).
    """

    cosines: tuple[float, ...]
    outliers: tuple[tuple[str, str, float], ...] = ()


@dataclass
class _Work:
    """What the workers share: what is asked for, their memory, what they report by key."""

    replaced: frozenset[str]
    dtype: DType | None
    scratch: Scratch = field(default_factory=Scratch)
    moments: dict[str, Moments] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def target(self, own: DType) -> DType | None:
        """The type that values of type `own` become, None where they stay what they are."""
        if self.dtype is None or own.kind != "float" or own.name == self.dtype.name:
            return None
        return self.dtype


def converted(signature: Signature, dtype: str | None) -> Signature:
    """The signature with the floating-point tensors in another type."""
    if dtype is None:
        return signature
    return {
        key: (shape, dtype if DTYPES[own].kind == "float" else own)
        for key, (shape, own) in signature.items()
    }


def weighted_sums(
    snapshots: SnapshotSet,
    rows: Sequence[Row],
    sinks: Sequence[Sink],
    *,
    replaced: frozenset[str] = frozenset(),
    threads: int | None = None,
) -> Similarity:
    """`sums` of all tensors, and how alike the snapshots are, seen from the first row."""
    moments = sums(snapshots, rows, sinks, replaced=replaced, threads=threads)
    return similarity(snapshots, rows[0], moments)


def sums(
    snapshots: SnapshotSet,
    rows: Sequence[Row],
    sinks: Sequence[Sink],
    *,
    keys: Collection[str] | None = None,
    dtype: str | None = None,
    replaced: frozenset[str] = frozenset(),
    threads: int | None = None,
    others: Callable[[], int] = lambda: 0,
) -> dict[str, Moments]:
    """Make the weights of every row in one read of the snapshots.

    Sums run in canonical order in float64 (float64 sources: compensated), are divided once and
    rounded once to the source dtype. Rows that take one snapshot and blocks that are bitwise
    equal in all are copied. Integer tensors must be equal, but for counters of one element,
    which take the newest value. Tied tensors are computed once and given to every key.

    Args:
        snapshots: K snapshots.
        rows: M rows of K coefficients.
        sinks: M receivers; called from several threads, in order within a key.
        keys: Only these tensors; tied ones are given together with the first of them.
        dtype: Type of the floating-point results; the sources' own when None.
        replaced: Keys whose values the caller replaces; they need not make sense.
        threads: Workers; default: one for each core, at most 4.
        others: How many cores other threads of this process want now: so many are left to them.

    Returns:
        By key, what `similarity` is made of.

    Raises:
        NotFiniteError: NaN or Inf in a snapshot or, by overflow, in a result.
        IncompatibleError: Integer tensors that differ.
        InputError: A negative variance.
        DamagedError: A checksum does not match, or a file changed.
    """
    assert len(rows) == len(sinks)
    assert all(len(row.coefficients) == len(snapshots) for row in rows)
    work = _Work(replaced, None if dtype is None else DTYPES[dtype])
    wanted = snapshots.first.tensors if keys is None else frozenset(keys)
    check_shared_storages(snapshots.snapshots, wanted)
    twins: dict[str, list[str]] = {}
    for group in snapshots.ties:
        here = [key for key in group if key in wanted]
        twins |= {here[0]: here} if here else {}
    followers = {key for group in twins.values() for key in group[1:]}
    jobs = [key for key in snapshots.first.tensors if key in wanted and key not in followers]
    jobs.sort(key=lambda key: -snapshots.first.tensors[key].nbytes)  # long ones first
    cores = threads or usable_cores()
    workers = threads or min(4, cores)
    waiting = deque(jobs)

    def run(number: int) -> None:
        while waiting:
            if number >= max(1, cores - others()):
                time.sleep(_PATIENCE_S)
                continue
            try:
                key = waiting.popleft()
            except IndexError:  # another worker took the last one
                return
            own = [_fan_out(sink, twins.get(key, (key,))) for sink in sinks]
            _average_tensor(snapshots, key, rows, own, work)

    futures: list[Future[None]] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures.extend(pool.submit(run, number) for number in range(workers))
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also when interrupted: leaving the pool waits for tensors under way
            waiting.clear()
    for future in futures:
        future.result()
    for snapshot in snapshots.snapshots:
        for source in snapshot.sources:
            source.check_unchanged()
    return work.moments


def array_sink(signature: Signature) -> tuple[dict[str, npt.NDArray[Any]], Sink]:
    """Empty arrays of a signature, and a sink that fills them."""
    arrays = {
        key: np.empty(shape, DTYPES[dtype].numpy) for key, (shape, dtype) in signature.items()
    }
    flat = {key: array.reshape(-1).view(np.uint8) for key, array in arrays.items()}

    def sink(key: str, offset: int, data: npt.NDArray[np.uint8]) -> None:
        flat[key][offset : offset + data.size] = data

    return arrays, sink


def materialize(
    snapshots: SnapshotSet, rows: Sequence[Row], *, replaced: frozenset[str] = frozenset()
) -> tuple[list[dict[str, npt.NDArray[Any]]], Similarity]:
    """The weights of every row as arrays in memory, in torch's dtypes seen by numpy."""
    targets = [array_sink(snapshots.first.signature) for _ in rows]
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
    work: _Work,
) -> None:
    own = snapshots.first.tensors[key].type
    target = work.target(own)
    most = bfloat16.BLOCK_VALUES if _in_float32(own.real, rows, target) else None
    reader = TensorBlocks(key, snapshots.snapshots, work.scratch, most)
    spec = reader.specs[0]
    if spec.size == 0:
        return
    growth = 1 if target is None else target.itemsize / spec.type.itemsize
    size = (target or spec.type).itemsize * spec.size
    collected = [] if reader.permutation is None else [np.empty(size, np.uint8) for _ in rows]
    moments = Moments.none(len(snapshots))
    for number, (offset, block_KB) in enumerate(reader):
        if spec.type.kind in ("float", "complex"):
            telling = number % _TELLING == 0
            results = _mix_floats(snapshots, key, block_KB, rows, moments, work, telling=telling)
        else:
            results = _pick_integers(snapshots, key, block_KB, rows)
        for m, result in enumerate(results):
            place = int(offset * growth)
            if collected:
                collected[m][place : place + result.size] = result
            else:
                sinks[m](key, place, result)
    while collected:
        sinks[len(rows) - len(collected)](
            key, 0, reader.in_c_order(collected.pop(0), target or spec.type)
        )
    parts = 2 if spec.type.kind == "complex" else 1
    with work.lock:
        work.moments[key] = moments.scaled(parts * spec.size)


def _mix_floats(
    snapshots: SnapshotSet,
    key: str,
    block_KB: npt.NDArray[np.uint8],
    rows: Sequence[Row],
    moments: Moments,
    work: "_Work",
    *,
    telling: bool,
) -> list[npt.NDArray[np.uint8]]:
    real = snapshots.first.tensors[key].type.real
    target = work.target(snapshots.first.tensors[key].type)
    seen = moments if telling else None
    if is_quick(real, rows, target) and not key.endswith("running_var"):
        with contextlib.suppress(NotRegular):
            if _in_float32(real, rows, target):
                return [bfloat16.mean(block_KB, work.scratch, seen)]
        with contextlib.suppress(NotRegular):
            results = quick(block_KB, real, rows, seen, work.scratch, target)
            if target is not None:
                for result in results:
                    check_result(key, result.view(target.real))
            return results
    with np.errstate(invalid="ignore"):  # NaN is reported below, with its key
        values_KN = block_KB.view(real).astype(np.float64)
    bits_KN = block_KB.view(f"u{real.itemsize}")
    if key not in work.replaced:
        _check_values(snapshots, key, values_KN, constant=bool((bits_KN == bits_KN[0]).all()))
    results = careful(block_KB, values_KN, real, rows, moments, target)
    for row, result in zip(rows, results, strict=True):
        if key not in work.replaced and (row.only is None or target is not None):
            check_result(
                key,
                result.view(real if target is None else target.real),
                constant=bool(np.isinf(values_KN).any()),
            )
    return results


def _in_float32(real: np.dtype[Any], rows: Sequence[Row], target: DType | None) -> bool:
    """Whether `bfloat16.mean` may take it: one plain mean that stays bfloat16."""
    plain = len(rows) == 1 and {*rows[0].coefficients} == {1.0}
    return plain and real == bfloat16.KIND and target is None


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


def check_result(key: str, values: npt.NDArray[Any], *, constant: bool = False) -> None:
    """Nothing may overflow; Inf that all snapshots have (a mask) stays.

    Raises:
        NotFiniteError: Something did.
        InputError: A variance became negative.
    """
    with np.errstate(invalid="ignore"):  # float8 has NaN that numpy warns of
        wide = values.astype(np.float64)
    if not constant and not np.isfinite(wide).all():
        raise NotFiniteError(
            f"'{key}': the average does not fit into {values.dtype}",
            hint="choose a wider --dtype, or coefficients nearer to those of a mean",
        )
    if key.endswith("running_var") and (wide < 0).any():
        raise InputError(
            f"'{key}': negative coefficients made a variance negative",
            hint="recompute the statistics: --model TARGET --train-data TARGET --bn recompute",
        )


def similarity(snapshots: SnapshotSet, row: Row, moments: Mapping[str, Moments]) -> Similarity:
    """How alike the snapshots are, from the moments of all tensors under a row."""
    count = len(snapshots)
    squares_K, products_K, square = np.zeros(count), np.zeros(count), 0.0
    outliers: list[tuple[str, str, float]] = []
    seconds = {k for group in snapshots.ties for k in [k for k in group if k in moments][1:]}
    for key in sorted(moments):  # a fixed order, whatever the threads did
        if key.endswith(("running_mean", "running_var")) or key in seconds:
            continue
        own = moments[key]
        if np.isfinite(own.squares_K).all():
            squares_K += own.squares_K
            products_K += own.products_K
            square += own.square
            if snapshots.first.tensors[key].size >= _OUTLIER_SIZE:
                outliers += _outliers(snapshots, key, own.squares_K)
    shares_K = np.array(row.weights)  # what the others sum to: the mean less one's own share
    with_others_K = products_K - shares_K * squares_K
    others_K = square - 2 * shares_K * products_K + shares_K**2 * squares_K
    lengths_K = np.sqrt(squares_K * np.maximum(others_K, 0))
    sizes_K = np.abs(shares_K)
    cancel_K = np.abs(1 - shares_K) < (sizes_K.sum() - sizes_K) / 2
    alone_K = (others_K <= _LOST * square) | (squares_K == 0) | (shares_K == 0) | cancel_K
    cosines_K = np.divide(with_others_K, lengths_K, out=np.ones(count), where=~alone_K)
    cosines_K[(shares_K > 1) & ~alone_K] *= -1  # the others' weights sum to less than 0
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
