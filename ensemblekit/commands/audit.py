"""Owns `inspect`: everything in a folder, what would be used, what not, and why.

Input: paths and a selection, as `average` takes them.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ensemblekit.candidates import mean_row
from ensemblekit.discovery import examine
from ensemblekit.distances import distances
from ensemblekit.errors import EnsembleKitError
from ensemblekit.schedule import early_span
from ensemblekit.selection import Selection
from ensemblekit.snapshots import Snapshot, SnapshotSet
from ensemblekit.state import weighted_sums

_DIGEST_LIMIT = 1 << 30  # bytes that are hashed without being asked


@dataclass(frozen=True)
class Audit:
    """The report of `inspect`.

    Attributes:
        snapshots: One dict a file, keys as in the contract.
        problems: Texts, errors first.
        errors: What would stop `average`.
        ordered_by: What the order was taken from.
    """

    snapshots: list[dict[str, Any]]
    problems: list[str]
    errors: tuple[EnsembleKitError, ...]
    ordered_by: str

    def to_json(self) -> dict[str, Any]:
        """The contract's object."""
        return {
            "schema_version": 1,
            "snapshots": self.snapshots,
            "problems": self.problems,
            "ordered_by": self.ordered_by,
        }


def audit(
    checkpoints: Sequence[str | os.PathLike[str]],
    selection: Selection | None = None,
    *,
    deep: bool = False,
    with_distances: bool = False,
) -> Audit:
    """Look at checkpoints without averaging them.

    Args:
        checkpoints: Files, folders, globs.
        selection: As for `average`.
        deep: Read everything: digests however large the files are, checksums, NaN and Inf.
            Without it files are hashed only when all of them together are below 1 GiB.
        with_distances: Also say how far the snapshots are from each other and from their mean.

    Raises:
        UsageError: A path that does not exist.
    """
    found = examine(checkpoints, selection or Selection())
    described = [*found.used, *(s.snapshot for s in found.skipped if s.snapshot)]
    size = sum(source.size for snapshot in described for source in snapshot.sources)
    hashed = deep or size <= _DIGEST_LIMIT
    rows = [_row(s, status="used", reason=None, hashed=hashed) for s in found.used]
    for item in found.skipped:
        if item.snapshot is not None:
            rows.append(_row(item.snapshot, status="skipped", reason=item.reason, hashed=hashed))
        else:
            nothing = dict.fromkeys(_KEYS)
            rows.append(
                {**nothing, "path": str(item.path), "status": "skipped", "reason": item.reason}
            )
    errors = list(found.errors)
    if deep:
        errors += [error for s in found.used if (error := _read_through([s])) is not None]
        if not errors and found.used and (error := _read_through(found.used)):
            errors.append(error)
    if with_distances and found.used and not errors:
        for row, distance in zip(rows, distances(SnapshotSet(found.used)), strict=False):
            row.update(asdict(distance))
    problems = [error.message for error in errors] + list(found.warnings)
    if advice := early_span(found.used, found.ordered_by):
        problems.append(advice)
    return Audit(rows, problems, tuple(errors), found.ordered_by)


def _read_through(snapshots: Sequence[Snapshot]) -> EnsembleKitError | None:
    """What reading every value brings to light; Inf is an error unless all have the same."""
    try:
        row = mean_row(len(snapshots))
        weighted_sums(SnapshotSet(tuple(snapshots)), [row], [lambda *_: None])
    except EnsembleKitError as error:
        return error
    return None


_KEYS = (
    *("path", "format", "step", "epoch", "lr", "metrics", "weights", "weights_available"),
    *("tensors", "parameters", "dtypes", "sha256", "status", "reason"),
)


def _row(snapshot: Snapshot, *, status: str, reason: str | None, hashed: bool) -> dict[str, Any]:
    facts = snapshot.facts
    values = (
        *(str(snapshot.path), snapshot.format, facts.step, facts.epoch, facts.lr),
        *(dict(facts.metrics), snapshot.variant, list(snapshot.available)),
        *(len(snapshot.tensors), snapshot.parameters),
        dict(Counter(spec.dtype for spec in snapshot.tensors.values())),
        *(snapshot.digest() if hashed else None, status, reason),
    )
    return dict(zip(_KEYS, values, strict=True))
