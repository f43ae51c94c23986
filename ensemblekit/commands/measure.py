"""Owns the part of `average` that runs the model: statistics that fit, and figures.

Input: snapshots, a row, a model and data. Imported only when there is a model.
"""

from collections.abc import Iterator

import numpy as np
import torch

from ensemblekit import metrics
from ensemblekit.cache import Cache
from ensemblekit.candidates import Member, Row, one_hot
from ensemblekit.commands.bn_plan import BnPlan
from ensemblekit.commands.result import Evaluation, Measured
from ensemblekit.distributed import world
from ensemblekit.errors import UsageError
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.state import materialize
from ensemblekit.workbench import Workbench

_NO_LIMIT = 1 << 62


def measure(
    snapshots: SnapshotSet,
    row: Row,
    plan: BnPlan,
    bn: str,
    options: ModelOptions,
    progress: Progress | None,
) -> Measured:
    """Recompute statistics, evaluate the members and the average, choose on validation data.

    Under torchrun every process takes part; what process 0 returns counts.
    """
    found = Measured("averaged" if plan.stale else "none")
    count = len(snapshots)
    with Cache(None, _NO_LIMIT) as cache, world() as here:
        bench = Workbench(
            snapshots, options, cache=cache, frozen=plan.frozen, world=here, progress=progress
        )
        members = {
            (snapshot.name, "own"): Member(one_hot(k, count))
            for k, snapshot in enumerate(snapshots.snapshots)
        }
        sound = not plan.recompute or _sound(bench, row)
        averaged, recomputed = Member(row, found.policy), Member(row, "recomputed")
        if sound:
            members["average", found.policy] = averaged
        if plan.recompute:
            members["average", "recomputed"] = recomputed
        if bench.splits:
            bench.predict(list(members.values()))
            found.evaluation += _evaluated(bench, members) if here.rank == 0 else ()
        if plan.recompute:
            bench.builder.models([recomputed])
            statistics = bench.builder.statistics(recomputed)
            assert statistics is not None
            found.warnings += statistics.notes
            if bn != "auto" or not sound or not _worse_on_val(found, averaged.batch_norm):
                found.policy = "recomputed"
                found.statistics, found.samples = dict(statistics.values), statistics.samples
    _judge(found)
    return found


def _sound(bench: Workbench, row: Row) -> bool:
    """Whether averaged variances are variances; negative coefficients may make them negative."""
    if min(row.weights) >= 0:
        return True
    every = frozenset(bench.snapshots.first.tensors)
    (arrays,), _ = materialize(bench.snapshots, [row], replaced=every)
    return all((arrays[key] >= 0).all() for key in arrays if key.endswith("running_var"))


def _evaluated(bench: Workbench, members: dict[tuple[str, str], Member]) -> Iterator[Evaluation]:
    """Accuracy and NLL of each member on every labelled split."""
    if bench.form is None or bench.form.task != "classification":
        raise UsageError(
            f"average reports figures of classifiers; these are data for "
            f"{bench.form.task if bench.form else 'nothing'}",
            hint="use ensemblekit compare, or leave --val-data and --test-data out",
        )
    for (name, batch_norm), member in members.items():
        for split in bench.splits:
            seen = bench.predictions([member], split)
            log_probs = torch.from_numpy(np.array(seen.outputs[0]))
            targets = torch.from_numpy(seen.targets)
            yield Evaluation(
                name,
                batch_norm,
                split,
                seen.samples,
                metrics.accuracy(log_probs, targets),
                metrics.nll(log_probs, targets),
            )


def _worse_on_val(found: Measured, policy: str) -> bool:
    """Whether the average with recomputed statistics has the higher loss on validation data."""
    nll = {
        e.batch_norm: e.nll
        for e in found.evaluation
        if e.candidate == "average" and e.split == "val"
    }
    return len(nll) == 2 and nll["recomputed"] > nll[policy]


def _judge(found: Measured) -> None:
    """The average against its worst and its best member, on validation data where there are any."""
    splits = [e.split for e in found.evaluation]
    if not splits:
        return
    split = "val" if "val" in splits else "test"
    members = [e for e in found.evaluation if e.split == split and e.candidate != "average"]
    final = [
        e
        for e in found.evaluation
        if e.split == split and e.candidate == "average" and e.batch_norm == found.policy
    ]
    if not final or not members:
        return
    worst = min(members, key=lambda e: e.accuracy)
    best = max(members, key=lambda e: e.accuracy)
    own = final[0].accuracy
    if own < worst.accuracy:
        found.warnings.append(
            f"the average is worse than its worst member on {split}: accuracy "
            f"{own:.4f} against {worst.accuracy:.4f} ({worst.candidate}); do not ship "
            "it. Average fewer, later snapshots (--last N), or ensemble their predictions"
        )
    elif own < best.accuracy:
        found.notes.append(
            f"{best.candidate} alone has the higher accuracy on {split}: {best.accuracy:.4f} against "
            f"{own:.4f}; ensemblekit compare tells whether that is chance"
        )
