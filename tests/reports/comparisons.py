"""Owns comparisons to report on, in the shape of docs/comparison.md: usual, sparse, large, hostile."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]

SPLITS = {"choosing": ("val", 5000), "reporting": ("test", 10000)}
HOSTILE = (
    "<script>alert(1)</script>",
    "</style></script><img src=http://example.com/x onerror=alert(1)>",
    "a|b `c` *d* [e](http://example.com)",
    "line one\nline two\r\n| x |",
    '"quoted" & \'single\' <b onclick="x">',
    '=HYPERLINK("http://example.com")',
    "+1+1",
    "-2",
    "@SUM(A1)",
    "\x1b[2J\u202egnp.exe\udc80",
    "x" * 300,
    "${jndi} {{7*7}} %s \\",
)


def classification(*, snapshots: int = 10, random_rows: int = 12, seed: int = 0) -> Json:
    """Ten snapshots of a run with cyclic rates, and about fifty candidates, all measured."""
    rng = random.Random(seed)
    files = [_snapshot(index, rng) for index in range(snapshots)]
    paths = [file["path"] for file in files]
    found = []
    for index, file in enumerate(files):
        value = 0.915 + 0.016 * (1 - math.exp(-index / 4)) + rng.gauss(0, 0.0015)
        found.append(_candidate(file["name"], "single", 1, [paths[index]], value, rng))
    for name, value in {
        "uniform": 0.9385,
        "uniform, averaged statistics": 0.9312,
        "last-5": 0.9391,
        "last-3": 0.9372,
        "linear weights": 0.9388,
        "ema 0.9": 0.9376,
        "greedy soup": 0.9397,
        "polynomial 3": 0.9384,
    }.items():
        found.append(_candidate(name, "averaged", 1, paths, value, rng))
    for index in range(random_rows):
        value = rng.gauss(0.937, 0.002)
        found.append(_candidate(f"random {index}", "averaged", 1, paths, value, rng))
    for count in range(2, snapshots + 1):
        gain = 0.017 * (1 - math.exp(-(count - 1) / 2.5))
        for order, start in (("last", 0.929), ("best", 0.931)):
            name = f"ensemble, {order} {count}"
            taken = paths[-count:]
            found.append(_candidate(name, "ensemble", count, taken, start + gain, rng))
    for combiner in ("mean-logits", "vote", "weighted", "temperature", "stack-logistic"):
        name = f"ensemble of all, {combiner}"
        value = 0.947 + rng.gauss(0, 0.0008)
        found.append(_candidate(name, "ensemble", snapshots, paths, value, rng, combiner=combiner))
    made = _comparison("classification", "accuracy", files, found)
    names = [file["name"] for file in files]
    made["agreement"] = {"names": names, "matrix": _agreement(len(names), rng)}
    every = ("uniform", f"ensemble, last {snapshots}", made["decision"]["ship"])
    made["reliability"] = {
        name: _bins(rng, 0.07 if name == made["baseline"] else 0.03)
        for name in (made["baseline"], *every)
    }
    made["diagnosis"] = {
        "verdict": "the snapshots lie in different basins",
        "because": ["accuracy falls to 11.2% at the mean", "cosine similarity is 0.31"],
        "next": ["ensemblekit", "compare", "runs/late", "--last", "5", "-o", "late"],
        "path": [
            {
                "row": {"coefficients": [1 - p / 10, p / 10], "divisor": 1.0},
                "position": p / 10,
                "metric_averaged_bn": 0.93 - 0.35 * math.sin(math.pi * p / 10),
                "metric_recomputed_bn": 0.93 - 0.02 * math.sin(math.pi * p / 10),
            }
            for p in range(11)
        ],
    }
    return made


def many() -> Json:
    """Hundreds of candidates of forty snapshots."""
    return classification(snapshots=40, random_rows=260, seed=3)


def regression() -> Json:
    """An error as the metric: no decisions, no latency, lower is better, one split for both."""
    rng = random.Random(1)
    files = [_snapshot(index, rng, lr=False) for index in range(4)]
    paths = [file["path"] for file in files]
    found = []
    for index, file in enumerate(files):
        found.append(_candidate(file["name"], "single", 1, [paths[index]], 0.42 - index / 50, rng))
    found.append(_candidate("uniform", "averaged", 1, paths, 0.341, rng))
    found.append(_candidate("ensemble of all", "ensemble", 4, paths, 0.322, rng, combiner="ridge"))
    for candidate in found:
        candidate["latency"] = None
        for evaluation in candidate["evaluations"]:
            rmse = evaluation.pop("accuracy")
            for name in ("accuracy_ci", "nll", "ece", "brier"):
                del evaluation[name]
            evaluation.update(rmse=rmse, mse=rmse**2, mae=0.8 * rmse, r2=1 - rmse**2)
    made = _comparison("regression", "rmse", files, found, unit="", higher=False)
    made["data"]["reporting"] = made["data"]["choosing"]
    made["data"]["note"] = "one labelled set was split in two: 5,000 to choose, 5,000 to report"
    made["agreement"] = None
    made["reliability"] = {}
    return made


def tiny() -> Json:
    """One snapshot, no labels, nothing measured: nearly everything is null."""
    return {
        "schema_version": 1,
        "task": "tokens",
        "metric": {"name": "nll", "higher_is_better": False, "unit": ""},
        "baseline": "only.pt",
        "data": {"choosing": {"split": "val", "samples": 64}, "reporting": None, "train": None},
        "snapshots": [{"name": "only.pt", "path": "runs/only.pt", "step": None, "lr": None}],
        "skipped": [],
        "candidates": [{"name": "only.pt", "kind": "single", "members": 1, "latency": None}],
        "growth": None,
        "agreement": None,
        "reliability": None,
        "decision": {"ship": None, "because": None, "headline": None, "gain": None, "budget": None},
        "diagnosis": None,
        "environment": None,
        "warnings": None,
        "command": None,
    }


def hostile() -> Json:
    """Names and texts that try to be markup, formulas, table cells or control sequences."""
    made = classification(random_rows=0)
    renamed = dict(zip([c["name"] for c in made["candidates"]], HOSTILE, strict=False))
    for candidate in made["candidates"]:
        candidate["name"] = renamed.get(candidate["name"], candidate["name"])
    for file, name in zip(made["snapshots"], HOSTILE, strict=False):
        file["name"] = name
    for key in ("ship", "best"):
        made["decision"][key] = HOSTILE[0]
    made["baseline"] = HOSTILE[2]
    made["metric"]["name"] = "accuracy"
    made["agreement"]["names"] = list(HOSTILE[:10])
    made["reliability"] = {
        HOSTILE[index]: bins for index, bins in enumerate(made["reliability"].values())
    }
    made["decision"].update(headline=HOSTILE[1], because=list(HOSTILE), next=["rm", *HOSTILE])
    made["diagnosis"].update(verdict=HOSTILE[0], because=list(HOSTILE), next=HOSTILE[1])
    made["environment"] = {name: name for name in HOSTILE}
    made["skipped"] = [{"path": name, "reason": name} for name in HOSTILE]
    made["warnings"] = list(HOSTILE)
    made["command"] = list(HOSTILE)
    made["data"]["note"] = HOSTILE[1]
    return made


COMPARISONS: dict[str, Callable[[], Json]] = {
    "classification": classification,
    "many": many,
    "regression": regression,
    "tiny": tiny,
    "hostile": hostile,
    "empty": dict,
}


def from_json(name: str) -> Json:
    """A comparison as a reader of the file gets it: lists instead of tuples."""
    made: Json = json.loads(json.dumps(COMPARISONS[name]()))
    return made


def _snapshot(index: int, rng: random.Random, *, lr: bool = True) -> Json:
    return {
        "name": f"epoch-{10 * (index + 1):03}.pt",
        "path": f"runs/resnet20/epoch-{10 * (index + 1):03}.pt",
        "step": 3910 * (index + 1),
        "epoch": 10 * (index + 1),
        "lr": round(0.05 * (0.5 + 0.5 * math.cos(index / 3)) + 1e-4, 6) if lr else None,
        "sha256": f"{rng.getrandbits(256):064x}",
        "cosine": 0.99 + 0.0007 * index,
    }


def _candidate(
    name: str,
    kind: str,
    members: int,
    paths: list[str],
    value: float,
    rng: random.Random,
    *,
    combiner: str = "mean",
) -> Json:
    evaluations = []
    for split, samples in SPLITS.values():
        here = value + rng.gauss(0, 0.0012)
        half = 1.96 * math.sqrt(here * (1 - here) / samples)
        evaluations.append(
            {
                "split": split,
                "samples": samples,
                "accuracy": here,
                "accuracy_ci": [here - half, here + half],
                "nll": 3.6 * (1 - here) - 0.01 * members**0.5,
                "brier": 1.5 * (1 - here),
                "ece": max(0.004, 0.05 - 0.004 * members + rng.gauss(0, 0.001)),
                "cross_fitted": False,
            }
        )
    p50 = (1.42 if members == 1 else 1.38 * members) * rng.uniform(0.97, 1.03)
    return {
        "name": name,
        "kind": kind,
        "members": members,
        "snapshots": paths,
        "combiner": None if members == 1 else combiner,
        "combiner_params": {},
        "batch_norm": {"policy": "recomputed", "samples": 10000},
        "chosen_on": "val" if "greedy" in name or combiner == "weighted" else None,
        "seed": None,
        "cost": {
            "members": members,
            "parameters": 272_474 * members,
            "bytes": 1_098_000 * members,
            "flops": 40_800_000 * members,
        },
        "evaluation": evaluations[1],
        "evaluations": evaluations,
        "gain": {},
        "latency": {
            "batch_size": 32,
            "p50_ms": p50,
            "p95_ms": 1.2 * p50,
            "throughput_per_s": 32000 / p50,
            "batches": [],
        },
        "pareto": False,
    }


def _comparison(
    task: str,
    metric: str,
    files: list[Json],
    found: list[Json],
    *,
    unit: str = "pp",
    higher: bool = True,
) -> Json:
    sign = 1 if higher else -1
    found.sort(key=lambda c: -sign * c["evaluations"][0][metric])
    baseline = next(c for c in found if c["kind"] == "single")
    ship = next(c for c in found if c["kind"] == "averaged")
    cheapest = math.inf
    for candidate in found:
        value = sign * (candidate["evaluation"][metric] - baseline["evaluation"][metric])
        candidate["gain"] = {
            "metric": metric,
            "vs": baseline["name"],
            "value": value,
            "ci": [value - 0.0031, value + 0.0031],
            "p_value": math.exp(-abs(value) * 900),
            "p_adjusted": min(1.0, 6 * math.exp(-abs(value) * 900)),
        }
        candidate["pareto"] = candidate["cost"]["members"] < cheapest
        cheapest = min(cheapest, candidate["cost"]["members"])
    baseline["gain"] = None
    splits = {role: {"split": s, "samples": n} for role, (s, n) in SPLITS.items()}
    gain = f"{100 * ship['gain']['value']:.1f} points" if unit else "an error lower by a fifth"
    return {
        "schema_version": 1,
        "task": task,
        "metric": {"name": metric, "higher_is_better": higher, "unit": unit},
        "baseline": baseline["name"],
        "data": {**splits, "train": {"samples": 50000}, "note": None},
        "snapshots": files,
        "skipped": [{"path": "runs/resnet20/events.log", "reason": "no checkpoint"}],
        "candidates": found,
        "growth": {
            order: [
                {
                    "members": k,
                    "choosing": {"metric": _grown(k, start, metric), "nll": 0.25},
                    "reporting": {"metric": _grown(k, start, metric), "nll": 0.24},
                }
                for k in range(1, len(files) + 1)
            ]
            for order, start in (("first", 0.0), ("last", 0.01), ("best", 0.012))
        },
        "agreement": None,
        "reliability": {},
        "decision": {
            "ship": ship["name"],
            "because": [
                f"{ship['name']} costs what one snapshot costs.",
                "The ensemble of all is better by 0.8 points, and takes ten times as long.",
                "Its gain over the best single snapshot is 0.9 points (0.6 to 1.2).",
            ],
            "headline": f"Ship {ship['name']}: {gain}, at the cost of one model.",
            "best": found[0]["name"],
            "enough_data": True,
            "samples_needed": None,
            "gain": ship["gain"],
            "real": True,
            "margin": 0.5,
            "budget": {"max_latency_ms": 5, "latency_batch": 32, "max_members": None},
            "next": [
                "ensemblekit",
                "average",
                "runs/resnet20",
                "--candidate",
                ship["name"],
                "--from",
                "out/comparison.json",
                "-o",
                "model.safetensors",
            ],
        },
        "diagnosis": None,
        "passes": {"forward": 31, "batch_norm": 21, "gradient": 0},
        "environment": {
            "ensemblekit": "0.2.0",
            "torch": "2.10.0",
            "device": "cpu",
            "threads": 2,
            "precision": "float32",
            "platform": "Linux-6.1-x86_64",
        },
        "warnings": ["Latency was measured on 2 threads; another machine ranks differently."],
        "command": ["ensemblekit", "compare", "runs/resnet20", "-o", "out"],
    }


def _grown(count: int, start: float, metric: str) -> float:
    gained = start + 0.02 * (1 - math.exp(-(count - 1) / 3))
    return 0.92 + gained if metric == "accuracy" else 0.42 - 4 * gained


def _agreement(count: int, rng: random.Random) -> list[list[float]]:
    matrix = [[1.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            share = 0.97 - 0.008 * (i - j) ** 0.5 - rng.uniform(0, 0.004)
            matrix[i][j] = matrix[j][i] = share
    return matrix


def _bins(rng: random.Random, over: float) -> list[Json]:
    bins = []
    for index in range(15):
        low, high = index / 15, (index + 1) / 15
        samples = 0 if index < 3 else round(20 * math.exp(index / 2.4))
        middle = (low + high) / 2
        bins.append(
            {
                "low": low,
                "high": high,
                "samples": samples,
                "confidence": middle if samples else None,
                "accuracy": min(1, max(0, middle - over + rng.gauss(0, 0.02))) if samples else None,
            }
        )
    return bins
