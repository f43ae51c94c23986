"""Owns which of the snapshots found are taken: the words of the command line, applied in order.

Input: snapshots in canonical order.
"""

import math
from dataclasses import dataclass

from ensemblekit.errors import UsageError, listing
from ensemblekit.snapshots import Skipped, Snapshot, position, skipped

_LOWER = {
    *(
        "loss",
        "nll",
        "error",
        "err",
        "perplexity",
        "ppl",
        "mse",
        "mae",
        "rmse",
        "wer",
        "cer",
        "fid",
    ),
    *("ece", "brier", "bpc", "eer"),
}
_HIGHER = {
    *(
        "acc",
        "acc1",
        "acc5",
        "accuracy",
        "top1",
        "top5",
        "f1",
        "auc",
        "auroc",
        "map",
        "ap",
        "score",
    ),
    *(
        "bleu",
        "rouge",
        "iou",
        "miou",
        "dice",
        "psnr",
        "ssim",
        "r2",
        "fitness",
        "precision",
        "recall",
    ),
}


@dataclass(frozen=True)
class Selection:
    """Which of the snapshots to take, in the words of the command line.

    Attributes:
        weights: `auto`, `model`, `ema`, `swa` or a key of the file.
        exclude: Globs of files to leave out.
        last: Only the newest N.
        every: Only each N-th, counted back from the newest.
        from_step: Nothing before this step (epoch or number, where files state no step).
        to_step: Nothing after it.
        best: Only the N best by `by`.
        by: Name of a metric in the files, with `:min` or `:max` where the name does not tell.
    """

    weights: str = "auto"
    exclude: tuple[str, ...] = ()
    last: int | None = None
    every: int | None = None
    from_step: float | None = None
    to_step: float | None = None
    best: int | None = None
    by: str | None = None

    def __post_init__(self) -> None:
        for name in ("last", "every", "best"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value}: must be at least 1")
        if (self.best is None) != (self.by is None):
            raise UsageError(
                "--best N and --by NAME go together", hint="for example: --best 3 --by val_acc:max"
            )

    @property
    def takes_all(self) -> bool:
        """Whether nothing is left out but by name."""
        limits = (self.last, self.every, self.from_step, self.to_step, self.best)
        return all(limit is None for limit in limits)


def select(
    snapshots: list[Snapshot], selection: Selection, ordered_by: str
) -> tuple[list[Snapshot], list[Skipped]]:
    """The snapshots that the selection keeps, and the others with the reason.

    Raises:
        UsageError: It keeps none, or asks for steps or metrics that the files do not state.
    """
    kept = list(snapshots)
    for flag in ("last", "every"):
        if getattr(selection, flag) is not None and ordered_by == "content" and len(kept) > 1:
            raise UsageError(
                f"--{flag} needs an order, and neither the files nor their names tell one",
                hint="name the files instead, or number them",
            )
    if selection.from_step is not None or selection.to_step is not None:
        kept = _between(kept, selection.from_step, selection.to_step, ordered_by)
    if selection.every is not None:
        kept = kept[::-1][:: selection.every][::-1]
    if selection.last is not None:
        kept = kept[-selection.last :]
    if selection.best is not None and selection.by is not None:
        kept = _best(kept, selection.best, selection.by)
    if snapshots and not kept:
        spans = f"{position(snapshots[0], ordered_by)} to {position(snapshots[-1], ordered_by)}"
        raise UsageError(
            f"--from-step and --to-step leave none of {len(snapshots)} snapshots; "
            f"they run from {ordered_by} {spans}"
        )
    left = [s for s in snapshots if s not in kept]
    return kept, [skipped(s, "not selected") for s in left]


def _between(
    snapshots: list[Snapshot], start: float | None, stop: float | None, ordered_by: str
) -> list[Snapshot]:
    low = -math.inf if start is None else start
    high = math.inf if stop is None else stop
    places = [position(s, ordered_by) for s in snapshots]
    if any(place is None for place in places):
        raise UsageError("--from-step and --to-step need steps, epochs or numbered names")
    pairs = zip(snapshots, places, strict=True)
    return [s for s, place in pairs if place is not None and low <= place <= high]


def _best(snapshots: list[Snapshot], count: int, by: str) -> list[Snapshot]:
    name, _, direction = by.partition(":")
    if direction not in ("", "min", "max"):
        raise UsageError(f"--by {by}: write NAME, NAME:min or NAME:max")
    if not direction:
        words = name.lower().replace("_", " ").replace("/", " ").replace("-", " ").split()
        if not _LOWER.isdisjoint(words):
            direction = "min"
        elif not _HIGHER.isdisjoint(words):
            direction = "max"
        else:
            raise UsageError(
                f"--by {name}: the name does not tell whether more is better",
                hint=f"--by {name}:max or --by {name}:min",
            )
    missing = [s for s in snapshots if name not in s.facts.metrics]
    if missing:
        known = sorted({metric for s in snapshots for metric in s.facts.metrics})
        raise UsageError(
            f"{missing[0].path} states no metric '{name}'",
            hint=f"metrics found: {listing(known) or 'none'}",
        )
    sign = -1 if direction == "max" else 1
    best = sorted(snapshots, key=lambda s: sign * s.facts.metrics[name])[:count]
    return [s for s in snapshots if s in best]
