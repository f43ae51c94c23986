"""Owns the question whether two files hold the same weights, or one the mean of others.

Input: snapshots. Samples first; whole tensors are read only where the samples agree.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ensemblekit.containers import TensorSpec, is_dense, read_array, storage_span
from ensemblekit.snapshots import Snapshot
from ensemblekit.tables import one_form

_SAMPLED_TENSORS = 32
_MEAN_SAMPLES = 1 << 14
_MEAN_VALUES = 1 << 20  # of all snapshots together
_MOST_READS = 20_000
_MEAN_TOLERANCE = 1e-6
_TOLD_APART = 8.0  # members must differ by more than the mean is off
_BLOCK = 1 << 20


def same_weights(snapshots: list[Snapshot]) -> list[list[Snapshot]]:
    """Group snapshots that hold bitwise the same weights; order is kept."""
    groups: list[list[Snapshot]] = []
    by_sample: defaultdict[bytes, list[list[Snapshot]]] = defaultdict(list)
    for snapshot in snapshots:
        key = _sample(snapshot)
        for group in by_sample[key]:
            if _equal(group[0], snapshot):
                group.append(snapshot)
                break
        else:
            group = [snapshot]
            groups.append(group)
            by_sample[key].append(group)
    return groups


def content_digest(snapshot: Snapshot) -> str:
    """SHA-256 over keys, types and values, whatever container they lie in."""
    digest = hashlib.sha256()
    for key in sorted(snapshot.tensors):
        spec = snapshot.tensors[key]
        digest.update(f"{key}\0{spec.dtype}\0{spec.shape}\0".encode())
        digest.update(read_array(spec).tobytes())
    return digest.hexdigest()


def means_of_others(
    snapshots: list[Snapshot],
    plausible: Callable[[Snapshot, list[Snapshot]], bool] = lambda _average, _members: True,
) -> list[tuple[Snapshot, list[Snapshot]]]:
    """Snapshots that equal the mean of at least two others, to 1e-6 of the largest value.

    Args:
        snapshots: To look through.
        plausible: Whether the first could have been made from the others; equality may be chance
            where weights move along a line.

    If one snapshot is a mean of others, the snapshots' values are linearly dependent. So one
    least-squares problem on sampled values finds the coefficients, whatever the subset is.
    """
    found: list[tuple[Snapshot, list[Snapshot]]] = []
    rest = list(snapshots)
    while len(rest) > 2:
        hit = _one_mean(rest, plausible)
        if hit is None:
            break
        found.append(hit)
        rest.remove(hit[0])
    return found


def _one_mean(
    snapshots: list[Snapshot], plausible: Callable[[Snapshot, list[Snapshot]], bool]
) -> tuple[Snapshot, list[Snapshot]] | None:
    values_SK, rounding_S = _sampled_values(snapshots)
    finite_S = np.isfinite(values_SK).all(axis=1)  # NaN is `state`'s to report
    if not finite_S.all():
        values_SK, rounding_S = values_SK[finite_S], rounding_S[finite_S]
    sizes_S = np.maximum(
        values_SK.max(axis=1, initial=-np.inf), -values_SK.min(axis=1, initial=np.inf)
    )
    scale = sizes_S.max(initial=0.0)
    # what the rounding of a mean to its own dtype may change
    noise_S = _MEAN_TOLERANCE * scale + 2 * rounding_S * sizes_S
    if scale == 0 or len(values_SK) < len(snapshots) + 4:
        return None
    # centred columns always sum to zero; a second (near) zero singular value is a dependency
    threshold = float(np.linalg.norm(noise_S) * np.sqrt(len(snapshots)))
    centred_SK = values_SK - values_SK.mean(axis=1, keepdims=True)
    squares_KK = centred_SK.T @ centred_SK
    del centred_SK
    squares = np.linalg.eigvalsh(squares_KK)  # small, and good to 1e-8 of the largest
    del squares_KK
    if squares[1] > (threshold + 1e-6 * np.sqrt(squares[-1])) ** 2:
        return None
    centred_SK = values_SK - values_SK.mean(axis=1, keepdims=True)
    singular = np.linalg.svd(centred_SK, compute_uv=False)
    del centred_SK
    if singular[-2] > threshold:
        return None
    for k, snapshot in enumerate(snapshots):
        others = [j for j in range(len(snapshots)) if j != k]
        base = values_SK[:, others[-1]]
        directions = values_SK[:, others[:-1]] - base[:, None]
        coefficients = np.linalg.lstsq(directions, values_SK[:, k] - base, rcond=None)[0]
        row = np.append(coefficients, 1 - coefficients.sum())
        members = [others[i] for i in np.flatnonzero(np.abs(row) > 0.5 / len(row))]
        if len(members) < 2:
            continue
        off_S = np.abs(values_SK[:, members].mean(axis=1) - values_SK[:, k])
        spread_S = np.abs(values_SK[:, members] - values_SK[:, [k]]).max(axis=1)
        others_found = [snapshots[j] for j in members]
        told_apart = np.linalg.norm(spread_S) > _TOLD_APART * np.linalg.norm(off_S)
        if (off_S <= noise_S).all() and told_apart and plausible(snapshot, others_found):
            return snapshot, others_found
    return None


def _sampled_values(
    snapshots: list[Snapshot],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The same elements of each snapshot's float parameters, and their unit roundoff."""
    first = snapshots[0].tensors
    others = [] if one_form(s.tensors for s in snapshots) else snapshots
    keys = [
        key
        for key, spec in sorted(first.items())
        if spec.type.kind == "float"
        and not key.endswith(("running_mean", "running_var"))  # these may be recomputed
        and is_dense(spec)
        and all(is_dense(s.tensors[key]) and s.tensors[key].stride == spec.stride for s in others)
    ]
    keys = keys[:: max(1, len(keys) * len(snapshots) // _MOST_READS)]
    samples = max(2 * len(snapshots), min(_MEAN_SAMPLES, _MEAN_VALUES // len(snapshots)))
    each = max(16, samples // max(len(keys), 1))
    count = sum(min(each, first[key].size) for key in keys)
    values_SK = np.empty((count, len(snapshots)), order="F")
    for k, snapshot in enumerate(snapshots):
        parts = [_leading(snapshot.tensors[key], each) for key in keys]
        values_SK[:, k] = np.concatenate(parts) if parts else 0.0
    units = [np.full(min(each, first[key].size), _unit_roundoff(first[key])) for key in keys]
    return values_SK, np.concatenate(units or [np.empty(0)])


def _unit_roundoff(spec: TensorSpec) -> float:
    info: Any = ml_dtypes.finfo(spec.type.numpy)  # type: ignore[no-untyped-call]
    return float(info.eps) / 2


def _leading(spec: TensorSpec, count: int) -> npt.NDArray[np.float64]:
    count = min(count, spec.size)
    raw = spec.extent.source.read(spec.start, count * spec.type.itemsize)
    return np.frombuffer(raw, dtype=spec.type.numpy).astype(np.float64)


def _sample(snapshot: Snapshot) -> bytes:
    """A digest of a few elements of a few tensors: equal weights have equal ones."""
    digest = hashlib.sha256(repr(sorted(snapshot.signature.items())).encode())
    keys = sorted(snapshot.tensors)
    for key in keys[:: max(1, len(keys) // _SAMPLED_TENSORS)]:
        spec = snapshot.tensors[key]
        if spec.size == 0 or spec.pieces:
            continue
        itemsize = spec.type.itemsize
        last = spec.start + (storage_span(spec) - 1) * itemsize
        for place in (spec.start, last):  # first and last are the same in every memory format
            digest.update(spec.extent.source.read(place, itemsize))
    return digest.digest()


def _equal(one: Snapshot, other: Snapshot) -> bool:
    if [s.fingerprint for s in one.sources] == [s.fingerprint for s in other.sources]:
        return one.variant == other.variant
    return all(_same_bytes(one.tensors[key], other.tensors[key]) for key in one.tensors)


def _same_bytes(one: TensorSpec, other: TensorSpec) -> bool:
    if not (one.in_one_run and other.in_one_run):
        return read_array(one).tobytes() == read_array(other).tobytes()
    for place in range(0, one.nbytes, _BLOCK):
        length = min(_BLOCK, one.nbytes - place)
        left = one.extent.source.read(one.start + place, length)
        if left != other.extent.source.read(other.start + place, length):
            return False
    return True
