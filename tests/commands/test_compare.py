"""`compare` called from Python: figures that hold, choices that see no test data, a whole folder."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ensemblekit import ModelOptions, evaluation, reports
from ensemblekit.candidates import Candidate
from ensemblekit.commands.compare import CompareOptions, compare
from ensemblekit.commands.report_folder import read_statistics
from ensemblekit.contest import views
from ensemblekit.decision import Budget
from ensemblekit.errors import CheckFailedError, EnsembleKitError, InputError, UsageError
from tests import comparing, helpers
from tests.comparing import PROBLEMS, Problem, compared, figures, problem, save

torch.set_num_threads(1)

NAMES = [f"snap_{n}.pt" for n in range(1, 5)]
CHOSEN = (
    "greedy-soup",
    "learned-soup",
    "ensemble-greedy",
    "ensemble-best-subset",
    "ensemble-weighted",
    "ensemble-best-2",
)


@functools.cache
def _result(name: str, folder: Path) -> str:
    wrapped = name in ("dict", "named dict", "tuple", "object")
    groups = "singles,averages,ensembles" if wrapped else None
    where = folder / name.replace(" ", "-")
    return json.dumps(compared(where, problem(name), candidates=groups).comparison)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(params=PROBLEMS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def found(name: str, folder: Path) -> dict[str, Any]:
    """The comparison of a problem, as it is written."""
    value: dict[str, Any] = json.loads(_result(name, folder))
    return value


def by_name(comparison: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in comparison["candidates"]}


# -------------------------------------------------------------------------------- schema

NUMBER = (int, float)
MAYBE = (*NUMBER, type(None))
TOP: dict[str, Any] = {
    "schema_version": int,
    "task": str,
    "metric": dict,
    "baseline": str,
    "data": dict,
    "snapshots": list,
    "skipped": list,
    "candidates": list,
    "growth": dict,
    "agreement": (dict, type(None)),
    "reliability": dict,
    "decision": dict,
    "diagnosis": (dict, type(None)),
    "subsets": (list, type(None)),
    "passes": dict,
    "environment": dict,
    "warnings": list,
    "command": list,
}
CANDIDATE: dict[str, Any] = {
    "name": str,
    "kind": str,
    "members": int,
    "snapshots": list,
    "coefficients": list,
    "rows": list,
    "candidate": dict,
    "combiner": (str, type(None)),
    "combiner_params": dict,
    "batch_norm": dict,
    "chosen_on": (str, type(None)),
    "seed": (int, type(None)),
    "cost": dict,
    "evaluation": dict,
    "evaluations": list,
    "gain": (dict, type(None)),
    "latency": (dict, type(None)),
    "pareto": bool,
    "within_budget": bool,
}
DECISION: dict[str, Any] = {
    "ship": (str, type(None)),
    "because": list,
    "headline": str,
    "best": (str, type(None)),
    "enough_data": bool,
    "samples_needed": (int, type(None)),
    "gain": (dict, type(None)),
    "real": bool,
    "margin": NUMBER,
    "budget": dict,
    "next": (str, type(None)),
}
LATENCY: dict[str, Any] = {
    "batch_size": int,
    "p50_ms": NUMBER,
    "p95_ms": NUMBER,
    "throughput_per_s": NUMBER,
    "batches": list,
}
TIMES: dict[str, Any] = {
    "batch_size": int,
    "iterations": int,
    "mean_ms": NUMBER,
    "p50_ms": NUMBER,
    "p95_ms": NUMBER,
    "p99_ms": NUMBER,
    "throughput_per_s": NUMBER,
}
GAIN: dict[str, Any] = {
    "metric": str,
    "vs": str,
    "value": NUMBER,
    "ci": list,
    "p_value": NUMBER,
    "p_adjusted": NUMBER,
}
DECIDES = {"classification", "multilabel"}


def check(value: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    for key, kind in wanted.items():
        assert key in value, f"{where} has no {key}"
        assert isinstance(value[key], kind), f"{where}.{key} is {value[key]!r}"


def test_schema(found: dict[str, Any], name: str) -> None:
    check(found, TOP, "comparison")
    assert found["schema_version"] == 1
    assert found["task"] == PROBLEMS[name]().task
    check(found["metric"], {"name": str, "higher_is_better": bool, "unit": str}, "metric")
    assert found["metric"]["unit"] in ("pp", "")
    for key in ("choosing", "reporting"):
        check(found["data"][key], {"split": str, "samples": int}, key)
    assert isinstance(found["data"]["note"], str)
    names = [snapshot["name"] for snapshot in found["snapshots"]]
    assert names == NAMES
    for number, snapshot in enumerate(found["snapshots"], start=1):
        kinds = {"path": str, "step": MAYBE, "epoch": MAYBE, "lr": MAYBE, "cosine": NUMBER}
        check(snapshot, kinds, "snapshot")
        assert snapshot["step"] == 100 * number
        assert re.fullmatch("[0-9a-f]{64}", snapshot["sha256"])
        assert -1 <= snapshot["cosine"] <= 1.000001
    check(found["decision"], DECISION, "decision")
    limits = ("max_latency_ms", "latency_batch", "max_members", "max_bytes", "runtime")
    assert {*limits, "device", "precision"} <= set(found["decision"]["budget"])
    whole = ("forward", "batch_norm", "gradient", "reused")
    check(found["passes"], dict.fromkeys(whole, int), "passes")
    assert found["diagnosis"] is None or {"verdict", "because", "next", "path"} <= set(
        found["diagnosis"]
    )


def test_schema_of_candidates(found: dict[str, Any]) -> None:
    names = [row["name"] for row in found["candidates"]]
    assert len(set(names)) == len(names)
    assert {found["baseline"], found["decision"]["ship"], found["decision"]["best"]} <= set(names)
    for row in found["candidates"]:
        check(row, CANDIDATE, row["name"])
        candidate = Candidate.from_json(row["candidate"])
        assert (candidate.name, candidate.kind) == (row["name"], row["kind"])
        assert len(row["rows"]) == row["members"] == len(candidate.rows)
        assert row["rows"] == row["candidate"]["rows"]
        assert (row["combiner"] is None) == (row["members"] == 1)
        lists = row["coefficients"] if row["members"] > 1 else [row["coefficients"]]
        for numbers in lists:
            assert len(numbers) == len(row["snapshots"])
            assert sum(numbers) == pytest.approx(1)
        assert row["batch_norm"]["policy"] in ("none", "averaged", "recomputed")
        assert (row["batch_norm"]["samples"] > 0) == (row["batch_norm"]["policy"] == "recomputed")
        assert row["chosen_on"] in (None, found["data"]["choosing"]["split"])
        check(
            row["cost"], {"members": int, "parameters": int, "bytes": int, "flops": MAYBE}, "cost"
        )
        splits = [e["split"] for e in row["evaluations"]]
        assert splits == [found["data"][k]["split"] for k in ("choosing", "reporting")]
        assert row["evaluation"] == row["evaluations"][1]
        for e in row["evaluations"]:
            assert isinstance(e["samples"], int)
            figures_ = {k: v for k, v in e.items() if k not in ("split", "samples", "cross_fitted")}
            for key, value in figures_.items():
                if key == "accuracy_ci":
                    assert value[0] <= e["accuracy"] <= value[1]
                else:
                    assert value is None or math.isfinite(value), key
        if row["name"] == found["baseline"]:
            assert row["gain"] is None
            assert (row["kind"], row["chosen_on"]) == ("single", None)
        else:
            check(row["gain"], GAIN, "gain")
            assert row["gain"]["vs"] == found["baseline"]
            assert row["gain"]["metric"] == found["metric"]["name"]
            assert row["gain"]["ci"][0] <= row["gain"]["value"] <= row["gain"]["ci"][1]
            assert row["gain"]["p_value"] <= row["gain"]["p_adjusted"] <= 1
        check(row["latency"], LATENCY, "latency")
        for times in row["latency"]["batches"]:
            check(times, TIMES, "times")


def test_candidates_are_best_first_and_pareto_is_theirs(found: dict[str, Any]) -> None:
    metric, sign = found["metric"]["name"], 1 if found["metric"]["higher_is_better"] else -1
    seen = [sign * row["evaluations"][0][metric] for row in found["candidates"]]
    assert seen == sorted(seen, reverse=True)
    points = [(row["members"], sign * row["evaluations"][0][metric]) for row in found["candidates"]]
    for row, (cost, good) in zip(found["candidates"], points, strict=True):
        beaten = any(
            (c <= cost and g > good + 1e-12) or (c < cost and g >= good - 1e-12) for c, g in points
        )
        assert row["pareto"] == (not beaten), row["name"]


def test_cost(found: dict[str, Any], name: str) -> None:
    one = problem(name)
    model = one.make()
    parameters = sum(p.numel() for p in model.parameters())
    floats = [t for t in model.state_dict().values() if t.is_floating_point()]
    least = sum(t.numel() * 4 for t in floats)
    for row in found["candidates"]:
        assert row["cost"]["members"] == row["members"]
        assert row["cost"]["parameters"] == parameters * row["members"]
        assert least * row["members"] <= row["cost"]["bytes"] <= (least + 16) * row["members"]


def test_growth(found: dict[str, Any]) -> None:
    metric, rows = found["metric"]["name"], by_name(found)
    for order in ("first", "last", "best"):
        entries = found["growth"][order]
        assert [entry["members"] for entry in entries] == [1, 2, 3, 4]
        for entry in entries:
            for side in ("choosing", "reporting"):
                check(entry[side], {"metric": NUMBER, "nll": MAYBE}, "growth")
        for side, place in (("choosing", 0), ("reporting", 1)):
            whole = rows["ensemble"]["evaluations"][place]
            assert entries[-1][side]["metric"] == pytest.approx(whole[metric])
            if order != "best":
                two = rows[f"ensemble-{order}-2"]["evaluations"][place]
                assert entries[1][side]["metric"] == pytest.approx(two[metric])
                only = rows[NAMES[0 if order == "first" else -1]]["evaluations"][place]
                assert entries[0][side]["metric"] == pytest.approx(only[metric])
    sign = 1 if found["metric"]["higher_is_better"] else -1
    alone = [sign * rows[name]["evaluations"][0][metric] for name in NAMES]
    assert sign * found["growth"]["best"][0]["choosing"]["metric"] == pytest.approx(max(alone))


def test_agreement_and_reliability(found: dict[str, Any], name: str) -> None:
    one = problem(name)
    if one.task not in DECIDES:
        assert found["agreement"] is None
        return
    assert found["agreement"]["names"] == NAMES
    outputs, truth = comparing.logits_of(one, one.weights, "test")
    if one.task == "classification":
        decided = [z.argmax(1).numpy() for z in outputs]
        wanted = [[float((a == b).mean()) for b in decided] for a in decided]
    else:
        signs = [(z > 0).numpy() for z in outputs]
        wanted = [[float((a == b).all(1).mean()) for b in signs] for a in signs]
    np.testing.assert_allclose(found["agreement"]["matrix"], wanted, atol=1e-9)
    if one.task != "classification":
        return
    assert {found["baseline"], "ensemble", "uniform+bn"} <= set(found["reliability"])
    for key, bins in found["reliability"].items():
        assert [b["low"] for b in bins] == pytest.approx([n / 15 for n in range(15)])
        assert sum(b["samples"] for b in bins) == len(truth)
        assert all((b["accuracy"] is None) == (b["samples"] == 0) for b in bins)
        right = sum((b["accuracy"] or 0) * b["samples"] for b in bins)
        accuracy = by_name(found)[key]["evaluation"]["accuracy"]
        assert right == pytest.approx(accuracy * len(truth))


# ------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("split", ["val", "test"])
def test_figures_of_singles_and_of_the_ensemble(
    found: dict[str, Any], name: str, split: str
) -> None:
    one, rows = problem(name), by_name(found)
    place = ("val", "test").index(split)
    half_kept = one.task == "segmentation"  # log-probabilities as float16
    wanted = {n: figures(one, [w], split) for n, w in zip(NAMES, one.weights, strict=True)}
    wanted["ensemble"] = figures(one, one.weights, split)
    wanted["ensemble-first-2"] = figures(one, one.weights[:2], split)
    for key, plain in wanted.items():
        seen = rows[key]["evaluations"][place]
        assert seen["samples"] == (
            24 if one.task == "segmentation" else 60 if one.task == "tokens" else 200
        )
        for figure, value in plain.items():
            tolerance = 3e-3 if half_kept else 2e-6
            assert seen[figure] == pytest.approx(value, rel=tolerance, abs=tolerance), (key, figure)


def test_figures_are_of_trained_networks(found: dict[str, Any], name: str) -> None:
    """Guards the tests above: what is compared is better than chance, and differs."""
    one, rows = problem(name), by_name(found)
    last, first = (rows[NAMES[k]]["evaluation"] for k in (-1, 0))
    chance = {
        "classification": ("nll", math.log(2 if name == "binary" else 4)),
        "multilabel": ("nll", math.log(2)),
        "segmentation": ("nll", math.log(3)),
        "tokens": ("nll", math.log(7)),
        "regression": ("mse", 5.0),
    }
    figure, worst = chance[one.task]
    assert last[figure] < 0.9 * worst
    assert last[figure] != first[figure]


def test_an_average_is_a_model_that_can_be_rebuilt(folder: Path) -> None:
    """`uniform+bn`: mean weights, statistics of the training data under them."""
    one = problem("classes")
    out = folder / "rebuilt"
    comparison = compared(folder / "classes", one, out, candidates="uniform+bn").comparison
    row = by_name(comparison)["uniform+bn"]
    mean = {k: torch.stack([w[k].double() for w in one.weights]).mean(0) for k in one.weights[0]}
    x, _ = one.data["train"]
    seen = x.double() @ mean["0.weight"].T + mean["0.bias"]
    mean["1.running_mean"], mean["1.running_var"] = seen.mean(0), seen.var(0, correction=0)
    state = {k: v.to(one.weights[0][k].dtype) for k, v in mean.items()}
    for key, value in figures(one, [state], "test").items():
        assert row["evaluation"][key] == pytest.approx(value, abs=1e-5), key
    stored = read_statistics(out, comparison)
    kept = stored["uniform+bn/0/1.running_var"].view(np.float32)
    np.testing.assert_allclose(kept, state["1.running_var"], rtol=1e-5)


def test_token_labels_are_found_whatever_stands_first(tmp_path: Path) -> None:
    """Collators put `attention_mask` before `input_ids` as often as behind them."""
    one = problem("token dicts", 2)
    order = ("attention_mask", "input_ids", "labels")
    data = {s: [{k: b[k] for k in order} for b in d] for s, d in one.data.items()}
    comparison = compared(tmp_path / "c", one, data=data, candidates="singles").comparison
    for row, weights in zip(NAMES[:2], one.weights, strict=True):
        wanted = figures(one, [weights], "test")["nll"]
        assert by_name(comparison)[row]["evaluation"]["nll"] == pytest.approx(wanted, abs=1e-5)


def test_the_subsets_are_all_of_them(folder: Path) -> None:
    found = json.loads(_result("classes", folder))
    one = problem("classes")
    every = {
        bits: figures(one, [w for k, w in enumerate(one.weights) if bits >> k & 1], "val")
        for bits in range(1, 16)
    }
    assert [entry["members"] for entry in found["subsets"]] == [1, 2, 3, 4]
    assert [entry["subsets"] for entry in found["subsets"]] == [4, 6, 4, 1]
    for entry in found["subsets"]:
        same = [f for bits, f in every.items() if bits.bit_count() == entry["members"]]
        assert entry["best_nll"]["nll"] == pytest.approx(min(f["nll"] for f in same), abs=1e-5)
        best = max(f["accuracy"] for f in same)
        assert entry["best_accuracy"]["accuracy"] == pytest.approx(best, abs=1e-9)
        assert len(entry["best_nll"]["snapshots"]) == entry["members"]
    row = by_name(found)["ensemble-best-subset"]
    best_of_all = min(f["nll"] for f in every.values())
    taken = [NAMES.index(Path(p).name) for p in row["snapshots"]]
    assert every[sum(1 << k for k in taken)]["nll"] == pytest.approx(best_of_all, abs=1e-6)


# ----------------------------------------------------------------------- split discipline


def choices(comparison: dict[str, Any]) -> dict[str, Any]:
    """Everything that is chosen, none of which may depend on what is only reported."""
    told = ("name", "rows", "coefficients", "combiner", "combiner_params", "chosen_on", "candidate")
    decision = {k: v for k, v in comparison["decision"].items() if k not in ("gain", "headline")}
    decision.pop("real")
    decision.pop("because")
    return {
        "candidates": [
            {k: row[k] for k in (*told, "pareto", "seed", "batch_norm")}
            for row in comparison["candidates"]
        ],
        "figures": [row["evaluations"][0] for row in comparison["candidates"]],
        "baseline": comparison["baseline"],
        "decision": decision,
        "growth": {
            order: [entry["choosing"] for entry in entries]
            for order, entries in comparison["growth"].items()
        },
        "subsets": comparison["subsets"],
    }


def scrambled(data: Any, inside: np.ndarray[Any, Any] | None = None) -> Any:
    """The labels of some samples in another order."""
    x, y = data
    places = np.arange(len(y)) if inside is None else np.nonzero(inside)[0]
    y = y.clone()
    y[places] = y[np.random.default_rng(5).permutation(places)]
    return x, y


@pytest.mark.parametrize(
    "name, options",
    [
        ("classes", {}),
        ("classes", {"metric": "nll"}),
        ("binary", {}),
        ("multilabel", {}),
        ("regression", {}),
        ("segmentation", {}),
        ("token pairs", {}),
    ],
)
def test_test_labels_choose_nothing(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    one = problem(name)
    other = one.data | {"test": scrambled(one.data["test"])}
    plain = compared(tmp_path / "c", one, **options).comparison
    wild = compared(tmp_path / "c", one, data=other, **options).comparison
    seen = set(by_name(plain))
    ends = ("", "+bn")
    assert all(any(made + end in seen for end in ends) for made in CHOSEN)
    if one.task == "classification":
        fitted = {"ensemble-temperature", "ensemble-stack-ridge", "ensemble-stack-logistic"}
        assert fitted <= seen
    assert choices(plain) == choices(wild)
    reported = [[row["evaluation"] for row in c["candidates"]] for c in (plain, wild)]
    assert reported[0] != reported[1], "the test labels did change"


def test_validation_labels_choose(tmp_path: Path) -> None:
    """Guards the test above."""
    one = problem("classes")
    other = one.data | {"val": scrambled(one.data["val"])}
    plain, wild = (choices(compared(tmp_path / "c", one, data=d).comparison) for d in (None, other))
    for made in ("ensemble-stack-ridge", "ensemble-temperature", "learned-soup+bn"):
        rows = [next(r for r in c["candidates"] if r["name"] == made) for c in (plain, wild)]
        assert rows[0] != rows[1]


@pytest.mark.parametrize("split", ["val", "test"])
def test_one_labelled_set_is_cut_in_two(tmp_path: Path, split: str) -> None:
    one = problem("classes")
    other = "test" if split == "val" else "val"
    comparison = compared(tmp_path / "c", one, without=[other]).comparison
    data = comparison["data"]
    assert data["choosing"] == {"split": f"{split}-choosing", "samples": 100}
    assert data["reporting"] == {"split": f"{split}-reporting", "samples": 100}
    assert split in data["note"]
    assert "half" in data["note"]
    assert "seed" in data["note"]
    masks = [view.mask(200) for view in views([split], 0)]
    x, y = one.data[split]
    for place, mask in enumerate(masks):
        half = Problem(one.task, one.make, {"half": (x[mask], y[mask])})
        for row, weights in [("ensemble", one.weights), (NAMES[0], one.weights[:1])]:
            seen = by_name(comparison)[row]["evaluations"][place]
            wanted = figures(half, weights, "half")
            assert seen["accuracy"] == pytest.approx(wanted["accuracy"])
            assert seen["nll"] == pytest.approx(wanted["nll"], abs=1e-5)
    seeded = compared(tmp_path / "c", one, without=[other], model={"seed": 1}).comparison
    assert (
        by_name(seeded)["ensemble"]["evaluation"] != by_name(comparison)["ensemble"]["evaluation"]
    )


@pytest.mark.parametrize("name", ["classes", "regression", "segmentation"])
def test_labels_of_the_reported_half_choose_nothing(tmp_path: Path, name: str) -> None:
    one = problem(name)
    _, reported = views(["val"], 0)
    mask = reported.mask(len(one.data["val"][0]))
    other = one.data | {"val": scrambled(one.data["val"], mask)}
    plain = compared(tmp_path / "c", one, without=["test"]).comparison
    wild = compared(tmp_path / "c", one, data=other, without=["test"]).comparison
    assert choices(plain) == choices(wild)
    assert plain["candidates"] != wild["candidates"]


@pytest.mark.parametrize("samples", [2, 3, 100, 101])
def test_halves(samples: int) -> None:
    first, second = (view.mask(samples) for view in views(["val"], 3))
    assert (first ^ second).all()
    assert abs(int(first.sum()) - int(second.sum())) <= 1
    again = views(["val"], 3)[0].mask(samples)
    assert (again == first).all()
    if samples > 50:
        assert (views(["val"], 4)[0].mask(samples) != first).any()
    both = views(["val", "test"], 3)
    assert [view.split for view in both] == ["val", "test"]
    assert all(view.mask(samples).all() for view in both)


def test_figures_of_fits_come_from_other_folds(folder: Path, tmp_path: Path) -> None:
    """Labels that mean nothing: a fit to them looks good on them, and must not be reported so."""
    found = json.loads(_result("classes", folder))
    crossed = {r["name"] for r in found["candidates"] if r["evaluations"][0].get("cross_fitted")}
    fitted = {"greedy", "best-subset", "weighted", "temperature", "stack-ridge", "stack-logistic"}
    assert crossed == {f"ensemble-{name}" for name in fitted}
    assert not any("cross_fitted" in row["evaluation"] for row in found["candidates"])
    one, gained = problem("classes"), []
    for seed in range(3):
        y = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(seed))
        data = one.data | {"val": (one.data["val"][0], y)}
        made = compared(tmp_path / "c", one, data=data, candidates="combiners").comparison
        row = by_name(made)["ensemble-stack-logistic"]
        gained.append(row["evaluations"][0]["accuracy"])
    assert np.mean(gained) < 0.25 + 0.06


# -------------------------------------------------------------------- gains and the metric


@pytest.mark.parametrize("name, metric", [("classes", "nll"), ("classes", "brier"), ("regression", None), ("regression", "r2"), ("token pairs", None)])  # fmt: skip
def test_signs(tmp_path: Path, name: str, metric: str | None) -> None:
    found = compared(tmp_path / "c", problem(name), metric=metric).comparison
    rows, told = by_name(found), found["metric"]
    assert told["name"] == (metric or {"regression": "mse"}.get(name, "nll"))
    assert told["higher_is_better"] == (metric == "r2")
    assert told["unit"] == ""
    own, sign = told["name"], 1 if metric == "r2" else -1
    base = rows[found["baseline"]]["evaluation"][own]
    singles = [r for r in found["candidates"] if r["kind"] == "single" and not r["chosen_on"]]
    best = max(singles, key=lambda r: sign * r["evaluations"][0][own])
    assert best["evaluations"][0][own] == rows[found["baseline"]]["evaluations"][0][own]
    signs = set()
    for row in found["candidates"]:
        if row["gain"] is not None:
            wanted = sign * (row["evaluation"][own] - base)
            assert row["gain"]["value"] == pytest.approx(wanted, abs=1e-6)
            signs.add(row["gain"]["value"] > 0)
    assert signs
    assert found["decision"]["best"] == found["candidates"][0]["name"]


def noisy(spread: float) -> Problem:
    """Snapshots around a good network, each off in its own way; their mean is that network."""
    one = problem("classes")
    noise = spread * torch.randn(4, 4, 12, generator=torch.Generator().manual_seed(0))
    noise -= noise.mean(0)
    last = one.weights[-1]
    weights = tuple({**last, "3.weight": last["3.weight"] + n} for n in noise)
    return Problem(one.task, one.make, one.data, weights)


@pytest.mark.parametrize("metric", ["nll", "brier"])
def test_words_fit_figures_that_are_no_shares(tmp_path: Path, metric: str) -> None:
    """Percentage points are for shares; a loss in nats is not multiplied by 100."""
    arguments: dict[str, Any] = {"metric": metric, "candidates": "singles,ensemble"}
    first = compared(tmp_path / "c", noisy(1.0), **arguments).comparison
    whole, alone = (by_name(first)[n]["evaluations"][0][metric] for n in ("ensemble", first["baseline"]))  # fmt: skip
    assert whole < alone
    loss = alone - whole
    budget = Budget(margin=100 * loss / whole * 1.001)  # the estimate is within it, not its bound
    found = compared(tmp_path / "c", noisy(1.0), budget=budget, **arguments).comparison
    decision = found["decision"]
    assert (decision["ship"], decision["enough_data"]) == ("ensemble", False)
    words = " ".join([*decision["because"], decision["headline"]])
    assert " points" not in words
    assert " pp" not in words
    assert f"{100 * loss:+.2f}" not in words


def test_a_metric_of_another_task(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="metric of this task 'mse'") as caught:
        compared(tmp_path / "c", problem("classes"), metric="mse")
    assert "accuracy" in str(caught.value)


@pytest.mark.parametrize("metric", ["acuracy", "f1", ""])
def test_an_unknown_metric(tmp_path: Path, metric: str) -> None:
    with pytest.raises(UsageError, match="metric"):
        compared(tmp_path / "c", problem("classes"), metric=metric)


def test_a_function_of_the_users(tmp_path: Path) -> None:
    def share(outputs: Any, truth: Any) -> float:
        np.testing.assert_allclose(outputs.sum(1), 1, atol=1e-5)
        return float((outputs.argmax(1) == truth).mean())

    found = compared(
        tmp_path / "c", problem("classes"), metric=share, candidates="singles,ensembles"
    )
    assert found.comparison["metric"]["name"] == "accuracy"
    for row in found.comparison["candidates"]:
        assert row["evaluation"]["share"] == pytest.approx(row["evaluation"]["accuracy"])


def test_a_broken_function_of_the_users(tmp_path: Path) -> None:
    def broken(outputs: Any, truth: Any) -> float:
        raise ValueError("never mind")

    with pytest.raises(InputError, match="never mind") as caught:
        compared(tmp_path / "c", problem("classes"), metric=broken)
    assert caught.value.exit_code == 3


# ----------------------------------------------------------------------- other sets of snapshots


@pytest.mark.parametrize("name", ["classes", "segmentation", "token dicts"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_snapshots(tmp_path: Path, name: str, count: int) -> None:
    one = problem(name)
    few = Problem(one.task, one.make, one.data, one.weights[:count], one.options)
    out = tmp_path / "out"
    found = compared(tmp_path / "c", few, out).comparison
    rows = by_name(found)
    assert set(NAMES[:count]) <= set(rows)
    assert ("uniform" in rows or "uniform+bn" in rows) == (count > 1)
    assert ("ensemble" in rows) == (count > 1)
    assert any(name.startswith("swag") for name in rows) == (count > 2)
    assert [e["members"] for e in found["growth"]["first"]] == list(range(1, count + 1))
    if count == 1:
        assert {row["kind"] for row in found["candidates"]} == {"single"}
    assert json.loads((out / "comparison.json").read_text())["baseline"] == found["baseline"]


def test_one_snapshot_without_statistics_is_its_own_baseline(tmp_path: Path) -> None:
    one = problem("token pairs")
    alone = Problem(one.task, one.make, one.data, one.weights[:1])
    found = compared(tmp_path / "c", alone, tmp_path / "out").comparison
    assert [row["name"] for row in found["candidates"]] == ["snap_1.pt"]
    assert (found["baseline"], found["decision"]["ship"]) == ("snap_1.pt", "snap_1.pt")
    assert (found["decision"]["gain"], found["decision"]["real"]) == (None, False)
    assert found["decision"]["enough_data"]


def unnormed() -> Problem:
    plain = Problem(
        "classification", lambda: comparing.mlp(norm=False), PROBLEMS["classes"]().data
    )  # fmt: skip
    return comparing.trained(plain)


def test_snapshots_without_batch_norm(tmp_path: Path) -> None:
    found = compared(tmp_path / "c", unnormed(), tmp_path / "out").comparison
    assert not any("+bn" in row["name"] for row in found["candidates"])
    assert {row["batch_norm"]["policy"] for row in found["candidates"]} == {"none"}
    assert found["passes"]["batch_norm"] == 0
    assert "batch_norm_statistics" not in found
    assert not (tmp_path / "out" / "batch_norm.npz").exists()
    assert not any("BatchNorm" in text for text in found["warnings"])
    assert {"uniform", "ema", "last-2", "ensemble", "swag-lowrank"} <= set(by_name(found))


def test_frozen_batch_norm(tmp_path: Path) -> None:
    """All snapshots have the same statistics: they were not trained, and are kept."""
    one = problem("classes")
    kept = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    weights = tuple({**w, **{k: one.weights[0][k] for k in kept}} for w in one.weights)
    frozen = Problem(one.task, one.make, one.data, weights)
    found = compared(tmp_path / "c", frozen).comparison
    assert not any("+bn" in row["name"] for row in found["candidates"])
    assert found["passes"]["batch_norm"] == 0
    for n, state in zip(NAMES, weights, strict=True):
        wanted = figures(frozen, [state], "test")
        assert by_name(found)[n]["evaluation"]["nll"] == pytest.approx(wanted["nll"], abs=1e-5)
    mean = {k: torch.stack([w[k].double() for w in weights]).mean(0) for k in weights[0]}
    state = {k: v.to(weights[0][k].dtype) for k, v in mean.items()}
    wanted = figures(frozen, [state], "test")
    assert by_name(found)["uniform"]["evaluation"]["nll"] == pytest.approx(wanted["nll"], abs=1e-5)


def test_no_training_data(tmp_path: Path) -> None:
    one = problem("classes")
    found = compared(tmp_path / "c", one, without=["train"]).comparison
    row = by_name(found)["uniform"]
    assert row["batch_norm"] == {"policy": "averaged", "samples": 0}
    assert found["passes"]["batch_norm"] == 0
    assert found["data"]["train"] is None
    (warning,) = [text for text in found["warnings"] if "averaged BatchNorm" in text]
    assert "--train-data" in warning
    mean = {k: torch.stack([w[k].double() for w in one.weights]).mean(0) for k in one.weights[0]}
    state = {k: v.to(one.weights[0][k].dtype) for k, v in mean.items()}
    wanted = figures(one, [state], "test")
    assert row["evaluation"]["nll"] == pytest.approx(wanted["nll"], abs=1e-5)


def test_added_averages(tmp_path: Path) -> None:
    added = (("mine", (1.0, 0.0, 0.0, 3.0)), ("past", (0.0, 0.0, -1.0, 2.0)))
    found = compared(tmp_path / "c", problem("classes"), candidates="singles", added=added)
    rows = by_name(found.comparison)
    assert rows["mine"]["coefficients"] == pytest.approx([0.25, 0.75])
    assert [Path(p).name for p in rows["mine"]["snapshots"]] == [NAMES[0], NAMES[3]]
    assert rows["past"]["coefficients"] == pytest.approx([-1, 2])


@pytest.mark.parametrize(
    "added",
    [
        (("x", (1.0, 2.0)),),
        (("x", (0.0, 0.0, 0.0, 0.0)),),
        (("x", (1.0, math.nan, 0.0, 0.0)),),
        (("snap_1.pt", (1.0, 1.0, 1.0, 1.0)),),
    ],
)
def test_bad_added_averages(tmp_path: Path, added: Any) -> None:
    with pytest.raises(UsageError):
        compared(tmp_path / "c", problem("classes"), added=added)


@pytest.mark.parametrize(
    "names", [["uniform"], ["mine", "mine"], ["ensemble"], ["greedy-soup"], ["uniform+bn"]]
)
def test_an_added_name_that_is_taken(tmp_path: Path, names: Sequence[str]) -> None:
    """Names are unique: a comparison in which two candidates share one is wrong for both."""
    added = tuple((n, (1.0, 1.0 + k, 1.0, 3.0)) for k, n in enumerate(names))
    try:
        found = compared(tmp_path / "c", problem("classes"), added=added).comparison
    except UsageError as error:
        assert names[0] in str(error)  # noqa: PT017  # either refused, or told apart
        return
    seen = [row["name"] for row in found["candidates"]]
    assert len(seen) == len(set(seen))
    alone = [row for row in found["candidates"] if row["members"] == 1]
    rows = [tuple(row["rows"][0]["coefficients"]) for row in alone]
    for name, numbers in added:
        assert numbers in rows, f"{name} was dropped without a word"
    assert (1.0,) * 4 in rows, "the mean of all was dropped without a word"


@pytest.mark.parametrize("text", ["singles,last-33", "singles-bm", "unifrom*"])
def test_a_pattern_that_no_candidate_has(tmp_path: Path, text: str) -> None:
    """A slip of the fingers must not quietly compare less than was meant."""
    try:
        found = compared(tmp_path / "c", problem("classes"), candidates=text).comparison
    except UsageError:
        return
    assert any(text.rpartition(",")[2] in warning for warning in found["warnings"])


# ----------------------------------------------------------------------- figures at the edge


def written(tmp_path: Path, one: Problem, **options: Any) -> dict[str, Any]:
    """The comparison as its file holds it; what is no number in JSON must not be in it."""
    compared(tmp_path / "c", one, tmp_path / "out", **options)
    value: dict[str, Any] = json.loads((tmp_path / "out" / "comparison.json").read_text())
    return value


def test_a_target_that_never_changes_has_no_r2(tmp_path: Path) -> None:
    one = problem("one value")
    data = one.data | {s: (one.data[s][0], torch.full((200,), 10.0)) for s in ("val", "test")}
    found = written(tmp_path, one, data=data)
    assert by_name(found)["ensemble"]["evaluation"]["r2"] is None
    assert by_name(found)["ensemble"]["evaluation"]["mse"] > 0


def test_pictures_without_a_pixel_that_counts(tmp_path: Path) -> None:
    """One such picture is common; a set of nothing else has no figures, and is refused or null."""
    one = problem("segmentation")
    x, y = one.data["test"]
    some, none = y.clone(), torch.full_like(y, 255)
    some[3] = 255
    data = one.data | {"test": (x, some)}
    holed = Problem(one.task, one.make, data, one.weights, one.options)
    found = written(tmp_path, holed)
    wanted = figures(holed, one.weights[:1], "test")
    seen = by_name(found)["snap_1.pt"]["evaluation"]
    assert seen["miou"] == pytest.approx(wanted["miou"], rel=1e-3)
    with pytest.raises(EnsembleKitError):
        written(tmp_path / "none", one, data=one.data | {"test": (x, none)})
    assert not (tmp_path / "none" / "out").exists()


def test_texts_without_a_token_that_counts(tmp_path: Path) -> None:
    one = problem("token pairs")
    x, y = one.data["test"]
    some = y.clone()
    some[:5] = -100
    holed = Problem(one.task, one.make, one.data | {"test": (x, some)}, one.weights)
    found = written(tmp_path, holed)
    wanted = figures(holed, one.weights[:1], "test")
    assert by_name(found)["snap_1.pt"]["evaluation"]["nll"] == pytest.approx(
        wanted["nll"], abs=1e-5
    )
    none = one.data | {"test": (x, torch.full_like(y, -100))}
    with pytest.raises(EnsembleKitError):
        written(tmp_path / "none", one, data=none)


def test_a_network_that_is_sure_and_wrong(tmp_path: Path) -> None:
    """Probabilities that are 0 in float32: figures stay numbers, and the file stays JSON."""
    one = problem("classes")
    loud = tuple({**w, "3.weight": w["3.weight"] * 3000} for w in one.weights)
    found = written(tmp_path, Problem(one.task, one.make, one.data, loud))
    nll = by_name(found)["snap_1.pt"]["evaluation"]["nll"]
    assert nll > 50


def test_a_language_model_that_is_sure_and_wrong(tmp_path: Path) -> None:
    """exp(NLL) has no number any more."""
    one = problem("token pairs")
    loud = tuple({**w, "head.weight": w["head.weight"] * 3000} for w in one.weights)
    found = written(tmp_path, Problem(one.task, one.make, one.data, loud))
    seen = by_name(found)["snap_1.pt"]["evaluation"]
    assert seen["nll"] > 800
    assert seen["perplexity"] is None


def test_equal_snapshots_are_equally_good(tmp_path: Path) -> None:
    """All of them right on everything: no interval, no fit and no division breaks."""
    one = problem("classes")
    model = one.make()
    model.load_state_dict(one.weights[-1])
    model.eval()
    data = {}
    for split, (x, _) in one.data.items():
        with torch.no_grad():
            data[split] = (x, model(x).argmax(1))
    weights = tuple({**one.weights[-1], "3.bias": one.weights[-1]["3.bias"] + k} for k in range(3))
    found = written(tmp_path, Problem(one.task, one.make, data, weights))
    assert by_name(found)["ensemble"]["evaluation"]["accuracy"] == 1
    shipped = by_name(found)[found["decision"]["ship"]]
    assert shipped["members"] == 1


# ------------------------------------------------------------------------------- passes


def test_the_announcement_is_kept(tmp_path: Path) -> None:
    told: list[str] = []
    found = compared(tmp_path / "c", problem("classes"), candidates="singles,ensembles,combiners",
                     announce=told.append)  # fmt: skip
    passes = found.comparison["passes"]
    assert passes == {"forward": 4 * 2, "batch_norm": 0, "gradient": 0, "reused": 0}
    assert "4 models x 2 data sets = 8 forward passes" in told[0]
    assert "BatchNorm" not in told[0]
    assert "soup" not in told[0]


@pytest.mark.parametrize("name", ["classes", "segmentation", "token dicts"])
def test_the_announcement_of_everything(tmp_path: Path, name: str) -> None:
    told: list[str] = []
    found = compared(tmp_path / "c", problem(name), announce=told.append).comparison
    passes = found["passes"]
    forward = re.search(r"= (\d+) forward passes", told[0])
    soup = re.search(r"greedy soup: at most (\d+) forward", told[0])
    learned = re.search(r"learned soup: (\d+) gradient and (\d+) forward", told[0])
    assert forward
    assert soup
    assert learned
    fixed = int(forward[1])
    most = fixed + int(soup[1]) + int(learned[2])
    assert fixed <= passes["forward"] <= most
    assert passes["gradient"] <= int(learned[1])
    layers = re.search(r"passes, (\d+) BatchNorm passes", told[0])
    if name == "token dicts":
        assert layers is None
        assert passes["batch_norm"] == 0
    else:
        assert layers
        assert int(layers[1]) <= passes["batch_norm"] <= int(layers[1]) + int(soup[1]) + 1


def test_members_that_are_shared_run_once(tmp_path: Path) -> None:
    """Every ensemble of snapshots is made of what the snapshots said."""
    told: list[str] = []
    compared(tmp_path / "c", problem("classes"), candidates="averages", announce=told.append)
    models = {*NAMES, "uniform", "uniform+bn", "last-2", "last-3", "ema"}
    assert f": {len(models)} models x 2" in told[0]


class Counted(nn.Module):
    """A network that knows how many samples it has seen."""

    seen: dict[str, int] = {}  # noqa: RUF012  # copies of the module count together

    def __init__(self) -> None:
        super().__init__()
        self.net = comparing.mlp(norm=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.seen["samples"] = Counted.seen.get("samples", 0) + len(x)
        return self.net(x)


@pytest.mark.parametrize("apart", [False, True], ids=["one run", "a failed average"])
def test_passes_are_what_the_network_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    from ensemblekit import comparison

    plain, timed = comparison.member_loops, []

    def measured(*args: Any, **named: Any) -> Any:
        before = Counted.seen["samples"]
        found = plain(*args, **named)
        timed.append(Counted.seen["samples"] - before)
        return found

    one = Problem("classification", Counted, PROBLEMS["classes"]().data)
    if apart:
        runs = [comparing.trained(one, snapshots=4, seed=seed) for seed in (0, 1, 2)]
        one = Problem(one.task, one.make, one.data, tuple(run.weights[-1] for run in runs))
    else:
        one = comparing.trained(one, snapshots=3)
    monkeypatch.setattr(comparison, "member_loops", measured)
    Counted.seen.clear()
    found = compared(tmp_path / "c", one).comparison
    assert (found["diagnosis"] is not None) == apart
    probe, counting = 128, 1  # the first batch, once; one sample for the FLOPs
    passes = found["passes"]["forward"] + found["passes"]["gradient"]
    assert Counted.seen["samples"] - sum(timed) == 200 * passes + probe + counting


# --------------------------------------------------------------------------- budget and words


@pytest.mark.parametrize(
    "budget, most",
    [(Budget(max_members=1), 1), (Budget(max_members=2), 2), (Budget(max_bytes=2000), 2)],
)
def test_budgets(tmp_path: Path, budget: Budget, most: int) -> None:
    found = compared(tmp_path / "c", problem("classes"), budget=budget).comparison
    rows = by_name(found)
    assert rows[found["decision"]["ship"]]["members"] <= most
    assert rows[found["decision"]["best"]]["members"] <= most
    assert max(row["members"] for row in found["candidates"]) > most, "all are still reported"
    for row in found["candidates"]:
        size = row["cost"]["bytes"]
        small = budget.max_bytes is None or size <= budget.max_bytes
        few = budget.max_members is None or row["members"] <= budget.max_members
        assert row["within_budget"] == (small and few), row["name"]
    shown = found["decision"]["budget"]
    assert shown["max_members"] == budget.max_members
    assert shown["max_bytes"] == budget.max_bytes


def test_a_budget_of_time(tmp_path: Path) -> None:
    wide = compared(tmp_path / "c", problem("classes"), budget=Budget(max_latency_ms=1e6, latency_batch=7))  # fmt: skip
    shown = [row["latency"] for row in wide.comparison["candidates"]]
    assert {latency["batch_size"] for latency in shown} == {7}
    sizes = [{b["batch_size"] for b in latency["batches"]} for latency in shown]
    assert all(7 in one for one in sizes)
    assert {1, 7, 32} in sizes  # one model, and the largest ensemble
    with pytest.raises(CheckFailedError, match="nothing fits the budget") as caught:
        compared(tmp_path / "c", problem("classes"), budget=Budget(max_latency_ms=1e-9))
    assert caught.value.exit_code == 5


def test_nothing_fits(tmp_path: Path) -> None:
    """The report is there all the same, since it says what would fit."""
    out = tmp_path / "out"
    with pytest.raises(CheckFailedError, match="bytes") as caught:
        compared(tmp_path / "c", problem("classes"), out, budget=Budget(max_bytes=1))
    assert caught.value.hint
    assert not list(tmp_path.glob(".*"))
    if out.exists():
        decision = json.loads((out / "comparison.json").read_text())["decision"]
        check(decision, DECISION, "decision")
        assert (decision["ship"], decision["best"], decision["gain"]) == (None, None, None)
        assert {p.name for p in out.iterdir()} > set(reports.REPORTS)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_latency_ms": -1.0},
        {"max_latency_ms": math.nan},
        {"max_members": 0},
        {"max_members": -1},
        {"max_bytes": 0},
        {"max_bytes": -5},
        {"margin": -0.1},
        {"margin": math.nan},
        {"margin": math.inf},
        {"latency_batch": 0},
        {"latency_batch": -3},
    ],
    ids=str,
)
def test_budgets_that_are_none(tmp_path: Path, arguments: dict[str, Any]) -> None:
    (key,) = arguments
    with pytest.raises(UsageError, match=key.replace("_", "[-_]")):
        compared(tmp_path / "c", problem("classes"), tmp_path / "out", candidates="singles", budget=Budget(**arguments))  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [-1, -(10**9)])
def test_a_cache_of_less_than_nothing(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="cache"):
        compared(tmp_path / "c", problem("classes"), candidates="singles", cache_bytes=size)


def test_the_headline_speaks_of_what_ships(found: dict[str, Any]) -> None:
    decision, rows = found["decision"], by_name(found)
    assert decision["headline"].startswith(f"Ship {decision['ship']}")
    row = rows[decision["ship"]]
    assert decision["gain"] == row["gain"]
    assert decision["real"] == (row["gain"] is not None and row["gain"]["ci"][0] > 0)
    assert len(decision["because"]) >= 1
    if not decision["enough_data"]:
        (text,) = [t for t in found["warnings"] if "not enough data" in t]
        assert text in decision["because"]
        if decision["samples_needed"] is not None:
            assert decision["samples_needed"] > found["data"]["choosing"]["samples"]
            assert f"{decision['samples_needed']:,}" in text


# --------------------------------------------------------------------------- the folder


def test_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compared(tmp_path / "c", problem("classes"), out)
    assert result.output == out
    names = {"comparison.json", "report.html", "report.md", "candidates.csv", "batch_norm.npz"}
    assert {p.name for p in out.iterdir()} == names
    value = json.loads((out / "comparison.json").read_text())
    assert value == json.loads(json.dumps(result.comparison))
    noted = value["batch_norm_statistics"]
    assert noted["file"] == "batch_norm.npz"
    assert noted["sha256"] == helpers.sha256(out / "batch_norm.npz")
    for name in reports.REPORTS:
        assert reports.render(name, value) == (out / name).read_text(), name
    lines = (out / "candidates.csv").read_text().splitlines()
    assert len(lines) == 1 + len(value["candidates"])
    assert value["decision"]["ship"] in (out / "report.md").read_text()
    assert not list(tmp_path.glob(".*"))


def test_statistics_of_every_recomputed_member(tmp_path: Path) -> None:
    out = tmp_path / "out"
    value = compared(tmp_path / "c", problem("classes"), out).comparison
    found = read_statistics(out, value)
    wanted = {
        f"{row['name']}/{m}/1.{key}"
        for row in value["candidates"]
        for m, policy in enumerate(row["candidate"]["batch_norm"])
        if policy == "recomputed"
        for key in ("running_mean", "running_var")
    }
    assert set(found) == wanted
    (out / "batch_norm.npz").write_bytes(b"other")
    with pytest.raises(InputError, match=r"batch_norm\.npz"):
        read_statistics(out, value)


def test_a_folder_that_exists_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compared(tmp_path / "c", problem("classes"), out, candidates="singles")
    before = helpers.contents(out)
    with pytest.raises(UsageError, match="exists already") as caught:
        compared(tmp_path / "c", problem("classes"), out, candidates="singles")
    assert "--force" in str(caught.value.hint)
    assert helpers.contents(out) == before


def test_force_replaces_the_folder_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compared(tmp_path / "c", problem("classes"), out)
    assert (out / "batch_norm.npz").exists()
    compared(tmp_path / "c", problem("classes"), out, candidates="ensembles", force=True)
    assert not (out / "batch_norm.npz").exists(), "a file of the earlier run"
    value = json.loads((out / "comparison.json").read_text())
    assert "uniform" not in by_name(value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "out"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    compared(tmp_path / "c", problem("classes"), tmp_path / "out", candidates="singles")
    assert (tmp_path / "out" / "comparison.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_not_ours(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("three years of work")
    with pytest.raises(UsageError, match=re.escape(str(out))) as caught:
        compared(tmp_path / "c", problem("classes"), out, candidates="singles", force=force)
    assert caught.value.hint
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema_version": 3, "epochs": 7}', "not JSON"])
def test_a_comparison_json_that_is_not_ours(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "comparison.json").write_text(text)
    with pytest.raises(UsageError, match="comparison"):
        compared(tmp_path / "c", problem("classes"), out, candidates="singles", force=True)
    assert (out / "comparison.json").read_text() == text


def test_what_lies_beside_our_files_is_not_lost(tmp_path: Path) -> None:
    """Someone put notes into the folder of reports; --force is about the reports."""
    out = tmp_path / "out"
    compared(tmp_path / "c", problem("classes"), out, candidates="singles")
    (out / "notes.txt").write_text("why we shipped it")
    try:
        compared(tmp_path / "c", problem("classes"), out, candidates="ensembles", force=True)
    except UsageError as error:
        assert "notes.txt" in str(error)  # noqa: PT017  # refused, or kept
    assert (out / "notes.txt").exists()


def test_force_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    out = tmp_path / "out"
    out.symlink_to("real")
    compared(tmp_path / "c", problem("classes"), out, candidates="singles")
    compared(tmp_path / "c", problem("classes"), out, candidates="ensembles", force=True)
    assert "ensemble" in by_name(json.loads((out / "comparison.json").read_text()))
    assert not list(tmp_path.glob(".*")), "nothing is left behind"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [False, True])
def test_a_writer_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, old: bool
) -> None:
    out = tmp_path / "out"
    if old:
        compared(tmp_path / "c", problem("classes"), out, candidates="singles")
        before = helpers.contents(out)

    def fails(name: str, comparison: Any) -> str:
        raise error

    monkeypatch.setattr(reports, "render", fails)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else EnsembleKitError
    with pytest.raises(expected) as caught:
        compared(tmp_path / "c", problem("classes"), out, candidates="ensembles", force=True)
    if isinstance(caught.value, EnsembleKitError):
        assert caught.value.exit_code == 4
        assert "out" in caught.value.message
    assert out.exists() == old
    if old:
        assert helpers.contents(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", *(["out"] if old else [])]


def test_a_rename_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compared(tmp_path / "c", problem("classes"), out, candidates="singles")
    before = helpers.contents(out)
    plain = Path.rename

    def fails(self: Path, target: Any) -> Any:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(EnsembleKitError):
        compared(tmp_path / "c", problem("classes"), out, candidates="ensembles", force=True)
    assert helpers.contents(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "out"]


def test_folders_in_the_way(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", problem("classes").weights)
    for out, words in (
        (folder, "holds an input"),
        (folder / "snap_1.pt", "is a file"),
        (tmp_path, "holds an input"),
        (tmp_path / "no" / "out", "does not exist"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            compared(folder, problem("classes"), out, candidates="singles", force=True)
        assert caught.value.hint
    assert helpers.contents(folder).keys() == set(NAMES)


def test_a_folder_inside_that_of_the_checkpoints(tmp_path: Path) -> None:
    """What is written there is not taken for a checkpoint the next time."""
    folder = save(tmp_path / "c", problem("classes").weights)
    for force in (False, True):
        found = compared(folder, problem("classes"), folder / "report", candidates="singles", force=force)  # fmt: skip
        assert [s["name"] for s in found.comparison["snapshots"]] == NAMES


# ----------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize(
    "given",
    [{}, {"val_data": "points"}, {"model": "mlp"}, {"model": "mlp", "train_data": "points"}],
    ids=str,
)
def test_a_model_and_labelled_data_are_needed(tmp_path: Path, given: dict[str, str]) -> None:
    one = problem("classes")
    save(tmp_path / "c", one.weights)
    made = {k: one.make() if k == "model" else one.data["val"] for k in given}
    with pytest.raises(UsageError) as caught:
        compare(tmp_path / "c", model=ModelOptions(**made), options=CompareOptions(cache_bytes=0))
    assert "--model" in str(caught.value.hint)


def test_strict_fails_on_warnings(tmp_path: Path) -> None:
    one = problem("classes")
    save(tmp_path / "c", one.weights)
    model = ModelOptions(model=one.make(), val_data=one.data["val"], device="cpu")
    options = CompareOptions(cache_bytes=0)
    with pytest.raises(CheckFailedError, match="--strict"):
        compare(tmp_path / "c", model=model, options=options, strict=True)


def test_a_required_gain(tmp_path: Path) -> None:
    options = {"require_gain": True, "candidates": "singles"}
    with pytest.raises(CheckFailedError, match="--require-gain") as caught:
        compared(tmp_path / "c", problem("classes"), tmp_path / "out", **options)
    assert caught.value.exit_code == 5


def test_a_required_gain_that_is_there(tmp_path: Path) -> None:
    found = compared(tmp_path / "c", noisy(1.5), candidates="singles,uniform",
                     require_gain=True)  # fmt: skip
    decision = found.comparison["decision"]
    assert decision["real"]
    assert decision["ship"] in ("uniform", "uniform+bn")
    assert decision["gain"]["ci"][0] > 0


@pytest.mark.parametrize("name", ["classes", "regression", "segmentation", "token pairs"])
def test_the_diagnosis_of_an_average_that_failed(tmp_path: Path, name: str) -> None:
    """Networks of several seeds: their mean is nothing, and someone says why."""
    one, rate = PROBLEMS[name](), {"regression": 0.01, "token pairs": 1.0}.get(name, 0.1)
    runs = [comparing.trained(one, snapshots=4, seed=seed, lr=rate) for seed in (0, 1, 2)]
    apart = Problem(one.task, one.make, one.data, tuple(r.weights[-1] for r in runs), one.options)
    told: list[str] = []
    found = compared(tmp_path / "c", apart, tmp_path / "out", announce=told.append).comparison
    diagnosis = found["diagnosis"]
    assert diagnosis is not None
    assert {"verdict", "because", "next", "path"} <= set(diagnosis)
    assert diagnosis["because"]
    for point in diagnosis["path"]:
        assert 0 <= point["position"] <= 1
        assert {"row", "metric_averaged_bn", "metric_recomputed_bn"} <= set(point)
    assert any(diagnosis["because"] in text for text in found["warnings"])


class Masked(nn.Module):
    """Rules two classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = comparing.mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.body(x)
        return made.index_fill(1, torch.tensor([3]), float("-inf"))


def test_classes_that_a_model_rules_out(tmp_path: Path) -> None:
    one = PROBLEMS["classes"]()
    masked = comparing.trained(Problem(one.task, Masked, one.data), snapshots=1)
    rest = comparing.trained(Problem(one.task, Masked, one.data), snapshots=3, seed=1)
    both = Problem(one.task, Masked, one.data, (*masked.weights, *rest.weights))
    found = compared(tmp_path / "c", both, tmp_path / "out").comparison
    text = (tmp_path / "out" / "comparison.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert found["decision"]["ship"]
    singles = [row for row in found["candidates"] if row["kind"] == "single"]
    assert all(row["evaluation"]["nll"] is None for row in singles)  # it is infinite


def test_one_item_cannot_be_halved(tmp_path: Path) -> None:
    one = problem("regression")
    x, y = one.data["val"]
    data = {"train": one.data["train"], "val": (x[:1], y[:1])}
    with pytest.raises(InputError, match="too few to choose on one half") as caught:
        compared(tmp_path / "c", one, data=data, without=("test",))
    assert caught.value.hint


@pytest.mark.parametrize("items", [2, 5, 10])
def test_few_items_claim_little(items: int) -> None:
    """The interval of a gain covers the truth also when there are few items."""
    generator = np.random.default_rng(items)
    covered, runs = 0, 150
    for _ in range(runs):
        a, b = generator.normal(1.0, 1.0, (2, items)) ** 2
        rows = np.ones(items)
        scores = [{"squared": v, "rows": rows} for v in (a, b)]
        (gain,) = evaluation.gains(evaluation.Measure("mse"), scores[:1], scores[1], seed=0)
        assert gain is not None
        covered += gain["ci"][0] <= 0 <= gain["ci"][1]
    assert covered / runs > 0.88


def test_one_hot_classes_are_not_taken_for_labels(tmp_path: Path) -> None:
    one = problem("classes")
    data = {split: (x, torch.nn.functional.one_hot(y, 4)) for split, (x, y) in one.data.items()}
    with pytest.raises(InputError, match="one-hot") as caught:
        compared(tmp_path / "c", one, data=data)
    assert "argmax" in str(caught.value.hint)
