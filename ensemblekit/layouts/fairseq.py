"""Owns fairseq: `checkpointN.pt`, `checkpoint_E_S.pt`, `checkpoint_best.pt`, `checkpoint_last.pt`.

Input: a dict with `optimizer_history` and `extra_state` beside the model.
"""

from ensemblekit.layouts.dialect import dialect

match, weights, facts = dialect(
    marks=("model", "optimizer_history", "extra_state"),
    weights={"extra_state.ema": "ema", "model": "model"},
    step="optimizer_history.-1.num_updates",
    epoch="extra_state.train_iterator.epoch",
    metrics={"val_loss": "extra_state.val_loss", "best": "extra_state.best"},
)
