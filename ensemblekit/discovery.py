"""Owns discovery: from paths to the ordered set of snapshots that belong to one run.

Input: the places that `walk` found, read by `containers`, understood by `layouts`.
"""

import glob
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemblekit import containers, duplicates, layouts, walk
from ensemblekit.containers import TensorSpec, Tree, Unusable
from ensemblekit.errors import (
    DamagedError,
    EnsembleKitError,
    IncompatibleError,
    InputError,
    MachineError,
    UnsupportedError,
    UsageError,
    listing,
)
from ensemblekit.files import Source
from ensemblekit.layouts import NoWeightsError, Role
from ensemblekit.layouts.torch_dict import words_in
from ensemblekit.ordering import in_order, made_after, numbers_in, order_warnings, with_numbers
from ensemblekit.schedule import high_rate_warning
from ensemblekit.selection import Selection, select
from ensemblekit.snapshots import (
    Skipped,
    Snapshot,
    SnapshotSet,
    check_same_signature,
    skipped,
)
from ensemblekit.tables import TensorTable


@dataclass(frozen=True)
class Examination:
    """Everything that was found: `discover` wants it clean, `inspect` shows it as it is.

    Attributes:
        used: In canonical order.
        skipped: With reasons.
        errors: One for each file that cannot be used.
        warnings: What a user should know.
        ordered_by: What the order was taken from.
    """

    used: tuple[Snapshot, ...]
    skipped: tuple[Skipped, ...]
    errors: tuple[EnsembleKitError, ...]
    warnings: tuple[str, ...]
    ordered_by: str


def discover(
    *checkpoints: str | os.PathLike[str],
    selection: Selection | None = None,
    seen: Callable[[Snapshot], None] | None = None,
) -> SnapshotSet:
    """The snapshots in files, folders and globs, read without running any code in them.

    Args:
        checkpoints: What to look at.
        selection: Which weights and which snapshots; default: all that belong to the run.
        seen: Told of every snapshot as soon as it is found, also of those that are left out later.

    Raises:
        UsageError: A path that does not exist, a selection that selects nothing.
        InputError: A file that is damaged, hostile, or does not fit the others.
        MachineError: The operating system refused to read.
    """
    found = examine(checkpoints, selection or Selection(), seen)
    if found.errors:
        raise _combined(found.errors)
    return SnapshotSet(found.used, found.skipped, found.warnings, found.ordered_by)


def examine(
    checkpoints: Sequence[str | os.PathLike[str]],
    selection: Selection,
    seen: Callable[[Snapshot], None] | None = None,
) -> Examination:
    """Look at everything and keep what is wrong as data.

    Raises:
        UsageError: A path that does not exist, a selection that selects nothing.
    """
    places, passed = walk.places(checkpoints, exclude=selection.exclude)
    skipped = [Skipped(item.path, item.name, item.reason) for item in passed]
    errors: list[EnsembleKitError] = []
    found: list[Snapshot] = []
    for place in places:
        try:
            found.append(read_snapshot(place, selection.weights))
            if seen is not None:
                seen(found[-1])
        except NoWeightsError as error:
            if place.found_in is None:
                errors.append(error)
            else:
                skipped.append(Skipped(place.path, place.name, "holds no model weights"))
        except UnsupportedError as error:
            if place.claims and not (place.found_in and place.path.suffix in walk.PICKLES):
                errors.append(error)
            else:
                skipped.append(Skipped(place.path, place.name, "not a checkpoint"))
        except DamagedError as error:
            if place.claims:
                errors.append(error)
            else:
                skipped.append(Skipped(place.path, place.name, "damaged, or still being written"))
        except (InputError, MachineError) as error:
            if place.claims or place.path.exists():
                errors.append(error)
            else:
                skipped.append(Skipped(place.path, place.name, "a link to nothing"))
    excluded = [item for item in skipped if item.reason.startswith("excluded")]
    if not found and not errors and excluded:
        raise UsageError(f"--exclude leaves none of {len(excluded)} files")
    unused = walk.unmatched(selection.exclude, [*places, *passed])
    found = with_numbers(found)
    if not found and not errors:
        names = ", ".join(str(c) for c in checkpoints)
        errors.append(InputError(f"{names}: no checkpoints found", hint=_what_was_there(skipped)))
    warnings = [f"--exclude '{pattern}' matches none of the files" for pattern in unused]
    return _arrange(found, skipped, errors, selection, warnings)


def _arrange(
    found: list[Snapshot],
    skipped: list[Skipped],
    errors: list[EnsembleKitError],
    selection: Selection,
    warnings: list[str],
) -> Examination:
    snapshots, more = _without_copies(found)
    skipped.extend(more)
    snapshots, ordered_by = in_order(snapshots)
    if error := _several_runs([s for s in snapshots if not s.is_average]):
        errors.append(error)
    warnings += [
        f"{s.name}: not averaged, because not tensors: {listing(s.extras)}"
        for s in snapshots
        if s.extras
    ]
    warnings += dict.fromkeys(text for s in snapshots for text in s.warnings)
    if not errors:
        try:
            snapshots, more = _without_stated_averages(snapshots)
            skipped.extend(more)
            check_same_signature(snapshots)
            snapshots, more = _without_averages(snapshots)
            skipped.extend(more)
            check_same_role(snapshots)
            _check_no_ranks(snapshots)
            snapshots, ordered_by = in_order(snapshots)
            snapshots, more = select(snapshots, selection, ordered_by)
            skipped.extend(more)
            warnings += [text for text in [high_rate_warning(snapshots)] if text]
        except UsageError:
            raise
        except EnsembleKitError as error:
            errors.append(error)
    warnings += order_warnings(snapshots, ordered_by)
    if ordered_by == "content" and len(snapshots) > 1:
        warnings.append("neither the files nor their names tell an order; none was assumed")
    return Examination(tuple(snapshots), tuple(skipped), tuple(errors), tuple(warnings), ordered_by)


def read_snapshot(place: walk.Place, weights: str = "auto") -> Snapshot:
    """Describe the snapshot at one place.

    Raises:
        InputError: Damaged, hostile, without weights, or with tensors that have no values.
    """
    path = place.path
    tree = containers.read_folder(path) if path.is_dir() else containers.read(Source(path))
    reading = layouts.interpret(tree, path)
    variant = layouts.choose(reading.weights, weights, path)
    chosen = reading.weights[variant]
    return Snapshot(
        path=path,
        name=place.name,
        format=f"{tree.container}/{reading.layout}",
        variant=variant,
        role=_role(chosen.role, path),
        available=tuple(reading.weights),
        tensors=TensorTable(_usable(chosen.tensors, path)),
        ties=chosen.ties,
        facts=reading.facts,
        extras=chosen.extras,
        is_average=chosen.is_average,
        sources=_own_sources(tree, chosen.tensors),
        numbers=(),
        found_in=place.found_in,
        warnings=chosen.warnings,
    )


def _usable(tensors: Mapping[str, TensorSpec | Unusable], path: Path) -> dict[str, TensorSpec]:
    usable: dict[str, TensorSpec] = {}
    for key, spec in tensors.items():
        if isinstance(spec, Unusable):
            kind = DamagedError if spec.damaged else UnsupportedError
            raise kind(f"{path}: '{key}' {spec.reason}", hint=spec.hint)
        usable[key] = spec
    return usable


def _own_sources(tree: Tree, tensors: Mapping[str, Any]) -> tuple[Source, ...]:
    used = {spec.extent.source.file for spec in tensors.values() if isinstance(spec, TensorSpec)}
    return tuple(source for source in tree.sources if source in used) or tree.sources


def _without_stated_averages(
    snapshots: list[Snapshot],
) -> tuple[list[Snapshot], list[Skipped]]:
    """Drop averages of the run that say so; they may be of another element type."""
    kept = [s for s in snapshots if not s.is_average]
    if not kept:
        return snapshots, []
    reason = "is an average already, says the file"
    return kept, [skipped(s, reason) for s in snapshots if s.is_average]


def _without_averages(snapshots: list[Snapshot]) -> tuple[list[Snapshot], list[Skipped]]:
    """Drop averages of the run that equal a mean of others."""
    kept = list(snapshots)
    left = []
    for snapshot, members in duplicates.means_of_others(kept, made_after):
        kept = [s for s in kept if s is not snapshot]
        names = listing([m.name for m in members], limit=3)
        left.append(skipped(snapshot, f"equals the mean of {names}"))
    return kept, left


def _without_copies(snapshots: list[Snapshot]) -> tuple[list[Snapshot], list[Skipped]]:
    """Drop the same weights under a second name; the one with a number in it stays."""
    kept: list[Snapshot] = []
    left = []
    for group in duplicates.same_weights(snapshots):
        first, *others = sorted(group, key=lambda s: (not s.numbers, len(s.name), s.name))
        kept.append(first)
        left += [skipped(s, f"same weights as {first.name}") for s in others]
    return kept, left


def _role(stated: Role, path: Path) -> Role:
    """Some tools keep their moving average in files of its own: `ema_0.9999_010000.pt`."""
    return "ema" if stated == "model" and "ema" in words_in(path.name) else stated


def _several_runs(snapshots: list[Snapshot]) -> EnsembleKitError | None:
    """Folders may be named one by one; within one that was named there must be one run."""
    runs: defaultdict[Path, defaultdict[Path, int]] = defaultdict(lambda: defaultdict(int))
    neighbours = Counter(s.path.parent for s in snapshots)
    for snapshot in snapshots:
        if snapshot.found_in is not None:
            alone = neighbours[snapshot.path.parent] == 1
            runs[snapshot.found_in][_run_of(snapshot, alone=alone)] += 1
    for folder, found in runs.items():
        if len(found) > 1:
            shown = listing(f"{run} ({count} snapshots)" for run, count in sorted(found.items()))
            return InputError(
                f"{folder} holds several runs: {shown}",
                hint="name one of them; weights of different runs have no meaningful average",
            )
    return None


def check_same_role(snapshots: Sequence[Snapshot]) -> None:
    """Moving averages and raw weights are different series, whatever their keys are called.

    Raises:
        IncompatibleError: There are both.
    """
    by_role = {s.role: s for s in reversed(snapshots)}
    if len(by_role) < 2:
        return
    first, second, *_ = by_role.values()
    common = set.intersection(*(set(s.available) for s in snapshots))
    raise IncompatibleError(
        f"{first.path} would give its '{first.variant}' ({first.role}), {second.path} its "
        f"'{second.variant}' ({second.role}); an average must not mix them",
        hint=f"--weights {sorted(common)[0]}"
        if common and first.variant != second.variant
        else f"leave one kind out, such as --exclude '{glob.escape(second.path.name)}'",
    )


def _check_no_ranks(snapshots: Sequence[Snapshot]) -> None:
    """Files of several ranks that differ are parts of one model, not snapshots of it."""
    ranks = {
        int(found[1]): s for s in snapshots if (found := re.search(r"rank[-_]?(\d+)", s.path.name))
    }
    if len(ranks) > 1:
        first, second, *_ = ranks.values()
        raise UnsupportedError(
            f"{first.path} and {second.path} are parts that two ranks of a distributed run saved",
            hint="gather the full weights before saving, or save with torch.distributed.checkpoint; "
            "for independent runs name the files of one",
        )


def _run_of(snapshot: Snapshot, *, alone: bool) -> Path:
    """The folder of the run: numbered folders with one file (`checkpoint-500/`) are snapshots."""
    folder = snapshot.path.parent
    inside = folder != snapshot.found_in
    return folder.parent if inside and alone and numbers_in(folder.name) else folder


def _what_was_there(skipped: list[Skipped]) -> str:
    if not skipped:
        return "it is empty; name a file or folder with .pt, .pth, .ckpt or .safetensors files"
    return "found only " + listing(f"{s.name} ({s.reason})" for s in skipped)


def _combined(errors: Sequence[EnsembleKitError]) -> EnsembleKitError:
    first = errors[0]
    if len(errors) > 1:
        first.hint = (
            f"{first.hint or ''} ({len(errors) - 1} more; see: ensemblekit inspect)".strip()
        )
    return first
