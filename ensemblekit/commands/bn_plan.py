"""Owns the decision what happens to BatchNorm statistics, before anything is computed.

Input: snapshots, a row, and what data there are.
"""

from dataclasses import dataclass

import numpy as np

from ensemblekit.candidates import Row
from ensemblekit.containers import read_array
from ensemblekit.errors import CheckFailedError, UsageError
from ensemblekit.options import ModelOptions
from ensemblekit.snapshots import SnapshotSet

BN_POLICIES = ("auto", "recompute", "average", "error")


@dataclass(frozen=True)
class BnPlan:
    """Which normalisation layers there are, and what is to happen to them.

    Attributes:
        layers: All with running statistics.
        frozen: Those whose statistics are equal in all snapshots, and were updated once.
        stale: The averaged statistics will not fit the averaged weights.
        recompute: There are data to make new ones from.
    """

    layers: tuple[str, ...]
    frozen: tuple[str, ...]
    stale: bool
    recompute: bool


def plan_bn(
    snapshots: SnapshotSet, row: Row, bn: str, options: ModelOptions, warnings: list[str]
) -> BnPlan:
    """What to do under the policy `bn`; what the user should know goes to `warnings`.

    Raises:
        UsageError: `recompute` without a model and training data.
        CheckFailedError: `error`, and the statistics would stay averaged.
    """
    layers = snapshots.norm_layers
    mixed = row.only is None
    frozen = frozen_layers(snapshots)
    live = len(layers) - len(frozen)
    stale = mixed and live > 0
    has_data = options.model is not None and options.train_data is not None
    if bn == "recompute" and not has_data:
        raise UsageError(
            "--bn recompute needs a model and training data",
            hint="--model FILE.py:NAME --train-data FILE.py:NAME",
        )
    for asked, flag in (
        (options.bn_layerwise, "--bn-layerwise"),
        (options.channels_last, "--channels-last"),
    ):
        if asked and not has_data:
            raise UsageError(
                f"{flag} is about recomputing BatchNorm, which needs a model and training data",
                hint="--model FILE.py:NAME --train-data FILE.py:NAME",
            )
    wanted = bn in ("auto", "recompute", "error") and has_data and live > 0
    recompute = wanted and (stale or bn == "recompute")
    if stale and not recompute and bn != "average":
        advice = (
            "add --model FILE.py:NAME --train-data FILE.py:NAME to recompute them, "
            "or --bn average to accept them"
        )
        text = (
            f"{live} BatchNorm layers keep averaged statistics, which seldom fit averaged weights"
        )
        if bn == "error":
            raise CheckFailedError(f"--bn error: {text}", hint=advice)
        warnings.append(f"{text}; {advice}")
    if not recompute:
        warnings += fresh_warnings(snapshots)
    return BnPlan(layers, frozen, stale, recompute)


def frozen_layers(snapshots: SnapshotSet) -> tuple[str, ...]:
    """Layers whose statistics are equal in all snapshots: they were frozen in training.

    Those of a new layer are equal, too, where training never updated them; they fit nothing.
    """
    equal = (name for name in snapshots.norm_layers if _frozen(snapshots, name))
    return tuple(name for name in equal if not _fresh(snapshots, name))


def fresh_warnings(snapshots: SnapshotSet) -> list[str]:
    """What to say of layers whose statistics were never updated."""
    fresh = [name for name in snapshots.norm_layers if _fresh(snapshots, name)]
    if not fresh:
        return []
    text = (
        f"{len(fresh)} BatchNorm layers have statistics that were never updated (mean 0, "
        "variance 1): these weights do not work before they are recomputed"
    )
    return [text]


def _fresh(snapshots: SnapshotSet, layer: str) -> bool:
    """Whether the statistics are still as a new layer has them, in the newest snapshot."""
    prefix = f"{layer}." if layer else ""
    newest = snapshots.snapshots[-1].tensors
    with np.errstate(invalid="ignore"):
        mean = read_array(newest[f"{prefix}running_mean"]).astype(np.float64)
        variance = read_array(newest[f"{prefix}running_var"]).astype(np.float64)
    return mean.size > 1 and bool((mean == 0).all() and (variance == 1).all())


def _frozen(snapshots: SnapshotSet, layer: str) -> bool:
    prefix = f"{layer}." if layer else ""
    for key in (f"{prefix}running_mean", f"{prefix}running_var"):
        first, *others = (read_array(s.tensors[key]).tobytes() for s in snapshots.snapshots)
        if any(other != first for other in others):
            return False
    return len(snapshots) > 1
