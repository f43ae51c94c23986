"""Owns Detectron2: `model_0004999.pth`, `model_final.pth`.

Input: a dict with `iteration` beside model, optimizer and scheduler.
"""

from ensemblekit.layouts.dialect import dialect

match, weights, facts = dialect(
    marks=("model", "iteration"),
    weights={"ema_state": "ema", "model": "model"},
    step="iteration",
    metrics={},
)
