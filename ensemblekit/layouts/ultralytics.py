"""Owns ultralytics: `epochN.pt`, `best.pt`, `last.pt` with whole pickled modules in half precision.

Input: a dict with `train_args`. While training goes on, `model` is None and `ema` is what is deployed;
at the end `best.pt` and `last.pt` are stripped: the average moves to `model`, the epoch is -1.
"""

from dataclasses import replace
from pathlib import Path

from ensemblekit.containers import Tree
from ensemblekit.layouts import Facts, Weights
from ensemblekit.layouts.dialect import dialect

match, _weights, _facts = dialect(
    marks=("train_args", "version"),
    weights={"ema": "ema", "model": "model"},
    metrics={"fitness": "train_metrics.fitness", "best_fitness": "best_fitness"},
)


def weights(tree: Tree, path: Path) -> dict[str, Weights]:
    """The moving average, wherever it is, and the raw model where it is kept."""
    found = _weights(tree, path)
    if _is_stripped(tree) and "ema" not in found:
        return {name: replace(w, role="ema") for name, w in found.items()}
    return found


def facts(tree: Tree, path: Path) -> Facts:
    """A stripped file no longer tells its epoch."""
    found = _facts(tree, path)
    return replace(found, epoch=None) if _is_stripped(tree) else found


def _is_stripped(tree: Tree) -> bool:
    return bool(tree.root.get("epoch") == -1)
