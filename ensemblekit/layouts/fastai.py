"""Owns fastai: `models/NAME.pth` of `Learner.save`.

Input: a dict of exactly model and `opt`.
"""

from pathlib import Path

from ensemblekit.containers import Tree
from ensemblekit.layouts.dialect import dialect

_match, weights, facts = dialect(marks=("model", "opt"), weights={"model": "model"}, metrics={})


def match(tree: Tree, path: Path) -> bool:
    """Whether there is nothing else: other tools name their optimizer `opt`, too."""
    return _match(tree, path) and set(tree.root) == {"model", "opt"}
