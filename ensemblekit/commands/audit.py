"""Owns `inspect`: everything in a folder, what would be used, what not, and why.

Input: paths and a selection, as `average` takes them.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ensemblekit.discovery import examine
from ensemblekit.errors import EnsembleKitError
from ensemblekit.selection import Selection
from ensemblekit.snapshots import Snapshot

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
) -> Audit:
    """Look at checkpoints without averaging them.

    Args:
        checkpoints: Files, folders, globs.
        selection: As for `average`.
        deep: Hash every file; otherwise only when all of them together are below 1 GiB.

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
            rows.append({"path": item.name, "status": "skipped", "reason": item.reason})
    problems = [error.message for error in found.errors] + list(found.warnings)
    return Audit(rows, problems, found.errors, found.ordered_by)


def _row(snapshot: Snapshot, *, status: str, reason: str | None, hashed: bool) -> dict[str, Any]:
    facts = snapshot.facts
    return {
        "path": str(snapshot.path),
        "format": snapshot.format,
        "step": facts.step,
        "epoch": facts.epoch,
        "lr": facts.lr,
        "metrics": dict(facts.metrics),
        "weights": snapshot.variant,
        "weights_available": list(snapshot.available),
        "tensors": len(snapshot.tensors),
        "parameters": snapshot.parameters,
        "dtypes": dict(Counter(spec.dtype for spec in snapshot.tensors.values())),
        "sha256": snapshot.digest() if hashed else None,
        "status": status,
        "reason": reason,
    }
