"""Owns taking a measured candidate again: `--candidate NAME --from comparison.json`.

Input: a comparison, and snapshots found now. What is made must be what was measured, so the files
are matched by digest, and BatchNorm statistics come from beside the comparison.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit.candidates import Candidate, Row
from ensemblekit.commands.report_folder import JSON_NAME, read_statistics
from ensemblekit.errors import IncompatibleError, InputError, UsageError, one_of
from ensemblekit.snapshots import SnapshotSet


@dataclass(frozen=True)
class Chosen:
    """A candidate of a comparison, over the snapshots that take part.

    Attributes:
        candidate: Its rows are over `snapshots`.
        snapshots: Those with a coefficient.
        statistics: Recomputed BatchNorm statistics of each member, by key; empty where none.
        samples: Training samples they were made from.
    """

    candidate: Candidate
    snapshots: SnapshotSet
    statistics: tuple[Mapping[str, npt.NDArray[Any]], ...]
    samples: int


def take(name: str, source: Path, found: SnapshotSet) -> Chosen:
    """The candidate of that name.

    Args:
        name: Of the candidate.
        source: comparison.json, or its folder.
        found: Snapshots now; more than those that take part do no harm.

    Raises:
        UsageError: No such file or candidate.
        InputError: It is no comparison, or its statistics are not the ones that were measured.
        IncompatibleError: A snapshot is missing, or its file has changed.
    """
    path = source / JSON_NAME if source.is_dir() else source
    comparison = read(path)
    rows = {str(row["name"]): row for row in comparison["candidates"]}
    one_of(name, rows, what=f"candidate of {path}")
    try:
        candidate = Candidate.from_json(rows[name]["candidate"])
        samples = int(rows[name]["batch_norm"]["samples"])
        files = [(s["sha256"], s["weights"], s["name"]) for s in comparison["snapshots"]]
        if not all(isinstance(text, str) for one in files for text in one):
            raise ValueError("a snapshot whose digest is no text")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: {name} is damaged ({error})") from error
    if len(files) != len(candidate.rows[0].coefficients):
        raise InputError(f"{path}: {name} is damaged: it is not over its {len(files)} snapshots")
    used = [k for k in range(len(files)) if any(row.coefficients[k] != 0 for row in candidate.rows)]
    now = {(s.digest(), s.variant): s for s in found.snapshots}
    taken = []
    for k in used:
        sha256, variant, _ = files[k]
        snapshot = now.get((sha256, variant))
        if snapshot is None:
            raise _missing(*files[k], found, path)
        taken.append(snapshot)
    restricted = replace(
        candidate,
        rows=tuple(
            Row(tuple(row.coefficients[k] for k in used), row.divisor) for row in candidate.rows
        ),
    )
    snapshots = SnapshotSet(tuple(taken), found.skipped, (), found.ordered_by)
    statistics = _statistics(path, comparison, candidate, snapshots)
    return Chosen(restricted, snapshots, statistics, samples)


def read(path: Path) -> dict[str, Any]:
    """A comparison.

    Raises:
        UsageError: There is no such file.
        InputError: It is no comparison.
    """
    if not path.is_file():
        raise UsageError(
            f"--from {path}: there is no such file", hint="ensemblekit compare makes it"
        )
    try:
        value = json.loads(path.read_bytes())
        if value["schema_version"] != 1:
            raise InputError(
                f"{path}: its schema version is {value['schema_version']}, this ensemblekit reads 1",
                hint="run ensemblekit compare again",
            )
        [row["name"] for row in value["candidates"]], value["snapshots"][0]["sha256"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no comparison.json of ensemblekit") from error
    found: dict[str, Any] = value
    return found


def _missing(
    sha256: str, variant: str, name: str, found: SnapshotSet, path: Path
) -> IncompatibleError:
    same = [s for s in found.snapshots if s.digest() == sha256]
    if same:
        return IncompatibleError(
            f"{same[0].path}: {path} measured its '{variant}' weights, and "
            f"'{same[0].variant}' were taken now",
            hint=f"--weights {variant}",
        )
    return IncompatibleError(
        f"{name} (sha256 {sha256[:12]}...) of {path} is not among the "
        f"{len(found)} snapshots found, or has changed since",
        hint="name the files that were compared, or run ensemblekit compare again",
    )


def _statistics(
    path: Path, comparison: Mapping[str, Any], candidate: Candidate, snapshots: SnapshotSet
) -> tuple[Mapping[str, npt.NDArray[Any]], ...]:
    if "recomputed" not in candidate.batch_norm:
        return tuple({} for _ in candidate.rows)
    raw = read_statistics(path.parent, comparison)
    tensors = snapshots.first.tensors
    found: list[dict[str, npt.NDArray[Any]]] = []
    for m in range(len(candidate.rows)):
        start = f"{candidate.name}/{m}/"
        own = {name.removeprefix(start): v for name, v in raw.items() if name.startswith(start)}
        if not own or not set(own) <= set(tensors):
            raise InputError(f"{path.parent} does not hold the statistics of {candidate.name}")
        found.append(
            {
                key: np.array(value).view(tensors[key].type.numpy).reshape(tensors[key].shape)
                for key, value in own.items()
            }
        )
    return tuple(found)
