"""Owns `compare`: every candidate measured on the same data, and a decision one can defend.

Input: paths, a model and data. The order of work: models run (on every process), then predictions
are scored, latency is measured, the decision made, and the folder of reports appears as a whole.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemblekit import decision as deciding
from ensemblekit import evaluation, families, latency, metrics
from ensemblekit.cache import Cache, default_root
from ensemblekit.candidates import Candidate, Member, Row, mean_row, one_hot
from ensemblekit.commands import provenance
from ensemblekit.commands.bn_plan import fresh_warnings, frozen_layers
from ensemblekit.commands.report_folder import check_folder, read_comparison, save_folder
from ensemblekit.contest import Contest, used_snapshots, views, weights_json
from ensemblekit.decision import Budget, Option
from ensemblekit.discovery import discover
from ensemblekit.distributed import World, world
from ensemblekit.errors import CheckFailedError, UsageError, one_of
from ensemblekit.evaluation import Measure
from ensemblekit.families import Wanted
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.rivals import all_subset_weights, find_rivals, score_mixes
from ensemblekit.scoring import Scores, combined_log_probs
from ensemblekit.selection import Selection
from ensemblekit.snapshots import SnapshotSet, position
from ensemblekit.state import weighted_sums
from ensemblekit.workbench import Workbench

SCHEMA_VERSION = 1
CACHE_BYTES = 20 * 10**9
SAME_BASIN = 0.8
_CALIBRATE_UP_TO = 4_000_000  # outputs beyond which only headline candidates are calibrated


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


@dataclass(frozen=True)
class CompareResult:
    """What `compare` found.

    Attributes:
        comparison: The object of comparison.json.
        output: The folder of reports.
        up_to_date: It was there already.
        statistics: Recomputed BatchNorm statistics by `bn/INDEX/KEY`.
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
        if earlier is not None and earlier.get("request") == request:
            _check_required(earlier, options, strict=strict)
            return CompareResult(earlier, folder, up_to_date=True)
        inputs = [source.path for s in snapshots.snapshots for source in s.sources]
        check_folder(folder, inputs=inputs, force=force)
    root = options.cache_dir or default_root()
    kept = root if options.cache_bytes > 0 else None
    with Cache(kept, options.cache_bytes or CACHE_BYTES) as cache:
        with world() as here:
            contest = _contest(snapshots, model, options, wanted, cache, here, progress)
            fixed = contest.fixed(added)
            if announce is not None and here.rank == 0:
                announce(_plan_text(contest, fixed))
            if dry_run:
                return None
            contest.predict(fixed)
        if here.rank != 0:
            return None
        contest.bench.world = World()  # from here on this process works alone
        found = _Found(contest, snapshots, options)
        comparison = found.comparison(command)
        comparison["request"] = request
        if folder is not None:
            save_folder(folder, comparison, found.statistics(), force=force)
    _check_required(comparison, options, strict=strict)
    return CompareResult(comparison, folder)


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
    text = f"{len(members)} models x {splits} data sets = {len(members) * splits} forward passes"
    if recomputed:
        text += f", {recomputed} BatchNorm passes"
    greedy, learned = contest.steps()
    most = len(contest.names) - 1
    bn = " and as many BatchNorm passes" if contest.mixed_bn == "recomputed" else ""
    if greedy:
        text += f"; greedy soup: at most {most + splits} forward passes{bn}"
    if learned:
        from ensemblekit.contest import LEARNED_STEPS

        text += f"; learned soup: {LEARNED_STEPS} gradient and {splits} forward passes"
    return f"{text} (what the cache holds is not run again)"


def _check_required(
    comparison: Mapping[str, Any], options: CompareOptions, *, strict: bool
) -> None:
    decision = comparison["decision"]
    if decision["ship"] is None:
        raise CheckFailedError(
            f"nothing fits the budget: {decision['because'][0]}", hint="raise the limit"
        )
    if options.require_gain and not decision["real"]:
        gain = decision["gain"]
        told = "it is the best single snapshot itself"
        if gain is not None:
            low, high = (deciding.points(v, comparison["metric"]["unit"]) for v in gain["ci"])
            told = f"its 95% interval is {low} to {high}"
        raise CheckFailedError(
            f"--require-gain: {decision['ship']} has no sure gain over "
            f"{comparison['baseline']}: {told}"
        )
    if strict and comparison["warnings"]:
        raise CheckFailedError(f"--strict: {comparison['warnings'][0]}")


class _Found:
    """From predictions to the comparison, on process 0."""

    def __init__(self, contest: Contest, snapshots: SnapshotSet, options: CompareOptions) -> None:
        self.contest = contest
        self.snapshots = snapshots
        self.options = options
        self.measure = contest.measure
        self.task = contest.predictions(contest.choosing).form.task
        self.warnings = list(snapshots.warnings) + fresh_warnings(snapshots)
        self.candidates: list[Candidate] = []
        self.chosen: dict[str, Scores] = {}
        self.reported: dict[str, Scores] = {}
        self.folded: set[str] = set()
        self._score()
        self.baseline = self._best_single()

    def _score(self) -> None:
        contest, count = self.contest, len(self.snapshots)
        alone = contest.scores(families.singles(contest.names), contest.choosing)
        goodness = [self.measure.goodness(alone[name]) for name in contest.names]
        nll = [metrics.figure("nll", alone[name]) or 0.0 for name in contest.names]
        self.ranking = sorted(range(count), key=lambda k: (-goodness[k], nll[k]))
        ensembles, folded = contest.ensembles(self.ranking)
        self.candidates = [*contest.candidates, *ensembles]
        self.chosen = contest.scores(self.candidates, contest.choosing) | folded
        self.reported = contest.scores(self.candidates, contest.reporting)
        self.folded = set(folded)

    def _best_single(self) -> str:
        singles = [c for c in self.candidates if c.kind == "single" and c.chosen_on is None]
        return max(
            singles,
            key=lambda c: (
                self.measure.goodness(self.chosen[c.name]),
                -(metrics.figure("nll", self.chosen[c.name]) or 0.0),
            ),
        ).name

    # ------------------------------------------------------------------- the whole

    def comparison(self, command: Sequence[str]) -> dict[str, Any]:
        """The object of comparison.json."""
        contest, bench = self.contest, self.contest.bench
        times = self._latency()
        gained = evaluation.gains(
            self.measure,
            [self.reported[c.name] for c in self.candidates],
            self.reported[self.baseline],
            seed=contest.seed,
        )
        rows = []
        for candidate, gain in zip(self.candidates, gained, strict=True):
            own = candidate.name == self.baseline
            rows.append(self._row(candidate, None if own else gain, times))
        options = [self._option(c, times) for c in self.candidates]
        front = deciding.pareto(options)
        for row in rows:
            row["pareto"] = row["name"] in front
        order = {o.name: (-o.goodness, o.cost, o.complexity, o.tie_break) for o in options}
        rows.sort(key=lambda row: order[row["name"]])
        by_name = {row["name"]: row for row in rows}
        decision = self._decision(options, by_name)
        self._finish(by_name, decision)
        for candidate in self.candidates:
            for member in candidate.members:
                statistics = bench.statistics(member)
                self.warnings += [] if statistics is None else statistics.notes
        figure = self.measure.figure
        data = {
            "choosing": self._view_json(contest.choosing),
            "reporting": self._view_json(contest.reporting),
            "train": self._train_json(),
            "note": self._note(),
        }
        cosines = self._cosines()
        from ensemblekit.commands.diagnose import diagnose

        diagnosis = diagnose(contest, self.chosen, self.baseline, cosines)
        if diagnosis is not None:
            self.warnings.append(f"averaging failed: {diagnosis['because']}")
        return {
            "schema_version": SCHEMA_VERSION,
            "task": self.task,
            "metric": {
                "name": self.measure.name,
                "higher_is_better": figure.higher_is_better,
                "unit": figure.unit,
            },
            "baseline": self.baseline,
            "decision": decision,
            "candidates": rows,
            "data": data,
            "snapshots": self._snapshots_json(cosines),
            "skipped": [{"path": str(s.path), "reason": s.reason} for s in self.snapshots.skipped],
            "growth": self._growth(),
            "subsets": self._subsets(),
            "agreement": self._agreement(),
            "reliability": self._reliability(decision),
            "diagnosis": diagnosis,
            "passes": asdict(bench.passes),
            "environment": self._environment(),
            "warnings": list(dict.fromkeys(self.warnings)),
            "command": list(command),
        }

    def statistics(self) -> dict[str, np.ndarray[Any, Any]]:
        """Recomputed BatchNorm statistics of every candidate's members."""
        found = {}
        for candidate in self.candidates:
            for m, member in enumerate(candidate.members):
                statistics = self.contest.bench.statistics(member)
                if statistics is not None and member.batch_norm == "recomputed":
                    for key, value in statistics.values.items():
                        found[f"{candidate.name}/{m}/{key}"] = value
        return found

    # ------------------------------------------------------------------ candidates

    def _row(
        self, candidate: Candidate, gain: dict[str, Any] | None, times: "_Times"
    ) -> dict[str, Any]:
        used = used_snapshots(candidate)
        policy = "recomputed" if "recomputed" in candidate.batch_norm else candidate.batch_norm[0]
        samples = [
            statistics.samples
            for member in candidate.members
            if (statistics := self.contest.bench.statistics(member)) is not None
        ]
        evaluations = [
            self._figures(candidate, self.contest.choosing, self.chosen[candidate.name]),
            self._figures(candidate, self.contest.reporting, self.reported[candidate.name]),
        ]
        if gain is not None:
            gain = {"metric": self.measure.name, "vs": self.baseline, **gain}
        return {
            "name": candidate.name,
            "kind": candidate.kind,
            "members": len(candidate.rows),
            "snapshots": [str(self.snapshots.snapshots[k].path) for k in used],
            "coefficients": weights_json(candidate),
            "combiner": candidate.combiner,
            "combiner_params": dict(candidate.params),
            "batch_norm": {"policy": policy, "samples": max(samples, default=0)},
            "candidate": candidate.to_json(),
            "rows": candidate.to_json()["rows"],
            "chosen_on": candidate.chosen_on,
            "seed": candidate.seed,
            "cost": self._cost(candidate, times),
            "evaluation": evaluations[1],
            "evaluations": evaluations,
            "gain": gain,
            "latency": times.to_json(len(candidate.rows)),
        }

    def _figures(self, candidate: Candidate, view: Any, scores: Scores) -> dict[str, Any]:
        found = {
            "split": view.name,
            "samples": len(scores["rows"]),
            **evaluation.figures(self.task, scores),
        }
        if view is self.contest.choosing and candidate.name in self.folded:
            found["cross_fitted"] = True
        pool, mix = self.contest.mix(candidate)
        predictions = self.contest.predictions(view, pool)
        evaluation.with_auroc(found, self.task, scores, predictions.targets)
        size = len(predictions.targets) * predictions.form.classes
        calibrated = self.task == "classification" and "log_prob" in scores
        if calibrated and (
            size <= _CALIBRATE_UP_TO or candidate.name in ("ensemble", self.baseline)
        ):
            nll, temperature = evaluation.calibrated_nll(
                combined_log_probs(predictions, mix), predictions.targets, seed=self.contest.seed
            )
            found["nll_calibrated"], found["temperature"] = nll, temperature
        if callable(self.options.metric):
            name = getattr(self.options.metric, "__name__", "metric")
            found[name] = self._user_metric(combined_log_probs(predictions, mix), predictions)
        return found

    def _user_metric(self, outputs_RC: torch.Tensor, predictions: Any) -> float:
        from ensemblekit.targets import user_code

        if self.task in ("segmentation", "tokens"):
            raise UsageError(
                f"--metric: a function of whole outputs is not possible for {self.task}"
            )
        shown = outputs_RC
        if self.task == "classification":
            shown = outputs_RC.exp()
        elif self.task == "multilabel":
            shown = torch.sigmoid(outputs_RC)
        with user_code("the metric"):
            return float(self.options.metric(shown.numpy(), predictions.targets))

    def _cost(self, candidate: Candidate, times: "_Times") -> dict[str, Any]:
        members, first = len(candidate.rows), self.snapshots.first
        return {
            "members": members,
            "parameters": first.parameters * members,
            "bytes": self._bytes * members,
            "flops": None if times.flops is None else times.flops * members,
        }

    @property
    def _bytes(self) -> int:
        """Of one member's weights, tied tensors once."""
        twins = {key for group in self.snapshots.ties for key in group[1:]}
        tensors = self.snapshots.first.tensors
        return sum(spec.nbytes for key, spec in tensors.items() if key not in twins)

    def _option(self, candidate: Candidate, times: "_Times") -> Option:
        members = len(candidate.rows)
        shown = times.to_json(members)
        chosen = self.chosen[candidate.name]
        plain = candidate.chosen_on is None and candidate.combiner in (None, "mean")
        return Option(
            candidate.name,
            candidate.kind,
            members,
            self._bytes * members,
            None if shown is None else shown["p95_ms"],
            None if shown is None else shown["p50_ms"],
            self.measure.goodness(chosen),
            metrics.figure("nll", chosen) or 0.0,
            0 if plain else 1,
        )

    # --------------------------------------------------------------------- latency

    def _latency(self) -> "_Times":
        bench = self.contest.bench
        counts = sorted({len(c.rows) for c in self.candidates})
        count = len(self.snapshots)
        most = max(counts)
        try:
            models = bench.models([Member(one_hot(k, count)) for k in range(min(count, most))])
        except (MemoryError, torch.OutOfMemoryError):
            self.warnings.append("latency was not measured: the members do not fit into memory")
            return _Times({}, None, self.options.budget.latency_batch)
        models = [models[m % len(models)] for m in range(most)]
        flops = latency.flops(models[0], bench.example, bench.device)
        sizes = sorted({1, self.options.budget.latency_batch, min(bench.options.batch_size, 64)})
        found = {}
        for size in sizes:
            found[size] = latency.measure(
                models, counts, bench.example, size, device=bench.device, precision=bench.precision
            )
        return _Times(found, flops, self.options.budget.latency_batch)

    # -------------------------------------------------------------------- decision

    def _decision(
        self, options: Sequence[Option], rows: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        bench = self.contest.bench
        budget = replace(
            self.options.budget, device=str(bench.device), precision=bench.options.precision
        )
        shown: dict[str, Any] = {"margin": budget.margin, "budget": deciding.budget_json(budget)}
        fit = deciding.affordable(options, budget)
        if not fit:
            least = min(options, key=lambda o: (o.members, o.nbytes))
            time = "" if least.p95_ms is None else f", {least.p95_ms:.2f} ms at p95"
            text = f"the cheapest candidate is {least.name}: {least.nbytes:,} bytes{time}"
            nothing = dict.fromkeys(("ship", "best", "samples_needed", "gain", "next"))
            return {
                **nothing,
                "headline": "Nothing fits the budget.",
                "because": [text],
                "enough_data": True,
                "real": False,
                **shown,
            }
        best = deciding.best_of(fit)
        margin = self._margin(budget.margin, best)
        lost = evaluation.losses(
            self.measure,
            [self.chosen[o.name] for o in fit],
            self.chosen[best.name],
            seed=self.contest.seed,
        )
        losses = {o.name: loss for o, loss in zip(fit, lost, strict=True)}
        samples = len(self.chosen[best.name]["rows"])
        made = deciding.decide(fit, losses, margin=margin, samples=samples, best=best)
        assert made.ship is not None
        row = rows[made.ship]
        gain = row["gain"]
        unit = self.measure.figure.unit
        ensemble = rows.get("ensemble") or max(
            (r for r in rows.values() if r["kind"] == "ensemble"),
            key=lambda r: r["members"],
            default=None,
        )
        because = [self._why(made, losses, row, best, margin), *made.reasons]
        because += self._bn_words(row)
        return {
            "ship": made.ship,
            "headline": deciding.headline(
                row, rows[self.baseline], ensemble, metric=self.measure.name, unit=unit
            ),
            "because": because,
            "best": made.best,
            "enough_data": made.enough_data,
            "samples_needed": made.samples_needed,
            "gain": gain,
            "real": gain is not None and gain["ci"][0] > 0,
            "next": None,
            **shown,
        }

    def _margin(self, margin: float, best: Option) -> float:
        """In the unit of the figure: points of a share, per cent of other figures."""
        if self.measure.figure.unit == "pp":
            return margin / 100
        return abs(best.goodness) * margin / 100

    def _why(
        self,
        made: deciding.Decision,
        losses: dict[str, Any],
        row: dict[str, Any],
        best: Option,
        margin: float,
    ) -> str:
        view, unit = self.contest.choosing.name, self.measure.figure.unit
        if made.ship == made.best:
            text = f"{made.ship} is the best on {view}"
            if row["members"] == 1:
                return f"{text}, and nothing runs faster than one model"
            return f"{text}, and nothing cheaper is surely within the allowed loss"
        loss = losses[row["name"]]
        return (
            f"{made.ship} runs {row['members']} of the {best.members} models of {best.name}, the "
            f"best on {view}, and loses at most {deciding.points(loss.high, unit).lstrip('+')} "
            f"against it (one-sided 95% bound; allowed: {deciding.points(margin, unit).lstrip('+')})"
        )

    def _bn_words(self, row: dict[str, Any]) -> list[str]:
        if row["batch_norm"]["policy"] != "averaged":
            return []
        return ["its BatchNorm statistics are averaged ones; --train-data lets them be recomputed"]

    def _finish(self, rows: Mapping[str, dict[str, Any]], decision: dict[str, Any]) -> None:
        """Warnings that need all figures."""
        if self.contest.mixed_bn == "averaged":
            self.warnings.append(
                "averages keep averaged BatchNorm statistics, which seldom fit averaged weights; "
                "add --train-data FILE.py:NAME to recompute them"
            )
        if decision["ship"] is not None and not decision["enough_data"]:
            self.warnings.append(decision["because"][1])

    # ------------------------------------------------------------------ the rest

    def _view_json(self, view: Any) -> dict[str, Any]:
        return {"split": view.name, "samples": self.contest.predictions(view).samples}

    def _train_json(self) -> dict[str, Any] | None:
        samples = [
            s.samples
            for c in self.candidates
            for m in c.members
            if (s := self.contest.bench.statistics(m)) is not None
        ]
        return {"samples": max(samples)} if samples else None

    def _note(self) -> str:
        chosen, reported = self.contest.choosing, self.contest.reporting
        if chosen.half is None:
            return f"every choice was made on {chosen.name}; {reported.name} was only reported"
        return (
            f"there is one labelled set ({chosen.split}); a half of it, drawn with seed "
            f"{chosen.seed}, was chosen on, the other half is reported"
        )

    def _snapshots_json(self, cosines: Sequence[float]) -> list[dict[str, Any]]:
        digests = self.contest.bench.digests
        return [
            {
                "name": s.name,
                "path": str(s.path),
                "position": position(s, self.snapshots.ordered_by),
                "step": s.facts.step,
                "epoch": s.facts.epoch,
                "lr": s.facts.lr,
                "weights": s.variant,
                "sha256": digest,
                "cosine": cosine,
            }
            for s, digest, cosine in zip(self.snapshots.snapshots, digests, cosines, strict=True)
        ]

    def _cosines(self) -> tuple[float, ...]:
        count = len(self.snapshots)
        if count < 2:
            return (1.0,)
        return weighted_sums(
            self.snapshots,
            [mean_row(count)],
            [lambda *_: None],
            replaced=frozenset(self.snapshots.first.tensors),
        ).cosines

    def _growth(self) -> dict[str, list[dict[str, Any]]]:
        count = len(self.snapshots)
        orders = {
            "first": list(range(count)),
            "last": list(range(count))[::-1],
            "best": self.ranking,
        }
        found: dict[str, list[dict[str, Any]]] = {}
        for name, order in orders.items():
            steps = [1, *families.ladder(count), count] if count > 1 else [1]
            made = [families.ensemble(f"{name}-{k}", sorted(order[:k]), count) for k in steps]
            sides = {
                side: self.contest.scores(made, view)
                for side, view in (
                    ("choosing", self.contest.choosing),
                    ("reporting", self.contest.reporting),
                )
            }
            found[name] = [
                {
                    "members": k,
                    **{
                        side: {
                            self.measure.name: metrics.figure(self.measure.name, s[c.name]),
                            "metric": metrics.figure(self.measure.name, s[c.name]),
                            "nll": metrics.figure("nll", s[c.name]),
                        }
                        for side, s in sides.items()
                    },
                }
                for k, c in zip(steps, made, strict=True)
            ]
        return found

    def _subsets(self) -> list[dict[str, Any]] | None:
        """The best uniform ensemble of each size on choosing data, of all there are."""
        from ensemblekit.choosing import MOST_EXHAUSTIVE

        count = len(self.snapshots)
        if self.task != "classification" or not 2 <= count <= MOST_EXHAUSTIVE:
            return None
        predictions = self.contest.predictions(self.contest.choosing)
        _, mix = self.contest.mix(families.ensemble("all", range(count), count))
        stacked = np.stack([np.asarray(predictions.outputs[m]) for m in mix.members])
        rivals = find_rivals(stacked, predictions.targets)
        weights_SM = all_subset_weights(count)
        scores = score_mixes(rivals, weights_SM)
        sizes_S = (weights_SM > 0).sum(axis=1)
        names = np.array(self.contest.names)
        found = []
        for size in range(1, count + 1):
            inside = np.nonzero(sizes_S == size)[0]
            by_nll = inside[np.argmin(scores.nll_S[inside])]
            by_accuracy = inside[np.argmax(scores.correct_S[inside])]
            entry: dict[str, Any] = {"members": size, "subsets": len(inside)}
            for key, at in (("best_nll", by_nll), ("best_accuracy", by_accuracy)):
                entry[key] = {
                    "snapshots": names[weights_SM[at] > 0].tolist(),
                    "accuracy": float(scores.correct_S[at] / len(predictions.targets)),
                    "nll": float(scores.nll_S[at]),
                }
            found.append(entry)
        return found

    def _agreement(self) -> dict[str, Any] | None:
        names = self.contest.names
        matrix = evaluation.agreement([self.reported[name] for name in names])
        return None if matrix is None else {"names": names, "matrix": matrix}

    def _reliability(self, decision: Mapping[str, Any]) -> dict[str, Any]:
        wanted = (self.baseline, "uniform+bn", "uniform", "ensemble", str(decision["ship"]))
        found = {}
        for name in dict.fromkeys(n for n in wanted if n in self.reported):
            scores = self.reported[name]
            if "confidence" in scores:
                found[name] = metrics.reliability(scores["confidence"], scores["correct"])
        return found

    def _environment(self) -> dict[str, Any]:
        bench = self.contest.bench
        return {
            **provenance.environment(),
            "device": str(bench.device),
            "device_name": provenance.device_name(bench.device),
            "precision": bench.options.precision,
            "threads": torch.get_num_threads(),
            "batch_size": bench.options.batch_size,
            "predictions_kept_as": bench.kept_as(self.contest.reporting.split),
            "latency": "eager torch, inputs on the device, no copies to the host",
        }


@dataclass(frozen=True)
class _Times:
    """Latency by batch size and number of members."""

    by_size: Mapping[int, Mapping[int, latency.Latency]]
    flops: int | None
    batch: int

    def to_json(self, members: int) -> dict[str, Any] | None:
        """As the contract has it; the budget's batch size first."""
        found = [sizes[members] for sizes in self.by_size.values() if members in sizes]
        if not found or self.batch not in self.by_size:
            return None
        main = self.by_size[self.batch][members]
        return {
            "runtime": "torch",
            "batch_size": main.batch_size,
            "p50_ms": main.p50_ms,
            "p95_ms": main.p95_ms,
            "throughput_per_s": main.throughput_per_s,
            "batches": [one.to_json() for one in found],
        }
