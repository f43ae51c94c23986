"""Owns PyTorch-Ignite: `checkpoint_N.pt` of its Checkpoint handler.

Input: a dict with the `trainer`'s state beside the model.
"""

from ensemblekit.layouts.dialect import dialect

match, weights, facts = dialect(
    marks=("model", "trainer"),
    weights={"ema": "ema", "model": "model"},
    step="trainer.iteration",
    metrics={},
)
