"""Owns MMEngine (OpenMMLab): `epoch_N.pth`, `iter_N.pth`, `best_*.pth`.

Input: a dict with `meta`. With an EMA hook `state_dict` is the average, swapped in for saving, and the
raw model is under `ema_state_dict`.
"""

from pathlib import Path

from ensemblekit.containers import Tree
from ensemblekit.layouts import Weights
from ensemblekit.layouts.dialect import dialect

match, _plain, facts = dialect(
    marks=("meta", "state_dict", "message_hub"),
    weights={"state_dict": "model"},
    step="meta.iter",
    epoch="meta.epoch",
    metrics={},
)
_swapped = dialect(
    marks=("ema_state_dict",), weights={"state_dict": "ema", "ema_state_dict": "model"}
)


def weights(tree: Tree, path: Path) -> dict[str, Weights]:
    """The weights that are deployed, and the raw ones where an EMA hook ran."""
    is_swapped, find_swapped, _ = _swapped
    return find_swapped(tree, path) if is_swapped(tree, path) else _plain(tree, path)
