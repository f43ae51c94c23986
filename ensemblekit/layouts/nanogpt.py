"""Owns nanoGPT: `ckpt.pt`.

Input: a dict with `model_args` and `iter_num` beside the model.
"""

from ensemblekit.layouts.dialect import dialect

match, weights, facts = dialect(
    marks=("model", "model_args", "iter_num"),
    weights={"model": "model"},
    step="iter_num",
    metrics={"best_val_loss": "best_val_loss"},
)
