"""Owns what `average` reports: plain data that the command line prints and the manifest keeps.

Input: filled in by `average` and `measure`.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy.typing as npt

from ensemblekit.candidates import BatchNorm


@dataclass(frozen=True)
class Evaluation:
    """Quality of one candidate on one split."""

    candidate: str
    batch_norm: str
    split: str
    samples: int
    accuracy: float
    nll: float


@dataclass(frozen=True)
class AverageResult:
    """What `average` did; `to_json` is the contract's object.

    Attributes:
        output: The file, None for a dry run or an average kept in memory.
        sha256: Of the output.
        method: The averaging rule.
        snapshots: path, step, coefficient of each, in canonical order.
        skipped: path and reason of each file left out.
        tensors: In the output.
        parameters: In the output, tied ones once.
        batch_norm: layers, policy, samples.
        evaluation: With val or test data: each snapshot and the average.
        warnings: What a user should know; failures under `--strict`.
        notes: What a user may want to know.
        cosines: Of each snapshot to the mean of the others.
        up_to_date: The output was there already and nothing was written.
        state: The averaged weights, when no output was asked for.
    """

    output: str | None
    sha256: str | None
    method: str
    snapshots: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, str], ...]
    tensors: int
    parameters: int
    batch_norm: dict[str, Any]
    evaluation: tuple[Evaluation, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cosines: tuple[float, ...] = ()
    up_to_date: bool = False
    state: dict[str, npt.NDArray[Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the weights."""
        shown = asdict(replace(self, state=None))
        shown.pop("state")
        return {"schema_version": 1, **shown}


@dataclass
class Measured:
    """What the model had to say: statistics to write, figures, notes."""

    policy: BatchNorm
    statistics: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    samples: int = 0
    evaluation: list[Evaluation] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
