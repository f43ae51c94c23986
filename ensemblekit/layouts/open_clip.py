"""Owns open_clip: `epoch_N.pt`, `epoch_latest.pt`.

Input: a dict with the run's `name` beside `state_dict` and optimizer.
"""

from ensemblekit.layouts.dialect import dialect

match, weights, facts = dialect(
    marks=("epoch", "name", "state_dict"),
    weights={"state_dict": "model"},
    metrics={},
)
