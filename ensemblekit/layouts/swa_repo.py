"""Owns the SWA authors' scripts (timgaripov/swa): `checkpoint-N.pt` with a running average beside.

Input: a dict with `swa_state_dict`. That average has fresh BatchNorm statistics and is no member.
"""

from ensemblekit.layouts.dialect import dialect

match, weights, facts = dialect(
    marks=("state_dict", "swa_state_dict", "swa_n"),
    weights={"state_dict": "model", "swa_state_dict": "swa"},
    metrics={},
)
