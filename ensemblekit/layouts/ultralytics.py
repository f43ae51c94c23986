"""Owns ultralytics: `epochN.pt`, `best.pt`, `last.pt` with whole pickled modules in half precision.

Input: a dict with `train_args`; while training goes on, `model` is None and `ema` is what is deployed.
"""

from ensemblekit.layouts.dialect import dialect

match, weights, facts = dialect(
    marks=("train_args", "version"),
    weights={"ema": "ema", "model": "model"},
    metrics={"fitness": "train_metrics.fitness", "best_fitness": "best_fitness"},
)
