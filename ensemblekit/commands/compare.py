"""Owns `compare`: every candidate measured on the same data, and a decision one can defend.

Input: paths, a model and data. The order of work: models run (on every process), then predictions
are scored, latency is measured, the decision made, and the folder of reports appears as a whole.
"""

import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ensemblekit import decision as deciding
from ensemblekit import families, metrics
from ensemblekit.cache import Cache, default_root
from ensemblekit.candidates import Candidate, Row, mean_row
from ensemblekit.commands import provenance
from ensemblekit.commands.bn_plan import fresh_warnings, frozen_layers
from ensemblekit.commands.diagnose import POSITIONS, diagnose
from ensemblekit.commands.report_folder import (
    JSON_NAME,
    check_folder,
    is_whole,
    read_comparison,
    save_folder,
)
from ensemblekit.comparison import Comparison
from ensemblekit.contest import LEARNED_STEPS, Contest, views
from ensemblekit.decision import Budget
from ensemblekit.discovery import discover
from ensemblekit.distributed import World, rank, world
from ensemblekit.errors import CheckFailedError, EnsembleKitError, UsageError, one_of
from ensemblekit.evaluation import Measure
from ensemblekit.families import Wanted
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.selection import Selection
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.targets import load_function
from ensemblekit.workbench import Workbench

CACHE_BYTES = 20 * 10**9


@dataclass(frozen=True)
class CompareOptions:
    """How to compare.

    Attributes:
        candidates: Groups and globs of candidates, None for all.
        added: (name, coefficients) of further weight averages.
        metric: What choices and gains go by, None for the task's first; or a user's function by
            target, which is reported beside.
        budget: What may be spent at inference.
        require_gain: Fail when nothing is surely better than the best single snapshot.
        cache_dir: Where predictions are kept; None for the user's cache folder.
        cache_bytes: How large it may grow; 0 keeps nothing after the run.
    """

    candidates: str | None = None
    added: tuple[tuple[str, tuple[float, ...]], ...] = ()
    metric: Any = None
    budget: Budget = field(default_factory=Budget)
    require_gain: bool = False
    cache_dir: Path | None = None
    cache_bytes: int = CACHE_BYTES

    def __post_init__(self) -> None:
        if self.cache_bytes < 0:
            raise UsageError(f"--cache-size {self.cache_bytes / 1e9:g}: must be at least 0")
        if isinstance(self.metric, str) and ":" not in self.metric:
            one_of(self.metric, metrics.FIGURES, what="metric")


@dataclass(frozen=True)
class CompareResult:
    """What `compare` found.

    Attributes:
        comparison: The object of comparison.json.
        output: The folder of reports.
        up_to_date: It was there already.
    """

    comparison: dict[str, Any]
    output: Path | None = None
    up_to_date: bool = False


def compare(
    checkpoints: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    model: ModelOptions,
    options: CompareOptions | None = None,
    selection: Selection | None = None,
    force: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> CompareResult | None:
    """Measure single snapshots, weight averages and ensembles, and say what to ship.

    Args:
        checkpoints: Files, folders, globs.
        output: Folder of the reports; None keeps them in memory.
        model: Model and data; validation or test data are needed.
        options: What to compare, and what may be spent.
        selection: Which weights and which snapshots.
        force: Replace an existing folder.
        dry_run: Say what would be run, and do nothing.
        strict: A warning is a failed check.
        command: What to note as the command.
        progress: Told how far the work is.
        announce: Told what will be done before it starts.

    Returns:
        The comparison; None on the other processes of a torchrun.

    Raises:
        UsageError: Options that do not fit, an output that exists.
        InputError: Checkpoints, model or data that cannot be used.
        MachineError: The machine said no.
        CheckFailedError: `strict` and a warning, nothing within the budget, or no gain where one
            is required.
    """
    options = options or CompareOptions()
    wanted = families.wanted(options.candidates)
    paths = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)
    folder = None if output is None else Path(output)
    snapshots = discover(*paths, selection=selection)
    model = model.with_model_from([s.facts.model_hint for s in snapshots.snapshots])
    if model.model is None or (model.val_data is None and model.test_data is None):
        raise UsageError(
            "compare needs a model and labelled data to run it on",
            hint="--model FILE.py:NAME --val-data FILE.py:NAME --test-data FILE.py:NAME",
        )
    added = _added(options.added, snapshots)
    request = provenance.request(
        snapshots, mean_row(len(snapshots)), "compare", repr(_settings(options)), model
    )
    if folder is not None:
        earlier = None if force else read_comparison(folder)
        if earlier is not None and earlier.get("request") == request and is_whole(folder):
            if rank() != 0:
                return None
            result = CompareResult(earlier, folder, up_to_date=True)
            _check_required(result, options, strict=strict)
            return result
        inputs = [source.path for s in snapshots.snapshots for source in s.sources]
        check_folder(folder, inputs=inputs, force=force)
    root = options.cache_dir or default_root()
    kept = root if options.cache_bytes > 0 else None
    with Cache(kept, options.cache_bytes or CACHE_BYTES) as cache:
        with world() as here:
            contest = _contest(snapshots, model, options, wanted, cache, here, progress)
            fixed = contest.fixed(added)
            contest.check_names(fixed, added)
            plan = _plan_text(contest, fixed)
            if announce is not None and here.rank == 0:
                announce(plan)
            if dry_run and here.rank != 0:
                return None
            if dry_run:
                return CompareResult({"schema_version": 1, "dry_run": True, "plan": plan})
            contest.predict(fixed)
        if here.rank != 0:
            return None
        contest.bench.alone()
        metric = _user_metric(options.metric)
        found = Comparison(contest, budget=options.budget, user_metric=metric)
        found.warnings += fresh_warnings(snapshots)
        comparison = found.to_json()
        _explain(comparison, found)
        comparison["decision"]["next"] = _next(comparison, selection, folder, model)
        comparison |= {"command": list(command), "request": request}
        comparison = finite(comparison)
        if folder is not None:
            save_folder(folder, comparison, found.statistics(), force=force)
    result = CompareResult(comparison, folder)
    _check_required(result, options, strict=strict)
    return result


def _added(
    given: Sequence[tuple[str, tuple[float, ...]]], snapshots: SnapshotSet
) -> list[tuple[str, Row]]:
    from ensemblekit.averaging.weighted import weighted

    names = [s.name for s in snapshots.snapshots]
    for name, _ in given:
        if name in names:
            raise UsageError(f"--add {name}: a snapshot has this name")
    return [(name, weighted(snapshots, coefficients=numbers)) for name, numbers in given]


def _settings(options: CompareOptions) -> dict[str, Any]:
    """What of the options changes the result."""
    shown = asdict(options)
    for name in ("cache_dir", "cache_bytes", "require_gain"):
        shown.pop(name)
    return shown


def _contest(
    snapshots: SnapshotSet,
    model: ModelOptions,
    options: CompareOptions,
    wanted: Wanted,
    cache: Cache,
    here: World,
    progress: Progress | None,
) -> Contest:
    frozen = frozen_layers(snapshots) if len(snapshots) > 1 else ()
    live = len(snapshots.norm_layers) > len(frozen)
    bench = Workbench(snapshots, model, cache=cache, frozen=frozen, world=here, progress=progress)
    assert bench.form is not None
    name = metrics.OF_TASK[bench.form.task][0]
    if isinstance(options.metric, str) and options.metric in metrics.FIGURES:
        name = one_of(options.metric, metrics.OF_TASK[bench.form.task], what="metric of this task")
    chosen, reported = views(list(bench.splits), model.seed)
    policy: Any = "none"
    if live:
        policy = "recomputed" if model.train_data is not None else "averaged"
    return Contest(bench, wanted, Measure(name), chosen, reported, policy, model.seed)


def _plan_text(contest: Contest, fixed: Sequence[Candidate]) -> str:
    """How many passes over the data there will be."""
    members = {m for c in fixed for m in c.members}
    splits = len(contest.bench.splits)
    recomputed = sum(m.batch_norm == "recomputed" for m in members)
    assert contest.bench.form is not None
    text = f"{contest.bench.form.task}, chosen by {contest.measure.name}: {len(members)} models x {splits} data sets = {len(members) * splits} forward passes"
    if recomputed:
        text += f", {recomputed} BatchNorm passes"
    greedy, learned = contest.steps()
    most = len(contest.names) - 1
    bn = " and as many BatchNorm passes" if contest.mixed_bn == "recomputed" else ""
    if greedy:
        text += f"; greedy soup: at most {most + splits} forward passes{bn}"
    if learned:
        text += f"; learned soup: {LEARNED_STEPS} gradient and {splits} forward passes"
    if any(c.kind == "averaged" for c in fixed):
        each = 2 * len(POSITIONS) if bn else len(POSITIONS)
        text += f"; should averaging fail, about {each} forward passes to tell why"
    return f"{text} (what the cache holds is not run again)"


class ComparedButFailedError(CheckFailedError):
    """A check said no; `result` holds what was found all the same."""

    def __init__(self, message: str, *, result: CompareResult, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.result = result


def _check_required(result: CompareResult, options: CompareOptions, *, strict: bool) -> None:
    comparison = result.comparison
    decision = comparison["decision"]
    text = hint = None
    if decision["ship"] is None:
        text, hint = f"nothing fits the budget: {decision['because'][0]}", "raise the limit"
    elif options.require_gain and not decision["real"]:
        gain = decision["gain"]
        text = f"--require-gain: {comparison['baseline']}, the best single snapshot, is what ships"
        if gain is not None:
            low, high = (deciding.points(v, comparison["metric"]["unit"]) for v in gain["ci"])
            text = (
                f"--require-gain: {decision['ship']} has no sure gain over {comparison['baseline']}: "
                f"its 95% interval is {low} to {high}"
            )
    elif strict and comparison["warnings"]:
        text = f"--strict: {comparison['warnings'][0]}"
    if text is not None:
        raise ComparedButFailedError(text, result=result, hint=hint)


def _user_metric(given: Any) -> Callable[..., Any] | None:
    """The user's own figure, where `metric` is no name of ours."""
    if given is None or given in metrics.FIGURES:
        return None
    return load_function(given, what="metric") if isinstance(given, str) else given


def _explain(comparison: dict[str, Any], found: Comparison) -> None:
    """Add why averaging failed, where it did; a reason that cannot be found ends nothing."""
    cosines = [snapshot["cosine"] for snapshot in comparison["snapshots"]]
    try:
        diagnosis = diagnose(found.contest, found.chosen, cosines)
    except EnsembleKitError as error:
        comparison["warnings"].append(f"averaging failed, and why could not be told: {error}")
        return
    finally:
        comparison["passes"] = asdict(found.contest.bench.passes)  # it may have needed some
    if diagnosis is None:
        return
    comparison["diagnosis"] = asdict(diagnosis)
    text = f"{diagnosis.verdict}: {diagnosis.because}. Next: {diagnosis.next}"
    comparison["warnings"].insert(0, text)
    if diagnosis.verdict == "mismatched model":
        decision = comparison["decision"]
        decision["headline"] = f"Check the model and the data first: {diagnosis.because}."
        decision["enough_data"] = False


def _next(
    comparison: Mapping[str, Any],
    selection: Selection | None,
    folder: Path | None,
    model: ModelOptions,
) -> str | None:
    """The command that makes the file to ship; None where it cannot be typed."""
    ship = comparison["decision"]["ship"]
    row = next((row for row in comparison["candidates"] if row["name"] == ship), None)
    if row is None or folder is None:
        return None
    ensemble = row["kind"] == "ensemble"
    if ensemble and not isinstance(model.model, str):
        return None
    name = ship.replace("/", "_")
    for ending in (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".tar"):
        name = name.removesuffix(ending)
    verb, ending = ("export", ".onnx") if ensemble else ("average", ".safetensors")
    words = ["ensemblekit", verb, *row["snapshots"], "--candidate", ship]
    words += ["--from", str(folder / JSON_NAME), "-o", f"{name}{ending}"]
    words += _model_flags(model) if ensemble else []
    if selection is not None and selection.weights != "auto":
        words += ["--weights", selection.weights]
    if selection is not None and selection.every is not None:
        words += ["--every", "1"]  # the files are named already; a setting must not thin them again
    return shlex.join(words)


def _model_flags(model: ModelOptions) -> list[str]:
    """What an export needs besides: the model, and data to verify with."""
    words = ["--model", str(model.model)]
    for key, value in model.model_args.items():
        words += ["--model-arg", f"{key}={value!r}"]
    split = "val" if isinstance(model.val_data, str) else "test"
    given = {f"{split}_data": getattr(model, f"{split}_data"), "logits": model.logits}
    if model.task != "auto":
        given["task"] = model.task
    if model.ignore_index != ModelOptions.ignore_index:
        given["ignore_index"] = str(model.ignore_index)
    for name, value in given.items():
        if isinstance(value, str):
            words += [f"--{name.replace('_', '-')}", value]
    return words


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
