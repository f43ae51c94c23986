"""Owns MosaicML Composer: `ep1-ba100-rank0.pt`.

Input: a dict whose `state` holds model, optimizers and a timestamp.
"""

from ensemblekit.layouts.dialect import dialect

match, weights, facts = dialect(
    marks=("state.model", "state.timestamp"),
    weights={"state.model": "model"},
    step="state.timestamp.Timestamp.batch",
    epoch="state.timestamp.Timestamp.epoch",
    metrics={},
)
