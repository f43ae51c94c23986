"""Owns the SWA authors' scripts (timgaripov/swa): `checkpoint-N.pt` with a running average beside.

Input: a dict with `swa_state_dict`. That average is no member, and mostly it was saved before its
BatchNorm statistics were computed.
"""

from dataclasses import replace
from pathlib import Path

from ensemblekit.containers import TensorSpec, Tree, read_array
from ensemblekit.layouts import Weights
from ensemblekit.layouts.dialect import dialect

_FRESH = (
    "the running average 'swa_state_dict' has fresh BatchNorm statistics (mean 0): recompute them "
    "with --model and --train-data before the network is used"
)

match, _weights, facts = dialect(
    marks=("state_dict", "swa_state_dict", "swa_n"),
    weights={"state_dict": "model", "swa_state_dict": "swa"},
    metrics={},
)


def weights(tree: Tree, path: Path) -> dict[str, Weights]:
    """The model, and the running average with a warning where its statistics were not computed."""
    found = _weights(tree, path)
    average = found.get("swa_state_dict")
    if average is not None and _is_fresh(average):
        found["swa_state_dict"] = replace(average, warnings=(_FRESH,))
    return found


def _is_fresh(average: Weights) -> bool:
    means = (t for key, t in average.tensors.items() if key.endswith("running_mean"))
    first = next((t for t in means if isinstance(t, TensorSpec)), None)
    return first is not None and first.size > 0 and not read_array(first).any()
