"""Owns the comparison: from predictions to the object of comparison.json.

Input: a contest whose predictions are there. It scores every candidate on the choosing and on the
reporting data, measures latency, and lets `decision` decide.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from ensemblekit import decision as deciding
from ensemblekit import (
    environment,
    evaluation,
    families,
    latency,
    machine,
    metrics,
    operations,
    sections,
)
from ensemblekit.candidates import Candidate, Member, one_hot
from ensemblekit.contest import Contest, used_snapshots, weights_json
from ensemblekit.decision import Budget, Option
from ensemblekit.errors import UsageError
from ensemblekit.predictions import Predictions
from ensemblekit.runtimes.torch_eager import member_loops
from ensemblekit.scoring import Mix, Scores, combined_log_probs
from ensemblekit.targets import user_code

SCHEMA_VERSION = 1
_OWN_KEYS = (  # of an evaluation, besides figures
    *("split", "samples", "cross_fitted", "accuracy_ci", "ece", "ece_adaptive", "auroc"),
    *("nll_calibrated", "temperature", "disagreement", "mutual_information"),
)
_BUSY = 1.5  # processes a core; ours are one, or a little more
_CALIBRATE_UP_TO = 4_000_000  # outputs beyond which only headline candidates are calibrated


class Comparison:
    """What a contest came to, on process 0; `to_json` is the object of comparison.json.

    Args:
        contest: Its predictions are there.
        budget: What may be spent at inference.
        user_metric: A figure of the user's, `f(outputs, targets) -> float`, reported beside.
    """

    def __init__(
        self,
        contest: Contest,
        *,
        budget: Budget,
        user_metric: Callable[..., Any] | None = None,
    ) -> None:
        self.contest = contest
        self.snapshots = contest.bench.snapshots
        self.budget = budget
        self.user_metric = user_metric
        self.measure = contest.measure
        self.task = contest.predictions(contest.choosing).form.task
        self.warnings = list(self.snapshots.warnings)
        self.candidates: list[Candidate] = []
        self.chosen: dict[str, Scores] = {}
        self.reported: dict[str, Scores] = {}
        self.folded: set[str] = set()
        self._check_user_metric()
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

    def to_json(self) -> dict[str, Any]:
        """The object of comparison.json, but for what the command adds."""
        contest, bench = self.contest, self.contest.bench
        times = self._latency()
        rows = self._rows(times)
        decision = self._decision([self._option(c, times) for c in self.candidates], rows)
        headliners = (self.baseline, "uniform+bn", "uniform", "ensemble", str(decision["ship"]))
        cosines = sections.cosines(self.snapshots)
        self._note_statistics(decision)
        figure = self.measure.figure
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
            "candidates": list(rows.values()),
            "data": {
                "choosing": self._view_json(contest.choosing),
                "reporting": self._view_json(contest.reporting),
                "train": self._train_json(),
                "note": self._note(),
            },
            "snapshots": sections.snapshots_json(self.snapshots, bench.builder.digests, cosines),
            "skipped": [{"path": str(s.path), "reason": s.reason} for s in self.snapshots.skipped],
            "growth": sections.growth(
                contest, self.ranking, {"choosing": self.chosen, "reporting": self.reported}
            ),
            "subsets": sections.subsets(contest),
            "agreement": sections.agreement(contest.names, self.reported),
            "reliability": sections.reliability(headliners, self.reported),
            "diagnosis": None,
            "passes": asdict(bench.passes),
            "environment": self._environment(),
            "warnings": list(dict.fromkeys(self.warnings)),
        }

    def statistics(self) -> dict[str, np.ndarray[Any, Any]]:
        """Recomputed BatchNorm statistics of every candidate's members."""
        found = {}
        for candidate in self.candidates:
            for m, member in enumerate(candidate.members):
                statistics = self.contest.bench.builder.statistics(member)
                if statistics is not None and member.batch_norm == "recomputed":
                    for key, value in statistics.values.items():
                        found[f"{candidate.name}/{m}/{key}"] = value
        return found

    # ------------------------------------------------------------------ candidates

    def _rows(self, times: "_Times") -> dict[str, dict[str, Any]]:
        """What is told of each candidate, best first on choosing data."""
        gained = evaluation.gains(
            self.measure,
            [self.reported[c.name] for c in self.candidates],
            self.reported[self.baseline],
            seed=self.contest.seed,
        )
        rows = {}
        for candidate, gain in zip(self.candidates, gained, strict=True):
            own = candidate.name == self.baseline
            rows[candidate.name] = self._row(candidate, None if own else gain, times)
        options = [self._option(candidate, times) for candidate in self.candidates]
        front = deciding.pareto(options)
        fit = {option.name for option in deciding.affordable(options, self.budget)}
        for name, row in rows.items():
            row |= {"pareto": name in front, "within_budget": name in fit}
        options.sort(key=lambda o: (-o.goodness, o.cost, o.complexity, o.tie_break))
        return {option.name: rows[option.name] for option in options}

    def _row(
        self, candidate: Candidate, gain: dict[str, Any] | None, times: "_Times"
    ) -> dict[str, Any]:
        used = used_snapshots(candidate)
        policy = "recomputed" if "recomputed" in candidate.batch_norm else candidate.batch_norm[0]
        samples = [
            statistics.samples
            for member in candidate.members
            if (statistics := self.contest.bench.builder.statistics(member)) is not None
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
        folded = "cross_fitted" in found  # what follows would be of the fit to all samples
        if self.task == "classification" and "log_prob" in scores:
            size = len(predictions.targets) * predictions.form.classes
            headline = candidate.name in ("ensemble", self.baseline)
            nll = temperature = None
            if not folded and (size <= _CALIBRATE_UP_TO or headline):
                combined = combined_log_probs(predictions, mix)
                nll, temperature = evaluation.calibrated_nll(
                    combined, predictions.targets, seed=self.contest.seed
                )
            found |= {"nll_calibrated": nll, "temperature": temperature}
        if self.user_metric is not None:
            own = None if folded else self._user_metric(mix, predictions)
            found[self._user_metric_name] = own
        return found

    @property
    def _user_metric_name(self) -> str:
        return getattr(self.user_metric, "__name__", "metric")

    def _check_user_metric(self) -> None:
        if self.user_metric is None:
            return
        if self.task in ("segmentation", "tokens"):
            raise UsageError(
                f"--metric: a function of whole outputs is not possible for {self.task}"
            )
        taken = {*metrics.FIGURES, *_OWN_KEYS}
        if self._user_metric_name in taken:
            raise UsageError(
                f"--metric: '{self._user_metric_name}' is the name of a figure of ours",
                hint="rename the function",
            )

    def _user_metric(self, mix: Mix, predictions: Predictions) -> float | None:
        """The user's figure of probabilities (of values in a regression) and targets."""
        assert self.user_metric is not None
        outputs_RC = combined_log_probs(predictions, mix)
        if self.task == "classification":
            outputs_RC = outputs_RC.exp()
        elif self.task == "multilabel":
            outputs_RC = torch.sigmoid(outputs_RC)
        with user_code("the metric"):
            found = float(self.user_metric(outputs_RC.numpy(), predictions.targets))
        return found if math.isfinite(found) else None

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
            models = bench.builder.models(
                [Member(one_hot(k, count)) for k in range(min(count, most))]
            )
        except (MemoryError, torch.OutOfMemoryError):
            self.warnings.append("latency was not measured: the members do not fit into memory")
            return _Times({}, None, self.budget.latency_batch)
        models = [models[m % len(models)] for m in range(most)]
        load = machine.busy()
        if load is not None and load > _BUSY:
            self.warnings.append(
                f"this machine had {load:.1f} processes a core to run in the last minute: latencies may "
                "be far too high; measure again when it is quiet"
            )
        flops = operations.flops(models[0], bench.example, bench.device)
        sizes = sorted({1, self.budget.latency_batch, min(bench.options.batch_size, 32)})
        found = {}
        for size in sizes:  # every number of members for the budget's batch, the ends elsewhere
            wanted = counts if size == self.budget.latency_batch else sorted({1, most} & {*counts})
            found[size] = member_loops(
                {count: models[:count] for count in wanted},
                bench.example.sized(size),
                device=bench.device,
                precision=bench.builder.precision,
                effort=latency.QUICK,
            )
        return _Times(found, flops, self.budget.latency_batch)

    # -------------------------------------------------------------------- decision

    def _decision(
        self, options: Sequence[Option], rows: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        bench = self.contest.bench
        budget = replace(self.budget, device=str(bench.device), precision=bench.options.precision)
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
        unit = self.measure.figure.unit
        made = deciding.decide(fit, losses, margin=margin, samples=samples, best=best, unit=unit)
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
        because += self._bn_words(row) + self._member_words(row)
        return {
            "ship": made.ship,
            "headline": deciding.headline(
                row,
                rows[self.baseline],
                ensemble,
                metric=self.measure.name,
                unit=unit,
                settled=made.enough_data,
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

    def _member_words(self, row: dict[str, Any]) -> list[str]:
        if row["kind"] != "ensemble":
            return []
        if row["batch_norm"]["policy"] == "none":
            text = (
                f"its members are {len(row['snapshots'])} checkpoints as they are; "
                f"combine their outputs by '{row['combiner']}'"
            )
            return [text]
        return [f"its members are {row['members']} averages (see rows in comparison.json)"]

    def _note_statistics(self, decision: Mapping[str, Any]) -> None:
        """Warnings about BatchNorm, and about what could not be decided."""
        if self.contest.mixed_bn == "averaged":
            self.warnings.append(
                "averages keep averaged BatchNorm statistics, which seldom fit averaged weights; "
                "add --train-data FILE.py:NAME to recompute them"
            )
        for candidate in self.candidates:
            for member in candidate.members:
                statistics = self.contest.bench.builder.statistics(member)
                self.warnings += [] if statistics is None else statistics.notes
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
            if (s := self.contest.bench.builder.statistics(m)) is not None
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

    def _environment(self) -> dict[str, Any]:
        bench = self.contest.bench
        return {
            **environment.block(),
            "device": str(bench.device),
            "device_name": environment.device_name(bench.device),
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
