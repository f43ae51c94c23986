"""Owns distances between snapshots: how far a run moved, and around which point.

Input: a `SnapshotSet`; every parameter is read once.
"""

import glob
from dataclasses import dataclass

import numpy as np

from ensemblekit.blocks import TensorBlocks
from ensemblekit.errors import NotFiniteError
from ensemblekit.snapshots import SnapshotSet


@dataclass(frozen=True)
class Distance:
    """Where one snapshot lies, over all parameters without running statistics.

    Attributes:
        to_previous: Euclidean distance to the snapshot before it, None for the first.
        cosine_to_previous: Cosine of the two, None for the first.
        to_mean: Distance to the uniform mean.
    """

    to_previous: float | None
    cosine_to_previous: float | None
    to_mean: float


def distances(snapshots: SnapshotSet) -> list[Distance]:
    """Distances of the snapshots, in their order.

    Raises:
        DamagedError: A checksum does not match.
        NotFiniteError: NaN or Inf in a snapshot.
    """
    tied = {key for group in snapshots.ties for key in group[1:]}
    count = len(snapshots)
    squares_K, to_mean_K = np.zeros(count), np.zeros(count)
    products, steps = np.zeros(max(count - 1, 0)), np.zeros(max(count - 1, 0))
    for key, spec in snapshots.first.tensors.items():
        if spec.type.kind not in ("float", "complex") or spec.size == 0:
            continue
        if key.endswith(("running_mean", "running_var")) or key in tied:
            continue
        for _, block_KB in TensorBlocks(key, snapshots.snapshots):
            values_KN = block_KB.view(spec.type.real).astype(np.float64)
            finite_K = np.isfinite(values_KN).all(axis=1)
            if not finite_K.all():
                bad = snapshots.snapshots[int(np.argmin(finite_K))]
                raise NotFiniteError(
                    f"{bad.path}: '{key}' contains NaN or Inf; it has no distance to anything",
                    hint=f"leave it out: --exclude '{glob.escape(bad.name)}'",
                )
            squares_K += np.einsum("kn,kn->k", values_KN, values_KN)
            off_KN = values_KN - values_KN.mean(axis=0)
            to_mean_K += np.einsum("kn,kn->k", off_KN, off_KN)
            moved = np.diff(values_KN, axis=0)
            steps += np.einsum("kn,kn->k", moved, moved)
            products += np.einsum("kn,kn->k", values_KN[1:], values_KN[:-1])
    lengths = np.sqrt(squares_K[1:] * squares_K[:-1])
    cosines = np.divide(products, lengths, out=np.ones_like(products), where=lengths > 0)
    return [
        Distance(
            float(np.sqrt(steps[k - 1])) if k else None,
            float(cosines[k - 1]) if k else None,
            float(np.sqrt(to_mean_K[k])),
        )
        for k in range(count)
    ]
